"""What the operating system may refuse, for the length of a block: large files, and writing without
permission."""

import contextlib
import ctypes
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

# capabilities by which root passes over permissions (linux/capability.h)
DAC_OVERRIDE, DAC_READ_SEARCH = 1, 2


@contextlib.contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """No file may grow above this; Python ignores the signal, so that the write fails with an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Sets(ctypes.Structure):
    _fields_ = [
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    ]


@contextlib.contextmanager
def without_permission(folder: Path) -> Iterator[None]:
    """``folder`` cannot be written, by root neither: this thread lays down root's privilege for the while."""
    libc, header, sets = ctypes.CDLL(None, use_errno=True), _Header(0x20080522, 0), (_Sets * 2)()
    root = os.geteuid() == 0
    if root and libc.capget(ctypes.byref(header), sets):
        pytest.skip("root may write everywhere here")
    before = sets[0].effective
    folder.chmod(0o500)
    try:
        if root:
            sets[0].effective = before & ~(1 << DAC_OVERRIDE | 1 << DAC_READ_SEARCH)
            assert libc.capset(ctypes.byref(header), sets) == 0
        yield
    finally:
        if root:
            sets[0].effective = before
            assert libc.capset(ctypes.byref(header), sets) == 0
        folder.chmod(0o700)
