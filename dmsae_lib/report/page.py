"""The pages of a published run, written from its results alone, so that no number in them can go stale: all
tables in results/<name>/README.md, the verdicts in the main README between two markers.

What they say is in templates/results.md.j2 and templates/verdicts.md.j2; here is what a template cannot do.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dmsae_lib.config.fields import EMBEDDED
from dmsae_lib.report.claims import CLAIMS
from dmsae_lib.report.equal_l0 import CHAIN, SEED, advantage, over_baseline, per_unit
from dmsae_lib.report.results import Results
from dmsae_lib.report.series import (
    ARMS,
    PLURAL,
    baselines,
    by_k,
    differences,
    kind_name,
    kinds,
    label,
    lines,
    replicates,
    units,
    varied,
)
from dmsae_lib.report.verdicts import t_interval
from dmsae_lib.report.what_is_a_core import RECORD, answers, mean_of_random, means
from dmsae_lib.store.atomic import write_text

TEMPLATES = Path(__file__).with_name("templates")
BEGIN, END = "<!-- verdicts: written by make publish -->", "<!-- end -->"
IN_README = {"SmolLM2-135M": ["smollm2-135m"], "embedded model": ["extended", "default"]}  # published runs
Row = dict[str, Any]


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def average(values: Iterable[float | None], digits: int = 4) -> str:
    found = [value for value in values if value is not None]
    return _number(fmean(found) if found else None, digits)


def mean(rows: list[Row], path: str, digits: int = 4) -> str:
    """Of what a dotted path names: over chains where there are several, else over training seeds."""

    def value(row: Row) -> Any:
        for key in path.split("."):
            row = row and row.get(key)
        return row

    return average(units(rows, value)[0], digits)


def signed(value: float | None, interval: list[float] | None, digits: int) -> str:
    if value is None:
        return "-"
    shown, *ends = [f"{number:+.{digits}f}" for number in (value, *(interval or ()))]
    return f"{shown} [{', '.join(ends)}]" if ends else shown


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def rendered(template: str, **values: Any) -> str:
    layout = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, **layout)
    used = (average, mean, signed, cell, kind_name, varied, mean_of_random)
    filters = {one.__name__: one for one in used}
    environment.filters |= filters | {"n": lambda rows: len(units(rows, lambda row: row["fvu"])[0])}
    return environment.get_template(template).render(values)


def _chains(summary: Row) -> list[tuple[str, Row, list[Row]]]:
    """(name, settings, cycles) of every chain, by kind of core, the main one's replicates first."""
    main = {"seed": summary["inputs"]["seed"]} | summary["sizes"]
    settings = {"main": main} | summary["chains"]
    return [(name, settings[name], rows) for kind in kinds(summary) for name, rows in kind.chains.items()]


def _controls(summary: Row) -> list[tuple[str, list[Row], str]]:
    """(label, rows, loss increase minus the baseline's at measured L0) of every arm at the distillation k,
    with the main chain's kind of core."""
    k, rows, found = summary["sizes"]["k"], kinds(summary)[0].rows, []
    for arm in ARMS:
        mine = [row for row in rows if (row["arm"], row["k"]) == (arm, k)]
        if mine:
            found.append((label(arm, summary), mine, _gain(mine, rows)))
    return found


def _by_k(summary: Row, arms: Iterable[str] = ARMS, metric: str = "") -> list[tuple[int, str, list[Row]]]:
    """(k, name, rows) of each of the arms, of each kind of core; with ``metric`` those that were scored."""
    drawn = lines(summary, arms, lambda row: not metric or metric in (row["saebench"] or {}))
    return [(k, look[0], rows) for look, mine in drawn for k, rows in by_k(mine).items()]


def _gain(rows: list[Row], without: list[Row]) -> str:
    """Loss increase of an arm's ``rows`` minus the baselines' at measured L0."""
    if rows[0]["arm"] == "none":
        return "-"
    gains = units(rows, lambda row: over_baseline(row, without, "loss_increase"))[0]
    return signed(fmean(gains), t_interval(gains), 4) if gains else "-"


