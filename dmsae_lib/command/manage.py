"""What the Makefile does with finished runs: status, compare, publish, core, push-core, figures, mend, clean.

``python -m dmsae_lib.command.manage status --config default``
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from dmsae_lib.command.atlas import carry_atlas
from dmsae_lib.command.plan import published_as, run_arguments, states
from dmsae_lib.command.stages import Stage, stages
from dmsae_lib.config.lock import locked
from dmsae_lib.config.run import Run, open_run
from dmsae_lib.store.artifacts import ArtifactError, UserError, explain_os_errors, load
from dmsae_lib.store.atomic import delete, replacing, write_text
from dmsae_lib.store.provenance import code_state

CODE = ("dmsae_lib", "requirements.lock")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def made_by(run: Run, stage: Stage) -> tuple[str, str, str]:
    """(when, seconds, code) of a stage's artefact; ``code`` says whether today's code has made it."""
    record = _read(run.folder / stage.artefact / "provenance.json")
    if not record:
        return "", "", ""
    seconds = _read(run.folder / "notebooks" / f"{stage.name}.json").get("seconds", "")
    commit = record.get("commit")
    if commit is None or code_state(run.root)["commit"] is None:
        code = "unknown (no git history)"
    elif record["dirty"]:
        code = f"{commit[:8]} with uncommitted changes"
    else:
        words = ["git", "diff", "--quiet", commit, "--", *CODE, f"notebooks/{stage.notebook}.ipynb"]
        same = subprocess.run(words, cwd=run.root, capture_output=True).returncode == 0
        code = "same as now" if same else f"other: {commit[:8]}"
    return record["created"][:16].replace("T", " "), str(seconds), code


def _table(rows: list[tuple[str, ...]], header: tuple[str, ...]) -> str:
    return tabulate(rows, header, tablefmt="plain", disable_numparse=True)


def status(run: Run) -> None:
    """Print one line per stage. Nothing is written, so it may be asked while the run computes."""
    made = states(run)
    rows = [(stage.name, made[stage.name], *made_by(run, stage)) for stage in stages(run.config)]
    print(f"runs/{run.name}\n{_table(rows, ('stage', 'state', 'made (UTC)', 'seconds', 'code'))}")


def _number(value: object) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.5g}"


def compare(run: Run, strict: bool = False) -> int:
    """Say how the run agrees with the published one: 0 whatever comes out, for the run is complete.

    ``strict``, the gate for one and the same machine: 1 unless every number and verdict is the published one.
    """
    from dmsae_lib.report import agreement
    from dmsae_lib.report.results import Results

    where = f"results/{run.config.name}"
    if not (run.root / where / "summary.json").is_file():
        print(f"There is no {where}: nothing is published to compare runs/{run.name} with.")
        return 0
    ours, theirs = Results(run.folder / "summary").summary, Results(run.root / where).summary
    rows = agreement.compare(ours, theirs)
    same_settings = ours["inputs"]["config_hash"] == theirs["inputs"]["config_hash"]
    if not same_settings:
        rows = [row for row in rows if None not in (row["published"], row["fresh"])]
    found, columns = agreement.assess(rows), ("metric", "published", "fresh", "difference", "tolerance")
    shown = [(*(_number(row[n]) for n in columns), "far" * row["far"]) for row in rows if not row["ok"]]
    if shown:
        print(_table(shown, (*columns, "")))
    if unasked := sorted(agreement.optional_evals(ours) ^ agreement.optional_evals(theirs)):
        print(f"Not compared, because `make saebench` ran for one of the two alone: {', '.join(unasked)}.")
    within = found["numbers"] - found["identical"] - found["beyond"]
    print(
        f"{found['numbers']} numbers against {where}: {found['identical']} identical, {within} within what "
        f"two seeds differ by, {found['beyond']} beyond it ({found['expected']:.0f} are expected by chance)."
    )
    changed = [f"{name} {after}, published: {before}" for name, (before, after) in found["verdicts"].items()]
    print(f"Verdicts: {'; '.join(changed) or 'all as published'}.")
    if not same_settings:
        print("The published run has other settings: differences are expected.")
    elif found["disagrees"]:
        print(
            f"THIS RUN DISAGREES WITH THE PUBLISHED ONE; runs/{run.name} is kept as it is. `make status` "
            "tells whether today's code made all of it, its summary/provenance.json which versions; if both "
            "are in order, please report that file and the table above."
        )
    return 1 if strict and any(row["published"] != row["fresh"] for row in rows) else 0


def publish(run: Run, name: str = "") -> None:
    """Copy summary, cores and executed notebooks to results/<name>, draw figures/<name> from there: all or
    nothing."""
    from dmsae_lib.distill.core_export import export_core
    from dmsae_lib.figures import draw_all
    from dmsae_lib.report.page import IN_README, published_page, update_readme

    if not name and run.name != run.config.name:
        raise UserError(
            f"runs/{run.name} is not the plain run of {run.config.name}: say with AS=name under which name "
            "to publish it."
        )
    name, made = published_as(name or run.name), states(run)
    for stage, state in made.items():
        if state not in ("present", "optional"):
            raise UserError(f"runs/{run.name} is not complete ({stage} is {state}): run `make reproduce`.")
    targets = [run.root / "results" / name, run.root / "figures" / name]
    with explain_os_errors(targets[0]), locked(run), replacing(*targets) as (results, figures):
        shutil.copytree(load(run.folder / "summary", "summary").folder, results, dirs_exist_ok=True)
        for chain in run.config.retrained_chains:
            export_core(run, results / "core" if chain == "main" else results / "cores" / chain, chain=chain)
        (results / "notebooks").mkdir()
        for stage, state in made.items():
            if state == "present" and not stage.startswith("chain_"):  # other chains' look the same
                shutil.copy(run.folder / "notebooks" / f"{stage}.ipynb", results / "notebooks")
        carry_atlas(run, targets[0], results, name)
        page = published_page(results, name, run.root)
        (results / "README.md").write_text(page, encoding="utf-8")
        draw_all(results, figures)
    if any(name in names for names in IN_README.values()):
        update_readme(run.root)
    size = sum(path.stat().st_size for target in targets for path in target.rglob("*") if path.is_file())
    print(f"published runs/{run.name} as results/{name} and figures/{name} ({size / 2**20:.1f} MiB)")


def core(run: Run) -> None:
    """Write the run's final core as runs/<run>/core, in the format that others load."""
    from dmsae_lib.distill.core_export import export_core
    from dmsae_lib.distill.core_format import load_core

    with explain_os_errors(run.folder), locked(run):
        made = load_core(export_core(run))
    print(f"wrote runs/{run.name}/core: {len(made)} latents, content hash {made.hash[:12]}")


