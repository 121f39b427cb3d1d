"""What a few values decide: intervals, p values, and the verdict on a claim made of several parts.

A *part* sets the mean of one value per independent unit against a bound:

    holds            the 95 % interval lies on the claimed side: above the bound, below it, or within +- it
    does not hold    it lies on the other side, with a p value that is corrected for the number of parts
    not decidable    anything else; fewer than two values, or values without any spread, decide nothing

A claim holds if every deciding part holds. That needs no correction: it is an intersection-union test, whose
level is that of one part (Berger 1982). It does not hold as soon as one deciding part does not, and that does
need one, since among many parts at their bounds some interval lies on the other side by chance: p values
against the claim are multiplied by Holm (1979) over all deciding parts, run or not. Parts that are only
reported are corrected among themselves.
"""

import math
from collections.abc import Iterable, Mapping
from itertools import combinations
from statistics import fmean, variance
from typing import Any, Literal

Row = dict[str, Any]
Side = Literal["above", "below", "within"]
HOLDS, FAILS, OPEN = "holds", "does not hold", "not decidable"
CONFIDENCE = 0.95
NO_SPREAD = 1e-9  # values that differ by less are copies of one: only rounding tells them apart


def _error(values: list[float]) -> float | None:
    """Squared standard error of the mean; None where it says nothing: fewer than two values, or copies."""
    spread = len(values) > 1 and max(values) - min(values) > NO_SPREAD
    return variance(values) / len(values) if spread else None


def _interval(mean: float, squared_error: float, df: float) -> list[float]:
    from scipy.special import stdtrit  # Student's t; scipy.stats would take four times as long to import

    half = float(stdtrit(df, 0.5 + CONFIDENCE / 2)) * math.sqrt(squared_error)
    return [mean - half, mean + half]


def t_interval(values: Iterable[float]) -> list[float] | None:
    """[low, high] of the 95 % t interval of the mean; None below two values and without any spread."""
    values = list(values)
    error = _error(values)
    return None if error is None else _interval(fmean(values), error, len(values) - 1)


def part(
    name: str,
    values: Iterable[float],
    bound: float = 0.0,
    side: Side = "above",
    k: int | None = None,
    decides: bool = True,
) -> Row:
    """A part decided by the t interval of ``values``, one per unit; ``p`` is two-sided, against the bound
    (that of +- ``bound`` that is nearer)."""
    from scipy.special import stdtr

    values = list(values)
    mean, error, p = fmean(values) if values else None, _error(values), None
    if error is not None:
        nearest = math.copysign(bound, mean) if side == "within" else bound
        p = 2 * float(stdtr(len(values) - 1, -abs(mean - nearest) / math.sqrt(error)))
    found = {"part": name, "k": k, "value": mean, "interval": t_interval(values), "p": p, "n": len(values)}
    return found | {"bound": bound, "side": side, "test": "t", "verdict": OPEN, "decides": decides}


def permutation_p(a: list[float], b: list[float]) -> tuple[float, float]:
    """One-sided p of "a above b" and of "a below b": the share of all relabellings of the pooled values whose
    difference of means is at least as large, or as small. Exact; the smallest is 1 / their number."""
    sums = [sum(group) for group in combinations([*a, *b], len(a))]
    return fmean(s >= sum(a) - NO_SPREAD for s in sums), fmean(s <= sum(a) + NO_SPREAD for s in sums)


def group_part(name: str, a: Iterable[float], b: Iterable[float], decides: bool = True) -> Row:
    """The mean of ``a`` is above that of ``b``: decided by the permutation test, whose one-sided p is
    doubled; the interval is Welch's."""
    a, b = list(a), list(b)
    found = part(name, [], decides=decides) | {"test": "permutation", "n": min(len(a), len(b))}
    if not found["n"]:
        return found
    found["value"] = fmean(a) - fmean(b)
    errors = [_error(group) or 0.0 for group in (a, b)]  # placebo rows may well be kept never, in every chain
    if found["n"] > 1 and sum(errors):
        df = sum(errors) ** 2 / sum(error**2 / (len(group) - 1) for error, group in zip(errors, (a, b)))
        found["interval"] = _interval(found["value"], sum(errors), df)
        found["p"] = min(1.0, 2 * permutation_p(a, b)[found["value"] < 0])
    return found


def pseudo_values(pairs: Mapping[tuple[str, str], float]) -> list[float]:
    """Jackknife pseudo-values, one per unit, of the mean U over pairs of units: n U - (n - 1) U without it.

    Pairs share units, so they are not independent; the pseudo-values nearly are, and have the same mean
    (Arvesen 1969, for U-statistics). Below three units there is only that mean.
    """
    units = sorted({unit for pair in pairs for unit in pair})
    if len(units) < 3:
        return list(pairs.values())
    n, mean = len(units), fmean(pairs.values())
    return [n * mean - (n - 1) * fmean(v for pair, v in pairs.items() if unit not in pair) for unit in units]


def holm(ps: list[float]) -> list[float]:
    """Holm's adjusted p values, in the order given: the i-th smallest of m times m - i, made monotone."""
    adjusted, highest = [0.0] * len(ps), 0.0
    for place, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, (len(ps) - place) * ps[i])
        adjusted[i] = min(1.0, highest)
    return adjusted


def _claimed(found: Row) -> bool:
    """Whether the mean is on the claimed side."""
    value, bound = found["value"], found["bound"]
    return {"above": value > bound, "below": value < bound, "within": abs(value) < bound}[found["side"]]


def decided(parts: list[Row]) -> list[Row]:
    """The parts with their verdicts, by the rule of this module's docstring."""
    verdicts: dict[int, str] = {}
    for decides in (True, False):
        family = [i for i, p in enumerate(parts) if p["decides"] == decides]
        tested = {i for i in family if parts[i]["p"] is not None}
        against = holm([1.0 if i not in tested or _claimed(parts[i]) else parts[i]["p"] for i in family])
        for i, p in zip(family, against):
            holds = i in tested and _claimed(parts[i]) and parts[i]["p"] < 1 - CONFIDENCE
            verdicts[i] = HOLDS if holds else FAILS if p < 1 - CONFIDENCE else OPEN
    return [p | {"verdict": verdicts[i]} for i, p in enumerate(parts)]


def overall(parts: list[Row]) -> str:
    """The claim's verdict from its decided parts."""
    verdicts = [p["verdict"] for p in parts if p["decides"]]
    if FAILS in verdicts:
        return FAILS
    return HOLDS if verdicts and set(verdicts) == {HOLDS} else OPEN
