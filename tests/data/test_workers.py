"""Processes that share out calls: their results, their exceptions, and what becomes of them when somebody is
killed."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from builders.models import save_model

from dmsae_lib.config.sections import ModelConfig
from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.data.workers import Workers
from dmsae_lib.store.artifacts import UserError

HERE = Path(__file__).parent


def settings(folder: Path) -> ModelConfig:
    return ModelConfig(name=str(folder), hook_name="blocks.0.hook_resid_post", context_size=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


def logit(model: LanguageModel, token: int, scale: float) -> tuple[float, int, int]:
    """A number from the model, this process, and its threads."""
    tokens = torch.tensor([[0, token]])
    return scale * float(model.logits(tokens)[0, 1, 5]), os.getpid(), torch.get_num_threads()


def fall(model: LanguageModel, how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "wrong":
        raise UserError("This item is wrong: take another.")
    time.sleep(0.01)


def test_every_item_is_computed_once_on_the_model_in_a_process_of_one_thread(folder):
    model = LanguageModel(settings(folder))
    items = {f"item {n}": n for n in range(3, 43)}
    here = dict(Workers(model).run(partial(logit, scale=2.0), items))
    assert list(here) == list(items) and {pid for _, pid, _ in here.values()} == {os.getpid()}
    workers = Workers(model, 2)
    try:
        there = dict(workers.run(partial(logit, scale=2.0), items))
        assert {key: found[0] for key, found in there.items()} == {
            key: found[0] for key, found in here.items()
        }
        pids = {pid for _, pid, _ in there.values()}
        assert len(pids) <= 2 and os.getpid() not in pids
        assert {threads for *_, threads in there.values()} == {1}
        assert list(workers.run(logit, {})) == []
        with pytest.raises(UserError, match="This item is wrong"):
            list(workers.run(fall, {"a": "fine", "b": "wrong", "c": "fine"}))
        again = dict(workers.run(partial(logit, scale=2.0), items))  # an exception costs no process
        # one may have done all the work before the other had started
        pids |= {pid for _, pid, _ in again.values()}
        assert len(pids) <= 2
        with pytest.raises(UserError, match="One of 2 worker processes was killed, .* lower threads"):
            list(workers.run(fall, {"a": "killed", "b": "fine"}))
    finally:
        workers.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def wait(model: LanguageModel, path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)


PARENT = """import sys
from types import SimpleNamespace
from test_workers import Path, Workers, settings, wait
if __name__ == "__main__":
    model, *files = sys.argv[1:]
    unloaded = SimpleNamespace(config=settings(Path(model)), device="cpu")
    list(Workers(unloaded, 2).run(wait, dict(zip(files, files))))
"""


def alive(pid: int) -> bool:
    """Also false of a process that has ended and waits for somebody to ask how."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc which processes there are")
def test_workers_do_not_outlive_a_killed_parent(folder, tmp_path):
    script, files = tmp_path / "parent.py", [tmp_path / "first", tmp_path / "second"]
    script.write_text(PARENT)
    path = ":".join(map(str, (HERE, HERE.parent, HERE.parents[1])))
    parent = subprocess.Popen([sys.executable, script, folder, *files], env=os.environ | {"PYTHONPATH": path})
    try:
        deadline = time.monotonic() + 120
        while not all(path.exists() and path.read_text() for path in files):
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        parent.kill()
        parent.wait()
    pids = [int(path.read_text()) for path in files]
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)
