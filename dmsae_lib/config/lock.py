"""One process at a time computes in a run's folder."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

from dmsae_lib.config.run import Run
from dmsae_lib.store.artifacts import UserError, explain_os_errors, sweep
from dmsae_lib.store.atomic import hold


def _owner(path: Path) -> str:
    """Who wrote the lock file, since when, and whether that process is still there."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        pid, host, since = int(owner["process"]), str(owner["host"]), float(owner["since"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return "another process"
    started, age = datetime.fromtimestamp(since), timedelta(seconds=max(0, round(time.time() - since)))
    text = f"process {pid} on {host} since {started:%d %b %H:%M} ({age} ago)"
    if host == socket.gethostname():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return f"what {text} started before it ended"
        except OSError:
            pass  # it is there, and somebody else's
    return text


def lock(run: Run) -> int:
    """Take the run for this process and those it starts, clear away what killed ones left; returns the lock.

    The kernel holds the lock (flock), so it goes with its last holder, however that ends: none is ever left
    over. Raises UserError naming the owner and its age where another process has it.
    """
    path = run.folder / ".lock"
    with explain_os_errors(run.folder):
        descriptor = hold(path, os.O_RDWR | os.O_CREAT)
        if descriptor is None:
            raise UserError(
                f"runs/{run.name} is in use by {_owner(path)}: wait until that has ended, or name this run "
                "otherwise with RUN=name."
            )
        owner = {"process": os.getpid(), "host": socket.gethostname(), "since": round(time.time())}
        with contextlib.suppress(OSError):  # on a full disk, too, `make clean` must get the lock
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        os.set_inheritable(descriptor, True)
        sweep(run.folder)
    return descriptor


@contextlib.contextmanager
def locked(run: Run) -> Iterator[None]:
    """Hold the run's lock for the length of the block."""
    descriptor = lock(run)
    try:
        yield
    finally:
        os.close(descriptor)
