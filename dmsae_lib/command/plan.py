"""A run's stages as the makefile that runs them, and what is left to do of them.

``python -m dmsae_lib.command.plan --config default --make make stages`` checks the configuration, writes
``runs/<run>/config.yaml``, ``runs/<run>/params/<stage>.json`` and ``runs/<run>/plan.mk``, and turns into
``make -f runs/<run>/plan.mk stages``, the run locked for as long as that lasts. Plain make decides what is
stale: a stage is made again when its notebook, its parameters file or a parent's artefact is newer than its
own artefact, or when its executed notebook is missing. A parameters file holds the stage's slice of the
configuration and is rewritten only when the slice changes. :func:`states` says the same without writing.
"""

import argparse
import difflib
import json
import os
import sys
from pathlib import Path

import yaml

from dmsae_lib.command.stages import Stage, stages
from dmsae_lib.config import load_config
from dmsae_lib.config.lock import lock
from dmsae_lib.config.run import NAME, Run, open_run
from dmsae_lib.config.yaml_file import split_overrides
from dmsae_lib.store.artifacts import UserError, explain_os_errors, write_json
from dmsae_lib.store.atomic import old, write_text

HEAD = """\
# The stages of {folder}, written by dmsae_lib.command.plan; `make -n stages` prints what is left to do.
PY ?= .venv/bin/python
stages: {folder}/summary/manifest.json $(wildcard {folder}/atlas/manifest.json)
.PHONY: stages unfinished {names}
# A stage that was killed or failed after its artefact was written has no executed notebook: it runs again.
executed = $(if $(wildcard {folder}/notebooks/$(1).ipynb),,unfinished)
# Asked for by name, an optional stage runs even if it is there: what could not be run then may be run now.
asked = $(if $(filter $(1),$(MAKECMDGOALS)),unfinished)
"""
RULE = """
{name}: {target}
.PRECIOUS: {target}
{target}: {needed}
\t@$(PY) -m dmsae_lib.command.run_notebook {source} {executed} --makes {target} {given} $(NBFLAGS)
"""


def _manifest(run: Run, artefact: str) -> str:
    """The file whose time is the artefact's; like all paths here below the repository's root."""
    return f"runs/{run.name}/{artefact}/manifest.json"


def _prerequisites(run: Run, stage: Stage) -> dict[str, str]:
    """{why a stage is stale: the file that is newer than its artefact then}."""
    files = {
        "parameters changed": f"runs/{run.name}/params/{stage.name}.json",
        "notebook changed": f"notebooks/{stage.notebook}.ipynb",
    }
    return files | {f"{parent} is newer": _manifest(run, parent) for parent in stage.parents}


def _there(path: Path) -> Path:
    """``path``, or where it lies while a killed writer has only moved its folder aside: make puts it back."""
    aside = old(path.parent) / path.name
    return aside if aside.is_file() and not path.parent.exists() else path


def _parameters_changed(run: Run, stage: Stage) -> bool:
    """Whether the parameters file of ``stage`` differs from its slice of today (or cannot be read)."""
    try:
        return json.loads((run.folder / "params" / f"{stage.name}.json").read_text()) != stage.slice
    except (OSError, ValueError):
        return True


def states(run: Run) -> dict[str, str]:
    """What make would say of each stage: ``missing`` (``optional``), ``stale: why``, or ``present``."""
    found: dict[str, str] = {}
    again: set[str] = set()  # the artefacts that will be made before

    def state(stage: Stage) -> str:
        target = _there(run.root / _manifest(run, stage.artefact))
        if not target.is_file():
            return "optional" if stage.optional else "missing"
        if _parameters_changed(run, stage):
            return "stale: parameters changed"
        if not (run.folder / "notebooks" / f"{stage.name}.ipynb").is_file():
            return "stale: its notebook did not run to the end"
        for parent in stage.parents:
            if parent in again:
                return f"stale: {parent} is made again"
        for reason, name in _prerequisites(run, stage).items():
            file = _there(run.root / name)
            if file.is_file() and file.stat().st_mtime_ns > target.stat().st_mtime_ns:
                return f"stale: {reason}"
        return "present"

    for stage in stages(run.config):
        found[stage.name] = state(stage)
        if found[stage.name] not in ("present", "optional"):
            again.add(stage.artefact)
    return found


