"""One process at a time computes in a run's folder."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator

from dmsae_lib.artifacts import UserError, explain_os_errors
from dmsae_lib.config import Run


def lock(run: Run) -> int:
    """Take the run for this process and the ones it starts; returns the open lock file.

    The kernel holds the lock (flock), so it goes with its last holder, however that ends: none is ever left over.
    Raises UserError naming the owner where another process has it.
    """
    with explain_os_errors(run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(descriptor, 200, 0).decode() or "another process"
        raise UserError(f"runs/{run.name} is in use by {owner}: wait until that has ended, or name this run "
                        "otherwise with RUN=name.") from error  # fmt: skip
    owner = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%d %b %H:%M')}"
    with contextlib.suppress(OSError):  # on a full disk, too, `make clean` must get the lock
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner.encode(), 0)
    os.set_inheritable(descriptor, True)
    return descriptor


@contextlib.contextmanager
def locked(run: Run) -> Iterator[None]:
    """Hold the run's lock for the length of the block."""
    descriptor = lock(run)
    try:
        yield
    finally:
        os.close(descriptor)
