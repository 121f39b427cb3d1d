"""status, compare, publish, figures and clean, on a synthetic run that is complete."""

import errno
import json
import os
import shutil
import signal
import subprocess
from multiprocessing import get_context
from pathlib import Path

import pytest
from builders import factory
from builders.clone import write_notebook
from builders.published import several_chains

from dmsae_lib.command import manage
from dmsae_lib.command.plan import states, write_plan
from dmsae_lib.command.stages import stages
from dmsae_lib.config.lock import lock
from dmsae_lib.config.run import Run
from dmsae_lib.distill.core_format import load_core
from dmsae_lib.report.summary import write_summary
from dmsae_lib.store.artifacts import UserError, sealed, sha256_file, write
from dmsae_lib.store.atomic import json_text


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A repository's folder around one complete run."""
    root = tmp_path_factory.mktemp("manage") / "a clone"
    for stage in stages(factory.config()):
        write_notebook(root / "notebooks" / f"{stage.notebook}.ipynb")
    (root / "configs").mkdir()
    run = factory.build_run(root)
    write_plan(run)
    made = [stage for stage in stages(run.config) if not stage.optional]
    for stage in made:
        # nothing in them goes into the summary
        if stage.artefact.startswith(("saebench/index", "learning_rate")):
            with write(run.folder / stage.artefact, "synthetic"):
                pass
        write_notebook(run.folder / "notebooks" / f"{stage.name}.ipynb", "1")
    write_summary(run, {})
    for n, stage in enumerate(made):
        os.utime(run.folder / stage.artefact / "manifest.json", (2e9 + n, 2e9 + n))
    return root


@pytest.fixture
def run(template, tmp_path) -> Run:
    root = tmp_path / "a clone"
    shutil.copytree(template, root)
    return Run(factory.config(), "synthetic", root)


@pytest.fixture
def one_figure(monkeypatch) -> None:
    """Draw one file in place of all figures, which take seconds."""
    monkeypatch.setattr(
        "dmsae_lib.figures.draw_all", lambda _, figures: [(figures / "one.png").write_text("1")]
    )


def published_files(run: Run) -> dict[str, bytes]:
    folders = (run.root / "results", run.root / "figures")
    return {
        str(path.relative_to(run.root)): path.read_bytes()
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_status_prints_each_stage_and_writes_nothing(run, capsys):
    """That its states are what make would do is tested with the plan."""
    shutil.rmtree(run.folder / "cycle_3" / "core")
    before, found = sorted(run.folder.rglob("*")), states(run)
    assert found["saebench_suite"] == "optional" and found["cycle_3_distill"] == "missing"
    assert found["cycle_4_train"] == "stale: cycle_3/core is made again"
    manage.status(run)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "runs/synthetic" and lines[1].split()[:2] == ["stage", "state"]
    assert [line.split()[0] for line in lines[2:]] == list(found)
    assert "present" in lines[2] and "unknown (no git history)" in lines[2]
    assert sorted(run.folder.rglob("*")) == before


def test_status_tells_which_code_made_a_stage(run, monkeypatch):
    def git(*words: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *names, *words], cwd=run.root, check=True, capture_output=True, text=True
        ).stdout

    (run.root / "dmsae_lib").mkdir()
    (run.root / "dmsae_lib" / "sae.py").write_text("1")
    git("init", "-q")
    git("add", "dmsae_lib", "notebooks")
    git("commit", "-q", "-m", "one")
    commit = git("rev-parse", "HEAD").strip()
    harvest = stages(run.config)[0]
    (run.folder / "notebooks" / "harvest.json").write_text('{"seconds": 1.5}')

    def code(**provenance) -> str:
        path = run.folder / "harvest" / "provenance.json"
        path.write_text(json.dumps({"created": "2026-01-02T03:04:05+00:00"} | provenance))
        manage.code_state.cache_clear()
        return manage.made_by(run, harvest)

    assert code(commit=commit, dirty=False) == ("2026-01-02 03:04", "1.5", "same as now")
    assert code(commit=commit, dirty=True)[2] == f"{commit[:8]} with uncommitted changes"
    (run.root / "README.md").write_text("unrelated")
    git("add", "README.md")
    git("commit", "-q", "-m", "two")
    assert code(commit=commit, dirty=False)[2] == "same as now"
    (run.root / "dmsae_lib" / "sae.py").write_text("2")
    assert code(commit=commit, dirty=False)[2] == f"other: {commit[:8]}"
    assert code(commit="0" * 40, dirty=False)[2] == "other: 00000000"


