"""SAEBench through the sae_bench package itself: the table of its evals, and how they run on a run's SAEs.

An eval is run on one SAE with one *evaluation seed*, which governs the texts that it draws, its splits and
its probes (training seeds are the SAEs'). Its result holds flat ``metrics``, and whatever explains them; or
``not_run`` with the reason, never a number, where it cannot be run. What SAEs share is made once, in a cache
of the run whose parts are named by the content of the model. Everything is computed with one numerical thread
per process, so that no score depends on how many processes there are.

To add an eval: a function ``run(sae, model, bench, seed)`` that returns such a result or raises NotRun, its
line in EVALS, and its name in :data:`dmsae_lib.config.sections.EVALS`, by which a configuration is checked.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dmsae_lib.config import RunConfig, sections
from dmsae_lib.config.sections import SaebenchConfig
from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.data.workers import Workers
from dmsae_lib.interop import load_any
from dmsae_lib.saebench.absorption import prepare_absorption, run_absorption
from dmsae_lib.saebench.adapter import SAE
from dmsae_lib.saebench.autointerp import run_autointerp
from dmsae_lib.saebench.core import run_core, run_core_hub
from dmsae_lib.saebench.meta_structure import run_meta_structure
from dmsae_lib.saebench.official import run_perturbation_hub, run_sparse_probing_hub
from dmsae_lib.saebench.perturbation import prepare_perturbation, run_perturbation
from dmsae_lib.saebench.probing import prepare_probing, run_probing
from dmsae_lib.saebench.ravel import run_ravel
from dmsae_lib.saebench.runner import Bench, NotRun, Row
from dmsae_lib.saebench.unlearning import run_unlearning
from dmsae_lib.store.artifacts import Artifact, hash_json, load, made, write

IMPORTED = 0  # the k of SAEs that were trained elsewhere
REPRODUCED = ("core", "sparse_probing")  # by `make reproduce`; the others are the suite of `make saebench`
PROBING = ("probing_sets", "probing_ks", "dense_at_least")  # settings
AUDIT = "found unreliable by an audit (arXiv 2605.18229)"
# what evals need
TEXTS, PAIRS = (f"nothing ({what} of the sae-probes wheel)" for what in ("labelled texts", "class pairs"))
SPELLING = 'a tokenizer in which " A" to " Z" are one token each, and a model that can spell'
HUB = "the Hub, or its data in saebench.suite.data"
HUB_SETS = "bias_in_bios, amazon_reviews, github-code, ag_news, europarl"
ENDPOINT = "an API key in OPENAI_API_KEY, and an OpenAI-compatible endpoint"
GEMMA = "gemma-2-2b-it or -9b-it, the WMDP corpus (on request), the Hub"
Run = Callable[[SAE, LanguageModel, Bench, int], Row]  # the last one is the evaluation seed
Prepare = Callable[[Workers, Bench, int], Any]


@dataclass(frozen=True)
class Eval:
    """One eval of sae_bench."""

    needs: str  # beyond a model and an SAE
    run: Run
    prepare: Prepare | None = None  # makes what SAEs share; else every worker would
    settings: tuple[str, ...] = ()  # of the sections saebench and saebench.suite, on which its result depends
    seeded: bool = True
    doubt: str = ""  # who found it unreliable


def run_mdl(sae: SAE, model: LanguageModel, bench: Bench, seed: int) -> Row:
    raise NotRun(
        "its bins reach from 0 to at least 100 whatever the activations are, and it needs the package "
        "loguru, which sae-bench does not declare: it is not wired here"
    )


def _perturbation(scr: bool) -> Eval:
    prepare = partial(prepare_perturbation, scr=scr)
    return Eval(PAIRS, partial(run_perturbation, scr=scr), prepare, doubt=AUDIT)


def _perturbation_hub(scr: bool) -> Eval:
    needs, run = f"{HUB}: bias_in_bios, amazon_reviews", partial(run_perturbation_hub, scr=scr)
    return Eval(needs, run, settings=("data",), doubt=AUDIT)


EVALS: dict[str, Eval] = {
    "core": Eval("nothing", run_core, settings=("core_rows",), seeded=False),
    "sparse_probing": Eval(TEXTS, run_probing, prepare_probing, PROBING),
    "absorption": Eval(SPELLING, run_absorption, prepare_absorption),
    "tpp": _perturbation(scr=False),
    "scr": _perturbation(scr=True),
    "meta_structure": Eval("nothing (the decoder alone)", run_meta_structure),
    "core_hub": Eval(f"{HUB}: openwebtext", run_core_hub, settings=("data",), seeded=False),
    "sparse_probing_hub": Eval(f"{HUB}: {HUB_SETS}", run_sparse_probing_hub, settings=("data",)),
    "tpp_hub": _perturbation_hub(scr=False),
    "scr_hub": _perturbation_hub(scr=True),
    "ravel": Eval(f"{HUB}; a model that knows the facts", run_ravel, settings=("data",)),
    "autointerp": Eval(ENDPOINT, run_autointerp, settings=("judge", "judge_url", "judge_latents")),
    "unlearning": Eval(GEMMA, run_unlearning, settings=("data", "unlearning_corpus")),
    "mdl": Eval("the Hub (fineweb) and the package loguru", run_mdl),
}


def check_names() -> None:
    """Every eval has its name in sections.EVALS, and every name its eval; else RuntimeError."""
    if odd := sorted(EVALS.keys() ^ set(sections.EVALS)):
        raise RuntimeError(f"{odd[0]} is in one of saebench.EVALS and config.sections.EVALS alone.")


check_names()


class Task(NamedTuple):
    """One eval of one SAE with one evaluation seed."""

    k: int
    arm: str
    seed: int
    name: str
    eval_seed: int
    chain: str = "main"  # whose cores the SAE was trained with

    @property
    def sae(self) -> tuple[int, str, int, str]:
        """(k, arm, training seed, chain)"""
        return self.k, self.arm, self.seed, self.chain

    def folder(self, run: Any) -> Path:
        """Where a :class:`~dmsae_lib.config.run.Run` keeps its result."""
        return run.scores(*self.sae) / f"{self.name}-seed{self.eval_seed}"

    def made_from(self, sae: Artifact, settings: SaebenchConfig) -> dict[str, str]:
        """The parents of its result: the SAE, and the settings on which the eval depends."""
        return {"sae": sae.hash, "settings": hash_json(depends(self.name, settings))}

    def scored(self, run: Any, sae: Artifact, settings: SaebenchConfig) -> Artifact | None:
        """Its result for this very SAE under these settings, or None; what was not run may run now."""
        found = made(self.folder(run), "scores", self.made_from(sae, settings))
        return found if found and "not_run" not in found.json("scores.json")["result"] else None

    def keep(self, run: Any, sae: Artifact, settings: SaebenchConfig, result: Row) -> Artifact:
        """Write its result as an artefact: ``scores.json``."""
        about = self._asdict() | {"sae": sae.hash, "settings": depends(self.name, settings), "result": result}
        with write(self.folder(run), "scores", self.made_from(sae, settings)) as writer:
            writer.json("scores.json", about)
        return load(self.folder(run), "scores")


def reproduced_tasks(config: RunConfig) -> list[Task]:
    """What ``make reproduce`` scores: the arms asked of the chains asked, and SAEs trained elsewhere."""
    settings = config.saebench
    chosen = [sae for sae in config.scorable if sae[1] in settings.arms]
    chosen += [(*sae, "main") for sae in config.imported]
    return [Task(*sae, name, settings.seed, chain) for *sae, chain in chosen for name in REPRODUCED]


def suite_tasks(config: RunConfig) -> list[Task]:
    """What ``make saebench`` adds: further evals, and further evaluation seeds on the first training seed,
    the first of those asked that a chain has at a k."""
    suite, done, found = config.saebench.suite, set(reproduced_tasks(config)), []
    ks = suite.ks or config.retrain.ks
    asked = {chain: suite.seeds or config.seeds(chain) for chain in config.saebench.chains}
    chosen = [
        (k, arm, seed, chain)
        for k, arm, seed, chain in config.scorable
        if k in ks and arm in suite.arms and seed in asked[chain]
    ]
    there = {(k, seed, chain) for k, _, seed, chain in chosen}
    first = {(k, chain): next(s for s in asked[chain] if (k, s, chain) in there) for k, _, chain in there}
    chosen += [(*sae, "main") for sae in config.imported]
    for name in [name for name in EVALS if name != "core"] if suite.evals is None else suite.evals:
        for k, arm, seed, chain in chosen:
            again = first.get((k, chain)) == seed
            if name in REPRODUCED and not again and k != IMPORTED:
                continue
            draws = suite.eval_seeds if again and EVALS[name].seeded else suite.eval_seeds[:1]
            found += [Task(k, arm, seed, name, draw, chain) for draw in draws]
    return [task for task in found if task not in done]


def depends(name: str, settings: SaebenchConfig) -> Row:
    """The settings that decide an eval's result."""
    known = settings.model_dump(mode="json") | settings.suite.model_dump(mode="json")
    return {setting: known[setting] for setting in EVALS[name].settings}


def score(model: LanguageModel, work: tuple[Path, str, int], bench: Bench) -> Row:
    """One result; ``work`` = (folder of the SAE's artefact, name of the eval, evaluation seed)."""
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
