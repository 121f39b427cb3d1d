"""What a model must be before anything is computed with it, and what may not happen while it is loaded."""

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator

STARTS = {"subprocess.Popen", "os.system", "os.posix_spawn", "os.fork", "os.forkpty", "os.exec"}  # of Python's audit events

_loading = threading.local()


@functools.cache
def _watch() -> None:
    """Once in a process: an audit hook hears every way to start another, and cannot be taken out again."""

    def refuse(event: str, _: tuple) -> None:
        if event in STARTS and getattr(_loading, "now", False):
            raise PermissionError("no other process may be started while a model is loaded")  # an OSError: callers look for it

    sys.addaudithook(refuse)


@contextlib.contextmanager
def no_processes() -> Iterator[None]:
    """Refuses, with PermissionError, to let this thread start another process inside the block.

    TransformerLens runs pip for whatever a checkpoint's image processor lacks, and goes on without where that fails.
    """
    _watch()
    _loading.now = True
    try:
        yield
    finally:
        _loading.now = False