def test_publish_copies_summary_core_and_notebooks_and_draws_the_figures(run, one_figure, capsys):
    manage.publish(run)
    files = published_files(run)
    for name in (
        "summary.json",
        "manifest.json",
        "cycles.csv",
        "core/core.json",
        "notebooks/cycle_7_distill.ipynb",
    ):
        assert f"results/synthetic/{name}" in files
    assert "figures/synthetic/one.png" in files and not any("/." in name for name in files)
    assert files["results/synthetic/summary.json"] == (run.folder / "summary" / "summary.json").read_bytes()
    assert "published runs/synthetic" in capsys.readouterr().out
    shutil.rmtree(run.root / "figures")
    manage.figures(run)
    assert published_files(run) == files


def test_publish_is_all_or_nothing(run, one_figure, monkeypatch):
    manage.publish(run)
    before = published_files(run)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dmsae_lib.figures.draw_all", full)
        with pytest.raises(UserError, match="the disk is full"):
            manage.publish(run)
    assert published_files(run) == before

    moves, move = [], os.replace

    def the_last_fails(old: Path, new: Path) -> None:
        moves.append(new)
        full() if len(moves) == 6 else move(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(
            "dmsae_lib.figures.draw_all", lambda results, figures: (figures / "one.png").write_text("2")
        )
        patch.setattr(os, "replace", the_last_fails)
        with pytest.raises(UserError, match="the disk is full"):
            manage.publish(run)
    assert moves[5] == run.root / "figures" / "synthetic" and published_files(run) == before


def test_publish_refuses_a_run_that_is_incomplete_damaged_or_of_another_name(run, one_figure):
    other = Run(run.config, "synthetic--1234abcd", run.root)
    with pytest.raises(UserError, match="not the plain run of synthetic: say with AS=name"):
        manage.publish(other)
    with pytest.raises(UserError, match="AS is '../x'"):
        manage.publish(run, "../x")
    for action in (manage.publish, manage.figures):
        for name in ("../../results/other", "..", "/tmp/x", ".hidden", "a/b", "x\n"):
            with pytest.raises(UserError, match="use letters, digits"):
                action(run, name)
    (run.folder / "summary" / "cycles.csv").write_text("broken")
    with pytest.raises(UserError, match="cycles.csv does not match its hash"):
        manage.publish(run)
    (run.folder / "notebooks" / "summary.ipynb").unlink()
    with pytest.raises(UserError, match="not complete .summary is stale"):
        manage.publish(run)
    assert published_files(run) == {}


def test_compare_tells_chance_from_disagreement_and_fails_only_if_strict(run, one_figure, capsys):
    assert manage.compare(run) == 0
    assert "nothing is published to compare runs/synthetic with" in capsys.readouterr().out
    manage.publish(run)
    capsys.readouterr()
    assert manage.compare(run, strict=True) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and ", 0 beyond it" in said[0] and said[1] == "Verdicts: all as published."
    path = run.root / "results" / "synthetic" / "summary.json"
    summary = json.loads(path.read_text())
    summary["cycles"][0]["fvu"]["full"] += 1e-5
    spoil(path, summary)
    assert manage.compare(run) == 0 and manage.compare(run, strict=True) == 1
    assert "DISAGREES" not in capsys.readouterr().out
    before = summary["claims"]["C1"]["verdict"]
    summary["claims"]["C1"]["verdict"] = "not decidable" if before != "not decidable" else "holds"
    summary["language_model"]["clean_loss"] += 1
    spoil(path, summary)
    assert manage.compare(run) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[1:3]] == ["language_model.clean_loss", "claims.C1"]
    assert f"Verdicts: C1 {before}, published: {summary['claims']['C1']['verdict']}." in said
    assert "THIS RUN DISAGREES" in said and (run.folder / "summary" / "summary.json").is_file()
    summary["inputs"]["config_hash"] = "another"
    spoil(path, summary)
    assert manage.compare(run) == 0
    said = capsys.readouterr().out
    assert "has other settings" in said and "DISAGREES" not in said
    path.write_text(path.read_text() + " ")
    with pytest.raises(UserError, match="results/synthetic is damaged .summary.json does not match its hash"):
        manage.compare(run)


