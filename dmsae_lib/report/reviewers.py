"""Numbers that answer the reviewers of the paper's earlier version, from one run.

R1 total L0 with the core counted, R3 longer-trained baselines, R4 how often core latents fire, R5 a core
selected by frequency, R6 stability over seeds, R7 examples (a table made by notebook 07), R10 aggregators and
the stability of the ranking, R13 what the error bars are over. Answers are about the main chain's core
settings; the loss is the loss increase in nats, lower is better.
"""

from statistics import fmean, quantiles
from typing import Any

from dmsae_lib.config.sections import ARMS, LONGER
from dmsae_lib.report.claims import identity_means, judged_chains, number
from dmsae_lib.report.equal_l0 import OfSAE, advantage, over_control, per_unit
from dmsae_lib.report.verdicts import t_interval

Row = dict[str, Any]
TABLE = "core_table.json"  # R7: written by notebook 07


def _answer(question: str, answer: str, numbers: Any) -> Row:
    return {"question": question, "answer": answer, "numbers": numbers}


def _mean(found: OfSAE) -> Row:
    values, varied = per_unit(found)
    return {
        "mean": fmean(values) if values else None,
        "interval": t_interval(values),
        "n": len(values),
        "varied": varied,
    }


def total_l0(rows: list[Row], k_distill: int) -> Row:
    """R1: per arm and k, L0 of core, free and both, with the loss increase; means over all SAEs."""
    numbers = []
    for arm in ARMS:
        for k in sorted({r["k"] for r in rows if r["arm"] == arm}):
            group = [r for r in rows if (r["arm"], r["k"]) == (arm, k)]
            numbers.append(
                {
                    "arm": arm,
                    "k": k,
                    "n": len(group),
                    "unbound": sum(r["unbound"] for r in group),
                    "L0": {part: fmean(r["L0"][part] for r in group) for part in ("core", "free", "total")},
                    "loss_increase": fmean(r["loss_increase"] for r in group),
                }
            )
    at = next((n for n in numbers if (n["arm"], n["k"]) == ("distilled", k_distill)), None)
    text = "No SAE with the distilled core was trained at the distillation k."
    if at:
        gain = _mean(advantage(rows, "distilled", k_distill, "loss_increase"))["mean"]
        text = (
            f"At k = {k_distill} the total L0 is {at['L0']['total']:.1f}, of which {at['L0']['core']:.1f} "
            f"from the core; the loss increases by {at['loss_increase']:.4f} nats, against the baseline at "
            f"that L0: {number(gain)}."
        )
    return _answer("What is the total L0 with the core counted, and what loss does it leave?", text, numbers)


def longer_baselines(rows: list[Row], k: int) -> Row:
    """R3: the plain Matryoshka SAE with the tokens of all cycles, and the distilled core, against the plain
    one."""
    numbers = {
        arm: {metric: _mean(advantage(rows, arm, k, metric)) for metric in ("loss_increase", "fvu")}
        for arm in ("distilled", *LONGER)
    }
    for arm, entry in numbers.items():
        entry["tokens"] = next((r["tokens"] for r in rows if (r["arm"], r["k"]) == (arm, k)), None)
    shown = "; ".join(
        f"{arm} {number(entry['loss_increase']['mean'])} (n = {entry['loss_increase']['n']})"
        for arm, entry in numbers.items()
    )
    return _answer(
        "How does DMSAE compare with a Matryoshka SAE given the compute of all cycles?",
        f"Loss increase in nats at k = {k}, minus that of the ordinary baseline at measured L0: {shown}.",
        numbers,
    )


def spread(values: list[float]) -> Row:
    """Mean, quartiles and tails of firing frequencies."""
    low, median, high = quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    return {
        "n": len(values),
        "mean": fmean(values),
        "min": min(values),
        "quartile_1": low,
        "median": median,
        "quartile_3": high,
        "max": max(values),
        "share_above_0.1": fmean(v > 0.1 for v in values),
        "share_above_0.5": fmean(v > 0.5 for v in values),
    }


def firing(core: list[float], candidates: list[float]) -> Row:
    """R4: firing frequencies of the last core, and of the candidates that were not selected into it."""
    numbers = {"core": spread(core), "not_selected": spread(candidates) if candidates else None}
    other = (
        f", the median candidate left out on {numbers['not_selected']['median']:.1%}" if candidates else ""
    )
    return _answer(
        "How often do core latents fire?",
        f"The median core latent fires on {numbers['core']['median']:.1%} of the tokens (quartiles "
        f"{numbers['core']['quartile_1']:.1%} and {numbers['core']['quartile_3']:.1%}, largest "
        f"{numbers['core']['max']:.1%}){other}.",
        numbers,
    )


