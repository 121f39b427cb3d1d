"""One notebook, executed strictly: its parameters, its failures, what the executed copy holds, and going
on."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from builders.clone import ROOT, make, make_clone, planned, write_notebook
from papermill.exceptions import PapermillExecutionError

from dmsae_lib.command.run_notebook import (
    OUT_OF_MEMORY,
    _explain,
    check_parameters,
    parameters_of,
    run_notebook,
)
from dmsae_lib.store.artifacts import UserError

ARTEFACT = """
import json, pathlib
folder = pathlib.Path("runs", run, {folder!r})
folder.mkdir(parents=True, exist_ok=True)
(folder / "manifest.json").write_text(json.dumps({{"config": config}}))
print("made", folder)
"""


@pytest.fixture
def clone(tmp_path) -> Path:
    return make_clone(tmp_path / "a clone")


def notebook(*cells: str):
    tagged = [nbformat.v4.new_code_cell(cell, metadata={"tags": ["parameters"]}) for cell in cells]
    return nbformat.v4.new_notebook(cells=tagged)


def test_parameters_are_the_literals_of_the_one_tagged_cell():
    assert parameters_of(notebook('config = "smoke"  # which\nk = -1\nseeds = [0, 1]'), "x") == {
        "config": "smoke",
        "k": -1,
        "seeds": [0, 1],
    }
    for cells in ([], ["k = 1", "k = 2"], ["import os"], ["k = j = 1"]):
        with pytest.raises(UserError, match="x"):
            parameters_of(notebook(*cells), "x")


KNOWN = {"config": "smoke", "cycle": 0, "coverage": 0.9, "quick": False}


def test_given_values_take_the_type_of_the_default():
    given = {"config": "8", "cycle": "3", "coverage": "1", "quick": "true"}
    checked = check_parameters(given, KNOWN, "02_train_cycle.ipynb")
    assert checked == {"config": "8", "cycle": 3, "coverage": 1.0, "quick": True}
    assert type(checked["coverage"]) is float


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        ("cicle", "1", "has no parameter 'cicle': its parameters are config, cycle, coverage, quick."),
        ("cycle", "one", "the parameter cycle is 'one', but must be of type int"),
        ("cycle", "1.5", "must be of type int"),
        ("cycle", "true", "must be of type int"),
        ("quick", "1", "must be of type bool"),
        ("coverage", "[0.9]", "must be of type float"),
        ("cycle", "[1", "must be of type int"),
    ],
)
def test_unknown_names_and_other_types_are_refused(name, value, sentence):
    with pytest.raises(UserError) as caught:
        check_parameters({name: value}, KNOWN, "02_train_cycle.ipynb")
    assert sentence in str(caught.value)


def test_an_executed_copy_is_the_same_wherever_and_whenever_it_was_made(tmp_path):
    source = tmp_path / "source.ipynb"
    write_notebook(
        source,
        "import pathlib\nprint(pathlib.Path.cwd() / 'dmsae_lib')\nprint('cycle', cycle)",
        parameters="cycle = 0",
    )
    copies = []
    for name in ("one", "two"):
        copy = tmp_path / name / "copy.ipynb"
        assert run_notebook(source, copy, {"cycle": "3"}) == "cycle 3"
        copies.append(copy.read_text())
    assert copies[0] == copies[1]
    assert (
        str(Path.cwd()) not in copies[0] and str(tmp_path) not in copies[0] and "papermill" not in copies[0]
    )
    tags = [cell.metadata.get("tags") for cell in nbformat.reads(copies[0], as_version=4).cells]
    assert tags[:2] == [["parameters"], ["injected-parameters"]]


def test_a_failed_stage_leaves_a_failed_copy_and_is_run_again(clone):
    """Killed or failed after the artefact was written: the stage still counts as not done."""
    check = (
        "import pathlib\nfrom dmsae_lib.store.artifacts import ArtifactError\n"
        "if pathlib.Path('broken').exists():\n"
        "    raise ArtifactError('harvest is damaged: delete\\n that folder.')"
    )
    write_notebook(clone / "notebooks" / "01_harvest.ipynb", ARTEFACT.format(folder="harvest"), check)
    notebooks = clone / "runs" / "toy" / "notebooks"
    (clone / "broken").touch()
    ended = make(clone, "stages", "STAGE=harvest")
    assert ended.returncode != 0
    assert ended.stderr.splitlines()[0] == "error: harvest: harvest is damaged: delete that folder."
    assert sorted(path.name for path in notebooks.iterdir()) == ["harvest.failed.ipynb"]
    assert json.loads((clone / "runs" / "toy" / "harvest" / "manifest.json").read_text()) == {"config": "toy"}
    assert planned(clone, "STAGE=harvest") == ["harvest"]
    (clone / "broken").unlink()
    ended = make(clone, "stages", "STAGE=harvest")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert 0 < json.loads((notebooks / "harvest.json").read_text())["seconds"] < 60
    assert ended.stdout.startswith("harvest ") and ended.stdout.endswith("made runs/toy/harvest\n")
    assert sorted(path.name for path in notebooks.iterdir()) == ["harvest.ipynb", "harvest.json"]
    assert planned(clone, "STAGE=harvest") == []


def test_an_unexpected_error_shows_its_traceback_and_a_missing_artefact_is_an_error(clone):
    write_notebook(clone / "notebooks" / "01_harvest.ipynb", "def deep():\n    return 1 / 0", "deep()")
    ended = make(clone, "stages", "STAGE=harvest")
    assert ended.returncode != 0 and "in deep()" in ended.stderr and "\x1b[" not in ended.stderr
    assert (
        "error: harvest: ZeroDivisionError: division by zero; see runs/toy/notebooks/harvest.failed"
        in ended.stderr
    )
    write_notebook(clone / "notebooks" / "01_harvest.ipynb", "print('nothing')")
    ended = make(clone, "stages", "STAGE=harvest")
    assert "error: harvest: the notebook ended without writing runs/toy/harvest" in ended.stderr


def test_a_hanging_cell_and_a_killed_kernel_are_named(clone):
    write_notebook(clone / "notebooks" / "01_harvest.ipynb", "import time\ntime.sleep(60)")
    ended = make(clone, "stages", "STAGE=harvest", "TIMEOUT=1")
    assert "error: harvest: a cell ran into the time limit; raise it with TIMEOUT=seconds" in ended.stderr
    write_notebook(
        clone / "notebooks" / "01_harvest.ipynb", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = make(clone, "stages", "STAGE=harvest")
    assert "error: harvest: the notebook's process was killed" in ended.stderr
    assert "lower model.batch_rows, or set data.store to stream, or run it with more memory" in ended.stderr
    assert (clone / "runs" / "toy" / "notebooks" / "harvest.failed.ipynb").is_file()


@pytest.mark.parametrize(
    "kind, text, said",
    [
        (
            "MemoryError",
            "",
            "cycle_0: the memory did not suffice: lower training.batch_size or sae.d_sae, or run it",
        ),
        (
            "RuntimeError",
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you "
            "tried to allocate 4503599627370496 bytes. Error code 12",
            "did not suffice (tried to allocate 4503599627370496 bytes): lower",
        ),
        (
            "OutOfMemoryError",
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has",
            "(tried to allocate 2.00 gib): lower",
        ),
        ("OSError", "[Errno 12] Cannot allocate memory", "did not suffice: lower training.batch_size"),
    ],
)
def test_want_of_memory_is_one_sentence(kind, text, said, capsys):
    error = PapermillExecutionError(
        cell_index=1, exec_count=1, source="", ename=kind, evalue=text, traceback=["long"]
    )
    sentence = _explain(error, "02_train_cycle", "cycle_0", Path("x.failed.ipynb"))
    assert said in sentence and sentence.endswith("what was finished, the last checkpoint too, is kept.")
    assert capsys.readouterr().err == ""


def test_torch_says_so_in_these_words():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert OUT_OF_MEMORY.search(str(caught.value))


def test_the_kernel_is_this_environment_whatever_is_installed_as_python3(tmp_path, monkeypatch):
    """Through papermill and through nbval; with Jupyter's own search the first one found would have run."""
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(
        json.dumps({"argv": ["false", "{connection_file}"], "display_name": "another", "language": "python"})
    )
    monkeypatch.setenv(
        "JUPYTER_PATH", str(tmp_path / "jupyter")
    )  # comes before the folder in the user's home
    source = tmp_path / "source.ipynb"
    check = "import sys\nassert sys.prefix == prefix\nprint(sys.version_info[:2])"
    write_notebook(source, check, parameters=f"prefix = {sys.prefix!r}")
    assert run_notebook(source, tmp_path / "copy.ipynb", {}) == str(sys.version_info[:2])
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "--nbval" in line]
    flags = [word for word in line.split() if word.startswith("--nbval")]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *flags, source],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0 and "2 passed" in ended.stdout, ended.stdout
