"""A copy of the repository's machinery in a folder with a space, without git history, around a toy
configuration."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).parents[2]
NOTEBOOKS = (
    "01_harvest",
    "02_train_cycle",
    "03_attribute",
    "04_distill",
    "05_retrain_across_k",
    "06_saebench",
    "07_figures",
    "09_learning_rate",
    "10_what_is_a_core",
    "11_atlas",
)
PARAMETERS = """config = "toy"  # a name
run = ""
overrides = []  # e.g. ["seed=1"]"""
TOY = {
    "model": {"name": "toy", "hook_name": "blocks.0.hook_resid_post", "context_size": 16},
    "data": {
        "source": "embedded",
        "train_tokens": 1000,
        "select_tokens": 100,
        "test_tokens": 100,
        "fresh_factor": 3,
    },
    "sae": {"d_sae": 64, "prefixes": [8, 16, 32]},
    "training": {"k": 8, "batch_size": 100, "lr": 0.001},
    "distill": {"cycles": 1},
    "retrain": {"ks": [4, 8], "seeds": [0]},
    "learning_rate_sweep": [1.0],
}


def write_notebook(path: Path, *cells: str, parameters: str = PARAMETERS) -> None:
    """A notebook whose first code cell is tagged ``parameters``."""
    tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[tagged, *map(nbformat.v4.new_code_cell, cells)])
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def write_script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


def make_clone(folder: Path) -> Path:
    """The clone; its ``python`` is the one that runs the tests, and no stage of it has run."""
    folder.mkdir(parents=True)
    for name in ("Makefile", "setup.sh", "pyproject.toml", "requirements.lock"):
        shutil.copy2(ROOT / name, folder)
    shutil.copytree(
        ROOT / "dmsae_lib", folder / "dmsae_lib", ignore=shutil.ignore_patterns("__pycache__", "embedded")
    )
    (folder / "configs").mkdir()
    (folder / "configs" / "toy.yaml").write_text(yaml.safe_dump(TOY))
    for name in NOTEBOOKS:
        write_notebook(folder / "notebooks" / f"{name}.ipynb")
    write_script(folder / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    return folder


def make(clone: Path, *words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """``make CONFIG=toy PY=./python words`` in the clone."""
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "PYTHONPATH"))
    }
    command = ["make", "CONFIG=toy", "PY=./python", *words]
    return subprocess.run(
        command, cwd=clone, env=inherited | (environment or {}), capture_output=True, text=True
    )


def planned(clone: Path, *words: str) -> list[str]:
    """The stages that make would run, in order."""
    listing = make(clone, "-n", "stages", *words)
    assert listing.returncode == 0, listing.stderr
    return re.findall(r"run_notebook .*/notebooks/([a-z_A-Z0-9-]+)\.ipynb --makes", listing.stdout)
