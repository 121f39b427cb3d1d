"""The claims of the paper that can be judged without its numbers, each decided from rows of the summary
(method, section 7).

The unit of inference for anything about cores is the distillation chain: the main one, and every other that
has its core settings and another seed. A chain's value is the mean over its retraining seeds. Claims are made
of parts, one per cycle, k, control or metric, which :mod:`dmsae_lib.report.verdicts` decides; ``value``,
``interval`` and ``n`` of a claim are those of the part that its docstring names. SAEs are compared at
measured L0 (:mod:`dmsae_lib.report.equal_l0`), in the loss increase ce_sae - ce_clean in nats: lower is
better.
"""

from statistics import fmean
from typing import Any, NamedTuple

from dmsae_lib.config.sections import CONTROLS, NEW_ROWS, OF_LATENTS
from dmsae_lib.report.equal_l0 import (
    SEED,
    OfSAE,
    advantage,
    bound_ks,
    by_chain,
    of_scored_chains,
    over_control,
    paired,
    per_seed,
)
from dmsae_lib.report.evidence import CLAIMS, Evidence, Finding, claim, furthest, judged, lowest, number
from dmsae_lib.report.verdicts import group_part, part, pseudo_values

Row = dict[str, Any]

SETTLED = 0.10  # C1: change of the core's size, up or down, that counts as none
CLOSE = 0.02  # C3, C5: nats (for RAVEL: of its score) that count as no difference


class Compared(NamedTuple):
    """One metric of C3."""

    label: str
    metrics: tuple[str, ...]  # of which the first that was measured counts
    side: str = "above"
    bound: float = 0.0
    low: bool = True  # whether low k alone are meant
    decides: bool = False  # what `make reproduce` always runs does


AUDITED = "unreliable by arXiv 2605.18229"
SCR, TPP = "scr_metric_threshold_20", "tpp_threshold_20_total_metric"
COMPARED = [
    Compared("sparse probing, top 1", ("probe_top1",), decides=True),
    Compared("sparse probing, top 5", ("probe_top5",), decides=True),
    Compared("loss increase", ("loss_increase",), bound=-CLOSE, low=False, decides=True),
    Compared("full absorption", ("absorption.mean_full_absorption_score",), "below"),
    Compared(f"SCR, {AUDITED}", (f"scr_hub.{SCR}", f"scr.{SCR}")),  # sae_bench's own data before ours
    Compared(f"TPP, {AUDITED}", (f"tpp_hub.{TPP}", f"tpp.{TPP}")),
    Compared("RAVEL", ("ravel.disentanglement_score",), "below", CLOSE, low=False),
]


@claim(
    "C1",
    "The core settles: its size changes by at most 10 % in each of the last two cycles.",
    "relative change of the core's size in a cycle",
)
def core_settles(evidence: Evidence) -> Finding:
    """The claim's value is the change that is further from 0."""
    chains = evidence.chains
    last = chains["main"][-1]["cycle"]
    cycles, parts = [t for t in (last - 1, last) if t >= 1], []
    for t in cycles:
        changes = [rows[t]["core_out"] / rows[t - 1]["core_out"] - 1 for rows in chains.values()]
        parts.append(part(f"cycle {t}", changes, SETTLED, "within"))
    changes = ", ".join(f"{p['value']:+.1%} in {p['part']}" for p in parts)
    same = ", ".join(f"{fmean(rows[t]['jaccard'] for rows in chains.values()):.2f}" for t in cycles)
    sizes = ", ".join(str(row["core_out"]) for row in chains["main"][-3:])
    detail = (
        f"Mean change {changes} (bound {SETTLED:.0%}); Jaccard index of the core and the one before {same}; "
        f"the main chain's last sizes {sizes}."
    )
    return Finding(parts, furthest(parts, abs), detail)


@claim(
    "C2",
    "The core is re-selected: more of it is selected again than of rows that never were selected.",
    "share selected again, core minus placebo",
)
def core_is_reselected(evidence: Evidence) -> Finding:
    """Of the frozen rows more are selected again than of as many rows of placebo chains, in the same cycles.

    A placebo chain begins with rows that nothing ever selected; those that are selected again stay, and new
    ones fill it up. A part per kind of placebo, over each chain's mean over cycles 1 .. last; single cycles
    are reported. The claim's value is the smallest excess. Uniform selection among the candidates would keep
    core_out / (core_in + m_0) of the rows.
    """
    chains, parts = evidence.chains.values(), []
    for kind in sorted({kind for rows in chains for row in rows for kind in row["placebos"]}):
        by_cycle = [
            {
                row["cycle"]: (_kept(row), _kept(row["placebos"][kind]))
                for row in rows
                if kind in row["placebos"]
            }
            for rows in chains
        ]
        shares = [of for of in by_cycle if of]
        means = ([fmean(pair[i] for pair in of.values()) for of in shares] for i in (0, 1))
        parts.append(group_part(f"above {kind}", *means))
        for t in sorted({t for of in shares for t in of}):
            pairs = [of[t] for of in shares if t in of]
            parts.append(group_part(f"above {kind}, cycle {t}", *zip(*pairs), decides=False))
    kept = fmean(_kept(row) for rows in chains for row in rows[1:])
    row = evidence.chains["main"][-1]
    uniform = row["core_out"] / (row["core_in"] + evidence.sizes["prefixes"][0])
    shown = ", ".join(f"{p['value']:+.3f} {p['part']}" for p in parts if p["decides"])
    detail = (
        f"Of the frozen rows {kept:.1%} are selected again, mean over cycles and chains: "
        f"{shown or 'placebo rows not run'}. In the main chain's last cycle {row['kept']} of "
        f"{row['core_in']} ({_kept(row):.1%}; uniform selection, a weak reference, {uniform:.1%})."
    )
    return Finding(parts or [part("above placebo rows (not run)", [])], lowest(parts), detail)