def spoil(path, summary):
    """Publish other numbers, with hashes that fit."""
    path.write_text(json.dumps(summary))
    manifest = json.loads(path.with_name("manifest.json").read_text())
    manifest["files"]["summary.json"] = sha256_file(path)
    del manifest["hash"]
    path.with_name("manifest.json").write_text(json_text(sealed(manifest)))


def test_clean_names_what_it_removes_and_touches_nothing_else(run, one_figure, capsys):
    manage.publish(run)
    before = published_files(run)
    capsys.readouterr()
    manage.clean(run)
    said = capsys.readouterr().out
    assert "removing runs/synthetic/cycle_0 (" in said and not run.folder.exists()
    assert published_files(run) == before
    manage.clean(run)
    assert capsys.readouterr().out == "there is no runs/synthetic: nothing to remove\n"


def test_mend_removes_what_is_damaged_and_its_stages_are_made_again(run, capsys):
    manage.mend(run)
    said = capsys.readouterr().out
    assert said.endswith("artefacts checked, 0 of them damaged and removed\n")
    assert set(states(run).values()) == {"present", "optional"}
    (run.folder / "retrain" / "k32" / "none-seed1" / "manifest.json").write_text("{}")
    manage.mend(run)  # one of the many that its stage makes
    said = capsys.readouterr().out
    assert (
        "none-seed1 is damaged (manifest.json cannot be read): removed" in said
        and "1 of them damaged" in said
    )
    assert not (run.folder / "retrain" / "k32" / "none-seed1").exists()
    assert states(run)["retrain"] == "stale: its notebook did not run to the end"
    assert states(run)["saebench"] == "stale: retrain/index is made again"
    assert states(run)["cycle_7_distill"] == "present"
    (run.folder / "cycle_3" / "core" / "core.json").write_text("broken")
    with write(run.folder / "cycle_1" / ".sae.checkpoint", "checkpoint") as writer:
        writer.json("state.json", {})
    (run.folder / "cycle_1" / ".sae.checkpoint" / "state.json").unlink()
    (run.folder / ".half.json.tmp").touch()
    manage.mend(run)
    said = capsys.readouterr().out
    assert "cycle_3/core is damaged (core.json does not match its hash): removed" in said
    assert "3 of them damaged" in said  # with the index that names the SAE removed before
    assert not any(
        (run.folder / name).exists() for name in ("cycle_3/core", "cycle_1/.sae.checkpoint", ".half.json.tmp")
    )
    found = states(run)
    assert (
        found["cycle_3_distill"] == "missing"
        and found["cycle_3_train"] == found["cycle_1_train"] == "present"
    )
    manage.mend(run)
    assert "0 of them damaged" in capsys.readouterr().out


def test_mend_sees_that_one_of_many_is_wholly_gone(run, capsys):
    shutil.rmtree(run.folder / "retrain" / "k32" / "none-seed1")
    manage.mend(run)
    assert "k32/none-seed1 is gone): removed" in capsys.readouterr().out
    assert states(run)["retrain"] == "missing"


