"""SAEBench through the sae_bench package itself: the table of its evals, and how they are run on a run's
SAEs.

An eval is run on one SAE with one *evaluation seed*, which governs the texts that it draws, its splits and
its probes (training seeds are the SAEs'). Its result holds flat ``metrics``, and whatever explains them; or
``not_run`` with the reason, never a number, where it cannot be run. What SAEs share is made once, in a cache
of the run whose parts are named by the content of the model. Everything is computed with one numerical thread
per process, so that no score depends on how many processes there are.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dmsae_lib.config.sections import RetrainConfig, SaebenchConfig
from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.data.workers import Workers
from dmsae_lib.interop import load_any
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.saebench.absorption import prepare_absorption, run_absorption
from dmsae_lib.saebench.adapter import NotRun
from dmsae_lib.saebench.autointerp import run_autointerp
from dmsae_lib.saebench.core import run_core
from dmsae_lib.saebench.meta_structure import run_meta_structure
from dmsae_lib.saebench.official import Texts, run_core_hub, run_scr_and_tpp_hub, run_sparse_probing_hub
from dmsae_lib.saebench.perturbation import prepare_scr, prepare_tpp, run_scr, run_tpp
from dmsae_lib.saebench.probing import prepare_probing, run_probing
from dmsae_lib.saebench.ravel import run_ravel
from dmsae_lib.saebench.unlearning import run_unlearning
from dmsae_lib.store.artifacts import Artifact, load

Row = dict[str, Any]
IMPORTED = 0  # the k of SAEs that were trained elsewhere
# those of `make reproduce`; the others are the suite of `make saebench`
REPRODUCED = ("core", "sparse_probing")


@dataclass(frozen=True)
class Bench:
    """What the scoring of a run's SAEs shares: settings, token rows, the probing sets, and the folder of the
    caches."""

    settings: SaebenchConfig
    rows: np.ndarray  # (rows, context): the test split
    sets: tuple[str, ...]  # those that a dense probe can do
    cache: Path

    @property
    def data(self) -> Path | None:
        """The folder to look for sae_bench's own data sets in before the Hub is asked."""
        return Path(self.settings.suite.data) if self.settings.suite.data else None


@dataclass(frozen=True)
class Eval:
    """One eval of sae_bench: what it needs beyond a model and an SAE, how it is run, and what its result
    depends on."""

    needs: str
    run: Callable[[MatryoshkaSAE, LanguageModel, Bench, int], Row]  # the last one is the evaluation seed
    # makes what SAEs share; else every worker would
    prepare: Callable[[Workers, Bench, int], Any] | None = None
    settings: tuple[str, ...] = ()  # names in the sections saebench and saebench.suite
    seeded: bool = True
    doubt: str = ""  # who found it unreliable


def _core(sae: MatryoshkaSAE, model: LanguageModel, bench: Bench, seed: int) -> Row:
    return {"metrics": run_core(sae, model, bench.rows[: bench.settings.core_rows])}


def _sparse_probing(sae: MatryoshkaSAE, model: LanguageModel, bench: Bench, seed: int) -> Row:
    if not bench.sets:
        raise NotRun("saebench.probing_sets names no set that a probe on all channels can do")
    return run_probing(sae, model, bench.sets, bench.settings.probing_ks, bench.cache, seed)


def _autointerp(sae: MatryoshkaSAE, model: LanguageModel, bench: Bench, seed: int) -> Row:
    suite = bench.settings.suite
    return run_autointerp(sae, model, bench.rows, seed, suite.judge_url, suite.judge, suite.judge_latents)


def _unlearning(sae: MatryoshkaSAE, model: LanguageModel, bench: Bench, seed: int) -> Row:
    corpus = bench.settings.suite.unlearning_corpus
    return run_unlearning(sae, model, bench.cache, seed, Path(corpus) if corpus else None, bench.data)


def _mdl(sae: MatryoshkaSAE, model: LanguageModel, bench: Bench, seed: int) -> Row:
    raise NotRun(
        "its bins reach from 0 to at least 100 whatever the activations are, and it needs the package "
        "loguru, which sae-bench does not declare: it is not wired here"
    )


