"""A run is never lost: two runs have the same content, damage is found, and whatever stops one, it goes on.

The runs are whole ones at toy size; what is damaged and what is compared is found in their folders. The slow
half of this file does the same through make, with more kills and more damage.
"""

import ast
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import torch
from builders.atlas import hostile_atlas
from builders.clone import make, make_clone, write_notebook
from builders.limits import file_size_limit, without_permission
from builders.models import save_model
from builders.run import (
    EVERY_STEP,
    ROOT,
    artefacts,
    content,
    execute,
    execute_all,
    open_tiny,
    stage_of,
    write_settings,
)

from dmsae_lib.atlas.page import publish_atlas
from dmsae_lib.config.lock import locked
from dmsae_lib.config.run import Run
from dmsae_lib.config.sections import ModelConfig
from dmsae_lib.data.activations import StoredActivations
from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.sae.training import Trainer
from dmsae_lib.store import artifacts
from dmsae_lib.store.artifacts import ArtifactError, UserError, load
from dmsae_lib.store.atomic import LEFT_OVER

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:FigureCanvasAgg")]

KILLS = pytest.param(20, marks=pytest.mark.slow), 3


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("never lost") / "a clone"
    write_settings(folder)
    return folder


@pytest.fixture(scope="module")
def whole(root) -> Run:
    """A run that nothing disturbed."""
    run = open_tiny(root, "whole")
    execute_all(run)
    return run


def test_a_page_is_made_of_the_atlas_that_a_run_holds(whole, tmp_path):
    artifact = load(whole.folder / "atlas", "atlas")
    assert artifact.json("atlas.json").keys() == hostile_atlas().keys()
    publish_atlas(artifact, tmp_path / "atlas", tmp_path, "tiny")
    assert whole.config.name in (tmp_path / "atlas" / "index.html").read_text()


def test_two_runs_have_the_same_content_whenever_and_wherever_they_are_made(whole, root, monkeypatch):
    elsewhere = {
        "commit": "0" * 40,
        "created": "1999-12-31T23:59:59+00:00",
        "seconds": 1e6,
        "hardware": {"cpu": "another"},
        "versions": {"torch": "another"},
    }
    monkeypatch.setattr(artifacts, "provenance", lambda *_: elsewhere)
    now = time.time() + 1e8
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    run = open_tiny(root, "again")
    execute_all(run)
    one, two = content(whole), content(run)
    assert sorted(one) == sorted(two) and [name for name in one if one[name] != two[name]] == []
    assert {Path(name).suffix for name in one if name.startswith("figures")} == {".png", ".svg", ".md"}
    assert all(
        load(folder, None).provenance["created"].startswith("1999") for folder in artefacts(run).values()
    )


# Damage


def kinds(*places: Path) -> dict[str, Path]:
    """{kind: the first artefact of that kind} of all artefacts below ``places``."""
    found: dict[str, Path] = {}
    for place in places:
        for manifest in sorted(place.rglob("manifest.json")):
            found.setdefault(json.loads(manifest.read_text())["kind"], manifest.parent)
    return found


def assert_damage_is_found(kind: str, folder: Path, copy: Path, n: int) -> None:
    """Change one byte in ``n`` random places, one after the other, and cut every file short once."""
    source = random.Random(f"{kind} {n}")
    shutil.copytree(folder, copy)
    names = sorted(path.name for path in copy.iterdir())
    for name, cut in [
        *((name, False) for name in source.choices(names, k=n)),
        *((name, True) for name in names),
    ]:
        path = copy / name
        whole = path.read_bytes()
        broken = bytearray(whole)
        offset = source.randrange(len(whole))
        if cut:
            del broken[offset:]
        else:
            broken[offset] ^= source.randrange(1, 256)
        path.write_bytes(broken)
        with pytest.raises(ArtifactError) as caught:
            load(copy, kind)
        assert name in caught.value.what and "run `make" in caught.value.remedy, (name, offset)
        path.write_bytes(whole)
    load(copy, kind)
    shutil.rmtree(copy)


def damage_everything(n: int, tmp_path: Path, *places: Path) -> None:
    found = kinds(*places)
    assert {"harvest", "sae", "attribution", "core", "retrain_index", "summary", "checkpoint"} <= set(found)
    for kind, folder in found.items():
        assert_damage_is_found(kind, folder, tmp_path / kind, n)


def test_a_flipped_byte_and_a_truncation_in_any_kind_of_artefact_are_found(whole, stopped, tmp_path):
    damage_everything(5, tmp_path, whole.folder, stopped.folder)


# What stops a training, and going on


