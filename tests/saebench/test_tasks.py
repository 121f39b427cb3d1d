"""Which scores are asked for, which are there already, and that neither company nor processes decide one."""

import subprocess
import sys

import pytest
import torch
from builders.clone import TOY
from builders.models import save_model
from builders.saebench import load_model, make_bench

from dmsae_lib import saebench
from dmsae_lib.config import RunConfig, sections
from dmsae_lib.config.run import Run as PlainRun
from dmsae_lib.config.sections import SaebenchConfig
from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.data.workers import Workers
from dmsae_lib.sae.model import MatryoshkaSAE, save_sae
from dmsae_lib.saebench import Eval, Task, probing
from dmsae_lib.saebench.adapter import undisturbed
from dmsae_lib.store.artifacts import Artifact, load, write

SET = "145_disease_class_digestive system diseases"  # 868 texts
CORE = Task(8, "none", 0, "core", 0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> LanguageModel:
    return load_model(save_model(tmp_path_factory.mktemp("models") / "tiny", confidence=8.0))


def save(folder, llama, seed: int = 0) -> Artifact:
    sae = MatryoshkaSAE(llama.d_model, 12, (4,))
    sae.initialise(torch.Generator().manual_seed(seed), torch.randn(8, llama.d_model))
    with write(folder, "sae") as writer:
        save_sae(writer, sae, scale=1.0)
    return load(folder, "sae")


def rows(llama):
    tokens = torch.randint(3, 300, (4, 32), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = llama.bos
    return tokens.numpy()


def asking(suite: dict, bench: dict | None = None, **retrain) -> RunConfig:
    """A configuration with a chain ``relu`` of seeds 3 and 2, beside a main one of seeds 0 and 1."""
    chain = {"name": "relu", "core_sparsity": "relu", "seeds": [3, 2], "retrain": ["distilled"]}
    asked = {"evals": ["core", "sparse_probing", "absorption"], "eval_seeds": [0, 5]} | suite
    sections = {
        "training": TOY["training"] | {"core_sparsity": "batchtopk"},
        "distill": TOY["distill"] | {"chains": [chain]},
        "retrain": {"ks": [4, 8], "seeds": [0, 1]} | retrain,
        "saebench": {"suite": asked} | (bench or {}),
    }
    return RunConfig.model_validate(TOY | {"name": "toy"} | sections)


class Run:
    """Where a run keeps scores."""

    def __init__(self, folder):
        self.folder = folder

    def scores(self, k, arm, seed, chain):
        return self.folder / chain / f"k{k}" / f"{arm}-seed{seed}"


def test_neither_company_nor_processes_decide_a_score(llama, tmp_path):
    bench = make_bench(tmp_path / "by one", rows(llama), [SET], probing_ks=[1, 5])
    folders = {arm: save(tmp_path / arm, llama, seed).folder for seed, arm in enumerate(("none", "random"))}
    names = ("core", "sparse_probing")
    tasks = {Task(8, arm, 0, name, 0): folder for arm, folder in folders.items() for name in names}
    alone = {}
    for task, folder in tasks.items():
        alone |= dict(saebench.score_all({task: folder}, bench, Workers(llama)))
    assert len({str(result) for result in alone.values()}) == len(tasks)
    one = probing.probing_baselines(Workers(llama), bench)
    two, other = Workers(llama, 2), make_bench(tmp_path / "by two", rows(llama), [SET], probing_ks=[1, 5])
    try:
        assert dict(saebench.score_all(tasks, other, two)) == alone
        assert probing.probing_baselines(two, other) == one
    finally:
        two.close()
    first, second = (probing.prepare_probing(Workers(llama), each) for each in (bench, other))
    assert first.hash == second.hash


def test_scores_are_known_by_sae_and_by_the_settings_that_decide_them(llama, tmp_path):
    settings, run = SaebenchConfig(probing_sets=[]), Run(tmp_path)
    sae, other = save(tmp_path / "a", llama), save(tmp_path / "b", llama, seed=1)
    bench = make_bench(tmp_path, rows(llama))
    assert CORE.scored(run, sae, settings) is None
    ((_, result),) = saebench.score_all({CORE: sae.folder}, bench, Workers(llama))
    kept = CORE.keep(run, sae, settings, result)
    assert kept.json("scores.json") == CORE._asdict() | {
        "sae": sae.hash,
        "settings": {"core_rows": 64},
        "result": result,
    }
    assert CORE.scored(run, sae, settings).hash == kept.hash
    assert CORE.scored(run, other, settings) is None
    assert CORE.scored(run, sae, SaebenchConfig(core_rows=3)) is None
    assert CORE.scored(run, sae, SaebenchConfig(probing_ks=[3])).hash == kept.hash  # does not concern core

    task = CORE._replace(name="sparse_probing")
    ((_, result),) = saebench.score_all({task: sae.folder}, bench, Workers(llama))
    assert result["metrics"] == {} and "no set that a probe on all channels can do" in result["not_run"]
    task.keep(run, sae, settings, result)
    assert task.scored(run, sae, settings) is None  # it may run another time


def test_the_suite_spares_what_is_scored_already_and_draws_again_on_the_first_training_seed_alone():
    config = asking({"ks": [8]}, controls={"random": 2})
    assert {task.name for task in saebench.reproduced_tasks(config)} == {"core", "sparse_probing"}
    found = saebench.suite_tasks(config)
    assert not set(found) & set(saebench.reproduced_tasks(config)) and len(set(found)) == len(found)
    asked = [(0, "sparse_probing", 5), (0, "absorption", 0), (0, "absorption", 5), (1, "absorption", 0)]
    assert set(found) == {Task(8, arm, *rest) for arm in ("none", "distilled") for rest in asked}


def test_the_saes_of_other_chains_are_scored_where_they_are_asked_for():
    """Each chain has seeds of its own, and so a first one; what is trained elsewhere is there once."""
    chains = {"chains": ["main", "relu"]}
    config = asking({}, chains, imported={"theirs": "release:sae"})
    mine = {(k, arm, seed, "main") for k in (4, 8) for arm in ("none", "distilled") for seed in (0, 1)}
    relu = {(k, "distilled", seed, "relu") for k in (4, 8) for seed in (3, 2)}
    reproduced = saebench.reproduced_tasks(config)
    assert {task.sae for task in reproduced} == mine | relu | {(0, "theirs", 0, "main")}
    assert len(reproduced) == 2 * 13
    found = [task for task in saebench.suite_tasks(config) if task.chain == "relu"]
    asked = [(3, "sparse_probing", 5), (3, "absorption", 0), (3, "absorption", 5), (2, "absorption", 0)]
    assert set(found) == {Task(k, "distilled", *rest, "relu") for k in (4, 8) for rest in asked}
    assert {task.chain for task in saebench.reproduced_tasks(asking({}))} == {"main"}
    alone = asking({"arms": ["distilled"]}, {"chains": ["relu"], "arms": ["distilled"]})
    assert {task.sae for task in saebench.reproduced_tasks(alone)} == relu


def test_further_seeds_come_first_where_they_are_and_are_asked_for_first():
    """Seed 7 is there at the distillation k = 8 alone; elsewhere the next one asked is the first."""
    config = asking({"seeds": [7, 1], "evals": ["absorption"]}, more_seeds=[7])
    draws = {}
    for task in saebench.suite_tasks(config):
        draws.setdefault((task.k, task.seed), set()).add(task.eval_seed)
    assert draws == {(8, 7): {0, 5}, (8, 1): {0}, (4, 1): {0, 5}}


def test_scores_of_another_chain_lie_in_its_own_folder(tmp_path):
    run, task = PlainRun(asking({}), "trial", tmp_path), Task(8, "distilled", 3, "core", 0)
    of_main, of_chain = (
        one.folder(run).relative_to(run.folder) for one in (task, task._replace(chain="relu"))
    )
    assert of_main.as_posix() == "saebench/k8/distilled-seed3/core-seed0"
    assert of_chain.as_posix() == "chain_relu/saebench/k8/distilled-seed3/core-seed0"


def test_an_eval_is_added_by_its_function_and_its_name(llama, tmp_path, monkeypatch):
    def run_toy(sae, model, bench, seed):
        return {"metrics": {"latents": sae.d_sae, "rows": len(bench.rows) + seed}}

    monkeypatch.setitem(saebench.EVALS, "toy", Eval("nothing", run_toy, settings=("core_rows",)))
    with pytest.raises(RuntimeError, match="^toy is in one of"):
        saebench.check_names()
    monkeypatch.setattr(sections, "EVALS", sections.EVALS)
    sections.EVALS.append("toy")
    try:
        saebench.check_names()
        config = asking({"evals": ["toy"], "eval_seeds": [3], "arms": ["none"], "seeds": [0], "ks": [8]})
    finally:
        sections.EVALS.remove("toy")
    (task,) = saebench.suite_tasks(config)
    sae = save(tmp_path / "sae", llama)
    found = dict(saebench.score_all({task: sae.folder}, make_bench(tmp_path, rows(llama)), Workers(llama)))
    assert found == {task: {"metrics": {"latents": 12, "rows": 7}}}
    assert saebench.depends("toy", config.saebench) == {"core_rows": 64}


def test_a_configuration_is_checked_without_torch():
    code = "import sys; from dmsae_lib.config import load_config; load_config('smoke')"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_process_is_left_as_it_was():
    import random

    import numpy as np
    from builders.saebench import state

    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        before = state()
        with undisturbed():  # some of sae_bench's evals do this
            assert torch.get_num_threads() == 1
            torch.set_grad_enabled(False)
            torch.rand(1), np.random.rand(), random.random()
        assert state() == before and torch.is_grad_enabled()
    finally:
        torch.set_num_threads(threads)
