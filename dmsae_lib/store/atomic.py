"""Files and folders replaced whole or not at all, whatever comes between: a kill, a full disk, a power cut.

Everything new is written beside its place under a hidden name, forced to the disk, and renamed. What a killed
process leaves behind carries one of the endings in ``LEFT_OVER`` and is found again by :func:`sweep`.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LEFT_OVER = (".writing", ".old", ".removed", ".tmp", ".running.ipynb")  # of hidden names
SCRATCH = ".scratch-"  # a hidden name that starts so is of use to its process alone


class UserError(ValueError):
    """Something the user can mend; the message is one sentence that says what and how."""


NO_PERMISSION = "there is no permission to write there: change the folder's permissions or the run's place"
REASONS = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again",
    errno.EFBIG: "the file size limit is reached: raise it (ulimit -f) and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EACCES: NO_PERMISSION,
    errno.EPERM: NO_PERMISSION,
    errno.EROFS: "the file system is read-only: clone the repository to a place that can be written",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
}


def _error_number(error: Exception) -> int | None:
    """The error number of a failed write, also where safetensors puts it: in its text."""
    if isinstance(error, OSError) or type(error).__name__ != "SafetensorError":
        return getattr(error, "errno", None)
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


@contextlib.contextmanager
def explain_errors(what: str, remedy: str) -> Iterator[None]:
    """UserError "``what`` (kind: its text, cut); ``remedy``." for what a library raises inside the block.

    For libraries whose kinds of exceptions are many and change from release to release.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = ": " + " ".join(str(error).split())[:160].rstrip(".")
        raise UserError(f"{what} ({type(error).__name__}{said.rstrip(': ')}); {remedy}.") from error


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn the failures of writing to ``path`` that the user can mend into one sentence, a UserError."""
    try:
        yield
    except Exception as error:
        if reason := REASONS.get(_error_number(error)):
            raise UserError(f"Cannot write {path}: {reason}.") from error
        raise


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{ending}")


def old(folder: Path) -> Path:
    """Where a folder lies between the two renames of its replacement."""
    return _beside(folder, "old")


def flush(*paths: Path) -> None:
    """Force files, and folders' lists of names, to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """As :func:`write_bytes`, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, so that a reader sees the old content or the new. Raises UserError."""
    temporary = _beside(path, "tmp")
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            flush(temporary)
            os.replace(temporary, path)
            flush(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def json_text(value: Any) -> str:
    """The one way in which we write a value as JSON. ValueError for NaN and Inf, which JSON does not have."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """As :func:`write_text`; NaN is refused with a ValueError, and the old file stays."""
    write_text(path, json_text(value))


def delete(path: Path) -> None:
    """Remove a folder, a file, or a link (never what it points to), if there is one.

    A folder first loses its name, so that a kill halfway leaves no half of it where the whole is looked for.
    """
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    gone = path if path.name.endswith(".removed") else _beside(path, "removed")
    if gone != path:
        delete(gone)
        os.replace(path, gone)
    shutil.rmtree(gone)


def recover(folder: Path) -> None:
    """After a kill between the two renames of a replacement the old folder is still whole: put it back."""
    if not folder.exists() and old(folder).exists():
        os.replace(old(folder), folder)


def _same(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still leads to what was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def hold(path: Path, flags: int = os.O_RDONLY) -> int | None:
    """Open ``path``, made a folder where it is missing, and lock it; None where a living process has it.

    The kernel holds the lock (flock) and frees it when the last process with the descriptor ends, however
    that ends. On a file system without such locks nothing is held.
    """
    while True:
        (path.parent if flags & os.O_CREAT else path).mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, flags, 0o644)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            return descriptor
        if _same(descriptor, path):
            return descriptor
        os.close(descriptor)  # deleted or renamed by its last holder, just before we had the lock


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[Path]:
    """The folder beside ``folder`` that becomes it, for this process alone; removed unless it was renamed."""
    place = _beside(folder, "writing")
    descriptor = hold(place)
    if descriptor is None:
        raise UserError(f"{folder} is being written by another process: wait until that has ended.")
    try:
        yield place
    finally:
        if _same(descriptor, place):
            shutil.rmtree(place, ignore_errors=True)
        os.close(descriptor)


def _back(folders: tuple[Path, ...]) -> None:
    """Put back what was moved aside."""
    for folder in folders:
        if old(folder).exists():
            delete(folder)
            os.replace(old(folder), folder)


@contextlib.contextmanager
def replacing(*folders: Path) -> Iterator[list[Path]]:
    """Empty folders to fill, which take the places of ``folders`` together when the block ends well.

    Otherwise all stay as they were; what a kill left half replaced, the next call puts back. Raises UserError
    where another living process is filling one of them.
    """
    with contextlib.ExitStack() as claims:
        new = [claims.enter_context(_claimed(folder)) for folder in folders]
        if any(any(place.iterdir()) for place in new):  # a writer was killed before its last rename
            _back(folders)
        for folder, place in zip(folders, new):
            recover(folder)
            delete(old(folder))
            for left in place.iterdir():
                delete(left)
        yield new
        for place in new:
            flush(*(path for path in place.rglob("*") if not path.is_symlink()), place)
        first = [folder for folder in folders if not folder.exists()]
        try:
            for folder, place in zip(folders, new):
                if folder.exists() or folder.is_symlink():
                    os.replace(folder, old(folder))
                os.replace(place, folder)
        except BaseException:
            for folder in first:
                delete(folder)
            _back(folders)
            raise
        flush(*{folder.parent for folder in folders})
        for folder in folders:
            delete(old(folder))


def sweep(folder: Path) -> None:
    """Clear away what killed processes left below ``folder``, and put back what they had only moved aside.

    What a living process is writing is left alone.
    """
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            if not (name.startswith(".") and name.endswith(LEFT_OVER) or name.startswith(SCRATCH)):
                continue
            path = Path(place, name)
            if name in files:
                path.unlink(missing_ok=True)
                continue
            folders.remove(name)
            if name.endswith(".old"):
                recover(path.with_name(name[1:].removesuffix(".old")))
            if (held := hold(path)) is not None:
                delete(path)
                os.close(held)
