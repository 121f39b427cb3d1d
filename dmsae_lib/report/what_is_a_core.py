"""What notebook 10 found: SAEs in open competition compared, and the answers in words, from its record.

The record is what_is_a_core.json, in the run's artefact of that stage and beside a published summary::

    config, k, coverage, tokens
    effects      per cycle, 0 and the last: dmsae_lib.distill.ablation.describe, kept_alone, deeper, latents
    redundancy   per chain and cycle: dmsae_lib.distill.redundancy.redundancy
    agreement    per pair of chains and kind: dmsae_lib.distill.identity.agreement_rows
    competition  of this module: rows, one per arm, and what was missing
"""

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from dmsae_lib.config.sections import ARMS
from dmsae_lib.report.equal_l0 import OfSAE, advantage, over_control, per_unit
from dmsae_lib.report.evidence import number
from dmsae_lib.report.verdicts import t_interval

Row = dict[str, Any]
Answer = tuple[str, Any]
RECORD = "what_is_a_core.json"


def _estimate(found: OfSAE) -> Row:
    values, varied = per_unit(found)
    mean = fmean(values) if values else None
    return {"value": mean, "interval": t_interval(values), "n": len(values), "varied": varied}


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return fmean(found) if found else None


def competition(rows: list[Row], k: int) -> list[Row]:
    """A row for each arm trained at ``k``: its core's share of k, how far its latents kept their frequencies,
    loss increase and FVU, minus those of the baseline at measured L0, and distilled minus it in loss."""
    found = []
    for arm in ARMS:
        mine = [row for row in rows if (row["arm"], row["k"]) == (arm, k)]
        if not mine:
            continue
        row = {"arm": arm, "saes": len(mine), "unbound": sum(row["unbound"] for row in mine)}
        row["core_share"] = fmean(row["L0"]["core"] / k for row in mine)
        row["frequency"] = _mean(row["frequency"] for row in mine)
        row |= {key: fmean(one[key] for one in mine) for key in ("loss_increase", "fvu")}
        for key in ("loss_increase", "fvu"):
            row[f"{key}_over_baseline"] = _estimate(advantage(rows, arm, k, key)) if arm != "none" else None
        distilled_minus = {} if arm in ("none", "distilled") else over_control(rows, arm, k)
        found.append(row | {"distilled_minus": _estimate(distilled_minus)})
    return found


def _last(record: Row) -> Row:
    return record["effects"][-1]


def attribution_and_ablation(record: Row) -> Answer:
    """Question 4; R11 is :func:`integrated`."""
    shown = []
    for row in record["effects"]:
        agreed = row["agreement"]
        pearson = {name: number(agreed[name]["pearson"], 2) for name in ("A", "halves of the contexts")}
        size = number(agreed["size, mean_abs"]["spearman"], 2)
        shown.append(
            f"In cycle {row['cycle']} the change of the loss that A promises for each of "
            f"{row['candidates']} candidates has Pearson {pearson['A']} with the one measured when it is "
            "ablated "
            f"(between halves of the contexts {pearson['halves of the contexts']}), and all A together are "
            f"{row['first_order']:.0%} of what the candidates are worth; in size, by context, mean |A| has "
            f"Spearman {size} with it."
        )
    kept, size = _last(record)["kept"], _last(record)["kept_size"]
    shown.append(
        f"Of equally many candidates kept alone ({size}), those by mean |A| lose {kept['mean_abs']:.3f} nats "
        "per "
        f"token against all, those by ablation one at a time {kept['ablation_by_context']:.3f}, the most "
        f"frequent {kept['frequency']:.3f}, random ones {mean_of_random(kept):.3f}."
    )
    agreement, kept = (
        {str(row["cycle"]): row[key] for row in record["effects"]} for key in ("agreement", "kept")
    )
    return " ".join(shown), {"agreement": agreement, "kept": kept}


def mean_of_random(kept: Row) -> float:
    return fmean(value for name, value in kept.items() if name.startswith("random"))


def integrated(record: Row) -> Answer:
    """R11."""
    shown, numbers = [], {}
    for row in record["effects"]:
        numbers[str(row["cycle"])] = {key: row[key] for key in ("completeness", "sets", "kept")}
        a, ig = (number(row["agreement"][name]["pearson"], 2) for name in ("A", "IG"))
        mine, theirs, kept = row["sets"]["mean_abs"], row["sets"]["ig_mean_abs"], row["kept"]
        shown.append(
            f"in cycle {row['cycle']} they sum to {row['completeness']:.0%} of the loss that the candidates "
            "are "
            f"worth (A to {row['first_order']:.0%}), have Pearson {ig} with ablation (A {a}), and select "
            f"{theirs['size']} latents where A selects {mine['size']}, Jaccard {theirs['jaccard']:.2f}; as "
            "many of "
            f"each kept alone lose {kept['ig_mean_abs']:.3f} and {kept['mean_abs']:.3f} nats"
        )
    tokens = _last(record)["tokens"]
    return f"From zero activations, in 8 steps, on {tokens} tokens: {'; '.join(shown)}.", numbers


