"""Artefacts: folders that are written whole or not at all, and that prove what they hold.

Every arrow in the pipeline is such a folder::

    manifest.json     kind, parents {name: content hash}, files {name: sha256}, hash
    provenance.json   when, where and with which code and versions it was made, and its own checksum
    *.json *.csv *.safetensors     the content

The content hash covers the kind, the parents' hashes and every file's bytes, but not provenance.json, so two
runs that computed the same thing have the same hash and the same manifest. Only JSON, CSV and safetensors are
read: never a pickle. A changed byte anywhere in the folder is found when it is opened.
"""

import contextlib
import csv
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmsae_lib.store import atomic
from dmsae_lib.store.atomic import UserError, explain_os_errors, json_text, recover, replacing
from dmsae_lib.store.atomic import write_json as write_json
from dmsae_lib.store.provenance import provenance

SCHEMA = 2


class ArtifactError(UserError):
    """An artefact is missing, damaged, or of another kind: ``what`` is wrong, and the ``remedy``."""

    def __init__(self, what: str, remedy: str = ""):
        super().__init__(f"{what}: {remedy}." if remedy else what)
        self.what, self.remedy = what, remedy


def repository_root(start: Path | None = None) -> Path:
    """The folder that holds ``dmsae_lib``, ``configs`` and ``notebooks``, found from any folder inside it."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents, *Path(__file__).resolve().parents):
        if (folder / "dmsae_lib" / "__init__.py").is_file() and (folder / "configs").is_dir():
            return folder
    raise UserError(f"No DMSAE repository around {here}: start the notebook from inside the clone.")


def sha256_file(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """sha256 of the canonical JSON text of ``value``."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """``value`` with its own hash beside it, as :func:`unseal` wants it."""
    return value | {"hash": hash_json(value)}


def unseal(path: Path) -> dict[str, Any]:
    """What a sealed JSON file holds, its hash included; ValueError where a byte is not as it was written."""
    text = path.read_bytes()
    value = json.loads(text)
    if not isinstance(value, dict) or "hash" not in value:
        raise ValueError("cannot be read")
    content = {key: value[key] for key in value if key != "hash"}
    if sealed(content) != value or json_text(value).encode() != text:
        raise ValueError("does not match its own hash")
    return value


class Writer:
    """Collects an artefact's files in a temporary folder; see :func:`write`."""

    def __init__(self, folder: Path):
        self.folder = folder
        # more for provenance.json: what may differ between two equal runs
        self.circumstances: dict[str, Any] = {}

    def path(self, name: str) -> Path:
        """A path inside the artefact, to be written by the caller."""
        if Path(name).name != name or name == "..":
            raise UserError(f"{name!r} cannot be the name of a file in an artefact: take its slashes out.")
        return self.folder / name

    def json(self, name: str, value: Any) -> None:
        self.path(name).write_text(json_text(value), encoding="utf-8")

    def csv(self, name: str, rows: list[dict[str, Any]]) -> None:
        """One line per row; the first row's keys are the header."""
        with open(self.path(name), "w", newline="", encoding="utf-8") as handle:
            table = csv.DictWriter(handle, fieldnames=list(rows[0]))
            table.writeheader()
            table.writerows(rows)

    def tensors(self, name: str, tensors: dict[str, Any]) -> None:
        from safetensors.torch import save_file

        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, self.path(name))


@contextlib.contextmanager
def write(folder: Path, kind: str, parents: dict[str, str] | None = None) -> Iterator[Writer]:
    """Write an artefact: everything inside the block lands in ``folder`` at once when the block ends well.

    An exception, a kill or a full disk leaves what was in ``folder`` before untouched. Raises UserError where
    it cannot be written, or another process is writing it.
    """
    folder = Path(folder)
    started = time.perf_counter()
    with explain_os_errors(folder), replacing(folder) as (place,):
        writer = Writer(place)
        yield writer
        files = {path.name: sha256_file(path) for path in sorted(place.iterdir())}
        made = provenance(repository_root(Path(__file__).parent), time.perf_counter() - started)
        writer.json("provenance.json", sealed(made | writer.circumstances))
        ordered = dict(sorted((parents or {}).items()))
        manifest = {"schema": SCHEMA, "kind": kind, "parents": ordered, "files": files}
        writer.json("manifest.json", sealed(manifest))


