"""Artefacts: folders that are written whole or not at all, and that prove what they hold.

Every arrow in the pipeline is such a folder::

    manifest.json     kind, parents {name: content hash}, files {name: sha256}, hash
    provenance.json   when, where and with which code and versions it was made (not part of the hash)
    *.json *.csv *.safetensors *.npy     the content

The content hash covers the kind, the parents' hashes and every file's bytes, so two runs that computed the same
thing have the same hash even though their provenance differs. Only JSON, CSV, safetensors and raw arrays are read:
never a pickle.
"""

import contextlib
import csv
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmsae_lib.provenance import provenance

SCHEMA = 1


class UserError(ValueError):
    """Something the user can mend; the message is one sentence that says what and how."""


class ArtifactError(UserError):
    """An artefact is missing, damaged, or of another kind than expected."""


def repository_root(start: Path | None = None) -> Path:
    """The folder that holds ``dmsae_lib``, ``configs`` and ``notebooks``, found from any folder inside it."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents, *Path(__file__).resolve().parents):
        if (folder / "dmsae_lib" / "artifacts.py").is_file() and (folder / "configs").is_dir():
            return folder
    raise UserError(f"No DMSAE repository around {here}: start the notebook from inside the clone.")


def sha256_file(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """sha256 of the canonical JSON text of ``value``."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write JSON through a temporary file, so that a reader sees the old text or the new one. NaN is refused."""
    text = _json_text(value)
    temporary = path.with_name(path.name + ".tmp")
    with explain_os_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "w", encoding="utf-8") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


REASONS = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again",
    errno.EFBIG: "the file size limit is reached: raise it (ulimit -f) and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EACCES: "there is no permission to write there: change the folder's permissions or the run's place",
    errno.EPERM: "there is no permission to write there: change the folder's permissions or the run's place",
    errno.EROFS: "the file system is read-only: clone the repository to a place that can be written",
}


def _error_number(error: Exception) -> int | None:
    """The error number of a failed write, also where safetensors (in its text) or numpy (nowhere) put it."""
    if isinstance(error, OSError):
        return errno.ENOSPC if error.errno is None and "written" in str(error) else error.errno
    found = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found[1]) if found else None


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn the failures of writing to ``path`` that the user can mend into one sentence, a UserError."""
    try:
        yield
    except Exception as error:
        if reason := REASONS.get(_error_number(error)):
            raise UserError(f"Cannot write {path}: {reason}.") from error
        raise


class Writer:
    """Collects an artefact's files in a temporary folder; see :func:`write`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, name: str) -> Path:
        """A path inside the artefact to be written by the caller (memory maps, for instance)."""
        return self.folder / name

    def json(self, name: str, value: Any) -> None:
        (self.folder / name).write_text(_json_text(value), encoding="utf-8")

    def csv(self, name: str, rows: list[dict[str, Any]]) -> None:
        """One line per row; the first row's keys are the header."""
        with open(self.folder / name, "w", newline="", encoding="utf-8") as handle:
            table = csv.DictWriter(handle, fieldnames=list(rows[0]))
            table.writeheader()
            table.writerows(rows)

    def tensors(self, name: str, tensors: dict[str, Any]) -> None:
        from safetensors.torch import save_file

        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, self.folder / name)


@contextlib.contextmanager
def write(folder: Path, kind: str, parents: dict[str, str] | None = None) -> Iterator[Writer]:
    """Write an artefact: everything inside the block lands in ``folder`` at once when the block ends well.

    An exception, a kill or a full disk leaves what was in ``folder`` before untouched.
    """
    folder = Path(folder)
    temporary, old = (folder.with_name(f".{folder.name}.{end}") for end in ("writing", "old"))
    started = time.perf_counter()
    try:
        with explain_os_errors(folder):
            _recover(folder, old)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            writer = Writer(temporary)
            yield writer
            files = {path.name: sha256_file(path) for path in sorted(temporary.iterdir())}
            manifest = {"schema": SCHEMA, "kind": kind, "parents": dict(sorted((parents or {}).items())), "files": files}
            writer.json("provenance.json", provenance(repository_root(Path(__file__).parent), time.perf_counter() - started))
            writer.json("manifest.json", manifest | {"hash": hash_json(manifest)})
            for path in [*temporary.iterdir(), temporary]:
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(folder, old)
            os.replace(temporary, folder)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _recover(folder: Path, old: Path) -> None:
    """After a kill between the two renames of `write` the previous artefact is still whole: put it back."""
    if not folder.exists() and old.exists():
        os.replace(old, folder)


def remove(folder: Path) -> None:
    """Delete an artefact that is no longer needed (a finished training's checkpoint)."""
    shutil.rmtree(folder, ignore_errors=True)


class Artifact:
    """A verified artefact, read lazily; see :func:`load`."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.kind, self.hash = folder, manifest["kind"], manifest["hash"]
        self.parents, self.files = manifest["parents"], manifest["files"]  # {name: hash}, {name: sha256}

    def path(self, name: str) -> Path:
        return self.folder / name

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def csv(self, name: str) -> list[dict[str, str]]:
        with open(self.folder / name, newline="", encoding="utf-8") as handle:
            return list(csv.DictReader(handle))

    def tensors(self, name: str) -> dict[str, Any]:
        from safetensors.torch import load_file

        return load_file(self.folder / name)

    @property
    def provenance(self) -> dict[str, Any]:
        try:
            return self.json("provenance.json")
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{self.folder} is damaged (provenance.json cannot be read): delete that folder and run "
                                "`make reproduce`.") from error


def load(folder: Path, kind: str, made_by: str = "") -> Artifact:
    """Open the artefact in ``folder`` and check every file against its hash.

    ``made_by`` names the make target that makes it, for the error message of a missing one.
    Raises ArtifactError, which names the file that is missing, truncated or changed.
    """
    folder = Path(folder)
    remedy = f"run `make {made_by}`" if made_by else "run `make reproduce`, which makes what is missing"
    _recover(folder, folder.with_name(f".{folder.name}.old"))
    if not (folder / "manifest.json").is_file():
        raise ArtifactError(f"There is no {kind} artefact in {folder}: {remedy}.")
    damaged = f"{folder} is damaged ({{}}): delete that folder and {remedy}."
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        content = {key: manifest[key] for key in ("schema", "kind", "parents", "files")}
        if manifest["hash"] != hash_json(content):
            raise ArtifactError(damaged.format("manifest.json does not match its own hash"))
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(damaged.format("manifest.json cannot be read")) from error
    if manifest["schema"] != SCHEMA or manifest["kind"] != kind:
        raise ArtifactError(f"{folder} holds a {manifest['kind']} artefact, schema {manifest['schema']}; "
                            f"a {kind} artefact, schema {SCHEMA}, is needed: delete that folder and {remedy}.")
    for name, digest in manifest["files"].items():
        if not (folder / name).is_file():
            raise ArtifactError(damaged.format(f"{name} is missing"))
        if sha256_file(folder / name) != digest:
            raise ArtifactError(damaged.format(f"{name} does not match its hash"))
    return Artifact(folder, manifest)
