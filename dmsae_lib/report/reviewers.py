"""Numbers that answer the reviewers of the paper's earlier version, from one run.

Answers are about the main chain's core settings; the loss is the loss increase in nats, lower is better. A
function per question gives the sentence and the numbers behind it.
"""

from statistics import fmean, quantiles
from typing import Any

from dmsae_lib.config.sections import ARMS, LONGER
from dmsae_lib.report.claims import identity_means
from dmsae_lib.report.equal_l0 import OfSAE, advantage, over_control, per_unit
from dmsae_lib.report.evidence import Evidence, number
from dmsae_lib.report.verdicts import t_interval
from dmsae_lib.report.what_is_a_core import deeper_prefixes, integrated

Row = dict[str, Any]
Answer = tuple[str, Any]
TABLE = "core_table.json"  # R7: written by notebook 07
QUESTIONS = {
    "R1": "What is the total L0 with the core counted, and what loss does it leave?",
    "R3": "How does DMSAE compare with a Matryoshka SAE given the compute of all cycles?",
    "R4": "How often do core latents fire?",
    "R5": "Is selection by attribution better than selection by activation frequency?",
    "R6": "Is the core stable over seeds?",
    "R7": "What do core latents respond to?",
    "R10": "Does the aggregator matter, and is the ranking stable?",
    "R11": "Do integrated gradients select the same latents?",
    "R12": "What if the candidates come from deeper prefixes?",
    "R13": "What are the error bars?",
}


def answers(
    summary: Row,
    records: list[Row],
    core: list[float],
    not_selected: list[float],
    asked: Row | None = None,
) -> dict[str, Row]:
    """{question's name: {question, answer, numbers}}; ``records`` are the attribution records by cycle.

    ``core`` and ``not_selected`` are firing frequencies of the last cycle's core and of the other candidates;
    ``asked`` is notebook 10's record, without which R11 and R12 have no answer.
    """
    evidence, k = Evidence.of(summary), summary["sizes"]["k"]
    found = {
        "R1": total_l0(evidence.rows, k),
        "R3": longer_baselines(evidence.rows, k),
        "R4": firing(core, not_selected),
        "R5": most_frequent(evidence.rows, k),
        "R6": stability(evidence),
        "R7": (
            f"The strongest core latents, with contexts, logit effects and lineage, are in {TABLE}.",
            {"table": TABLE},
        ),
        "R10": aggregators(summary["cycles"], records, summary["sizes"]["aggregator"]),
    }
    if asked:
        found |= {"R11": integrated(asked), "R12": deeper_prefixes(asked)}
    found["R13"] = error_bars(summary["claims"])
    return {
        name: {"question": QUESTIONS[name], "answer": answer, "numbers": numbers}
        for name, (answer, numbers) in found.items()
    }


def _mean(found: OfSAE) -> Row:
    values, varied = per_unit(found)
    mean = fmean(values) if values else None
    return {"mean": mean, "interval": t_interval(values), "n": len(values), "varied": varied}


def total_l0(rows: list[Row], k_distill: int) -> Answer:
    """R1: per arm and k, L0 of core, free and both, with the loss increase; means over all SAEs."""
    numbers = []
    for arm, k in [(arm, k) for arm in ARMS for k in sorted({r["k"] for r in rows if r["arm"] == arm})]:
        group = [r for r in rows if (r["arm"], r["k"]) == (arm, k)]
        found = {"arm": arm, "k": k, "n": len(group), "unbound": sum(r["unbound"] for r in group)}
        found["L0"] = {part: fmean(r["L0"][part] for r in group) for part in ("core", "free", "total")}
        numbers.append(found | {"loss_increase": fmean(r["loss_increase"] for r in group)})
    at = next((n for n in numbers if (n["arm"], n["k"]) == ("distilled", k_distill)), None)
    if at is None:
        return "No SAE with the distilled core was trained at the distillation k.", numbers
    gain = _mean(advantage(rows, "distilled", k_distill, "loss_increase"))["mean"]
    return (
        f"At k = {k_distill} the total L0 is {at['L0']['total']:.1f}, of which {at['L0']['core']:.1f} from "
        f"the core; the loss increases by {at['loss_increase']:.4f} nats, against the baseline at that L0: "
        f"{number(gain)}."
    ), numbers