def makefile(run: Run, config: str) -> str:
    """The text of plan.mk. ``config`` is what the notebooks get as their parameter of that name."""
    folder, found = f"runs/{run.name}", stages(run.config)
    text = HEAD.format(folder=folder, names=" ".join(stage.name for stage in found))
    optional = {_manifest(run, stage.artefact) for stage in found if stage.optional}
    for stage in found:
        needed = [
            f"$(wildcard {file})" if file in optional else file
            for file in _prerequisites(run, stage).values()
        ]
        needed.append(f"$(call executed,{stage.name})")
        if stage.optional:
            needed.append(f"$(call asked,{stage.name})")
        given = {"config": config, "run": run.name} | stage.parameters
        text += RULE.format(
            name=stage.name,
            target=_manifest(run, stage.artefact),
            needed=" ".join(needed),
            source=f"notebooks/{stage.notebook}.ipynb",
            executed=f"{folder}/notebooks/{stage.name}.ipynb",
            given=" ".join(f"-p {name} {value}" for name, value in given.items()),
        )
    return text


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def _stands_as(run: Run, name: str) -> bool | None:
    """Whether the run's settings are those of configs/<name>.yaml; None where there is no such file."""
    there = (run.root / "configs" / f"{name}.yaml").is_file()
    return run.config == load_config(name) if there else None


def write_plan(run: Run) -> Path:
    """Write config.yaml, params/ and plan.mk of ``run``; returns the path of plan.mk."""
    if _stands_as(run, run.name) is False:
        raise UserError(
            f"The run name {run.name} is kept for configs/{run.name}.yaml as it stands: name this run "
            "otherwise with RUN=name."
        )
    config = run.config.name if _stands_as(run, run.config.name) else f"runs/{run.name}/config.yaml"
    with explain_os_errors(run.folder):
        (run.folder / "notebooks").mkdir(parents=True, exist_ok=True)
        settings = yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False)
        _write_if_changed(run.folder / "config.yaml", settings)
        for stage in stages(run.config):
            if _parameters_changed(run, stage):
                write_json(run.folder / "params" / f"{stage.name}.json", stage.slice)
        _write_if_changed(run.folder / "plan.mk", makefile(run, config))
    return run.folder / "plan.mk"


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which run is meant."""
    add = parser.add_argument
    add("--config", default="default", help="name of a file in configs/, or the path of a YAML file")
    add("--run", default="", help="name of the folder below runs/")
    overrides = {"action": "extend", "type": split_overrides, "default": [], "metavar": "section.key=value"}
    add("--set", **overrides, help="override a setting, or several with spaces between")


def published_as(name: str) -> str:
    """``name`` if it can be one below results/ and figures/; else UserError."""
    if not NAME.fullmatch(name):
        raise UserError(f"AS is {name!r}: use letters, digits, '.', '_' and '-'.")
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the plan of a run, then run it by make.")
    run_arguments(parser)
    parser.add_argument("--make", nargs=2, required=True, metavar=("make", "target"), help="runs the plan")
    options = parser.parse_args()
    run = open_run(options.config, options.run, options.set)
    os.chdir(run.root)
    lock(run)
    plan = write_plan(run)
    make, target = options.make
    names = [stage.name for stage in stages(run.config)]
    if target not in ("stages", *names):
        close = difflib.get_close_matches(target, names, n=3, cutoff=0.4) or names[:3]
        raise UserError(f"STAGE is {target}: {run.name} has no such stage, but {', '.join(close)}.")
    os.execvp(make, [make, "--no-print-directory", "-f", str(plan.relative_to(run.root)), target])


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
