"""Does a fresh run agree with the published one? Tolerances are measured, on the published run's own
replicates.

On the machine, library versions and thread count of the published run every number repeats exactly. Another
CPU adds in another order, and training magnifies the last bit until two runs differ about as two seeds do. So
the yardstick of a number is its standard deviation s between replicates, pooled over all places where it was
measured more than once: over chains that differ in their seed alone for what happens in the cycles, and over
retraining seeds too for retrained SAEs and their scores. (An eval draws the same texts and probes in both
runs.) Two runs that differ as two seeds do have a difference of standard deviation sqrt(2) s; the tolerance
is what all but CHANCE of such differences stay within, by Student's t.
"""

import math
from collections.abc import Iterator
from statistics import fmean
from typing import Any, NamedTuple

from dmsae_lib.report.series import replicates
from dmsae_lib.report.verdicts import FAILS, HOLDS

Row = dict[str, Any]
CHANCE = 0.01  # share of the numbers that are beyond their tolerance where runs differ as seeds do
SURPRISE = 0.001  # so improbable a count of such numbers is a disagreement
FAR = 3.0  # and so is one that is so many times its tolerance away
UNMOVED = (0.0, 0.001, "replicates do not differ: rounding alone")
# Where a run has no replicates of a number, as the bare model or the cycles of a run with one chain.
SIZE = (3.0, 0.10, "the change of size that claim C1 calls settled")
CORE_L0, TOTAL_L0 = (1.0, 0.10, "as the core's size"), (0.0, 0.04, "calibration on other text")
UNMEASURED = {
    "bare model": (0.001, 0.0, "rounding: the weights are given"),  # nats
    "cycle.core_out": SIZE,
    "cycle.kept": SIZE,
    "cycle.L0.core": CORE_L0,
    "L0.core": CORE_L0,
    "cycle.L0.total": TOTAL_L0,
    "L0.total": TOTAL_L0,
    "cycle.fvu": (0.01, 0.05, "by decision"),
    "cycle.loss_increase": (0.03, 0.05, "by decision"),
}
OTHERWISE = (0.05, 0.05, "one replicate only: by decision")


class Number(NamedTuple):
    """One number that a second run should give again; numbers of one ``group`` differ in the seed alone."""

    metric: str  # what it is called in a report
    kind: str
    group: tuple
    value: float


def _numbers(summary: Row) -> Iterator[Number]:
    for name in ("clean_loss", "zero_loss", "mean_loss"):
        yield Number(f"language_model.{name}", "bare model", (name,), summary["language_model"][name])
    alike = dict.fromkeys(replicates(summary), "replicates")  # others have core settings of their own
    chains = {"main": summary["cycles"]}
    chains |= {name: chain["cycles"] for name, chain in summary["chains"].items()}
    for name, rows in chains.items():
        place = "" if name == "main" else f"chains.{name}."
        for row in rows:
            values = {"core_out": row["core_out"], "kept": row["kept"], "fvu": row["fvu"]["full"]}
            values |= {"loss_increase": row["loss_increase"]["full"], **_l0(row)}
            group = (alike.get(name, name), row["cycle"])
            for kind, value in values.items():
                yield Number(f"{place}cycles[{row['cycle']}].{kind}", f"cycle.{kind}", group, value)
    for row in summary["retrain"]:
        chain = "" if row["chain"] == "main" else f"chain {row['chain']}, "
        place = f"retrain[{chain}k={row['k']}, {row['arm']}, seed {row['seed']}]"
        group = (alike.get(row["chain"], row["chain"]), row["k"], row["arm"])
        values = {"fvu": row["fvu"], "loss_increase": row["loss_increase"], **_l0(row)}
        for kind, value in (values | (row["saebench"] or {})).items():
            if value is not None:
                yield Number(f"{place}.{kind}", kind, group, value)


def _l0(row: Row) -> dict[str, float]:
    return {f"L0.{part}": row["L0"][part] for part in ("core", "total")}


