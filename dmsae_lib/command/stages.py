"""The stages of a run as data: which notebook makes which artefact, of which parents and settings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmsae_lib.config import RunConfig
from dmsae_lib.config.fields import EMBEDDED
from dmsae_lib.config.run import STEP, Run
from dmsae_lib.config.sections import OTHER_CHAIN, TrainingConfig

COMPUTING = ("threads", "device")
SELECTION = ("distill.coverage", "distill.aggregator", "distill.quantile")
# of every stage that trains SAEs
TRAINING = (*COMPUTING, "seed", "sae", "training")


@dataclass(frozen=True)
class Stage:
    """One notebook call. Artefacts are folders below the run's own."""

    name: str
    notebook: str
    artefact: str
    parents: tuple[str, ...]  # the artefacts that it reads, an optional one where it is there
    parameters: dict[str, Any]  # of the notebook, beside config and run
    slice: dict[str, Any]  # the settings (and files) that it depends on
    optional: bool = False  # made on request; once made, it is kept up to date like the others


def _slice(config: RunConfig, *names: str, **more: Any) -> dict[str, Any]:
    """The named sections and ``section.key`` settings as JSON, and ``more``."""
    tree = config.model_dump(mode="json", exclude={"training": TrainingConfig.NO_EFFECT})
    found = {}
    for name in names:
        section, _, key = name.partition(".")
        found[name] = tree[section][key] if key else tree[section]
    return found | more


def _fingerprint(name: str) -> dict[str, list[int]]:
    """{file: [size, modification time]} of an embedded or local model, or of local text; {} elsewhere."""
    for path in (EMBEDDED / name, Path(name).expanduser()):
        places = sorted(path.rglob("*")) if path.is_dir() else [path]
        if files := {place.name: place.stat() for place in places if place.is_file()}:
            return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in files.items()}
    return {}


def _chain_stages(config: RunConfig, chain: str) -> list[Stage]:
    """Train, attribute and distil each cycle of a chain, but for a cycle 0 that lies in another one."""
    run, own = Run(config, config.name, Path()), config.for_chain(chain)
    found: list[Stage] = []
    before: tuple[str, ...] = ()  # the core of the cycle before
    for t in range(own.distill.cycles + 1):
        sae, attribution, core = (
            run.cycle(t, part, chain).relative_to(run.folder).as_posix() for part in STEP
        )
        placebos = ["distill.placebos"] if t else []
        settings = _slice(own, *TRAINING, *placebos)
        if t == 0 and (theirs := own.distill.from_sae):
            names = (*COMPUTING, "distill.from_sae", "distill.from_prefixes")
            settings = _slice(own, *names, files=_fingerprint(theirs))
        attribute = _slice(own, *COMPUTING, *SELECTION, *placebos)
        given = {"cycle": t} if chain == "main" else {"cycle": t, "chain": chain}
        calls = [
            ("train", "02_train_cycle", sae, ("harvest", *before), settings),
            ("attribute", "03_attribute", attribution, ("harvest", sae, *before), attribute),
            ("distill", "04_distill", core, (sae, attribution, *before), _slice(own, *SELECTION)),
        ]
        if config.trains(chain, t) == chain:
            found += [Stage(run.stage(t, step, chain), *what, given, by) for step, *what, by in calls]
        before = (core,)
    return found


def _retrain_stage(config: RunConfig, chain: str, parents: tuple[str, ...]) -> Stage:
    """Every SAE that is trained with one chain's cores."""
    # with fewer cycles another core is the last one, of which nothing is newer
    names = (*TRAINING, *SELECTION, "distill.final_core", "distill.cycles")
    settings = _slice(config.for_chain(chain), *names)
    settings["training"].pop("k")  # each of these SAEs has its own
    saes = [(k, *which) for k in config.retrain.ks for which in config.retrain_arms(k, chain)]
    settings["saes"] = [f"k{k}/{arm}-seed{seed}" for k, arm, seed in saes]
    if chain == "main" and (imported := config.retrain.imported):
        settings["imported"] = {name: [where, _fingerprint(where)] for name, where in imported.items()}
    run, given = Run(config, config.name, Path()), {} if chain == "main" else {"chain": chain}
    place = (run.base(chain) / "retrain" / "index").relative_to(run.folder).as_posix()
    return Stage(run.retrain_stage(chain), "05_retrain_across_k", place, parents, given, settings)


