"""Numbers that answer the reviewers of the paper's earlier version, from one run.

R1 total L0 with the core counted, R3 longer-trained baselines, R4 how often core latents fire, R5 a core selected by
frequency, R7 examples (a table made by notebook 07), R10 aggregators and the stability of the ranking.
"""

from collections.abc import Iterable
from statistics import fmean, quantiles
from typing import Any

from dmsae_lib.claims import advantage, number, over_control, t_interval
from dmsae_lib.settings import ARMS, LONGER

Row = dict[str, Any]
TABLE = "core_table.json"  # R7: written by notebook 07


def _answer(question: str, answer: str, numbers: Any) -> Row:
    return {"question": question, "answer": answer, "numbers": numbers}


def _mean(values: Iterable[float]) -> Row:
    values = list(values)
    return {"mean": fmean(values) if values else None, "interval": t_interval(values), "n": len(values)}


def total_l0(rows: list[Row], k_distill: int) -> Row:
    """R1: per arm and k, L0 of core, non-core and both, with loss recovered; means over seeds."""
    numbers = []
    for arm in ARMS:
        for k in sorted({r["k"] for r in rows if r["core"] == arm}):
            group = [r for r in rows if (r["core"], r["k"]) == (arm, k)]
            numbers.append({"core": arm, "k": k, "n": len(group), "unbound": sum(r["unbound"] for r in group),
                            "L0": {part: fmean(r["L0"][part] for r in group) for part in ("core", "non_core", "total")},
                            "loss_recovered": fmean(r["loss_recovered"] for r in group)})
    at = next((n for n in numbers if (n["core"], n["k"]) == ("distilled", k_distill)), None)
    text = "No SAE with the distilled core was trained at the distillation k."
    if at:
        gain = _mean(advantage(rows, "distilled", k_distill, "loss_recovered").values())["mean"]
        text = (f"At k = {k_distill} the total L0 is {at['L0']['total']:.1f}, of which {at['L0']['core']:.1f} from the "
                f"core; loss recovered {at['loss_recovered']:.4f}, against the baseline at that L0: {number(gain)}.")
    return _answer("What is the total L0 with the core counted, and what is recovered at it?", text, numbers)


def longer_baselines(rows: list[Row], k: int) -> Row:
    """R3: the plain Matryoshka SAE with the tokens of all cycles, and the distilled core, against the plain one."""
    numbers = {arm: {metric: _mean(advantage(rows, arm, k, metric).values()) for metric in ("loss_recovered", "fvu")}
               for arm in ("distilled", *LONGER)}
    for arm, entry in numbers.items():
        entry["tokens"] = next((r["tokens"] for r in rows if (r["core"], r["k"]) == (arm, k)), None)
    shown = "; ".join(f"{arm} {number(entry['loss_recovered']['mean'])} (n = {entry['loss_recovered']['n']})"
                      for arm, entry in numbers.items())
    return _answer("How does DMSAE compare with a Matryoshka SAE given the compute of all cycles?",
                   f"Loss recovered at k = {k}, minus the ordinary baseline at measured L0: {shown}.", numbers)


def spread(values: list[float]) -> Row:
    """Mean, quartiles and tails of firing frequencies."""
    low, median, high = quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    return {"n": len(values), "mean": fmean(values), "min": min(values), "quartile_1": low, "median": median,
            "quartile_3": high, "max": max(values), "share_above_0.1": fmean(v > 0.1 for v in values),
            "share_above_0.5": fmean(v > 0.5 for v in values)}


def firing(core: list[float], candidates: list[float]) -> Row:
    """R4: firing frequencies of the last core, and of the candidates that were not selected into it."""
    numbers = {"core": spread(core), "not_selected": spread(candidates) if candidates else None}
    other = f", the median candidate left out on {numbers['not_selected']['median']:.1%}" if candidates else ""
    return _answer("How often do core latents fire?",
                   f"The median core latent fires on {numbers['core']['median']:.1%} of the tokens (quartiles "
                   f"{numbers['core']['quartile_1']:.1%} and {numbers['core']['quartile_3']:.1%}, largest "
                   f"{numbers['core']['max']:.1%}){other}.", numbers)


def most_frequent(rows: list[Row], k: int) -> Row:
    """R5: the distilled core minus a core of equal size made of the most frequent candidates."""
    overlaps = [r["overlap"] for r in rows if (r["core"], r["k"]) == ("most_frequent", k) and r["overlap"] is not None]
    difference = _mean(over_control(rows, "most_frequent", k))
    numbers = {"k": k, "distilled_minus_most_frequent": difference, "overlap": fmean(overlaps) if overlaps else None}
    shared = f"; {numbers['overlap']:.0%} of it is in the distilled core too" if overlaps else ""
    return _answer("Is selection by attribution better than selection by activation frequency?",
                   f"Loss recovered at k = {k}, distilled minus most-frequent core at measured L0: "
                   f"{number(difference['mean'])} (n = {difference['n']}){shared}.", numbers)


def aggregators(cycles: list[Row], records: list[Row], default: str) -> Row:
    """R10: core size by aggregator, its agreement with the default, and the ranking's stability, per cycle."""
    numbers = [{"cycle": row["cycle"], "aggregators": record["aggregators"], "stability": row["ranking_stability"]}
               for row, record in zip(cycles, records)]
    last = numbers[-1]
    shown = ", ".join(f"{name} {entry['size']}" for name, entry in last["aggregators"].items())
    spearman, jaccard = number(last["stability"]["spearman"], 3), last["stability"]["jaccard"]
    text = (f"Sizes that reach the coverage in cycle {last['cycle']}: {shown} (default {default}); between two halves "
            f"of the tokens the ranking has Spearman {spearman} and the selected sets have Jaccard {jaccard:.3f}.")
    return _answer("Does the aggregator matter, and is the ranking stable?", text, numbers)


def answers(summary: Row, records: list[Row], core: list[float], not_selected: list[float]) -> dict[str, Row]:
    """All answers; ``records`` are the attribution records by cycle.

    ``core`` and ``not_selected`` are firing frequencies of the last cycle's core and of the other candidates.
    """
    rows, sizes = summary["retrain"], summary["sizes"]
    examples = f"The strongest core latents, with contexts, logit effects and lineage, are in {TABLE}."
    return {"R1": total_l0(rows, sizes["k"]), "R3": longer_baselines(rows, sizes["k"]),
            "R4": firing(core, not_selected), "R5": most_frequent(rows, sizes["k"]),
            "R7": _answer("What do core latents respond to?", examples, {"table": TABLE}),
            "R10": aggregators(summary["cycles"], records, sizes["aggregator"])}