def results_page(
    name: str,
    summary: Row,
    made: Row,
    base_model: Row | None = None,
    sweep: Row | None = None,
    beside: Row | None = None,
    asked: Row | None = None,
) -> str:
    """Markdown of all the numbers of one published run; ``made``: how its stages were made.

    ``base_model`` is the record of the embedded model where the run is about that one, ``beside`` where it is
    about another on the same text; ``sweep`` is the run's learning_rate.json, ``asked`` its
    what_is_a_core.json.
    """
    k, scored = summary["sizes"]["k"], [row["saebench"] or {} for row in summary["retrain"]]
    gains = advantage(kinds(summary)[0].rows, "distilled", k, "loss_increase")
    without = baselines(summary)
    return rendered(
        "results.md.j2",
        name=name,
        made=made,
        base_model=base_model,
        sweep=sweep,
        beside=beside,
        asked=asked,
        core_answers=answers(asked) if asked else {},
        arm_labels={arm: label(arm, summary) for arm in ARMS},
        core_agreement=means(asked["agreement"]) if asked else {},
        **summary,
        placebos=sorted({kind for row in summary["cycles"] for kind in row["placebos"]}),
        arm_names={arm: look[0] for arm, look in ARMS.items()},
        core_eval=[row["ce_loss_without_sae"] for row in scored if "ce_loss_without_sae" in row],
        n_chains=len(replicates(summary)),
        all_chains=_chains(summary),
        varied=PLURAL[per_unit(gains)[1]],
        controls=_controls(summary),
        by_k=[
            (*group, _gain(group[-1], without))
            for group in sorted(_by_k(summary, ["none", "distilled"]), key=lambda group: group[0])
        ],
        by_core=differences(summary),
        probed=_by_k(summary, metric="probe_top1") if summary["probing_baselines"] else [],
        tops=[key for key in ("probe_top1", "probe_top5") if any(key in row for row in scored)],
    )


def published_page(folder: Path, name: str, root: Path) -> str:
    """The page of the results in ``folder``, which lie, or will, in results/<name>."""
    results, sweep = Results(folder), folder / "learning_rate.json"
    record, inputs = root / "results" / "base_model" / "base_model.json", results.summary["inputs"]
    embedded = (EMBEDDED / inputs["model"]["name"] / "config.json").is_file()
    same_text = not embedded and inputs["data"]["source"] == "embedded"
    base_model, rates, beside, asked = (
        json.loads(path.read_text(encoding="utf-8")) if there and path.is_file() else None
        for path, there in ((record, embedded), (sweep, True), (record, same_text), (folder / RECORD, True))
    )
    return results_page(name, results.summary, results.made, base_model, rates, beside, asked)


def verdict_table(models: dict[str, list[Row]]) -> str:
    """Each claim about each model, from the summary that has most units to judge it by, the first of
    equals."""
    best = {
        model: {name: max(summaries, key=lambda found: found["claims"][name]["n"]) for name in CLAIMS}
        for model, summaries in models.items()
    }
    units = {CHAIN: "chain", SEED: "seed"}
    return rendered("verdicts.md.j2", best=best, claims=CLAIMS, units=units)


def update_readme(root: Path) -> None:
    """Put the verdicts of the published runs that the README is about between its markers, if any."""
    path, models = root / "README.md", {}
    for model, names in IN_README.items():
        places = [root / "results" / name for name in names]
        if found := [Results(place).summary for place in places if (place / "summary.json").is_file()]:
            models[model] = found
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if models and BEGIN in text:
        table = f"{BEGIN}\n\n{verdict_table(models)}\n{END}"
        between = re.escape(BEGIN) + ".*?" + re.escape(END)
        write_text(path, re.sub(between, lambda _: table, text, count=1, flags=re.DOTALL))
