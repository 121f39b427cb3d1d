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

from dmsae_lib.report.claims import judged_chains
from dmsae_lib.report.verdicts import FAILS, HOLDS

Row = dict[str, Any]
CHANCE = 0.01  # share of the numbers that are beyond their tolerance where runs differ as seeds do
# so improbable a count of such numbers, or one that is FAR times its tolerance away, is a disagreement
SURPRISE = 0.001
FAR = 3.0
UNMOVED = (0.0, 0.001, "replicates do not differ: rounding alone")
# Where a run has no replicates of a number, as the bare model or the cycles of a run with one chain.
UNMEASURED = {
    "bare model": (0.001, 0.0, "rounding: the weights are given"),  # nats
    "cycle.core_out": (3.0, 0.10, "the change of size that claim C1 calls settled"),
    "cycle.kept": (3.0, 0.10, "the change of size that claim C1 calls settled"),
    "cycle.L0.core": (1.0, 0.10, "as the core's size"),
    "L0.core": (1.0, 0.10, "as the core's size"),
    "cycle.L0.total": (0.0, 0.04, "calibration on other text"),
    "L0.total": (0.0, 0.04, "calibration on other text"),
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
    model, chains = summary["language_model"], {"main": summary["cycles"]}
    for name in ("clean_loss", "zero_loss", "mean_loss"):
        yield Number(f"language_model.{name}", "bare model", (name,), model[name])
    chains |= {name: chain["cycles"] for name, chain in summary["chains"].items()}
    kinds = dict.fromkeys(judged_chains(summary), "judged")  # others have core settings of their own
    for name, rows in chains.items():
        for row in rows:
            place, group = (
                f"{'' if name == 'main' else f'chains.{name}.'}cycles[{row['cycle']}]",
                kinds.get(name, name),
            )
            for kind, value in [
                ("core_out", row["core_out"]),
                ("kept", row["kept"]),
                ("fvu", row["fvu"]["full"]),
                ("loss_increase", row["loss_increase"]["full"]),
                *_l0(row["L0"]),
            ]:
                yield Number(f"{place}.{kind}", f"cycle.{kind}", (group, row["cycle"]), value)
    for row in summary["retrain"]:
        chain = "" if row["chain"] == "main" else f"chain {row['chain']}, "
        place = f"retrain[{chain}k={row['k']}, {row['arm']}, seed {row['seed']}]"
        group = (kinds.get(row["chain"], row["chain"]), row["k"], row["arm"])
        for kind, value in [
            ("fvu", row["fvu"]),
            ("loss_increase", row["loss_increase"]),
            *_l0(row["L0"]),
            *(row["saebench"] or {}).items(),
        ]:
            if value is not None:
                yield Number(f"{place}.{kind}", kind, group, value)


def _l0(l0: Row) -> list[tuple[str, float]]:
    return [(f"L0.{part}", l0[part]) for part in ("core", "total")]


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
        # no core: its L0 is 0 whatever the seed
        varied = [values for values in by_group.values() if any(values)]
        df = sum(len(values) - 1 for values in varied)
        squares = sum((value - fmean(values)) ** 2 for values in varied for value in values)
        if df == 0 or squares == 0:
            absolute, relative, source = UNMOVED if df else UNMEASURED.get(kind, OTHERWISE)
            found[kind] = {
                "tolerance": [absolute, relative],
                "sd": 0.0 if df else None,
                "df": df,
                "source": source,
            }
        else:
            sd = math.sqrt(squares / df)
            limit = float(stdtrit(df, 1 - CHANCE / 2)) * math.sqrt(2) * sd
            found[kind] = {"tolerance": [limit, 0.0], "sd": sd, "df": df, "source": "replicates of this run"}
    return found


def optional_evals(summary: Row) -> set[str]:
    """Those of SAEBench's evals that ran beyond what ``make reproduce`` runs."""
    return {name for name, row in summary["evals"].items() if row["scores"]} - {"core", "sparse_probing"}


def compare(fresh: Row, published: Row) -> list[Row]:
    """Rows {metric, published, fresh, difference, tolerance, ok, far} for every number, and for every
    verdict.

    A number that only one side has is not ok and far; so is a verdict that turned into its opposite, while
    one that became decidable, or undecidable, is not ok alone. What only one side was asked to run (``make
    saebench``) is left out; no verdict depends on it.
    """
    new, old = ({number.metric: number for number in _numbers(side)} for side in (fresh, published))
    unasked, rows = optional_evals(fresh) ^ optional_evals(published), []
    for metric in old | new:
        number = old.get(metric) or new[metric]
        if number.kind.partition(".")[0] in unasked:
            continue
        values = [side[metric].value if metric in side else None for side in (old, new)]
        row = {
            "metric": metric,
            "published": values[0],
            "fresh": values[1],
            "difference": None,
            "tolerance": None,
        }
        if None in values:
            rows.append(row | {"ok": False, "far": True})
            continue
        absolute, relative = published["tolerances"].get(number.kind, {"tolerance": OTHERWISE[:2]})[
            "tolerance"
        ]
        tolerance, difference = max(absolute, relative * abs(values[0])), values[1] - values[0]
        rows.append(
            row
            | {
                "difference": difference,
                "tolerance": tolerance,
                "ok": abs(difference) <= tolerance,
                "far": abs(difference) > FAR * tolerance,
            }
        )
    for name, claim in published["claims"].items():
        verdicts = claim["verdict"], fresh["claims"][name]["verdict"]
        rows.append(
            {
                "metric": f"claims.{name}",
                "published": verdicts[0],
                "fresh": verdicts[1],
                "difference": None,
                "tolerance": None,
                "ok": verdicts[0] == verdicts[1],
                "far": {*verdicts} == {HOLDS, FAILS},
            }
        )
    return rows


def assess(rows: list[Row]) -> Row:
    """{numbers, identical, beyond, expected, disagrees, verdicts}: what the rows of :func:`compare` come to.

    They disagree where anything is far, or where more numbers are beyond their tolerance than chance would
    put there, of those that are not identical.
    """
    from scipy.stats import binom

    numbers = [row for row in rows if not row["metric"].startswith("claims.")]
    identical, beyond = sum(row["difference"] == 0 for row in numbers), sum(not row["ok"] for row in numbers)
    changed = {
        row["metric"].removeprefix("claims."): (row["published"], row["fresh"])
        for row in rows
        if row["metric"].startswith("claims.") and not row["ok"]
    }
    moved = len(numbers) - identical
    return {
        "numbers": len(numbers),
        "identical": identical,
        "beyond": beyond,
        "expected": CHANCE * moved,
        "verdicts": changed,
        "disagrees": any(row["far"] for row in rows) or beyond > binom.isf(SURPRISE, moved, CHANCE),
    }