def _kept(row: Row) -> float:
    return row["kept"] / row["core_in"]


@claim(
    "C3",
    "At equal L0 DMSAE beats its Matryoshka baseline in sparse probing (and absorption, SCR, TPP) at low k, "
    "and not in loss (and RAVEL).",
    "probing accuracy (top 1) minus the baseline's",
)
def beats_baseline(evidence: Evidence) -> Finding:
    """Probing and a loss that is no better by more than .02 nats always are run, and decide; absorption, SCR,
    TPP and RAVEL are reported where they were. "Low" k is up to the distillation k.

    Over the first scored chain's training seeds (over chains where it has one alone); where the SAEs of
    several chains were scored, what these give is reported. The claim's value is probing top 1 at the largest
    low k.
    """
    rows, k = of_scored_chains(evidence.rows), evidence.sizes["k"]
    parts, missing, ks, units = [], [], bound_ks(rows), {}
    for one in COMPARED:
        metric = next((m for m in one.metrics if any(advantage(rows, "distilled", at, m) for at in ks)), None)
        if metric is None:
            missing.append(one.label)
        for at in [at for at in ks if at <= k or not one.low] or [None]:
            gains = advantage(rows, "distilled", at, metric) if metric else {}
            values, units[one.label, at] = per_seed(gains)
            label = one.label if values else f"{one.label} (not run)"
            if values or one.decides:
                parts.append(part(label, values, one.bound, one.side, at, one.decides))
            if units[one.label, at] == SEED and len(chains := by_chain(gains)) > 1:
                parts.append(part(f"{label}, over chains", chains.values(), one.bound, one.side, at, False))
    low = max((at for at in ks if at <= k), default=None)
    headline = next((p for p in parts if (p["part"], p["k"]) == (COMPARED[0].label, low)), None)
    shown = ", ".join(
        f"{p['part']} {number(p['value'])} (n = {p['n']})" for p in parts if p["k"] == low and p["n"]
    )
    where = f"k = {low}" if low else "no low k is bound"
    detail = f"DMSAE minus baseline at measured L0, {where}: {shown or 'not measured'}"
    detail += f"; not run: {', '.join(missing)}." if missing else "."
    return Finding(parts, headline, detail, units.get((COMPARED[0].label, low), SEED))


def _control_parts(rows: list[Row]) -> list[Row]:
    """Loss increase, distilled minus control, over chains: one part per bound k and control, run or not."""
    parts = []
    for k in bound_ks(rows):
        for control in CONTROLS:
            gains = by_chain(over_control(rows, control, k)).values()
            ran = any((r["arm"], r["k"]) == (control, k) for r in rows)
            name = control if gains else f"{control} ({'no equal L0' if ran else 'not run'})"
            parts.append(part(name, gains, side="below", k=k))
    return parts


@claim(
    "C4",
    "The distilled core beats every control core of equal size in loss at measured L0, at every bound k.",
    "loss increase minus the best control's at the worst k, nats",
)
def beats_controls(evidence: Evidence) -> Finding:
    """The claim's value is the difference to the control and at the k where it is worst."""
    parts = _control_parts(evidence.rows)
    worst = [furthest([p for p in parts if p["k"] == k], float) for k in dict.fromkeys(p["k"] for p in parts)]
    shown = "; ".join(f"{number(p['value'])} ({p['part']}, k = {p['k']}, n = {p['n']})" for p in worst if p)
    detail = (
        f"Loss increase in nats, distilled minus the best control of each bound k: {shown or 'not measured'}."
    )
    return Finding(parts, furthest(parts, float), detail)


@claim(
    "C5",
    "One core serves at all k: at every bound k it beats every control core and its loss is within 0.02 nats "
    "of the baseline's.",
    "loss increase minus the baseline's at the worst k, nats",
)
def serves_all_k(evidence: Evidence) -> Finding:
    """The claim's value is the difference to the baseline at the k where it is worst."""
    rows, close = evidence.rows, []
    ks, arms = bound_ks(rows), {r["k"] for r in rows if r["arm"] == "distilled"}
    for k in ks:
        gains = by_chain(advantage(rows, "distilled", k, "loss_increase")).values()
        close.append(part("distilled - baseline", gains, CLOSE, "below", k))
    shown = ", ".join(f"{number(p['value'])} at k = {p['k']}" for p in close) or "not measured"
    shown += f" (bound {CLOSE:+.2f}); unbound k: {sorted(arms - set(ks)) or 'none'}."
    detail = f"Loss increase in nats, distilled minus baseline: {shown}"
    return Finding(close + _control_parts(rows), furthest(close, float), detail)