def begin(whole: Run, name: str, stage: str) -> Run:
    """A run with everything of ``whole`` that ``stage`` needs, which writes a checkpoint after every step."""
    run = open_tiny(whole.root, name, f"training.checkpoint_seconds={EVERY_STEP}")
    for parent in stage_of(run, stage).parents:
        if not (run.folder / parent).exists():
            shutil.copytree(whole.folder / parent, run.folder / parent)
    return run


def assert_same(whole: Run, run: Run, stage: str) -> None:
    """The stage's artefacts are bit for bit those of the undisturbed run, and no checkpoint or scrap is
    left."""
    made = Path(stage_of(run, stage).artefact).parts[0]
    one, two = (
        {name: text for name, text in content(r).items() if name.startswith(made) and name in content(run)}
        for r in (whole, run)
    )
    assert one == two and len(two) > 3
    with locked(run):
        left = [path.name for path in run.folder.rglob(".*") if path.name != ".lock"]
    assert left == []


def killed(run: Run, stage: str, steps: int, delay: float) -> bool:
    """Execute the stage in a process of its own and kill that ``delay`` seconds after its ``steps``-th
    training step.

    False where the stage was finished before.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        step = Trainer.train_step

        def told(trainer, x):
            os.write(writing, b".")
            return step(trainer, x)

        Trainer.train_step = told
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            execute(run, stage_of(run, stage))
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    os.close(writing)
    while steps and os.read(reading, 1):
        steps -= 1
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.close(reading)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


@pytest.fixture(scope="module")
def stopped(whole) -> Run:
    """A run that was killed in the middle of a training: it holds a checkpoint."""
    run = begin(whole, "stopped", "cycle_0_train")
    assert killed(run, "cycle_0_train", steps=5, delay=0)
    return run


@pytest.mark.parametrize("stage", ["cycle_0_train", "retrain"])
@pytest.mark.parametrize("kills", KILLS)
def test_kills_at_random_points_of_a_training_change_no_bit(whole, stage, kills):
    run = begin(whole, f"killed-{stage}-{kills}", stage)
    source, done = random.Random(f"{stage} {kills}"), 0
    while done < kills:
        if killed(run, stage, source.randint(1, max(1, 18 // kills)), source.random() * 0.03):
            done += 1
        else:  # it came to its end before: start the stage again
            assert_same(whole, run, stage)
            shutil.rmtree(run.folder / Path(stage_of(run, stage).artefact).parts[0])
            run = begin(whole, run.name, stage)
    execute(run, stage_of(run, stage))
    assert_same(whole, run, stage)


def nan_activations(run: Run, patch: pytest.MonkeyPatch) -> None:
    rows = StoredActivations.rows
    patch.setattr(StoredActivations, "rows", lambda source, index: rows(source, index) * float("nan"))


def no_memory(run: Run, patch: pytest.MonkeyPatch) -> None:
    step = Trainer.train_step

    def full(trainer, x):
        if trainer.step == 8:
            torch.empty(2**50)
        return step(trainer, x)

    patch.setattr(Trainer, "train_step", full)


STOPS: dict[str, tuple[Callable, type[Exception], str]] = {
    "a file size limit": (
        lambda run, _: file_size_limit(20_000),
        UserError,
        "Cannot write .*: the file size limit is reached",
    ),
    "no permission": (
        lambda run, _: without_permission(run.folder / "cycle_0"),
        UserError,
        "Cannot write .*: there is no perm",
    ),
    "activations that are no numbers": (
        nan_activations,
        UserError,
        "Step [45]: the activations hold NaN.*checkpoint is kept",
    ),
    "no memory": (no_memory, RuntimeError, "can't allocate memory"),
}


@pytest.mark.parametrize("name", STOPS)
def test_what_stops_a_training_is_named_and_leaves_the_last_checkpoint(whole, stopped, name, monkeypatch):
    cause, kind, message = STOPS[name]
    run = begin(whole, f"stop-{list(STOPS).index(name)}", "cycle_0_train")
    shutil.copytree(
        stopped.folder / "cycle_0" / ".sae.checkpoint", run.folder / "cycle_0" / ".sae.checkpoint"
    )
    with monkeypatch.context() as patch:
        context = cause(run, patch)
        with pytest.raises(kind, match=message):
            if context is None:
                execute(run, stage_of(run, "cycle_0_train"))
            else:
                with context:
                    execute(run, stage_of(run, "cycle_0_train"))
    kept = load(run.folder / "cycle_0" / ".sae.checkpoint", "checkpoint").json("state.json")
    assert kept["step"] >= 4 and not (run.folder / "cycle_0" / "sae").exists()
    execute(run, stage_of(run, "cycle_0_train"))
    assert_same(whole, run, "cycle_0_train")


def test_a_full_disk_leaves_the_last_checkpoint(whole, small_disk):
    """Room for the run, a checkpoint and a half."""
    root = small_disk("20m") / "a clone"
    write_settings(root)
    run = open_tiny(root, "full", f"training.checkpoint_seconds={EVERY_STEP}")
    shutil.copytree(whole.folder / "harvest", run.folder / "harvest")
    assert killed(run, "cycle_0_train", steps=5, delay=0)
    with locked(run):
        pass
    size = sum(path.stat().st_size for path in (run.folder / "cycle_0" / ".sae.checkpoint").iterdir())
    free = os.statvfs(root).f_bavail * os.statvfs(root).f_frsize
    (root / "fill").write_bytes(b"x" * (free - size // 2))
    with pytest.raises(UserError, match="Cannot write .*sae.checkpoint: the disk is full: free some space"):
        execute(run, stage_of(run, "cycle_0_train"))
    assert load(run.folder / "cycle_0" / ".sae.checkpoint", "checkpoint").json("state.json")["step"] >= 4
    (root / "fill").unlink()
    execute(run, stage_of(run, "cycle_0_train"))
    assert_same(whole, run, "cycle_0_train")


# Two at once


def test_of_two_makes_of_one_run_the_second_says_so_and_a_killed_one_blocks_nobody(tmp_path):
    clone = make_clone(tmp_path / "a clone")
    slow = (
        "import pathlib, time\npathlib.Path('started').touch()\n"
        "time.sleep(0 if pathlib.Path('go').exists() else 60)"
    )
    made = (
        "pathlib.Path('runs', run, 'harvest').mkdir(parents=True, exist_ok=True)\n"
        "pathlib.Path('runs', run, 'harvest', 'manifest.json').write_text('{}')\nprint('done')"
    )
    write_notebook(clone / "notebooks" / "01_harvest.ipynb", slow, made)
    command = ["make", "CONFIG=toy", "PY=./python", "stages", "STAGE=harvest"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    first = subprocess.Popen(
        command, cwd=clone, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    )
    while not (clone / "started").exists():
        time.sleep(0.05)
    second = make(clone, "stages", "STAGE=harvest")
    assert second.returncode != 0 and "Traceback" not in second.stderr
    said = re.search(
        r"error: runs/toy is in use by process (\d+) on (\S+) since .* \(0:00:\d\d ago\): wait", second.stderr
    )
    assert said and said[2] == os.uname().nodename and os.getpgid(int(said[1])) == first.pid
    os.kill(int(said[1]), signal.SIGKILL)  # what it started goes on, and keeps the lock
    first.wait()
    orphaned = make(clone, "stages", "STAGE=harvest")
    assert (
        f"in use by what process {said[1]} on {said[2]} since" in orphaned.stderr
        and "before it ended: wait" in orphaned.stderr
    )
    os.killpg(first.pid, signal.SIGKILL)
    (clone / "go").touch()
    third = make(clone, "stages", "STAGE=harvest")
    assert (third.returncode, third.stderr) == (0, "") and third.stdout.endswith("done\n")
    assert [path.name for path in (clone / "runs" / "toy").rglob(".*")] == [".lock"]


# What is read


def test_no_code_of_a_model_runs_unless_that_is_asked_for_by_name(tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, flag = save_model(tmp_path / "bait"), tmp_path / "it ran"
    (folder / "bait.py").write_text(
        f"open({str(flag)!r}, 'w').close()\nfrom transformers import PretrainedConfig\n"
        # its own class: transformers leaves a mark on it
        "class Bait(PretrainedConfig):\n    model_type = 'bait'\n"
    )
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "model_type": "bait",
        "auto_map": {name: "bait.Bait" for name in ("AutoConfig", "AutoModelForCausalLM")},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    wanted = {"name": str(folder), "hook_name": "blocks.0.hook_resid_post", "context_size": 16}
    with pytest.raises(UserError, match="its config.json is not that of a causal language model"):
        LanguageModel(ModelConfig(**wanted))
    assert not flag.exists()
    with pytest.raises(UserError):  # it is no model; but now it may run
        LanguageModel(ModelConfig(**wanted, trust_remote_code=True))
    assert flag.exists()


class Bait:
    def __reduce__(self):
        return os.mkdir, ("it ran",)


def test_a_pickle_is_refused_even_where_another_package_would_read_it(tmp_path, monkeypatch):
    """sae_probes opens its cache with `weights_only=False`; `runtime.prepare` forbids that for the whole
    process."""
    monkeypatch.chdir(tmp_path)
    torch.save(Bait(), "x.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load("x.pt", weights_only=False)
    assert not Path("it ran").exists()


PICKLES = {"pickle", "dill", "shelve", "marshal", "cloudpickle"}
LOADERS = {"torch.load", "np.load", "numpy.load", "pd.read_pickle", "pandas.read_pickle", "joblib.load"}


def test_the_library_and_the_notebooks_read_no_pickle():
    library = ROOT / "dmsae_lib"
    sources = {path.relative_to(library).as_posix(): path.read_text() for path in library.rglob("*.py")}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        sources[path.name] = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert len(sources) > 50
    for name, text in sources.items():
        # others' ae.pt, where it is asked for by name: that call must keep to tensors
        allowed = {"torch.load"} if name == "interop/dictionary_learning.py" else set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {getattr(node, "module", None) or "", *(alias.name for alias in node.names)}
                assert modules.isdisjoint(PICKLES), name
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in LOADERS - allowed, name
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                arguments = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert arguments.get("weights_only") == "True", name


# Names from configurations


@pytest.mark.parametrize(
    "override",
    [
        "distill.chains=[{name: ../x}]",
        "distill.chains=[{name: /tmp/x}]",
        "name=../x",
        "name=/tmp/x",
        "name=..",
        "name=.x",
        'distill.chains=[{name: "a/b"}]',
        'name="x\\n"',
    ],
)
def test_names_in_a_configuration_stay_inside_the_run(root, override):
    with pytest.raises(UserError, match="letters, digits"):
        open_tiny(root, "names", override)
    assert not (root / "runs" / "names").exists()


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "..", ".x", "a/b", "x\n", "~"])
def test_run_names_stay_inside_runs(root, name):
    before = sorted(root.parent.rglob("*"))
    with pytest.raises(UserError, match="cannot name a folder"):
        open_tiny(root, name)
    assert sorted(root.parent.rglob("*")) == before


def test_probing_sets_stay_inside_the_cache(whole, root):
    if "saebench" not in {Path(place).parts[0] for place in artefacts(whole)}:
        pytest.skip("the run scored nothing")
    run = begin(whole, "sets", "saebench")
    shutil.copytree(whole.folder / "retrain", run.folder / "retrain", dirs_exist_ok=True)
    before = set(root.parent.rglob("*"))
    run = open_tiny(root, "sets", "saebench.probing_sets=[../../../../x]")
    with pytest.raises(UserError, match="saebench.probing_sets names '../../../../x'"):
        execute(run, stage_of(run, "saebench"))
    assert all(run.folder in path.parents for path in set(root.parent.rglob("*")) - before)


# Through make, and more of everything


def run_make(clone: Path, *words: str) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        ["make", "CONFIG=tiny", "PY=./python", *words],
        cwd=clone,
        env=environment,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finished(process: subprocess.Popen) -> str:
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
def test_kills_of_make_damage_and_mending(stopped, tmp_path):
    clone = make_clone(tmp_path / "a clone")
    shutil.rmtree(clone / "notebooks")
    shutil.copytree(ROOT / "notebooks", clone / "notebooks")
    (clone / "dmsae_lib" / "embedded").symlink_to(ROOT / "dmsae_lib" / "embedded")
    write_settings(clone)
    words = ["stages", f"SET=training.checkpoint_seconds={EVERY_STEP}"]
    started = time.time()
    finished(run_make(clone, *words, "RUN=whole"))
    seconds, source = time.time() - started, random.Random("make")
    for _ in range(5):
        process = run_make(clone, *words, "RUN=killed")
        time.sleep(source.random() * seconds / 3)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finished(run_make(clone, *words, "RUN=killed"))
    one, two = (
        open_tiny(clone, name, f"training.checkpoint_seconds={EVERY_STEP}") for name in ("whole", "killed")
    )
    assert [
        path for run in (one, two) for path in run.folder.rglob(".*") if path.name.endswith(LEFT_OVER)
    ] == []
    before, after = content(one), content(two)
    assert sorted(before) == sorted(after) and [name for name in before if before[name] != after[name]] == []
    (tmp_path / "copies").mkdir()
    damage_everything(20, tmp_path / "copies", one.folder, stopped.folder)
    for place in ("cycle_1/core", "retrain/k16/distilled-seed0"):
        path = next((one.folder / place).glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        with pytest.raises(ArtifactError) as caught:
            load(path.parent, None)
    [command] = re.findall("`make (.*?)`", caught.value.remedy)
    assert "2 of them damaged" in finished(run_make(clone, *command.split()))
    assert content(one) == before
