"""Bad input through the command that a user gives: exit code, one sentence, nothing half-written."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builders.clone import ROOT, make, make_clone
from builders.models import save_model
from builders.sentences import assert_one_sentence

COMMANDS = {
    "an unknown parameter": (
        "01_harvest",
        ["-p", "confg", "smoke"],
        "01_harvest.ipynb has no parameter 'confg'",
    ),
    "a parent that is missing": ("02_train_cycle", ["-p", "cycle", "1"], "There is no harvest artefact in"),
    "truncated weights": (
        "01_harvest",
        ["-p", "overrides", '["model.name={model}", "model.context_size=32"]'],
        "model.name is {model}: it could not be loaded",
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_command(case, tmp_path):
    notebook, words, sentence = COMMANDS[case]
    model, run = tmp_path / "model", f"bad-input-{os.getpid()}"
    if "{model}" in sentence:
        weights = save_model(model, context=32) / "model.safetensors"
        os.truncate(weights, weights.stat().st_size // 2)
    output = tmp_path / "out" / "stage.ipynb"
    command = [
        sys.executable,
        "-m",
        "dmsae_lib.command.run_notebook",
        f"notebooks/{notebook}.ipynb",
        str(output),
    ]
    command += ["-p", "run", run, *(word.replace("{model}", str(model)) for word in words)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    try:
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=offline)
        left = sorted((ROOT / "runs" / run).rglob("*"))
    finally:
        shutil.rmtree(ROOT / "runs" / run, ignore_errors=True)
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.startswith("error: ") and sentence.replace("{model}", str(model)) in ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert left == [] and not output.exists()


def test_a_stage_that_there_is_not(tmp_path):
    clone = make_clone(tmp_path / "clone")
    ended = make(clone, "stages", "STAGE=cycle_0")
    assert ended.returncode != 0 and "STAGE is cycle_0" in ended.stderr and "cycle_0_train" in ended.stderr


def fill(folder: Path) -> None:
    with open(folder / "fill", "wb", buffering=0) as handle, contextlib.suppress(OSError):
        while handle.write(b"x" * 4096):
            pass


def test_a_full_and_a_read_only_disk_through_make(small_disk):
    clone = make_clone(small_disk("8m") / "a clone")
    assert make(clone, "-n", "stages").returncode == 0
    before = {path: path.read_bytes() for path in (clone / "runs").rglob("*") if path.is_file()}
    fill(clone)
    ended = make(clone, "stages", "SET=training.lr=0.5", "RUN=toy2")
    assert ended.returncode != 0 and "Traceback" not in ended.stderr
    assert_one_sentence(
        ended.stderr.splitlines()[0], "Cannot write", "runs/toy2", "the disk is full: free some space"
    )
    subprocess.run(["mount", "-o", "remount,ro", clone.parent], check=True)
    ended = make(clone, "stages", "RUN=toy3")
    assert ended.returncode != 0 and "Traceback" not in ended.stderr
    assert_one_sentence(
        ended.stderr.splitlines()[0], "Cannot write", "runs/toy3", "the file system is read-only"
    )
    subprocess.run(["mount", "-o", "remount,rw", clone.parent], check=True)
    assert before == {path: path.read_bytes() for path in before}
    ended = make(clone, "clean")  # what makes room must work without any
    assert ended.returncode == 0 and not (clone / "runs" / "toy").exists(), ended.stderr