def test_clean_of_a_link_leaves_what_it_points_to(run, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    os.replace(run.folder, elsewhere)
    run.folder.symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    manage.clean(run)
    assert "is a link to" in capsys.readouterr().out and not run.folder.is_symlink()
    assert set(before) <= set(elsewhere.rglob("*"))


def publish_until(root: Path, fatal: int) -> None:
    """Publish the synthetic run below ``root``, and be killed before a rename."""
    from dmsae_lib import figures as plots

    move, moves = os.replace, []

    def killed(old: Path, new: Path) -> None:
        moves.append(new)
        if len(moves) >= fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        move(old, new)

    os.replace = killed
    plots.draw_all = lambda results, figures: (figures / "one.png").write_text("1")
    manage.publish(Run(factory.config(), "synthetic", root))


def test_a_killed_publish_loses_nothing(run, one_figure, monkeypatch):
    """Killed between any two of the renames: the next one finds the published folders again."""
    manage.publish(run)
    before = published_files(run)
    (run.root / "results" / "synthetic" / "kept").touch()
    processes = get_context("forkserver")  # this process has threads, whose locks a fork of it would inherit
    processes.set_forkserver_preload(["dmsae_lib.distill.core_format", "dmsae_lib.figures"])
    for fatal in range(1, 7):
        child = processes.Process(target=publish_until, args=(run.root, fatal))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        with monkeypatch.context() as patch:
            patch.setattr("dmsae_lib.figures.draw_all", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                manage.publish(run)
        assert (run.root / "results" / "synthetic" / "kept").exists()
        assert {
            name: text for name, text in published_files(run).items() if not name.endswith("kept")
        } == before


def test_clean_and_publish_leave_a_run_alone_that_is_being_computed(run):
    held = lock(run)
    for action in (manage.clean, manage.publish):
        with pytest.raises(UserError, match="is in use by process"):
            action(run)
    os.close(held)
    assert run.folder.exists() and not published_files(run)


def test_every_core_that_was_retrained_is_published(tmp_path, one_figure, monkeypatch):
    run = factory.build_run(tmp_path, several_chains(), scored=False)
    write_summary(run)
    monkeypatch.setattr(manage, "states", lambda run: {})
    manage.publish(run)
    published = tmp_path / "results" / "synthetic"
    cores = {chain: load_core(published / "cores" / chain) for chain in ("seed1", "seed2", "relu0", "relu1")}
    cores["main"] = load_core(published / "core")
    assert {name: core.record["distilled"]["chain"] for name, core in cores.items()} == {n: n for n in cores}
    sparsities = {core.record["distilled"]["core_sparsity"] for n, core in cores.items() if "relu" in n}
    assert sparsities == {"relu"} and len(list(published.glob("cores/*"))) == 4


# ------------------------------------------------------------------------------------------------------ the
# core


def test_the_core_goes_into_the_run_and_with_its_card_into_a_folder(run, tmp_path, capsys):
    manage.core(run)
    made = load_core(run.folder / "core")
    assert (
        len(made) == 108
        and f"wrote runs/synthetic/core: 108 latents, content hash {made.hash[:12]}"
        in capsys.readouterr().out
    )
    manage.push_core(run, str(tmp_path / "shared"), licence="mit")
    card = (tmp_path / "shared" / "README.md").read_text()
    assert load_core(tmp_path / "shared").hash == made.hash and "| 64 | distilled | 3 |" in card
    assert f"pushed it to {tmp_path / 'shared'}\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="'' is neither a folder nor a Hub id"):
        manage.push_core(run, "", licence="mit")
    shutil.rmtree(run.folder / "summary")
    manage.push_core(run, str(tmp_path / "shared"), licence="mit")
    assert "the card holds no results" in capsys.readouterr().out