def remove(folder: Path) -> None:
    """Delete an artefact that is no longer needed (a finished training's checkpoint)."""
    with explain_os_errors(folder):
        atomic.delete(Path(folder))


class Artifact:
    """A verified artefact, read lazily; see :func:`load`."""

    def __init__(self, folder: Path, manifest: dict[str, Any], provenance: dict[str, Any]):
        self.folder, self.kind, self.hash = folder, manifest["kind"], manifest["hash"]
        self.parents, self.files = manifest["parents"], manifest["files"]  # {name: hash}, {name: sha256}
        self.provenance = provenance

    def path(self, name: str) -> Path:
        return self.folder / name

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def csv(self, name: str) -> list[dict[str, str]]:
        with open(self.folder / name, newline="", encoding="utf-8") as handle:
            return list(csv.DictReader(handle))

    def tensors(self, name: str) -> dict[str, Any]:
        """{key: tensor} in memory mapped to the file: what is not looked at is not read."""
        from safetensors.torch import load_file

        return load_file(self.folder / name)


def _remedies(folder: Path, made_by: str) -> tuple[str, str]:
    """What makes the artefact in ``folder``, and what makes it again where it is damaged."""
    make = f"make {made_by or 'reproduce'}"
    for run in folder.resolve().parents:
        if run.parent.name == "runs":
            plain = (run.parent.parent / "configs" / f"{run.name}.yaml").is_file()
            planned = (run / "config.yaml").is_file()
            own = f"runs/{run.name}/config.yaml" if planned else "<its configuration>"
            which = f"CONFIG={run.name}" if plain else f"CONFIG={own} RUN={run.name}"
            make = make if "CONFIG=" in make else f"{make} {which}"
            return f"run `{make}`", f"run `make mend {which}`, which makes it again"
    return f"run `{make}`", f"delete that folder and run `{make}`"


def load(folder: Path, kind: str | None, made_by: str = "") -> Artifact:
    """Open the artefact in ``folder`` and check every file against its hash.

    ``kind`` is what it must be (None: anything), ``made_by`` the make target that makes it, for the message.
    Raises ArtifactError, which names the file that is missing, truncated or changed.
    """
    folder = Path(folder)
    remedy, again = _remedies(folder, made_by)
    recover(folder)
    if not (folder / "manifest.json").is_file():
        raise ArtifactError(f"There is no {kind or 'whole'} artefact in {folder}", remedy)

    def damaged(name: str, how: object) -> ArtifactError:
        return ArtifactError(f"{folder} is damaged ({name} {how})", again)

    def opened(name: str) -> dict[str, Any]:
        try:
            return unseal(folder / name)
        except FileNotFoundError as error:
            raise damaged(name, "is missing") from error
        except (OSError, ValueError) as error:
            raise damaged(name, error if str(error).startswith("does") else "cannot be read") from error

    manifest = opened("manifest.json")
    if manifest["schema"] != SCHEMA or kind not in (None, manifest["kind"]):
        held = f"{folder} holds a {manifest['kind']} artefact, schema {manifest['schema']}"
        raise ArtifactError(f"{held}; a {kind or 'new'} artefact, schema {SCHEMA}, is needed", again)
    made = opened("provenance.json")
    for name, digest in manifest["files"].items():
        if not (folder / name).is_file():
            raise damaged(name, "is missing")
        if sha256_file(folder / name) != digest:
            raise damaged(name, "does not match its hash")
    return Artifact(folder, manifest, {key: value for key, value in made.items() if key != "hash"})


def made(folder: Path, kind: str, parents: dict[str, str]) -> Artifact | None:
    """The artefact in ``folder`` if it is there, whole, and made from these parents (name: content hash).

    None where there is none or it was made from others; ArtifactError where it is damaged.
    """
    recover(folder)
    if not (folder / "manifest.json").is_file():
        return None
    found = load(folder, kind)
    return found if found.parents == parents else None


def sweep(folder: Path) -> None:
    """:func:`dmsae_lib.store.atomic.sweep`, and of the checkpoints those whose SAEs are finished."""
    atomic.sweep(folder)
    for manifest in Path(folder).rglob(".*.checkpoint/manifest.json"):
        sae = manifest.parent.with_name(manifest.parent.name[1:].removesuffix(".checkpoint"))
        with contextlib.suppress(OSError, ValueError):
            if unseal(sae / "manifest.json")["parents"] == unseal(manifest)["parents"]:
                remove(manifest.parent)
