"""The plan: which stages there are, what a change makes stale, and that two runs do not get into each other's
way."""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import nbformat
import pytest
import yaml
from builders.clone import ROOT, TOY, make, make_clone, planned, write_script

from dmsae_lib.command.plan import states
from dmsae_lib.command.run_notebook import check_parameters, parameters_of
from dmsae_lib.command.stages import stages
from dmsae_lib.config import RunConfig, load_config
from dmsae_lib.config.lock import lock
from dmsae_lib.config.run import Run, open_run
from dmsae_lib.store.artifacts import UserError

CYCLES = [f"cycle_{t}_{step}" for t in (0, 1) for step in ("train", "attribute", "distill")]
END = ["retrain", "saebench", "summary"]
ASKED = ["saebench_suite", "what_is_a_core", "atlas"]  # for on request
ALL = ["harvest", *CYCLES, "learning_rate", *END]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    return make_clone(tmp_path_factory.mktemp("plan") / "a clone")


def pretend(clone: Path, run: str, overrides: tuple[str, ...] = (), suite: bool = False) -> Path:
    """Leave the run as if every stage (with ``suite`` also the optional ones) had been made, in order, some
    time ago."""
    folder = clone / "runs" / run
    found = stages(open_run(str(clone / "configs" / "toy.yaml"), run, overrides).config)
    for n, stage in enumerate(stage for stage in found if suite or not stage.optional):
        made = time.time() - 1000 + n
        for path in (folder / stage.artefact / "manifest.json", folder / "notebooks" / f"{stage.name}.ipynb"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
            os.utime(path, (made, made))
        os.utime(folder / "params" / f"{stage.name}.json", (made - 2000, made - 2000))
    for path in (clone / "notebooks").iterdir():
        os.utime(path, (0, 0))
    return folder


@pytest.fixture
def done(fresh) -> Path:
    """A clone whose run ``trial`` is complete."""
    planned(fresh, "RUN=trial")  # writes the parameters files
    pretend(fresh, "trial")
    assert planned(fresh, "RUN=trial") == []
    yield fresh
    make(fresh, "clean", "RUN=trial")


def test_stages_come_parents_first_and_only_from_the_configuration():
    config = RunConfig.model_validate(TOY | {"name": "toy"})
    assert [stage.name for stage in stages(config) if not stage.optional] == ALL
    made = set()
    for stage in stages(config):
        assert set(stage.parents) <= made
        made.add(stage.artefact)


def test_saebench_waits_for_the_saes_of_every_chain_that_it_scores():
    main = ("harvest", "retrain/index")
    for chains, parents in (
        ("main", main),
        ("main, equal-l0", (*main, "chain_equal-l0/retrain/index")),
        (
            "equal-l0",
            (*main, "chain_equal-l0/retrain/index"),
        ),  # SAEs from elsewhere lie with the main chain's
    ):
        found = stages(load_config("smoke", [f"saebench.chains=[{chains}]"]))
        assert [stage.parents for stage in found if stage.notebook == "06_saebench"] == [parents] * 2


def test_a_chain_has_cycles_of_its_own_that_share_the_harvest():
    chain = {"name": "other", "seed": 5, "core_sparsity": "batchtopk"}
    config = RunConfig.model_validate(TOY | {"name": "toy", "distill": {"cycles": 1, "chains": [chain]}})
    found = {stage.name: stage for stage in stages(config)}
    train = found["chain_other_cycle_1_train"]
    assert train.artefact == "chain_other/cycle_1/sae" and train.parents == (
        "harvest",
        "chain_other/cycle_0/core",
    )
    assert train.parameters == {"cycle": 1, "chain": "other"}
    assert (train.slice["seed"], train.slice["training"]["core_sparsity"]) == (5, "batchtopk")
    assert found["cycle_1_train"].slice["seed"] == 0
    assert "chain_other/cycle_1/core" in found["summary"].parents


def test_every_notebook_has_the_parameters_that_its_stages_give():
    other = {"name": "other", "seed": 1, "retrain": ["distilled"]}
    config = RunConfig.model_validate(TOY | {"name": "toy", "distill": {"cycles": 1, "chains": [other]}})
    for stage in stages(config):
        notebook = nbformat.read(ROOT / "notebooks" / f"{stage.notebook}.ipynb", as_version=4)
        given = {"config": "toy", "run": "toy"} | {
            name: str(value) for name, value in stage.parameters.items()
        }
        check_parameters(given, parameters_of(notebook, stage.notebook), stage.notebook)


def test_a_dry_run_lists_the_whole_experiment_in_order(fresh):
    assert planned(fresh) == ALL
    listing = make(fresh, "-n", "stages").stdout
    assert (
        "run_notebook notebooks/02_train_cycle.ipynb runs/toy/notebooks/cycle_1_train.ipynb "
        "--makes runs/toy/cycle_1/sae/manifest.json -p config toy -p run toy -p cycle 1"
    ) in listing
    assert planned(fresh, "STAGE=cycle_0_attribute") == ["harvest", "cycle_0_train", "cycle_0_attribute"]


CHANGES = {
    "seed=1": [*CYCLES, "learning_rate", *END],
    "training.lr=0.002": [*CYCLES, "learning_rate", *END],
    "sae.prefixes=[8,16]": [*CYCLES, "learning_rate", *END],
    "distill.coverage=0.8": [*CYCLES[1:], "learning_rate", *END],
    "distill.final_core=all_of_last": END,
    "distill.cycles=2": ["cycle_2_train", "cycle_2_attribute", "cycle_2_distill", *END],
    "retrain.seeds=[0,1]": END,
    "retrain.ks=[4,8,16]": END,
    'retrain.controls={"random":1}': END,
    "saebench.probing_ks=[1]": ["saebench", "summary"],
    "saebench.suite.ks=[4]": ["summary"],
    "training.checkpoint_seconds=5": ["summary"],
    "training.together=2": ["summary"],
    "data.train_tokens=2000": ALL,
}


@pytest.mark.parametrize("override", CHANGES)
def test_a_changed_setting_remakes_exactly_what_depends_on_it(done, override):
    assert sorted(planned(done, "RUN=trial", f"SET={override}")) == sorted(CHANGES[override])


def test_parameters_files_are_left_alone_while_nothing_changes(done):
    files = sorted((done / "runs" / "trial").glob("params/*.json")) + [done / "runs" / "trial" / "plan.mk"]
    before = [path.stat().st_mtime_ns for path in files]
    assert planned(done, "RUN=trial") == []
    # the three optional stages have one too
    assert [path.stat().st_mtime_ns for path in files] == before and len(files) == len(ALL) + 4


def lose(run: Path, name: str) -> None:
    (run / name).unlink()


def touch(run: Path, name: str) -> None:
    (run / name).touch()


def move_aside(run: Path, name: str) -> None:
    """What a writer leaves that is killed between its two renames."""
    (run / name).rename((run / name).with_name(f".{Path(name).name}.old"))


# What is done to a complete run (or which setting is changed) -> the stages made again, the first one's state
DISTURBED = {
    "nothing": (None, [], ""),
    "an artefact moved aside by a kill": (partial(move_aside, name="retrain/index"), [], ""),
    "an artefact lost": (partial(lose, name="retrain/index/manifest.json"), END, "missing"),
    "a parameter changed": ("distill.final_core=all_of_last", END, "stale: parameters changed"),
    "a parameters file lost": (partial(lose, name="params/retrain.json"), END, "stale: parameters changed"),
    "a parameters file newer": (partial(touch, name="params/retrain.json"), END, "stale: parameters changed"),
    "a notebook changed": (
        partial(touch, name="../../notebooks/06_saebench.ipynb"),
        ["saebench", "summary"],
        "stale: notebook changed",
    ),
    "a notebook unfinished": (
        partial(lose, name="notebooks/saebench.ipynb"),
        ["saebench", "summary"],
        "stale: its notebook did not run to the end",
    ),
    "a parent newer": (
        partial(touch, name="cycle_1/sae/manifest.json"),
        ["cycle_1_attribute", "cycle_1_distill", *END],
        "stale: cycle_1/sae is newer",
    ),
    "a parent of the optional stage newer": (
        partial(touch, name="retrain/index/manifest.json"),
        ["saebench", "saebench_suite", "what_is_a_core", "summary"],
        "stale: retrain/index is newer",
    ),
}


@pytest.mark.parametrize("case", DISTURBED)
def test_what_is_made_again_and_status_says_the_same_beforehand(done, case):
    disturb, again, reason = DISTURBED[case]
    suite = "saebench_suite" in again or case == "nothing"
    folder = pretend(done, "trial", suite=suite)
    overrides = (disturb,) if isinstance(disturb, str) else ()
    if disturb and not overrides:
        disturb(folder)
    run = open_run(str(done / "configs" / "toy.yaml"), "trial", overrides)
    said = states(Run(run.config, "trial", done))
    left = [stage for stage, state in said.items() if state not in ("present", "optional")]
    assert left == again and (not again or said[again[0]] == reason)
    assert sorted(planned(done, "RUN=trial", *(f"SET={override}" for override in overrides))) == sorted(again)


def test_status_of_a_new_run_is_what_make_would_do(fresh):
    run = Run(open_run(str(fresh / "configs" / "toy.yaml"), "new").config, "new", fresh)
    assert states(run) == dict.fromkeys(ALL, "missing") | dict.fromkeys(ASKED, "optional")
    assert not run.folder.exists() and planned(fresh, "RUN=new") == ALL


def test_the_suite_is_made_on_request_and_then_kept_up_to_date(done):
    assert planned(done, "RUN=trial", "STAGE=saebench_suite") == ["saebench_suite"]
    pretend(done, "trial", suite=True)
    assert planned(done, "RUN=trial") == []
    # what could not be run may run now
    assert planned(done, "RUN=trial", "STAGE=saebench_suite") == ["saebench_suite"]
    assert planned(done, "RUN=trial", "SET=saebench.suite.ks=[4]") == ["saebench_suite", "summary"]
    retrained = planned(done, "RUN=trial", "SET=distill.final_core=all_of_last")
    assert sorted(retrained) == sorted([*END, *ASKED])
    assert all(retrained.index("summary") > retrained.index(name) for name in ASKED[:2])


def test_the_atlas_is_made_on_request_of_the_cycles_alone_and_then_kept_up_to_date(done):
    assert planned(done, "RUN=trial", "STAGE=atlas") == ["atlas"]
    pretend(done, "trial", suite=True)
    touch(done / "runs" / "trial", "retrain/index/manifest.json")
    assert "atlas" not in planned(done, "RUN=trial")
    touch(done / "runs" / "trial", "cycle_1/attribution/manifest.json")
    assert {"cycle_1_distill", "atlas"} <= set(planned(done, "RUN=trial"))


def test_an_override_computes_elsewhere_and_notebooks_read_its_resolved_settings(fresh):
    listing = make(fresh, "-n", "stages", "SET=training.k=16 seed=3").stdout
    (folder,) = [path for path in (fresh / "runs").iterdir() if path.name.startswith("toy--")]
    assert f"-p config runs/{folder.name}/config.yaml -p run {folder.name} " in listing
    resolved = open_run(str(folder / "config.yaml"), folder.name).config
    assert (resolved.training.k, resolved.seed, resolved.name) == (16, 3, "toy")


def test_changed_model_files_change_the_harvest(tmp_path):
    model = tmp_path / "my llama"
    model.mkdir()
    (model / "config.json").write_text("{}")
    config = RunConfig.model_validate(TOY | {"name": "toy", "model": TOY["model"] | {"name": str(model)}})
    before = stages(config)[0].slice
    assert stages(config)[0].slice == before
    (model / "config.json").write_text("{ }")
    assert stages(config)[0].slice != before


BAD = {
    "an unknown configuration": (["CONFIG=nope"], "There is no configuration"),
    "an unknown key": (["SET=training.kk=3"], "unknown key training.kk"),
    "k above the width": (["SET=training.k=65"], "training.k is 65"),
    "prefixes that do not increase": (["SET=sae.prefixes=[8,8]"], "sae.prefixes is [8, 8]"),
    "an override without a value": (["SET=training.k"], "not of the form"),
    "a run name with a slash": (["RUN=../results"], "run name '../results'"),
    "a run name that belongs to a configuration": (["RUN=toy", "SET=seed=1"], "kept for configs/toy.yaml"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_sentence_before_anything_runs(fresh, case):
    words, sentence = BAD[case]
    ended = make(fresh, "stages", *words)
    assert ended.returncode != 0 and ended.stdout == ""
    message, *rest = ended.stderr.splitlines()
    assert message.startswith("error: ") and sentence in message
    assert all(line.startswith("make") for line in rest)


def test_a_second_run_is_told_who_has_the_first(fresh):
    run = open_run(str(fresh / "configs" / "toy.yaml"), "busy")
    run.root, run.folder = fresh, fresh / "runs" / "busy"
    held = lock(run)
    ended = make(fresh, "stages", "RUN=busy")
    assert ended.returncode != 0 and f"runs/busy is in use by process {os.getpid()} on" in ended.stderr
    assert planned(fresh, "RUN=other") == ALL
    os.close(held)
    assert planned(fresh, "RUN=busy") == ALL


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    run = open_run(str(make_clone(tmp_path / "a clone") / "configs" / "toy.yaml"), "killed")
    run.folder = tmp_path / "killed"
    code = (
        "import pathlib, sys, time; from dmsae_lib.config.lock import lock\n"
        "class run: name, folder = 'killed', pathlib.Path(sys.argv[1])\n"
        "lock(run); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, run.folder], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} "):
        lock(run)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    os.close(lock(run))


def fake_python(folder: Path, version: str) -> Path:
    """An interpreter that says it is of another version."""
    claim = f"import sys; sys.version_info = ({version.replace('.', ', ')}); exec(sys.argv[1])"
    return write_script(
        folder / f"python{version}", f'#!/bin/sh\nexec "{sys.executable}" -c "{claim}" "$2"\n'
    )


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.13"])
def test_setup_refuses_another_python_before_it_makes_anything(tmp_path, version):
    clone = make_clone(tmp_path / "a clone")
    python = fake_python(tmp_path, version)
    ended = make(clone, "setup", "PY=.venv/bin/python", f"PYTHON={python}")
    assert ended.returncode != 0 and ended.stdout == ""
    assert (
        ended.stderr.startswith("error: Python 3.11 or 3.12 is needed")
        and f"only: {version};" in ended.stderr
    )
    assert not (clone / ".venv").exists()


def test_setup_starts_again_after_an_interruption_and_keeps_an_environment_that_it_did_not_make(tmp_path):
    clone = make_clone(tmp_path / "a clone")
    (clone / ".venv").mkdir()
    ended = make(clone, "setup", "PY=.venv/bin/python")
    assert "the folder .venv is no environment" in ended.stderr and (clone / ".venv").is_dir()
    (clone / ".venv" / ".unfinished").touch()
    ended = make(clone, "setup", "PY=.venv/bin/python", f"PYTHON={fake_python(tmp_path, '3.13')}")
    assert "an earlier set-up was interrupted" in ended.stdout and not (clone / ".venv").exists()


TARGETS = next(
    line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY:")
).split()[1:]


@pytest.mark.parametrize("state", ["fresh", "half set up"])
def test_a_dry_run_of_any_target_works_before_the_set_up(tmp_path, state):
    """It says what would be done, and of the stages, which only Python knows, that the set-up comes first."""
    clone = make_clone(tmp_path / "a clone")
    shutil.copytree(ROOT / "benchmarks", clone / "benchmarks")
    (clone / "tests" / "atlas").mkdir(parents=True)
    shutil.copy(ROOT / "tests/atlas/requirements.txt", clone / "tests" / "atlas")
    if state == "half set up":  # killed before its packages were there
        (clone / ".venv" / "bin").mkdir(parents=True)
        write_script(clone / ".venv" / "bin" / "python", '#!/bin/sh\nexec "$(command -v python3)" -S "$@"\n')
    for target in TARGETS:
        ended = make(clone, "-n", target, "PY=.venv/bin/python")
        assert (ended.returncode, ended.stderr) == (0, "") and ended.stdout.strip(), target
        listing = target in ("reproduce", "stages", "saebench", "atlas", "smoke", "test", "mend")
        assert listing == ("the stages are listed once 'make setup' has run" in ended.stdout), target
        assert (
            "setup.sh" in ended.stdout or "PY" not in ended.stdout or target in ("help", "clean", "lock")
        ), target
    assert not (clone / "runs").exists()


def test_a_python_that_is_not_there_is_named(fresh):
    ended = make(fresh, "stages", "PY=./nowhere")
    assert ended.returncode != 0 and ended.stdout == ""
    assert ended.stderr.startswith("error: there is no ./nowhere: run 'make setup' or name a Python")
    assert make(fresh, "-n", "stages", "PY=./nowhere").returncode == 0


@pytest.mark.parametrize(
    "given, model, ks",
    [
        ("model.name=my model retrain.ks=[4, 8]", "my model", [4, 8]),
        ("model.name='my model' retrain.ks=[4,  8] seed=1", "my model", [4, 8]),
        # not YAML: a backslash at the end of a quoted text
        ("model.name=\"o'brien's $HOME; `x` \\\"", None, None),
        ("model.name=o'brien retrain.ks=[8]", "o'brien", [8]),
        ('model.name=a$HOME"b', 'a$HOME"b', [4, 8]),
    ],
)
def test_overrides_reach_python_with_their_spaces_and_quotes(fresh, given, model, ks):
    ended = make(fresh, "-n", "stages", "RUN=spaced", f"SET={given}")
    if model is None:
        assert ended.returncode != 0 and "the value is not valid YAML" in ended.stderr.splitlines()[0]
        return
    assert ended.returncode == 0, ended.stderr
    config = yaml.safe_load((fresh / "runs" / "spaced" / "config.yaml").read_text())
    assert (config["model"]["name"], config["retrain"]["ks"]) == (model, ks)
    make(fresh, "clean", "RUN=spaced")


def test_a_configuration_is_named_with_its_dots_and_by_a_path_with_spaces_and_quotes(fresh):
    shutil.copy(fresh / "configs" / "toy.yaml", fresh / "configs" / "toy.v2.yaml")
    listing = make(fresh, "-n", "stages", "CONFIG=toy.v2")
    assert listing.returncode == 0 and "-p config toy.v2 -p run toy.v2" in listing.stdout
    other = fresh.parent / "o'brien's files"
    other.mkdir()
    shutil.copy(fresh / "configs" / "toy.yaml", other / "theirs.yaml")
    listing = make(fresh, "-n", "stages", f"CONFIG={other / 'theirs.yaml'}")
    assert listing.returncode == 0 and "-p config runs/theirs/config.yaml -p run theirs" in listing.stdout


def test_help_names_every_target():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    targets = next(line for line in makefile.splitlines() if line.startswith(".PHONY:")).split()[1:]
    shown = subprocess.run(
        ["make", "-s"], cwd=Path(__file__).parents[2], capture_output=True, text=True
    ).stdout
    assert all(f"make {target} " in shown for target in targets)


def test_fewer_cycles_make_another_core_the_last_one():
    """Nothing is newer then, so the parameters must tell: the SAEs that are there hold a core of a later
    cycle."""
    config = load_config("default")
    fewer = config.model_copy(update={"distill": config.distill.model_copy(update={"cycles": 6})})
    slices = [next(stage.slice for stage in stages(c) if stage.name == "retrain") for c in (config, fewer)]
    assert slices[0] != slices[1]
