"""SAEBench in the summary: each SAE's numbers, which evals ran and why the others did not, DMSAE minus
baseline.

Two kinds of error bars are kept apart. *Training seeds*: every SAE scored with the first evaluation seed, the
difference to the same-seed baseline at measured L0 (:func:`dmsae_lib.report.equal_l0.advantage`), t interval
over the seeds of the first chain of a kind of core; over the chains where that one has a single seed.
*Evaluation seeds*: the SAEs of one chain's first training seed scored again on other texts, splits and
probes; the difference at equal k, t interval over these draws. Kinds of core are never mixed.
"""

from collections.abc import Iterable
from typing import Any

from dmsae_lib.report.equal_l0 import advantage, of_scored_chains, per_seed
from dmsae_lib.report.series import baselines, kinds, lenders
from dmsae_lib.report.verdicts import t_interval
from dmsae_lib.saebench import EVALS, REPRODUCED, Task

Row = dict[str, Any]
Results = dict[Task, Row]

# What is compared, with its label and which direction is better (0: neither). SCR and TPP at 20 latents, as
# sae_bench displays them; full absorption, because the fraction score was redefined between versions (method,
# section 9).
HEADLINES: dict[str, tuple[str, int]] = {
    "loss_increase": ("loss increase (ours)", -1),
    "ce_loss_score": ("CE loss score", 1),
    "fvu": ("FVU (ours)", -1),
    "explained_variance_legacy": ("explained variance", 1),
    "probe_top1": ("sparse probing, top 1", 1),
    "probe_top5": ("sparse probing, top 5", 1),
    "absorption.mean_full_absorption_score": ("full absorption", -1),
    "tpp.tpp_threshold_20_total_metric": ("TPP, 20 latents", 1),
    "scr.scr_metric_threshold_20": ("SCR, 20 latents", 1),
    "tpp_hub.tpp_threshold_20_total_metric": ("TPP, 20 latents, sae_bench's data", 1),
    "scr_hub.scr_metric_threshold_20": ("SCR, 20 latents, sae_bench's data", 1),
    "sparse_probing_hub.sae_top_1_test_accuracy": ("sparse probing, top 1, sae_bench's data", 1),
    "meta_structure.above_random_rows": ("meta-structure above random rows", 0),
    "ravel.disentanglement_score": ("RAVEL disentanglement", 1),
    "autointerp.autointerp_score": ("automated interpretability", 1),
    "unlearning.unlearning_score": ("unlearning", 1),
}
# sae_bench's core eval knows which token an id is, not how large its residual
WITH_OUTLIERS = ("core", "core_hub")
OF_CORE = ("ce_loss_score", "explained_variance_legacy")


def numbers(name: str, result: Row) -> dict[str, float | None]:
    """The metrics of one eval; those that are not part of ``make reproduce`` carry the eval's name."""
    prefix = "" if name in REPRODUCED else f"{name}."
    return {f"{prefix}{metric}": value for metric, value in result["metrics"].items()}


def by_sae(results: Results) -> dict[tuple[int, str, int, str], Row]:
    """{(k, arm, training seed, chain): its numbers} by the first evaluation seed of each eval."""
    found: dict[tuple[int, str, int, str], Row] = {}
    for task, result in results.items():
        row = found.setdefault(task.sae, {})
        row |= {metric: value for metric, value in numbers(task.name, result).items() if metric not in row}
    return found


def score_rows(results: Results) -> list[Row]:
    """saebench_scores.csv: one line per SAE, eval, evaluation seed and metric; or the reason why there is
    none, and what the ground-truth probes of absorption reach (F1 by letter), by which it is decided whether
    it can be run."""
    found = []
    for task, result in results.items():
        values = result["metrics"] | {f"probe_f1.{of}": f1 for of, f1 in result.get("probe_f1", {}).items()}
        values |= {"not_run": result["not_run"]} if "not_run" in result else {}
        found += [task._asdict() | {"metric": metric, "value": value} for metric, value in values.items()]
    return found


def eval_rows(results: Results, asked: Iterable[str], outliers: float) -> dict[str, Row]:
    """{eval: {needs, doubt, scores, not_run}}: how many results there are, or why there is none.

    ``outliers`` is their share of the test split, which the core eval scores as anything else.
    """
    asked, found = set(asked), {}
    for name, row in EVALS.items():
        mine = [result.get("not_run") for task, result in results.items() if task.name == name]
        ran = mine.count(None)
        if not mine:
            left = "`make saebench` was not run" if name in asked else "the configuration does not ask for it"
            mine = [left]
        counted = name in WITH_OUTLIERS and outliers
        doubt = f"counts the outliers, {outliers:.2%} of the tokens" if counted else row.doubt
        found[name] = {"needs": row.needs, "doubt": doubt, "scores": ran, "not_run": None if ran else mine[0]}
    return found


def _sign(interval: list[float] | None) -> str:
    if interval is None or interval[0] <= 0 <= interval[1]:
        return "?"
    return "+" if interval[0] > 0 else "-"


def _mean(gains: list[float]) -> Row:
    return {"value": sum(gains) / len(gains), "interval": t_interval(gains), "n": len(gains)}


def differences(summary: Row, results: Results) -> list[Row]:
    """DMSAE minus its baseline for each kind of core of which a chain was scored (and for the main one in any
    case), each headline metric and k: the fields of :class:`dmsae_lib.report.shape.Difference`.

    The baseline of a chain that trained none is that of a chain with its distillation seed
    (:func:`dmsae_lib.report.series.lenders`), in SAEBench's metrics where that one was scored too.
    ``sign`` is "+" or "-" where the interval over training seeds excludes 0, else "?"; ``evaluation`` =
    {value, interval, n} over evaluation seeds, or None below two of them.
    """
    found, base, without = [], lenders(summary), baselines(summary)
    outliers = summary["language_model"]["outliers"]["test"]
    for n, kind in enumerate(kinds(summary)):
        distilled = [row for row in of_scored_chains(kind.rows) if row["arm"] == "distilled"]
        first = next((row["chain"] for row in distilled if row["chain"] in base), None)
        rows = distilled + without
        for metric, (label, better) in HEADLINES.items():
            name = metric.partition(".")[0]
            doubted = name in EVALS and bool(EVALS[name].doubt) or metric in OF_CORE and outliers > 0
            for k in sorted({row["k"] for row in distilled}):
                gains, varied = per_seed(advantage(rows, "distilled", k, metric))
                if gains:
                    row = {"core": kind.name if n else None, "metric": metric, "label": label}
                    row |= {"better": better, "doubted": doubted, "k": k, "varied": varied, **_mean(gains)}
                    evaluation = _over_draws(metric, k, results, first, base[first])
                    found.append(row | {"sign": _sign(row["interval"]), "evaluation": evaluation})
    return found


def _over_draws(metric: str, k: int, results: Results, chain: str, base: str) -> Row | None:
    """Of the training seed that several evaluation seeds were spent on."""
    pairs: dict[int, dict[int, dict[str, float]]] = {}  # by training seed, then by evaluation seed
    for task, result in results.items():
        value = numbers(task.name, result).get(metric)
        compared = (task.chain, task.arm) in ((chain, "distilled"), (base, "none"))
        if compared and task.k == k and value is not None:
            pairs.setdefault(task.seed, {}).setdefault(task.eval_seed, {})[task.arm] = value
    both = [[pair for pair in of.values() if {"distilled", "none"} <= pair.keys()] for of in pairs.values()]
    drawn = max(both, key=len, default=[])
    return _mean([pair["distilled"] - pair["none"] for pair in drawn]) if len(drawn) > 1 else None