def tolerances(summary: Row) -> dict[str, Row]:
    """{kind of number: {tolerance, sd, df, source}}.

    ``tolerance`` is [absolute, relative], of which the larger counts; where there are no replicates it is a
    decision.
    """
    from scipy.special import stdtrit

    groups: dict[str, dict[tuple, list[float]]] = {}
    for number in _numbers(summary):
        groups.setdefault(number.kind, {}).setdefault(number.group, []).append(number.value)
    found = {}
    for kind, by_group in groups.items():
        varied = [values for values in by_group.values() if any(values)]  # no core: L0 is 0 whatever the seed
        df = sum(len(values) - 1 for values in varied)
        squares = sum((value - fmean(values)) ** 2 for values in varied for value in values)
        sd = math.sqrt(squares / df) if df else None
        if sd:
            absolute = float(stdtrit(df, 1 - CHANCE / 2)) * math.sqrt(2) * sd
            relative, source = 0.0, "replicates of this run"
        else:
            absolute, relative, source = UNMOVED if df else UNMEASURED.get(kind, OTHERWISE)
        found[kind] = {"tolerance": [absolute, relative], "sd": sd, "df": df, "source": source}
    return found


def optional_evals(summary: Row) -> set[str]:
    """Those of SAEBench's evals that ran beyond what ``make reproduce`` runs."""
    return {name for name, row in summary["evals"].items() if row["scores"]} - {"core", "sparse_probing"}


def compare(fresh: Row, published: Row) -> list[Row]:
    """Rows {metric, published, fresh, difference, tolerance, ok, far} for every number, and for every
    verdict.

    A number that only one side has is not ok and far; so is a verdict that turned into its opposite, while
    one that became decidable, or undecidable, is not ok alone. What only one side was asked to run (``make
    saebench``; no verdict depends on it) or to judge (a claim that is new) is left out.
    """
    new, old = ({number.metric: number for number in _numbers(side)} for side in (fresh, published))
    unasked, rows = optional_evals(fresh) ^ optional_evals(published), []
    for metric in old | new:
        number = old.get(metric) or new[metric]
        if number.kind.partition(".")[0] in unasked:
            continue
        before, after = (side[metric].value if metric in side else None for side in (old, new))
        row = {"metric": metric, "published": before, "fresh": after, "difference": None, "tolerance": None}
        if None in (before, after):
            rows.append(row | {"ok": False, "far": True})
            continue
        limits = published["tolerances"].get(number.kind, {"tolerance": OTHERWISE[:2]})["tolerance"]
        difference, tolerance = after - before, max(limits[0], limits[1] * abs(before))
        row |= {"difference": difference, "tolerance": tolerance, "ok": abs(difference) <= tolerance}
        rows.append(row | {"far": abs(difference) > FAR * tolerance})
    for name in [name for name in published["claims"] if name in fresh["claims"]]:
        before, after = (side["claims"][name]["verdict"] for side in (published, fresh))
        row = {"metric": f"claims.{name}", "published": before, "fresh": after, "difference": None}
        rows.append(
            row | {"tolerance": None, "ok": before == after, "far": {before, after} == {HOLDS, FAILS}}
        )
    return rows


def assess(rows: list[Row]) -> Row:
    """{numbers, identical, beyond, expected, verdicts, disagrees}: what the rows of :func:`compare` come to.

    They disagree where anything is far, or where more numbers are beyond their tolerance than chance would
    put there, of those that are not identical.
    """
    from scipy.stats import binom

    numbers = [row for row in rows if not row["metric"].startswith("claims.")]
    changed = {
        row["metric"].removeprefix("claims."): (row["published"], row["fresh"])
        for row in rows
        if row["metric"].startswith("claims.") and not row["ok"]
    }
    identical, beyond = sum(row["difference"] == 0 for row in numbers), sum(not row["ok"] for row in numbers)
    moved = len(numbers) - identical
    found = {"numbers": len(numbers), "identical": identical, "beyond": beyond, "expected": CHANCE * moved}
    disagrees = any(row["far"] for row in rows) or beyond > binom.isf(SURPRISE, moved, CHANCE)
    return found | {"verdicts": changed, "disagrees": disagrees}
