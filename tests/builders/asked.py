"""A record of notebook 10 with known numbers. None of them is a result."""

from itertools import combinations
from typing import Any

from dmsae_lib.config.sections import ARMS

Row = dict[str, Any]
SCORES = ["mean_abs", "abs_mean", "ig_mean_abs", "ig_abs_mean", "ablation", "ablation_by_context"]
SCORES += ["frequency"]
AGREED = ["A", "A, by context", "IG", "IG, by context"]
AGREED += ["size, mean_abs", "size, ig_mean_abs", "size, frequency"]
CHAINS = ("main", "seed1", "seed2")


def effects(cycle: int, n: int = 12) -> Row:
    """Of cycle 0 and 2: A promises half of what is measured, IG all of it but for the last candidate."""
    measured = [0.01 * (i - 2) for i in range(n)]
    latents = [
        {"index": i, "measured": m, "promised": 0.5 * m, "ig_promised": m + 0.02 * (i == n - 1)}
        for i, m in enumerate(measured)
    ]
    agreement = {name: {"pearson": 0.5, "spearman": 0.4, "slope": 1.0} for name in AGREED}
    agreement["IG"]["pearson"] = 0.9
    agreement["halves of the contexts"] = {"pearson": 0.95, "spearman": 0.94, "slope": 1.0}
    kept = {name: 0.1 * (at + 1) for at, name in enumerate(SCORES)}
    alike = {"jaccard": 0.7, "jaccard_ablation": 0.6}
    deeper = [
        {"prefix": j, "free": m, "candidates": m, "selected": m // 2, "shallow": 5, "again": 4, "first": 5}
        for j, m in enumerate((n, 48, 112))
    ]
    return {
        "cycle": cycle,
        "candidates": n,
        "contexts": 16,
        "tokens": 2000,
        "loss_of_all": 3.5,
        "first_order": 0.25,
        "completeness": 1.01,
        "hurting": 2,
        "agreement": agreement,
        "sets": {name: alike | {"size": 9 - at} for at, name in enumerate(SCORES)},
        "kept": kept | {f"random {draw}": 1.0 + draw for draw in range(3)},
        "kept_size": 9,
        "deeper": deeper,
        "latents": latents,
    }


def _redundancy(chain: str, cycle: int) -> Row:
    pairs = {"largest": 0.93, "pairs": {"0.7": cycle, "0.9": 1}}
    without = {"0.7": {"merged": 20, "dropped": None}, "0.9": {"merged": 25, "dropped": 30}}
    row = {"chain": chain, "core": "equal-L0", "cycle": cycle, "size": 28 + 10 * cycle, "rank": 17.5}
    return row | {"cosine": pairs, "activation": pairs, "without": without}


def agreement() -> list[Row]:
    rows = []
    for a, b in combinations(CHAINS, 2):
        for kind, cosine in (("cores", 0.5), ("turned", 0.4), ("plain", 0.3), ("random", 0.2)):
            fires = None if kind == "random" else cosine + 0.1
            row = {"core": "equal-L0", "a": a, "b": b, "kind": kind, "size": 5, "cosine": cosine}
            row |= {"cosine_above": 0.1, "activation": fires, "activation_above": fires and 0.2}
            row |= {"span": 0.6, "span_chance": 0.3, "cosines": [cosine + 0.1, cosine, cosine - 0.1]}
            rows.append(row | {"activations": [fires] * 3 if fires else [], "angles": [0.9, 0.8, 0.1]})
    return rows


def _estimate(value: float | None, low: float | None = None) -> Row:
    interval = None if low is None else [low, 2 * value - low]
    return {
        "value": value,
        "interval": interval,
        "n": 3 * (value is not None),
        "varied": "distillation chain",
    }


def competition() -> list[Row]:
    rows = []
    for at, arm in enumerate(ARMS):
        with_core = arm not in ("none", "cold_start", "warm_start") and not arm.startswith("longer")
        row = {"arm": arm, "saes": 3, "unbound": 0, "core_share": 0.03 * at * with_core, "loss_increase": 0.5}
        row |= {"frequency": 0.7 if arm in ("distilled", "random", "other_chain") else None, "fvu": 0.2}
        over = None if arm == "none" else _estimate(0.01 * at, 0.005 * at)
        minus = _estimate(None) if arm in ("none", "distilled") else _estimate(0.003 * (5 - at), 0.001)
        rows.append(
            row
            | {f"{key}_over_baseline": over for key in ("loss_increase", "fvu")}
            | {"distilled_minus": minus}
        )
    return rows


def record() -> Row:
    return {
        "config": "synthetic",
        "k": 64,
        "coverage": 0.9,
        "effects": [effects(0), effects(2, 40)],
        "redundancy": [_redundancy(chain, cycle) for chain in CHAINS for cycle in range(3)],
        "agreement": agreement(),
        "competition": {"rows": competition(), "missing": ["retrain/k64/pca-seed1"]},
    }
