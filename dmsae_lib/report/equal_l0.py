"""SAEs compared at *measured* L0: each against the baseline without a core of the same chain and seed.

The baseline's score is interpolated linearly in log L0 between the k's it was trained at. A chain without a
baseline of its own enters no claim (figures and pages lend it that of its seed: see
:func:`~dmsae_lib.report.series.baselines`). Neither does an SAE that is ``unbound``: its core alone reaches
k, so that its L0 cannot be brought to k.
"""

import math
from statistics import fmean
from typing import Any

Row = dict[str, Any]
OfSAE = dict[tuple[str, int], float]  # a number by (chain, training seed)

OF_SAE = ("loss_increase", "loss_recovered", "loss_recovered_mean", "fvu")  # the others are SAEBench's
# Thresholds are calibrated to 1 % of k, on other text than L0 is measured on, so two SAEs of the same k can
# differ by 4 % in L0. Within that margin the baseline's outermost segment is prolonged; beyond it there is
# nothing to compare with.
L0_MARGIN = 0.04
CHAIN, SEED = "distillation chain", "training seed (one distilled core)"


def score(row: Row, metric: str) -> float | None:
    """A loss or the FVU of a retrain row, or a SAEBench number of it; None where it was not measured."""
    return row[metric] if metric in OF_SAE else (row["saebench"] or {}).get(metric)


def baseline_at(rows: list[Row], chain: str, seed: int, l0: float, metric: str) -> float | None:
    """The baseline's score at total L0 = ``l0``, linear in log L0; None where it has no point near."""
    points = sorted(
        (math.log(r["L0"]["total"]), score(r, metric))
        for r in rows
        if (r["chain"], r["arm"], r["seed"]) == (chain, "none", seed) and score(r, metric) is not None
    )
    x = math.log(l0)
    if not points or not points[0][0] - L0_MARGIN <= x <= points[-1][0] + L0_MARGIN:
        return None
    if len(points) == 1:
        return points[0][1]
    right = next((i for i in range(1, len(points) - 1) if x <= points[i][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def over_baseline(row: Row, baselines: list[Row], metric: str) -> float | None:
    """The score of ``row`` minus the baseline's at its measured L0; None where it is unbound, was not scored,
    or has no baseline near."""
    if row["unbound"] or (value := score(row, metric)) is None:
        return None
    base = baseline_at(baselines, row["chain"], row["seed"], row["L0"]["total"], metric)
    return None if base is None else value - base


def advantage(rows: list[Row], arm: str, k: int | None, metric: str) -> OfSAE:
    """{(chain, seed): score of the arm's SAE minus the baseline's at its measured L0}, of bound SAEs."""
    gains = {}
    for row in rows:
        if row["arm"] == arm and row["k"] == k and (gain := over_baseline(row, rows, metric)) is not None:
            gains[row["chain"], row["seed"]] = gain
    return gains


def of_scored_chains(rows: list[Row]) -> list[Row]:
    """The rows of those chains whose distilled SAEs SAEBench scored; of the main one where there are none."""
    scored = {row["chain"] for row in rows if row["arm"] == "distilled" and row["saebench"]}
    return [row for row in rows if row["chain"] in (scored or {"main"})]


def paired(a: OfSAE, b: OfSAE) -> OfSAE:
    """a - b where both have a value."""
    return {key: a[key] - b[key] for key in a if key in b}


def over_control(rows: list[Row], control: str, k: int) -> OfSAE:
    """Loss increase, distilled minus control, each against the baseline at its own measured L0."""
    return paired(*(advantage(rows, arm, k, "loss_increase") for arm in ("distilled", control)))


def by_chain(found: OfSAE) -> dict[str, float]:
    """{chain: mean over its training seeds}."""
    return {
        chain: fmean(v for (c, _), v in found.items() if c == chain)
        for chain in dict.fromkeys(c for c, _ in found)
    }


def per_unit(found: OfSAE) -> tuple[list[float], str]:
    """One value per chain where there are several, else per training seed; and what it is that varied."""
    chains = by_chain(found)
    return (list(chains.values()), CHAIN) if len(chains) > 1 else (list(found.values()), SEED)


def per_seed(found: OfSAE) -> tuple[list[float], str]:
    """One value per training seed of the first chain; per chain where that chain has one seed alone."""
    first = next((chain for chain, _ in found), None)
    seeds, chains = [value for (chain, _), value in found.items() if chain == first], by_chain(found)
    return (list(chains.values()), CHAIN) if len(seeds) < 2 <= len(chains) else (seeds, SEED)


def bound_ks(rows: list[Row]) -> list[int]:
    """The k's at which at least one SAE with the distilled core could be calibrated to total L0 = k."""
    return sorted({r["k"] for r in rows if r["arm"] == "distilled" and not r["unbound"]})
