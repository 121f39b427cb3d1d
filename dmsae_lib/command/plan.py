"""The stages of a run as data, and as the makefile that runs them.

``python -m dmsae_lib.command.plan --config default --make make stages`` checks the configuration, writes
``runs/<run>/config.yaml``, ``runs/<run>/params/<stage>.json`` and ``runs/<run>/plan.mk``, and turns into
``make -f runs/<run>/plan.mk stages``, the run locked for as long as that lasts. Plain make decides what is
stale: a stage is remade when its notebook, its parameters file or a parent's artefact is newer than its own
artefact. A parameters file holds this stage's slice of the configuration and is rewritten only when the slice
changes.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dmsae_lib.config import RunConfig, load_config
from dmsae_lib.config.lock import lock
from dmsae_lib.config.run import Run, open_run
from dmsae_lib.config.sections import EMBEDDED, TrainingConfig
from dmsae_lib.config.yaml_file import split_overrides
from dmsae_lib.store.artifacts import UserError, explain_os_errors, write_json
from dmsae_lib.store.atomic import write_text

COMPUTING = ("threads", "device")
SELECTION = ("distill.coverage", "distill.aggregator", "distill.quantile")


@dataclass(frozen=True)
class Stage:
    """One notebook call. Artefacts are folders below the run's own."""

    name: str
    notebook: str
    artefact: str
    parents: tuple[str, ...]  # the artefacts it reads
    parameters: dict[str, Any] = field(default_factory=dict)  # of the notebook, beside config and run
    slice: dict[str, Any] = field(default_factory=dict)  # the settings (and files) it depends on
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
    """{file: [size, modification time]} of an embedded or local model, or of local text; {} for anything
    else."""
    for path in (EMBEDDED / name, Path(name).expanduser()):
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        if found := {
            file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()
        }:
            return found
    return {}


def _chain_stages(config: RunConfig, chain: str) -> list[Stage]:
    """The distillation cycles of one chain: train, attribute, distil. A cycle 0 that lies in another chain is
    made there."""
    run, config, found = Run(config, config.name, Path()), config.for_chain(chain), []

    def artefact(cycle: int, part: str) -> str:
        return run.cycle(cycle, part, chain).relative_to(run.folder).as_posix()

    for t in range(config.distill.cycles + 1):
        if run.config.trains(chain, t) != chain:
            continue
        sae, attribution, core = (artefact(t, part) for part in ("sae", "attribution", "core"))
        before = (artefact(t - 1, "core"),) if t else ()
        given = {"cycle": t} if chain == "main" else {"cycle": t, "chain": chain}
        settings = _slice(config, *COMPUTING, "seed", "sae", "training", *(["distill.placebos"] if t else []))
        if t == 0 and config.distill.from_sae:
            settings = _slice(
                config,
                *COMPUTING,
                "distill.from_sae",
                "distill.from_prefixes",
                files=_fingerprint(config.distill.from_sae),
            )
        found += [
            Stage(run.stage(t, "train", chain), "02_train_cycle", sae, ("harvest", *before), given, settings),
            Stage(
                run.stage(t, "attribute", chain),
                "03_attribute",
                attribution,
                ("harvest", sae, *before),
                given,
                _slice(config, *COMPUTING, *SELECTION, *(["distill.placebos"] if t else [])),
            ),
            Stage(
                run.stage(t, "distill", chain),
                "04_distill",
                core,
                (sae, attribution, *before),
                given,
                _slice(config, *SELECTION),
            ),
        ]
    return found


def _retrain_stage(config: RunConfig, chain: str, cycles: tuple[str, ...]) -> Stage:
    """Every SAE that is trained with one chain's cores."""
    settings = _slice(
        config.for_chain(chain),
        *COMPUTING,
        "seed",
        "sae",
        "training",
        *SELECTION,
        "distill.final_core",
        "distill.cycles",
    )  # with fewer another core is the last one, of which nothing is newer
    settings["training"].pop("k")  # each of these SAEs has its own
    settings["saes"] = [
        f"k{k}/{arm}-seed{seed}" for k in config.retrain.ks for arm, seed in config.retrain_arms(k, chain)
    ]
    if chain == "main":
        if config.retrain.imported:
            settings["imported"] = {
                name: [where, _fingerprint(where)] for name, where in config.retrain.imported.items()
            }
        return Stage("retrain", "05_retrain_across_k", "retrain/index", cycles, {}, settings)
    place = f"chain_{chain}/retrain/index"
    return Stage(f"chain_{chain}_retrain", "05_retrain_across_k", place, cycles, {"chain": chain}, settings)