def push_core(run: Run, to: str, licence: str = "", public: bool = False) -> None:
    """Put the run's final core, with a model card of the summary's numbers, into a Hub repository or a
    folder."""
    from dmsae_lib.report import card as hub

    core(run)
    summary = run.folder / "summary" if (run.folder / "summary" / "manifest.json").is_file() else None
    address = hub.push_core(run.folder / "core", to, results=summary, licence=licence, private=not public)
    print(f"pushed it to {address}{'' if summary else '; without a summary yet, the card holds no results'}")


def figures(run: Run, name: str = "") -> None:
    """Draw figures/<name> and write the pages of results/<name> again from the results; nothing is
    computed."""
    from dmsae_lib.atlas.page import write_pages
    from dmsae_lib.figures import draw_all
    from dmsae_lib.report.page import IN_README, published_page, update_readme

    name = published_as(name or run.name)
    results, target = run.root / "results" / name, run.root / "figures" / name
    with explain_os_errors(target), replacing(target) as (new,):
        drawn = draw_all(results, new)
        write_text(results / "README.md", published_page(results, name, run.root))
    if (results / "atlas" / "manifest.json").is_file():
        write_pages(results / "atlas", run.root, name)
    if any(name in names for names in IN_README.values()):
        update_readme(run.root)
    print(f"drew {len(drawn)} figures in figures/{name}")


def _makers(run: Run, folder: Path) -> list[Stage]:
    """The stages that may have made the artefact in ``folder``: its own, or all of its part of the run."""
    if folder.name.startswith("."):
        return []  # a checkpoint, which nothing waits for
    place, found = folder.relative_to(run.folder), stages(run.config)
    own = [stage for stage in found if Path(stage.artefact) == place]
    return own or [stage for stage in found if Path(stage.artefact).parts[0] == place.parts[0]]


def _whole(folder: Path) -> None:
    """ArtifactError where the artefact is damaged, or an index of what lies beside it lacks one of these."""
    artifact = load(folder, None)
    if artifact.kind == "retrain_index":
        for name in artifact.parents:
            if not (folder.parent / name / "manifest.json").is_file():
                raise ArtifactError(f"{folder} is damaged ({folder.parent / name} is gone)")


def mend(run: Run) -> None:
    """Check every artefact against its hashes and remove the damaged, so that `make stages` makes them again.

    Stages whose artefact is one of several that they make run again too, and make only what is missing.
    """
    if not run.folder.is_dir():
        print(f"there is no runs/{run.name}: nothing to mend")
        return
    with explain_os_errors(run.folder), locked(run):
        found, removed = sorted(path.parent for path in run.folder.rglob("manifest.json")), 0
        for folder in found:
            try:
                _whole(folder)
            except ArtifactError as error:
                print(f"{error.what}: removed")
                for stage in _makers(run, folder):
                    (run.folder / "notebooks" / f"{stage.name}.ipynb").unlink(missing_ok=True)
                delete(folder)
                removed += 1
        print(f"runs/{run.name}: {len(found)} artefacts checked, {removed} of them damaged and removed")


def clean(run: Run) -> None:
    """Remove everything computed in the run's folder, named first; never results/ or figures/."""
    if not run.folder.is_dir():
        print(f"there is no runs/{run.name}: nothing to remove")
        return
    with explain_os_errors(run.folder), locked(run):
        for path in sorted(run.folder.iterdir()):
            size = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
            print(f"removing runs/{run.name}/{path.name} ({size / 2**20:.1f} MiB)")
        if run.folder.is_symlink():
            print(f"runs/{run.name} is a link to {run.folder.resolve()}: that folder itself is left as it is")
        delete(run.folder)


# Each action with the options that it takes
ACTIONS: dict[str, tuple[Callable[..., int | None], tuple[str, ...]]] = {
    "status": (status, ()),
    "compare": (compare, ("strict",)),
    "publish": (publish, ("name",)),
    "core": (core, ()),
    "push-core": (push_core, ("to", "licence", "public")),
    "figures": (figures, ("name",)),
    "mend": (mend, ()),
    "clean": (clean, ()),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Look after finished runs.")
    add = parser.add_argument
    add("action", choices=ACTIONS)
    add("--as", dest="name", default="", help="publish, figures: the name below results/ and figures/")
    add("--to", default="", help="push-core: owner/name on the Hub, or a folder")
    add("--licence", default="", help="push-core: an identifier of the Hub, such as mit or gemma")
    add("--public", action="store_true", help="push-core: a new repository is not private")
    add("--strict", action="store_true", help="compare: fail unless every number is the published one")
    run_arguments(parser)
    options = parser.parse_args()
    run = open_run(options.config, options.run, options.set)
    action, names = ACTIONS[options.action]
    return action(run, **{name: getattr(options, name) for name in names}) or 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
