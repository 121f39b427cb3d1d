"""Variables of the environment that let torch say one number of threads and compute with another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders.run import ROOT
from builders.sentences import assert_one_sentence

COUNT = """
import os, torch
from dmsae_lib.store.process import prepare
prepare(2)
a = torch.randn(500, 500)
before = len(os.listdir("/proc/self/task"))
for _ in range(20):
    a.exp().sum(0), a @ a, torch.randn(2**20).sum()
print(torch.get_num_threads(), len(os.listdir("/proc/self/task")) - before)
"""
LOWERING = {"OMP_THREAD_LIMIT": "1", "OMP_DYNAMIC": "TRUE", "OMP_MAX_ACTIVE_LEVELS": "0"}


@pytest.mark.parametrize(
    "name, value",
    [
        *LOWERING.items(),
        ("OMP_THREAD_LIMIT", "+1"),
        ("OMP_THREAD_LIMIT", "2"),
        ("OMP_NUM_THREADS", "1"),
        ("MKL_NUM_THREADS", "1"),
        ("OMP_DYNAMIC", "false"),
    ],
)
def test_torch_computes_with_the_threads_that_are_reported_or_not_at_all(name, value):
    clean = {
        key: text
        for key, text in os.environ.items()
        if key not in (*LOWERING, "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    }
    ended = subprocess.run(
        [sys.executable, "-c", COUNT], cwd=ROOT, env=clean | {name: value}, capture_output=True, text=True
    )
    if ended.returncode:
        assert_one_sentence(
            ended.stderr.splitlines()[-1], f"{name} is {value}", "threads = 2", f"unset {name}"
        )
    assert bool(ended.returncode) == (value in (LOWERING.get(name), "+1"))
    if not ended.returncode and Path("/proc/self/task").is_dir():
        said, started = map(int, ended.stdout.split())
        assert said == 2 and started >= 1  # a second thread computed