def most_frequent(rows: list[Row], k: int) -> Row:
    """R5: the distilled core minus a core of equal size made of the most frequent candidates."""
    overlaps = [
        r["overlap"] for r in rows if (r["arm"], r["k"]) == ("most_frequent", k) and r["overlap"] is not None
    ]
    difference = _mean(over_control(rows, "most_frequent", k))
    numbers = {
        "k": k,
        "distilled_minus_most_frequent": difference,
        "overlap": fmean(overlaps) if overlaps else None,
    }
    shared = f"; {numbers['overlap']:.0%} of it is in the distilled core too" if overlaps else ""
    return _answer(
        "Is selection by attribution better than selection by activation frequency?",
        f"Loss increase in nats at k = {k}, distilled minus most-frequent core at measured L0: "
        f"{number(difference['mean'])} (n = {difference['n']}, {difference['varied']}){shared}.",
        numbers,
    )


def stability(chains: dict[str, list[Row]], identity: list[Row]) -> Row:
    """R6: sizes of the last cores over chains, and how well their latents match, beside plain SAEs and random
    rows."""
    sizes, means = (
        {chain: cycles[-1]["core_out"] for chain, cycles in chains.items()},
        identity_means(identity),
    )
    numbers = {
        "chains": len(chains),
        "sizes": sizes,
        "interval": t_interval(sizes.values()),
        "identity": means,
    }
    text = "There is one distillation seed: what another one would select is not known."
    if len(chains) > 1:
        matched = ", ".join(
            f"{kind} {m['cosine']:.3f} ({m['cosine_above']:.0%} above .7)" for kind, m in means.items()
        )
        text = (
            f"The last cores of {len(chains)} chains, each with its own seed, have "
            f"{', '.join(map(str, sizes.values()))} latents; mean |cosine| of latents matched between two "
            f"chains: {matched or 'not measured'}."
        )
    return _answer("Is the core stable over seeds?", text, numbers)


def aggregators(cycles: list[Row], records: list[Row], default: str) -> Row:
    """R10: core size by aggregator, its agreement with the default, and the ranking's stability, per
    cycle."""
    numbers = [
        {"cycle": row["cycle"], "aggregators": record["aggregators"], "stability": row["ranking_stability"]}
        for row, record in zip(cycles, records)
    ]
    last = numbers[-1]
    shown = ", ".join(f"{name} {entry['size']}" for name, entry in last["aggregators"].items())
    spearman, jaccard = number(last["stability"]["spearman"], 3), last["stability"]["jaccard"]
    text = (
        f"Sizes that reach the coverage in cycle {last['cycle']}: {shown} (default {default}); between two "
        f"halves of the tokens the ranking has Spearman {spearman} and the selected sets have Jaccard "
        f"{jaccard:.3f}."
    )
    return _answer("Does the aggregator matter, and is the ranking stable?", text, numbers)


def error_bars(claims: dict[str, Row]) -> Row:
    """R13: what each claim's interval is over."""
    numbers = {name: {"n": claim["n"], "varied": claim["varied"]} for name, claim in claims.items()}
    shown = "; ".join(f"{name} {entry['n']} x {entry['varied']}" for name, entry in numbers.items())
    return _answer(
        "What are the error bars?",
        "95 % t intervals of the mean; what would decide against a claim is corrected for "
        f"the number of its parts (Holm). Values of each claim: {shown}.",
        numbers,
    )


def answers(summary: Row, records: list[Row], core: list[float], not_selected: list[float]) -> dict[str, Row]:
    """All answers; ``records`` are the attribution records by cycle.

    ``core`` and ``not_selected`` are firing frequencies of the last cycle's core and of the other candidates.
    """
    sizes, chains = summary["sizes"], judged_chains(summary)
    rows = [row for row in summary["retrain"] if row["chain"] in chains]
    examples = f"The strongest core latents, with contexts, logit effects and lineage, are in {TABLE}."
    return {
        "R1": total_l0(rows, sizes["k"]),
        "R3": longer_baselines(rows, sizes["k"]),
        "R4": firing(core, not_selected),
        "R5": most_frequent(rows, sizes["k"]),
        "R6": stability(chains, summary["identity"]),
        "R7": _answer("What do core latents respond to?", examples, {"table": TABLE}),
        "R10": aggregators(summary["cycles"], records, sizes["aggregator"]),
        "R13": error_bars(summary["claims"]),
    }