def longer_baselines(rows: list[Row], k: int) -> Answer:
    """R3: the distilled core, and a plain SAE with the tokens of all cycles, against the plain one."""
    numbers, shown = {}, []
    for arm in ("distilled", *LONGER):
        found = {metric: _mean(advantage(rows, arm, k, metric)) for metric in ("loss_increase", "fvu")}
        tokens = next((r["tokens"] for r in rows if (r["arm"], r["k"]) == (arm, k)), None)
        numbers[arm] = found | {"tokens": tokens}
        shown.append(f"{arm} {number(found['loss_increase']['mean'])} (n = {found['loss_increase']['n']})")
    return (
        f"Loss increase in nats at k = {k}, minus that of the ordinary baseline at measured L0: "
        f"{'; '.join(shown)}."
    ), numbers


def spread(values: list[float]) -> Row:
    """Mean, quartiles and tails of firing frequencies."""
    low, median, high = quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    found = {"n": len(values), "mean": fmean(values), "min": min(values)}
    found |= {"quartile_1": low, "median": median, "quartile_3": high, "max": max(values)}
    return found | {f"share_above_{at}": fmean(v > at for v in values) for at in (0.1, 0.5)}


def firing(core: list[float], candidates: list[float]) -> Answer:
    """R4: firing frequencies of the last core, and of the candidates that were not selected into it."""
    mine, others = spread(core), spread(candidates) if candidates else None
    beside = f", the median candidate left out on {others['median']:.1%}" if others else ""
    return (
        f"The median core latent fires on {mine['median']:.1%} of the tokens (quartiles "
        f"{mine['quartile_1']:.1%} and {mine['quartile_3']:.1%}, largest {mine['max']:.1%}){beside}."
    ), {"core": mine, "not_selected": others}


def most_frequent(rows: list[Row], k: int) -> Answer:
    """R5: the distilled core minus a core of equal size made of the most frequent candidates."""
    mine = [r for r in rows if (r["arm"], r["k"]) == ("most_frequent", k) and r["overlap"] is not None]
    overlap = fmean(r["overlap"] for r in mine) if mine else None
    difference = _mean(over_control(rows, "most_frequent", k))
    shared = f"; {overlap:.0%} of it is in the distilled core too" if mine else ""
    return (
        f"Loss increase in nats at k = {k}, distilled minus most-frequent core at measured L0: "
        f"{number(difference['mean'])} (n = {difference['n']}, {difference['varied']}){shared}."
    ), {"k": k, "distilled_minus_most_frequent": difference, "overlap": overlap}


def stability(evidence: Evidence) -> Answer:
    """R6: sizes of the last cores over chains, and how well two chains' latents match."""
    sizes = {chain: cycles[-1]["core_out"] for chain, cycles in evidence.chains.items()}
    means = identity_means(evidence.identity)
    numbers = {"chains": len(sizes), "sizes": sizes}
    numbers |= {"interval": t_interval(sizes.values()), "identity": means}
    if len(sizes) == 1:
        return "There is one distillation seed: what another one would select is not known.", numbers
    matched = [f"{kind} {m['cosine']:.3f} ({m['cosine_above']:.0%} above .7)" for kind, m in means.items()]
    return (
        f"The last cores of {len(sizes)} chains, each with its own seed, have "
        f"{', '.join(map(str, sizes.values()))} latents; mean |cosine| of latents matched between two "
        f"chains: {', '.join(matched) or 'not measured'}."
    ), numbers


def aggregators(cycles: list[Row], records: list[Row], default: str) -> Answer:
    """R10, per cycle: core size by aggregator, agreement with the default, the ranking's stability."""
    numbers = [
        {"cycle": row["cycle"], "aggregators": record["aggregators"], "stability": row["ranking_stability"]}
        for row, record in zip(cycles, records)
    ]
    cycle, sizes, stable = numbers[-1].values()
    shown = ", ".join(f"{name} {entry['size']}" for name, entry in sizes.items())
    return (
        f"Sizes that reach the coverage in cycle {cycle}: {shown} (default {default}); between two halves of "
        f"the tokens the ranking has Spearman {number(stable['spearman'], 3)} and the selected sets have "
        f"Jaccard {stable['jaccard']:.3f}."
    ), numbers


def error_bars(claims: dict[str, Row]) -> Answer:
    """R13: what each claim's interval is over."""
    numbers = {name: {"n": claim["n"], "varied": claim["varied"]} for name, claim in claims.items()}
    shown = "; ".join(f"{name} {entry['n']} x {entry['varied']}" for name, entry in numbers.items())
    return (
        "95 % t intervals of the mean; what would decide against a claim is corrected for the number of its "
        f"parts (Holm). Values of each claim: {shown}."
    ), numbers