def _atlas_stage(config: RunConfig) -> Stage:
    """The cards of the last SAE of each kind of core; on request, and nothing depends on it."""
    run, last = Run(config, config.name, Path()), config.distill.cycles
    parents = ["harvest"]
    for chain in config.exemplars:
        places = [run.cycle(t, "core", chain) for t in range(last + 1)]
        places += [run.cycle(last, part, chain) for part in ("sae", "attribution")]
        parents += [place.relative_to(run.folder).as_posix() for place in places]
    settings = _slice(config, *COMPUTING, "distill.final_core", "distill.aggregator", chains=config.exemplars)
    distinct = tuple(dict.fromkeys(parents))
    return Stage("atlas", "11_atlas", "atlas", distinct, {}, settings, optional=True)


def stages(config: RunConfig) -> list[Stage]:
    """Every stage of a run, parents first."""
    files = {"model_files": _fingerprint(config.model.name), "data_files": _fingerprint(config.data.source)}
    harvest = _slice(config, *COMPUTING, "model", "data", **files)
    found = [Stage("harvest", "01_harvest", "harvest", (), {}, harvest)]
    chains = {name: _chain_stages(config, name) for name in config.chains}
    for chain in chains.values():
        found += chain
    if factors := config.learning_rate_sweep:
        seeds = {name: config.for_chain(name).seed for name in config.replicates}
        cores = [chains[config.trains(name, 0)][2].artefact for name in seeds]
        settings = _slice(config, *COMPUTING, "sae", "training", factors=factors, seeds=seeds)
        place, parents = "learning_rate/record", ("harvest", *cores)
        found.append(Stage("learning_rate", "09_learning_rate", place, parents, {}, settings))
    retrained = {}
    for name in config.retrained_chains:
        shared = chains[config.trains(name, 0)][:3] if config.trains(name, 0) != name else []
        # random cores are drawn from all cycles
        cycles = ("harvest", *(stage.artefact for stage in [*shared, *chains[name]]))
        if OTHER_CHAIN in config.arms(name):
            cycles += tuple(chains[other][-1].artefact for other in config.other_chains(name))
        retrained[name] = _retrain_stage(config, name, cycles)
    found += retrained.values()
    bench = _slice(config, *COMPUTING, "saebench")
    suite = bench | {"suite": bench["saebench"].pop("suite")}
    # the main chain's in any case: SAEs that were trained elsewhere are adopted there
    scored = dict.fromkeys(("main", *config.saebench.chains))
    parents = ("harvest", *(retrained[name].artefact for name in scored))
    index, suite_index = "saebench/index", "saebench/suite_index"
    found.append(Stage("saebench", "06_saebench", index, parents, {}, bench))
    asked = {"suite": True}
    found.append(Stage("saebench_suite", "06_saebench", suite_index, parents, asked, suite, optional=True))
    # what is asked of the cores and of the SAEs retrained with them; the summary takes its answers in
    asked_of = _slice(config, *COMPUTING, *SELECTION, "distill.final_core")
    asked_of |= {"ablation_tokens": config.distill.ablation_tokens, "chains": config.chains}
    made = [stage.artefact for own in chains.values() for stage in own]
    parents = ("harvest", *made, *(stage.artefact for stage in retrained.values()))
    place = "what_is_a_core/record"
    found.append(Stage("what_is_a_core", "10_what_is_a_core", place, parents, {}, asked_of, optional=True))
    everything = tuple(stage.artefact for stage in found)
    found.append(Stage("summary", "07_figures", "summary", everything, {}, config.model_dump(mode="json")))
    return [*found, _atlas_stage(config)]