def stages(config: RunConfig) -> list[Stage]:
    """Every stage of a run, parents first."""
    files = {"model_files": _fingerprint(config.model.name), "data_files": _fingerprint(config.data.source)}
    harvest = _slice(config, *COMPUTING, "model", "data", **files)
    found = [Stage("harvest", "01_harvest", "harvest", (), {}, harvest)]
    chains = {name: _chain_stages(config, name) for name in config.chains}
    for chain in chains.values():
        found += chain
    if config.learning_rate_sweep:
        seeds = {name: config.for_chain(name).seed for name in config.replicates}
        cores = tuple(chains[config.trains(name, 0)][2].artefact for name in seeds)
        found.append(
            Stage(
                "learning_rate",
                "09_learning_rate",
                "learning_rate/record",
                ("harvest", *cores),
                {},
                _slice(
                    config, *COMPUTING, "sae", "training", factors=config.learning_rate_sweep, seeds=seeds
                ),
            )
        )
    for chain in config.retrained_chains:
        shared = chains[config.trains(chain, 0)][:3] if config.trains(chain, 0) != chain else []
        # random cores are drawn from all cycles
        cycles = ("harvest", *(stage.artefact for stage in [*shared, *chains[chain]]))
        found.append(_retrain_stage(config, chain, cycles))
    bench = _slice(config, *COMPUTING, "saebench")
    suite = bench["saebench"].pop("suite")
    found.append(Stage("saebench", "06_saebench", "saebench/index", ("harvest", "retrain/index"), {}, bench))
    found.append(
        Stage(
            "saebench_suite",
            "06_saebench",
            "saebench/suite_index",
            ("harvest", "retrain/index"),
            {"suite": True},
            bench | {"suite": suite},
            optional=True,
        )
    )
    everything = tuple(stage.artefact for stage in found if not stage.optional)
    return [*found, Stage("summary", "07_figures", "summary", everything, {}, config.model_dump(mode="json"))]


def parameters_changed(run: Run, stage: Stage) -> bool:
    """Whether the parameters file of ``stage`` differs from its slice of today (or cannot be read)."""
    try:
        return json.loads((run.folder / "params" / f"{stage.name}.json").read_text()) != stage.slice
    except (OSError, ValueError):
        return True


def makefile(run: Run, config: str) -> str:
    """The text of plan.mk. ``config`` is what the notebooks get as their parameter of that name."""
    folder = f"runs/{run.name}"
    lines = [
        f"# The stages of {folder}, written by dmsae_lib.command.plan; `make -n stages` prints what is left "
        "to do.",
        "PY ?= .venv/bin/python",
        f"stages: {folder}/summary/manifest.json",
        ".PHONY: stages unfinished " + " ".join(stage.name for stage in stages(run.config)),
        "# A stage that was killed or failed after its artefact was written has no executed notebook: it "
        "runs again.",
        f"executed = $(if $(wildcard {folder}/notebooks/$(1).ipynb),,unfinished)",
        "# Asked for by name, an optional stage runs even if it is there: what could not be run then may be "
        "run now.",
        "asked = $(if $(filter $(1),$(MAKECMDGOALS)),unfinished)",
    ]
    for stage in stages(run.config):
        target = f"{folder}/{stage.artefact}/manifest.json"
        parents = " ".join(f"{folder}/{parent}/manifest.json" for parent in stage.parents)
        if stage.optional:
            parents += f" $(call asked,{stage.name})"
        if stage.name == "summary":
            made = [
                f"{folder}/{other.artefact}/manifest.json" for other in stages(run.config) if other.optional
            ]
            parents += "".join(f" $(wildcard {path})" for path in made)
        given = {"config": config, "run": run.name} | stage.parameters
        lines += [
            f"\n{stage.name}: {target}",
            f".PRECIOUS: {target}",
            f"{target}: notebooks/{stage.notebook}.ipynb {folder}/params/{stage.name}.json {parents} "
            f"$(call executed,{stage.name})",
            f"\t@$(PY) -m dmsae_lib.command.run_notebook notebooks/{stage.notebook}.ipynb "
            f"{folder}/notebooks/{stage.name}.ipynb --makes {target} "
            + " ".join(f"-p {name} {value}" for name, value in given.items())
            + " $(NBFLAGS)",
        ]
    return "\n".join(lines) + "\n"


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def write_plan(run: Run) -> Path:
    """Write config.yaml, params/ and plan.mk of ``run``; returns the path of plan.mk."""
    if (run.root / "configs" / f"{run.name}.yaml").is_file() and run.config != load_config(run.name):
        raise UserError(
            f"The run name {run.name} is kept for configs/{run.name}.yaml as it stands: name this run "
            "otherwise with RUN=name."
        )
    plain = (run.root / "configs" / f"{run.config.name}.yaml").is_file() and run.config == load_config(
        run.config.name
    )
    config = run.config.name if plain else f"runs/{run.name}/config.yaml"
    with explain_os_errors(run.folder):
        (run.folder / "notebooks").mkdir(parents=True, exist_ok=True)
        settings = yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False)
        _write_if_changed(run.folder / "config.yaml", settings)
        for stage in stages(run.config):
            if parameters_changed(run, stage):
                write_json(run.folder / "params" / f"{stage.name}.json", stage.slice)
        _write_if_changed(run.folder / "plan.mk", makefile(run, config))
    return run.folder / "plan.mk"


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which run is meant."""
    parser.add_argument(
        "--config", default="default", help="name of a file in configs/, or the path of a YAML file"
    )
    parser.add_argument("--run", default="", help="name of the folder below runs/")
    parser.add_argument(
        "--set",
        action="extend",
        type=split_overrides,
        default=[],
        metavar="section.key=value",
        help="override a setting, or several with spaces between",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the plan of a run, then run it by make.")
    run_arguments(parser)
    parser.add_argument(
        "--make", nargs=2, required=True, metavar=("make", "target"), help="what runs the plan"
    )
    options = parser.parse_args()
    run = open_run(options.config, options.run, options.set)
    os.chdir(run.root)
    lock(run)
    plan = write_plan(run)
    make, target = options.make
    os.execvp(make, [make, "--no-print-directory", "-f", str(plan.relative_to(run.root)), target])


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