AUDIT = "found unreliable by an audit (arXiv 2605.18229)"
HUB = "the Hub, or its data in saebench.suite.data"
EVALS: dict[str, Eval] = {
    "core": Eval("nothing", _core, settings=("core_rows",), seeded=False),
    "sparse_probing": Eval(
        "nothing (labelled texts of the sae-probes wheel)",
        _sparse_probing,
        lambda workers, bench, seed: bench.sets and prepare_probing(workers, bench.sets, bench.cache),
        ("probing_sets", "probing_ks", "dense_at_least"),
    ),
    "absorption": Eval(
        'a tokenizer in which " A" to " Z" are one token each, and a model that can spell',
        lambda sae, model, bench, seed: run_absorption(sae, model, bench.cache, seed),
        lambda workers, bench, seed: prepare_absorption(workers.model, bench.cache, seed),
    ),
    "tpp": Eval(
        "nothing (class pairs of the sae-probes wheel)",
        lambda sae, model, bench, seed: run_tpp(sae, model, bench.cache, seed),
        lambda workers, bench, seed: prepare_tpp(workers, bench.cache, seed),
        doubt=AUDIT,
    ),
    "scr": Eval(
        "nothing (class pairs of the sae-probes wheel)",
        lambda sae, model, bench, seed: run_scr(sae, model, bench.cache, seed),
        lambda workers, bench, seed: prepare_scr(workers, bench.cache, seed),
        doubt=AUDIT,
    ),
    "meta_structure": Eval(
        "nothing (the decoder alone)", lambda sae, model, bench, seed: run_meta_structure(sae, seed)
    ),
    "core_hub": Eval(
        f"{HUB}: openwebtext",
        lambda sae, model, bench, seed: run_core_hub(sae, model, bench.data),
        settings=("data",),
        seeded=False,
    ),
    "sparse_probing_hub": Eval(
        f"{HUB}: bias_in_bios, amazon_reviews, github-code, ag_news, europarl",
        lambda sae, model, bench, seed: run_sparse_probing_hub(
            sae, model, bench.cache, seed, Texts(bench.data)
        ),
        settings=("data",),
    ),
    "tpp_hub": Eval(
        f"{HUB}: bias_in_bios, amazon_reviews",
        lambda sae, model, bench, seed: run_scr_and_tpp_hub(
            sae, model, False, bench.cache, seed, Texts(bench.data)
        ),
        settings=("data",),
        doubt=AUDIT,
    ),
    "scr_hub": Eval(
        f"{HUB}: bias_in_bios, amazon_reviews",
        lambda sae, model, bench, seed: run_scr_and_tpp_hub(
            sae, model, True, bench.cache, seed, Texts(bench.data)
        ),
        settings=("data",),
        doubt=AUDIT,
    ),
    "ravel": Eval(
        f"{HUB}; a model that knows the facts",
        lambda sae, model, bench, seed: run_ravel(sae, model, bench.cache, seed, bench.data),
        settings=("data",),
    ),
    "autointerp": Eval(
        "an API key in OPENAI_API_KEY, and an OpenAI-compatible endpoint",
        _autointerp,
        settings=("judge", "judge_url", "judge_latents"),
    ),
    "unlearning": Eval(
        "gemma-2-2b-it or -9b-it, the WMDP corpus (on request), the Hub",
        _unlearning,
        settings=("data", "unlearning_corpus"),
    ),
    "mdl": Eval("the Hub (fineweb) and the package loguru", _mdl),
}


class Task(NamedTuple):
    """One eval of one SAE with one evaluation seed."""

    k: int
    arm: str
    seed: int
    name: str
    eval_seed: int

    def folder(self, run: Any) -> Path:
        """Where a :class:`~dmsae_lib.config.Run` keeps its result."""
        return run.scores(self.k, self.arm, self.seed) / f"{self.name}-seed{self.eval_seed}"


def reproduced_tasks(settings: SaebenchConfig, saes: Iterable[tuple[int, str, int]]) -> list[Task]:
    """What ``make reproduce`` scores of the SAEs (k, arm, training seed)."""
    return [
        Task(*sae, name, settings.seed)
        for sae in saes
        if sae[1] in settings.arms or sae[0] == IMPORTED
        for name in REPRODUCED
    ]


def suite_tasks(
    settings: SaebenchConfig, retrain: RetrainConfig, saes: Iterable[tuple[int, str, int]]
) -> list[Task]:
    """What ``make saebench`` adds: further evals, and further evaluation seeds on the first training seed."""
    suite = settings.suite
    names = [name for name in EVALS if name != "core"] if suite.evals is None else suite.evals
    ks, seeds = suite.ks or retrain.ks, suite.seeds or retrain.seeds
    chosen = [
        sae for sae in saes if sae[0] == IMPORTED or sae[0] in ks and sae[1] in suite.arms and sae[2] in seeds
    ]
    found = [
        Task(*sae, name, seed)
        for name in names
        for sae in chosen
        for seed in suite.eval_seeds
        if seed == suite.eval_seeds[0] or (sae[0] != IMPORTED and sae[2] == seeds[0] and EVALS[name].seeded)
    ]
    done = set(reproduced_tasks(settings, chosen))
    return [
        task for task in found if task not in done and (task.name not in REPRODUCED or task.seed == seeds[0])
    ]


def depends(name: str, settings: SaebenchConfig) -> Row:
    """The settings that decide an eval's result."""
    known = settings.model_dump(mode="json") | settings.suite.model_dump(mode="json")
    return {setting: known[setting] for setting in EVALS[name].settings}


def score(model: LanguageModel, work: tuple[Path, str, int], bench: Bench) -> Row:
    """The result of one eval on the SAE whose artefact lies in a folder: ``work`` = (folder, eval, evaluation
    seed)."""
    folder, name, seed = work
    try:
        return EVALS[name].run(load_any(load(folder, "sae"), model), model, bench, seed)
    except NotRun as why:
        return {"metrics": {}, "not_run": str(why)}


def score_all(tasks: dict[Task, Path], bench: Bench, workers: Workers) -> Iterator[tuple[Task, Row]]:
    """``(task, result)`` as soon as each is done; ``tasks`` gives the folder of each one's SAE."""
    for name, seed in dict.fromkeys((task.name, task.eval_seed) for task in tasks):
        if prepare := EVALS[name].prepare:
            with contextlib.suppress(NotRun):  # each of its tasks will say so
                prepare(workers, bench, seed)
    work = {task: (folder, task.name, task.eval_seed) for task, folder in tasks.items()}
    yield from workers.run(partial(score, bench=bench), work)


def is_scored(task: Task, folder: Path, sae: Artifact, settings: SaebenchConfig) -> bool:
    """Whether ``folder`` holds this task's result for this very SAE under these settings; what was not run
    may run now."""
    if not (folder / "manifest.json").is_file():
        return False
    known = load(folder, "scores").json("scores.json")
    same = known["sae"] == sae.hash and known["settings"] == depends(task.name, settings)
    return same and "not_run" not in known["result"]