SHARE, BEFORE, NEXT_K = "core L0 / k", "frequency correlation", "frequency correlation over k"  # parts of C6


@claim(
    "C6",
    "In open competition the distilled core wins its place: a larger share of k, and latents that keep their "
    "frequencies better, than every control.",
    "core L0 / k minus that of the control with the largest",
)
def wins_its_place(evidence: Evidence) -> Finding:
    """Where the core competes for k, the distilled one's share of it is above that of every control, and so
    is the correlation of its latents' frequencies with their own in the cycle before.

    Rows that are no latents have no cycle before: with them the correlation with the same rows at the next k
    is compared. The claim's value is the smallest difference in share.
    """
    rows, k = evidence.rows, evidence.sizes["k"]
    measures = {
        SHARE: lambda r: r["L0"]["core"] / k,
        BEFORE: lambda r: r["frequency_correlation"]["before"],
        NEXT_K: lambda r: r["frequency_correlation"]["next_k"],
    }

    def of(arm: str, name: str) -> OfSAE:
        found = {(r["chain"], r["seed"]): measures[name](r) for r in rows if (r["arm"], r["k"]) == (arm, k)}
        return {sae: value for sae, value in found.items() if value is not None}

    if evidence.sizes["core_sparsity"] != "batchtopk":
        detail = "The core is exempt from selection, so it does not compete: core_sparsity is relu."
        return Finding([], None, detail)
    parts = []
    for name, controls in ((SHARE, CONTROLS), (BEFORE, OF_LATENTS), (NEXT_K, NEW_ROWS)):
        for control in controls:
            gains = by_chain(paired(of("distilled", name), of(control, name))).values()
            parts.append(part(f"{name}, above {control}{'' if gains else ' (not run)'}", gains, k=k))
    shown, least = [], {}
    for name in (SHARE, BEFORE):
        least[name] = lowest([p for p in parts if p["part"].startswith(f"{name},")])
        if values := of("distilled", name).values():
            shown.append(f"{name} {fmean(values):.3f}")
    shown += [f"smallest difference {number(p['value'], 3)} ({p['part']})" for p in least.values() if p]

    def over(arm: str) -> str:
        gains = paired(*(advantage(rows, one, k, "loss_increase") for one in ("warm_start", arm)))
        return number(fmean(by_chain(gains).values()) if gains else None)

    detail = (
        f"At k = {k}: {', '.join(shown) or 'not run'}; loss increase, warm-started minus distilled, "
        f"{over('distilled')} nats, minus the same nesting without the rows {over('cold_start')}."
    )
    return Finding(parts, least[SHARE], detail)


def identity_means(identity: list[Row]) -> dict[str, Row]:
    """{kind: means over pairs of chains}."""
    found = {}
    for kind in dict.fromkeys(row["kind"] for row in identity):
        rows = [row for row in identity if row["kind"] == kind]
        keys = ("cosine", "cosine_above", "span", "span_chance")
        found[kind] = {key: fmean(row[key] for row in rows) for key in keys}
    return found


@claim(
    "C7",
    "Chains agree on the core's latents: they match better than those of plain SAEs and than random rows.",
    "|cosine| of matched latents minus that of plain SAEs'",
)
def chains_agree(evidence: Evidence) -> Finding:
    """Over pairs of chains, with one jackknife pseudo-value per chain. The claim's value is the excess of the
    cosine over plain SAEs."""
    identity, parts = evidence.identity, []
    of = {
        kind: {(row["a"], row["b"]): row for row in identity if row["kind"] == kind}
        for kind in ("cores", "plain", "random")
    }
    for metric, other in (("cosine", "plain"), ("cosine", "random"), ("activation", "plain")):
        both = {
            pair: (row[metric], of[other][pair][metric])
            for pair, row in of["cores"].items()
            if pair in of[other]
        }
        excess = {pair: core - null for pair, (core, null) in both.items() if None not in (core, null)}
        parts.append(part(f"{metric}, above {other}{'' if excess else ' (not run)'}", pseudo_values(excess)))
    shown = "; ".join(
        f"{kind}: |cosine| of matched latents {m['cosine']:.3f}, {m['cosine_above']:.1%} above .7, spans "
        f"{m['span']:.3f} (chance {m['span_chance']:.3f})"
        for kind, m in identity_means(identity).items()
    )
    detail = f"Over {len(of['cores'])} pairs of chains: {shown}." if shown else "There is one chain only."
    return Finding(parts, parts[0], detail)


def judge(summary: Row) -> dict[str, Row]:
    """Every claim from a summary's ``cycles``, ``chains``, ``retrain``, ``identity`` and ``sizes``."""
    evidence = Evidence.of(summary)
    return {name: judged(name, evidence) for name in CLAIMS}
