"""Artefacts: whole or not at all, every damage named, hashes that depend on content and parents alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders.limits import file_size_limit, without_permission

from dmsae_lib.store import artifacts, atomic
from dmsae_lib.store.artifacts import (
    ArtifactError,
    UserError,
    load,
    remove,
    repository_root,
    sweep,
    write,
    write_json,
)
from dmsae_lib.store.atomic import explain_errors, replacing, write_text

ROOT = Path(__file__).parents[2]


def make(folder: Path, value: float = 1.0, parents: dict[str, str] | None = None) -> artifacts.Artifact:
    with write(folder, "toy", parents) as writer:
        writer.json("metrics.json", {"value": value})
        writer.csv("history.csv", [{"step": 1, "loss": value}, {"step": 2, "loss": value / 2}])
        writer.tensors("sae.safetensors", {"rows": torch.full((3, 4), value), "columns": torch.eye(3).T})
        writer.path("x.txt").write_text("12345")
    return load(folder, "toy")


@pytest.fixture
def made(tmp_path) -> artifacts.Artifact:
    return make(tmp_path / "an artefact")


def value_of(folder: Path) -> float:
    return load(folder, "toy").json("metrics.json")["value"]


def test_what_was_written_is_read_again(made):
    assert made.json("metrics.json") == {"value": 1.0}
    assert made.csv("history.csv") == [{"step": "1", "loss": "1.0"}, {"step": "2", "loss": "0.5"}]
    tensors = made.tensors("sae.safetensors")
    assert torch.equal(tensors["rows"], torch.ones(3, 4)) and torch.equal(tensors["columns"], torch.eye(3))
    assert made.path("x.txt").read_text() == "12345"
    assert sorted(made.files) == ["history.csv", "metrics.json", "sae.safetensors", "x.txt"]
    assert [path.name for path in made.folder.parent.iterdir()] == ["an artefact"]


def test_provenance_says_where_when_and_with_what(made):
    found = made.provenance
    assert set(found) == {"commit", "dirty", "created", "seconds", "hardware", "versions"}
    assert (
        found["versions"]["torch"] == torch.__version__.split("+")[0]
        or found["versions"]["torch"] == torch.__version__
    )
    assert found["hardware"]["cores"] == os.cpu_count() and found["seconds"] >= 0


def test_an_exception_inside_leaves_the_old_one(made):
    with pytest.raises(ZeroDivisionError), write(made.folder, "toy") as writer:
        writer.json("metrics.json", {"value": 2})
        raise ZeroDivisionError
    assert value_of(made.folder) == 1.0
    assert [path.name for path in made.folder.parent.iterdir()] == ["an artefact"]


def test_a_kill_inside_leaves_the_old_one(made):
    code = (
        "import sys, time; from dmsae_lib.store.artifacts import write\n"
        "with write(sys.argv[1], 'toy') as writer:\n"
        "    writer.json('metrics.json', {'value': 2}); print('written', flush=True); time.sleep(60)"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, made.folder], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert writer.stdout.readline() == "written\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert value_of(made.folder) == 1.0
    assert value_of(make(made.folder, 3.0).folder) == 3.0
    # what was left over is gone
    assert [path.name for path in made.folder.parent.iterdir()] == ["an artefact"]


@pytest.mark.parametrize("then", ["load", "write", "failing write"])
def test_killed_between_the_two_renames_the_old_one_comes_back(made, then):
    os.replace(made.folder, made.folder.with_name(f".{made.folder.name}.old"))
    (made.folder.with_name(f".{made.folder.name}.writing") / "half").mkdir(parents=True)
    if then == "write":
        make(made.folder, 2.0)
    elif then == "failing write":
        with pytest.raises(ZeroDivisionError), write(made.folder, "toy"):
            raise ZeroDivisionError
    assert value_of(made.folder) == (2.0 if then == "write" else 1.0)


def test_killed_after_both_renames_the_new_one_stays(made):
    """Also if the next writer is killed before it was done."""
    old, writing = (made.folder.with_name(f".{made.folder.name}.{ending}") for ending in ("old", "writing"))
    assert value_of(make(made.folder, 2.0).folder) == 2.0
    make(old, 1.0)
    child = os.fork()
    if not child:
        with write(made.folder, "toy") as writer:
            writer.json("metrics.json", {"value": 3.0})
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (writing / "metrics.json").is_file()
    with pytest.raises(ZeroDivisionError), write(made.folder, "toy"):
        raise ZeroDivisionError
    assert value_of(made.folder) == 2.0
    assert [path.name for path in made.folder.parent.iterdir()] == ["an artefact"]


@pytest.mark.parametrize("fatal", [1, 2, 3, 4])
def test_several_are_replaced_together_or_not_at_all(tmp_path, monkeypatch, fatal):
    def fill(text: str) -> None:
        with replacing(*folders) as new:
            for place in new:
                (place / "x").write_text(text)

    folders, real, moves = [tmp_path / "a", tmp_path / "b"], os.replace, []
    fill("old")

    def failing(source, target):
        moves.append(target)
        if len(moves) == fatal:
            raise OSError(5, "broken")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError):
            fill("new")
    assert [(folder / "x").read_text() for folder in folders] == ["old", "old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("before", ["whole", "moved aside"])
def test_a_kill_at_any_rename_leaves_the_old_one_or_the_new(tmp_path, before):
    for fatal in range(1, 20):
        folder = tmp_path / str(fatal)
        make(folder)
        if before == "moved aside":  # by a writer that was killed
            os.replace(folder, folder.with_name(f".{fatal}.old"))
        child = os.fork()
        if not child:
            done = []

            def counted(real, done=done, fatal=fatal):
                def call(*arguments):
                    done.append(real)
                    if len(done) == fatal:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*arguments)

                return call

            os.replace, atomic.delete = counted(os.replace), counted(atomic.delete)
            make(folder, 2.0)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert value_of(folder) in ((2.0,) if status == 0 else (1.0, 2.0))
        sweep(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]
        remove(folder)
        if status == 0:
            assert fatal > 3
            return
    raise AssertionError


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 3)


def test_two_writers_of_one_artefact_do_not_meet(made):
    with write(made.folder, "toy") as writer:
        writer.json("metrics.json", {"value": 2.0})
        with (
            pytest.raises(UserError, match="is being written by another process: wait"),
            write(made.folder, "toy"),
        ):
            raise AssertionError
    assert value_of(made.folder) == 2.0
    assert [path.name for path in made.folder.parent.iterdir()] == ["an artefact"]


def test_names_stay_inside_the_artefact(tmp_path):
    for name in ("../x.json", "/x.json", "a/x.json", ".."):
        with (
            pytest.raises(UserError, match="cannot be the name of a file"),
            write(tmp_path / "a", "toy") as writer,
        ):
            writer.json(name, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["metrics.json", "history.csv", "sae.safetensors", "x.txt", "manifest.json", "provenance.json"]
)
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_every_damaged_file_is_detected_and_named(made, name, damage):
    damage(made.path(name))
    with pytest.raises(ArtifactError) as caught:
        load(made.folder, "toy", "stages STAGE=toy")
    message = str(caught.value)
    if (damage, name) == (Path.unlink, "manifest.json"):
        assert message == f"There is no toy artefact in {made.folder}: run `make stages STAGE=toy`."
    else:
        assert message.startswith(f"{made.folder} is damaged ({name}") and message.count(".\n") == 0
        assert message.endswith("delete that folder and run `make stages STAGE=toy`.")


@pytest.mark.parametrize(
    "edit",
    [
        {"parents": {"core": "0" * 64}},
        {"kind": "other"},
        {"schema": 3},
        {"hash": "0" * 64},
        {"files": {}},
        {"files": None},
    ],
)
def test_an_edited_manifest_is_detected(made, edit):
    path = made.path("manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(ArtifactError, match="manifest.json does not match its own hash"):
        load(made.folder, "toy")


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "\x00", '{"schema": 1'])
def test_a_manifest_that_is_none_is_one_sentence(made, text):
    made.path("manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="manifest.json cannot be read"):
        load(made.folder, "toy")


def test_white_space_counts_too(made):
    for name in ("manifest.json", "provenance.json"):
        text = made.path(name).read_text()
        made.path(name).write_text(text.replace("\n", "\t", 1))
        with pytest.raises(ArtifactError, match=f"damaged .{name} does not match its own hash"):
            load(made.folder, "toy")
        made.path(name).write_text(text)


@pytest.mark.parametrize(
    "name, named",
    [
        ("default", "CONFIG=default"),
        ("default--12345678", "CONFIG=runs/default--12345678/config.yaml RUN=default--12345678"),
    ],
)
def test_inside_a_run_the_message_says_what_to_type(tmp_path, name, named):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "default.yaml").touch()
    made = make(tmp_path / "runs" / name / "cycle_0" / "sae")
    (tmp_path / "runs" / name / "config.yaml").touch()
    flip(made.path("metrics.json"))
    with pytest.raises(ArtifactError) as caught:
        load(made.folder, "toy", "stages STAGE=cycle_0_train")
    assert str(caught.value).endswith(
        f"(metrics.json does not match its hash): run `make mend {named}`, which makes it again."
    )
    remove(made.folder)
    with pytest.raises(ArtifactError) as caught:
        load(made.folder, "toy", "stages STAGE=cycle_0_train")
    assert (
        str(caught.value)
        == f"There is no toy artefact in {made.folder}: run `make stages STAGE=cycle_0_train {named}`."
    )


def test_another_kind_is_refused(made):
    with pytest.raises(
        ArtifactError, match="holds a toy artefact, schema 2; a core artefact, schema 2, is needed"
    ):
        load(made.folder, "core")


def test_the_hash_depends_on_content_kind_and_parents_and_on_nothing_else(tmp_path, monkeypatch):
    first = make(tmp_path / "one", parents={"core": "a", "sae": "b"})
    monkeypatch.setattr(artifacts, "provenance", lambda root, seconds: {"commit": "another", "seconds": 1e9})
    same = make(tmp_path / "two", parents={"sae": "b", "core": "a"})
    assert same.provenance != first.provenance and same.hash == first.hash
    others = [
        make(tmp_path / "three", 2.0, {"core": "a", "sae": "b"}),
        make(tmp_path / "four", parents={"core": "a"}),
        make(tmp_path / "five", parents={"core": "a", "sae": "c"}),
    ]
    assert len({artifact.hash for artifact in [first, *others]}) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1, {"deep": float("-inf")}]])
def test_json_refuses_what_is_no_number(tmp_path, value):
    path = tmp_path / "x.json"
    write_json(path, 1)
    with pytest.raises(ValueError):
        write_json(path, value)
    assert path.read_text() == "1\n" and list(tmp_path.iterdir()) == [path]


# Failing disks. Each writes half a megabyte, by one of the ways in which stages write.
SIZE = 2**19
WAYS = {
    "json": lambda writer: writer.json("big.json", "x" * SIZE),
    "csv": lambda writer: writer.csv("big.csv", [{"text": "x" * SIZE}]),
    "safetensors": lambda writer: writer.tensors("big.safetensors", {"x": torch.zeros(SIZE // 4)}),
    "a path": lambda writer: writer.path("big.txt").write_text("x" * SIZE),
}


def assert_refused(folder: Path, way: str, reason: str) -> None:
    with pytest.raises(UserError) as caught, write(folder, "toy") as writer:
        WAYS[way](writer)
    message = str(caught.value)
    assert message.startswith(f"Cannot write {folder}: {reason}") and "\n" not in message


@pytest.mark.parametrize("way", WAYS)
def test_a_file_size_limit_is_one_sentence_and_the_old_artefact_stays(made, way):
    with file_size_limit(SIZE // 4):
        assert_refused(made.folder, way, "the file size limit is reached")
    assert value_of(made.folder) == 1.0
    assert [path.name for path in made.folder.parent.iterdir()] == ["an artefact"]


@pytest.mark.parametrize("way", WAYS)
def test_a_full_disk_is_one_sentence_and_the_old_artefact_stays(small_disk, way):
    made = make(small_disk("256k") / "an artefact")
    assert_refused(made.folder, way, "the disk is full: free some space")
    assert value_of(made.folder) == 1.0
    assert [path.name for path in made.folder.parent.iterdir()] == ["an artefact"]


def test_a_read_only_file_system_is_one_sentence_also_for_root(small_disk):
    made = make(small_disk("256k") / "an artefact")
    subprocess.run(["mount", "-o", "remount,ro", made.folder.parent], check=True)
    assert_refused(made.folder, "json", "the file system is read-only")
    with pytest.raises(UserError, match="the file system is read-only"):
        write_json(made.folder.parent / "x.json", 1)
    assert value_of(made.folder) == 1.0


def test_a_folder_without_permission_is_one_sentence(made):
    with without_permission(made.folder.parent):
        assert_refused(made.folder, "json", "there is no permission to write there")
        with pytest.raises(UserError, match="there is no permission to write there"):
            write_json(made.folder.parent / "x.json", 1)
        assert value_of(made.folder) == 1.0
    assert [path.name for path in made.folder.parent.iterdir()] == ["an artefact"]


# What killed processes leave behind


def test_sweeping_keeps_what_counts_and_what_is_being_written(made, tmp_path):
    make(tmp_path / "replaced", 5.0)
    os.replace(tmp_path / "replaced", tmp_path / ".replaced.old")  # killed between two renames
    make(tmp_path / ".an artefact.old")  # killed after both
    for name in (".killed.writing", "..gone.checkpoint.removed", ".scratch-abc", "notebooks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half.json").touch()
    for name in (
        ".x.json.tmp",
        "notebooks/.harvest.running.ipynb",
        "notebooks/harvest.failed.ipynb",
        ".lock",
    ):
        (tmp_path / name).touch()
    for name, parents in (
        ("done", {"core": "a"}),
        (".done.checkpoint", {"core": "a"}),
        (".other.checkpoint", {}),
        ("changed", {"core": "b"}),
        (".changed.checkpoint", {"core": "c"}),
    ):
        make(tmp_path / name, parents=parents)
    with write(tmp_path / "living", "toy"):
        sweep(tmp_path)
        left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [
        ".changed.checkpoint",
        ".living.writing",
        ".lock",
        ".other.checkpoint",
        "an artefact",
        "changed",
        "done",
        "notebooks",
        "replaced",
    ]
    assert sorted(path.name for path in (tmp_path / "notebooks").iterdir()) == [
        "half.json",
        "harvest.failed.ipynb",
    ]
    assert (
        value_of(tmp_path / "replaced") == 5.0
        and value_of(made.folder) == 1.0
        and (tmp_path / "living").is_dir()
    )


def test_a_kill_while_deleting_leaves_no_half_artefact(made, monkeypatch):
    def killed(path, *_, **__):
        next(Path(path).glob("*.csv")).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(made.folder)
    monkeypatch.undo()
    assert not made.folder.exists()
    sweep(made.folder.parent)
    assert list(made.folder.parent.iterdir()) == []


def test_deleting_a_link_leaves_what_it_points_to(made, tmp_path):
    (tmp_path / "link").symlink_to(made.folder)
    remove(tmp_path / "link")
    assert value_of(made.folder) == 1.0 and not (tmp_path / "link").exists()
    (tmp_path / "link").symlink_to(made.folder)
    make(tmp_path / "link", 3.0)
    assert (
        value_of(made.folder) == 1.0
        and value_of(tmp_path / "link") == 3.0
        and not (tmp_path / "link").is_symlink()
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("part"), "X is no model (KeyError: 'part'); choose another."),
        (RuntimeError("first.\nsecond"), "X is no model (RuntimeError: first. second); choose another."),
        (OSError(), "X is no model (OSError); choose another."),
        (UserError("Our own sentence."), "Our own sentence."),
    ],
)
def test_what_a_library_raises_is_one_sentence_with_a_remedy(error, said):
    with pytest.raises(UserError) as caught, explain_errors("X is no model", "choose another"):
        raise error
    assert str(caught.value) == said
    with pytest.raises(KeyboardInterrupt), explain_errors("X is no model", "choose another"):
        raise KeyboardInterrupt


def test_text_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "plan.mk"
    write_text(path, "old")
    with file_size_limit(2), pytest.raises(UserError, match="the file size limit is reached"):
        write_text(path, "newer")
    monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    child = os.fork()
    if not child:
        write_text(path, "newer")
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert path.read_text() == "old"


@pytest.mark.parametrize("around", ["nothing", "another repository"])
def test_a_tree_without_git_history_has_no_commit(tmp_path, around):
    """A downloaded zip; unpacked inside somebody else's repository, that one's commit must not be taken for
    ours."""
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    if around == "another repository":
        subprocess.run([*git, "init", "-q", tmp_path], check=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], cwd=tmp_path, check=True)
    clone = tmp_path / "a clone"
    (clone / "configs").mkdir(parents=True)
    (clone / "dmsae_lib").mkdir()
    shutil.copy(ROOT / "dmsae_lib" / "__init__.py", clone / "dmsae_lib")
    shutil.copytree(ROOT / "dmsae_lib" / "store", clone / "dmsae_lib" / "store")
    code = (
        "from dmsae_lib.store.artifacts import repository_root; from dmsae_lib.store.provenance import "
        "code_state; print(code_state(repository_root()))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True)
    assert ended.stdout == "{'commit': None, 'dirty': None}\n", ended.stderr


def test_the_root_is_found_from_any_folder_inside(monkeypatch):
    for inside in (ROOT, ROOT / "notebooks", ROOT / "dmsae_lib" / "embedded"):
        monkeypatch.chdir(inside)
        assert repository_root() == ROOT


def test_made_is_the_artefact_of_these_parents_none_of_others_and_an_error_where_it_is_damaged(tmp_path):
    folder, parents = tmp_path / "a", {"sae": "1" * 64}
    assert artifacts.made(folder, "thing", parents) is None
    with artifacts.write(folder, "thing", parents) as writer:
        writer.json("a.json", 1)
    found = artifacts.made(folder, "thing", parents)
    assert found and found.hash == artifacts.load(folder, "thing").hash
    for others in ({"sae": "2" * 64}, {}, parents | {"core": "3" * 64}):
        assert artifacts.made(folder, "thing", others) is None
    os.replace(folder, atomic.old(folder))  # a writer was killed between its two renames
    assert artifacts.made(folder, "thing", parents)
    (folder / "a.json").write_text("2")
    with pytest.raises(artifacts.ArtifactError, match="a.json does not match its hash"):
        artifacts.made(folder, "thing", parents)
