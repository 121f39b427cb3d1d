"""Where a result comes from: code, versions, hardware, time. Kept apart from its content and its hash."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformer-lens", "transformers", "sae-lens", "sae-bench", "sae-probes")
PACKAGES += ("numpy", "safetensors")


@cache
def code_state(root: Path) -> dict[str, Any]:
    """``{"commit": hash, "dirty": bool}``, both None where the tree has no git history (a zip download)."""

    def git(*words: str) -> str:
        ended = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
        return ended.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return {"commit": None, "dirty": None}  # the zip was unpacked inside somebody else's repository
        code = ("dmsae_lib", "benchmarks", "notebooks", "configs", "Makefile", "requirements.lock")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", *code))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


@cache
def hardware() -> dict[str, Any]:
    """CPU model, cores, memory in GiB, operating system, and the GPU's name where torch sees one."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    machine = {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(memory, 1)}
    return machine | {"system": platform.system(), "gpu": gpu}


@cache
def versions() -> dict[str, str]:
    """Of Python and of the packages whose version may change a number."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def provenance(root: Path, seconds: float) -> dict[str, Any]:
    """commit, dirty, created (UTC), seconds, hardware and versions of what has just been computed."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    when = {"created": now, "seconds": round(seconds, 2)}
    return code_state(root) | when | {"hardware": hardware(), "versions": versions()}