def deeper_prefixes(record: Row) -> Answer:
    """R12."""
    rows = record["effects"][0]["deeper"]
    shown = [f"{row['selected']} of {row['candidates']} (first prefix: {row['shallow']})" for row in rows]
    return (
        f"In cycle 0 {record['coverage']:.0%} take, attributed at the reconstruction of prefix "
        f"{' and of '.join(str(row['prefix']) for row in rows)}: {', '.join(shown)}. Of the "
        f"{rows[-1]['first']} "
        f"that the first prefix gives, {rows[-1]['again']} are selected among the deepest one's candidates "
        "too."
    ), {str(row["cycle"]): row["deeper"] for row in record["effects"]}


def duplicates(record: Row) -> Answer:
    """Question 3."""
    last = max(row["cycle"] for row in record["redundancy"])
    rows, shown = [row for row in record["redundancy"] if row["cycle"] == last], []
    for row in rows:
        rows_above, fires_above = (row[name]["pairs"]["0.7"] for name in ("cosine", "activation"))
        without = row["without"]["0.7"]["merged"]
        shown.append(f"{row['chain']} {row['size']}, {rows_above}, {fires_above}, {without}")
    return (
        "Size of the last cycle's core, pairs above .7 by encoder rows and by activations, and size of a "
        "core "
        f"of the same coverage without these copies, by chain: {'; '.join(shown)}."
    ), rows


def means(agreement: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """{kind of core: {kind of latents: means over pairs of chains}}."""
    keys = ("cosine", "cosine_above", "activation", "activation_above", "span", "span_chance")
    found: dict[str, dict[str, Row]] = {}
    for core in dict.fromkeys(row["core"] for row in agreement):
        mine = [row for row in agreement if row["core"] == core]
        found[core] = {
            kind: {key: _mean(row[key] for row in mine if row["kind"] == kind) for key in keys}
            for kind in dict.fromkeys(row["kind"] for row in mine)
        }
    return found


def latents_or_subspace(record: Row) -> Answer:
    """Question 2."""
    found, shown = means(record["agreement"]), []
    names = {"cores": "cores", "turned": "turned in their span", "plain": "first latents of plain SAEs"}
    for core, kinds in found.items():
        matches = [
            f"{name} {number(kinds[kind]['cosine'], 2)} and {number(kinds[kind]['activation'], 2)}"
            for kind, name in names.items()
            if kind in kinds
        ]
        span, chance = (kinds["cores"][key] for key in ("span", "span_chance"))
        shown.append(
            f"{core}: {', '.join(matches)}; the spans of the cores overlap by {span:.2f}, by chance "
            f"{chance:.2f}"
        )
    if not shown:
        return "There is one chain of each kind: not known.", found
    return f"Mean |cosine| and correlation of activations of matched latents: {'. '.join(shown)}.", found


def principal_components(record: Row) -> Answer:
    """Question 1: is a core of principal components the better idea, for loss?"""
    rows = {row["arm"]: row for row in record["competition"]["rows"]}
    k, pca = record["k"], rows.get("pca")
    if pca is None or pca["distilled_minus"]["value"] is None:
        return f"At k = {k} no core of principal components was trained yet.", None
    against, base = pca["distilled_minus"], pca["loss_increase_over_baseline"]
    verdict, interval = "which no interval decides", ""
    if ends := against["interval"]:
        interval = f" [{number(ends[0])}, {number(ends[1])}]"
        verdict = "yes" if ends[0] > 0 else "no, it is worse" if ends[1] < 0 else "no difference is seen"
    return (
        f"At k = {k} and measured L0 the loss with the distilled core minus that with principal components "
        "is "
        f"{number(against['value'])} nats{interval}, n = {against['n']}: {verdict}. Against no core "
        "principal "
        f"components cost {number(base['value'])}."
    ), against


QUESTIONS = {
    "Does A mean what it says?": attribution_and_ablation,
    "Is a core one latent several times over?": duplicates,
    "Do chains agree on latents, or on a subspace?": latents_or_subspace,
    "Is a core of principal components the better idea, for loss?": principal_components,
}


def answers(record: Row) -> dict[str, str]:
    """{question: answer} of the record, in words."""
    return {question: answer(record)[0] for question, answer in QUESTIONS.items()}
