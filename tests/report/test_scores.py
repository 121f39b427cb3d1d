"""SAEBench in the summary: which evals ran, each SAE's numbers, and differences whose value is known."""

import csv

import pytest
from builders import factory

from dmsae_lib.report import scores
from dmsae_lib.report.agreement import compare
from dmsae_lib.report.results import validate
from dmsae_lib.report.stages import Stages
from dmsae_lib.report.summary import summarise, write_summary
from dmsae_lib.report.verdicts import FAILS
from dmsae_lib.saebench import EVALS, Task

FULL = "absorption.mean_full_absorption_score"


@pytest.fixture
def run(tmp_path):
    return factory.build_run(tmp_path, factory.config(cycles=2, ks=(64, 96)))


def absorb(run, gain: float = 0.2, jitter: float = 0.01) -> None:
    """`make saebench` by hand: absorption at k = 64, with two further draws on training seed 0."""
    for arm in ("none", "distilled"):
        for seed in (0, 1, 2):
            for draw in (0, 1, 2) if seed == 0 else (0,):
                value = 0.3 + 0.05 * seed + (gain + jitter * (seed + 10 * draw) if arm == "distilled" else 0)
                metrics = {"mean_full_absorption_score": value, "mean_num_split_features": None}
                factory.write_scores(run, Task(64, arm, seed, "absorption", draw), {"metrics": metrics})


def test_differences_are_paired_by_training_seed_and_draws_are_told_apart(run):
    absorb(run)
    summary = summarise(run)
    (row,) = [row for row in summary["differences"] if row["metric"] == FULL]
    assert (row["k"], row["n"], row["better"], row["sign"]) == (64, 3, -1, "+")
    # mean of 0.20, 0.21, 0.22: the seeds' own levels drop out
    assert row["value"] == pytest.approx(0.21, rel=1e-4)
    half = 4.302652730 * 0.01 / 3**0.5
    assert row["interval"] == pytest.approx([0.21 - half, 0.21 + half], rel=1e-4)
    # 0.2, 0.3, 0.4
    assert row["evaluation"]["n"] == 3 and row["evaluation"]["value"] == pytest.approx(0.3, rel=1e-4)
    distilled = next(r for r in summary["retrain"] if (r["k"], r["arm"], r["seed"]) == (64, "distilled", 0))
    assert distilled["saebench"][FULL] == pytest.approx(0.5)  # the first draw's
    (part,) = [p for p in summary["claims"]["C3"]["parts"] if p["part"] == "full absorption"]
    assert part["verdict"] == FAILS and not part["decides"]  # more is absorbed, not less
    validate(summary)


def test_differences_are_those_of_the_main_chain(run):
    """A further chain's SAEs, however much worse, are in no difference; losses are better when they are
    lower."""
    summary = summarise(run)
    other = [
        row | {"chain": "b", "loss_increase": row["loss_increase"] + (row["arm"] == "distilled")}
        for row in summary["retrain"]
    ]
    rows = summary["retrain"]
    assert scores.differences(rows + other, {}, 0.0) == scores.differences(rows, {}, 0.0)
    loss = [row for row in summary["differences"] if row["metric"] == "loss_increase"]
    found = [(row["k"], row["n"], row["better"], row["sign"]) for row in loss]
    assert found == [(64, 3, -1, "+"), (96, 3, -1, "+")]
    assert all(row["value"] == pytest.approx(factory.EFFECT["distilled"], rel=1e-4) for row in loss)


def test_every_score_is_in_the_table_with_its_seeds_and_a_missing_one_with_its_reason(run):
    absorb(run)
    why = {"metrics": {}, "not_run": "the model cannot spell", "probe_f1": {"a": 0.25, "b": 0.5}}
    factory.write_scores(run, Task(96, "none", 2, "absorption", 0), why)
    with open(write_summary(run) / "saebench_scores.csv", newline="") as handle:
        rows = {
            (r["k"], r["arm"], r["seed"], r["name"], r["eval_seed"], r["metric"]): r["value"]
            for r in csv.DictReader(handle)
        }
    full, top1 = (
        float(rows[key])
        for key in (
            ("64", "distilled", "0", "absorption", "2", FULL.partition(".")[2]),
            ("96", "none", "1", "sparse_probing", "0", "probe_top1"),
        )
    )
    assert full == pytest.approx(0.7) and top1 == pytest.approx(factory.probe("none", 96.0, 1), rel=1e-5)
    missing = {key[-1]: value for key, value in rows.items() if key[:4] == ("96", "none", "2", "absorption")}
    assert missing == {"not_run": "the model cannot spell", "probe_f1.a": "0.25", "probe_f1.b": "0.5"}


def test_a_difference_that_the_seeds_do_not_decide_has_no_sign(run):
    absorb(run, gain=0.001, jitter=0.01)
    (row,) = [row for row in summarise(run)["differences"] if row["metric"] == FULL]
    assert row["interval"][0] < 0 < row["interval"][1] and row["sign"] == "?"


def test_every_eval_says_whether_it_ran_and_else_why(run):
    evals = summarise(run)["evals"]
    assert list(evals) == list(EVALS)
    # 2 k's x 3 seeds x {none, distilled}
    assert evals["core"]["scores"] == 12 and evals["core"]["not_run"] is None
    skipped = {"needs": EVALS["absorption"].needs, "doubt": "", "scores": 0}
    assert evals["absorption"] == skipped | {"not_run": "`make saebench` was not run"}
    result = {"metrics": {}, "not_run": "the model cannot spell"}
    factory.write_scores(run, Task(64, "none", 0, "absorption", 0), result)
    summary = summarise(run)
    assert summary["evals"]["absorption"] == skipped | {"not_run": "the model cannot spell"}
    assert not any(row["metric"] == FULL for row in summary["differences"])
    unasked = scores.eval_rows({}, asked=(), outliers=0.0)["core"]
    assert unasked["not_run"] == "the configuration does not ask for it"


def test_the_core_eval_is_doubted_where_there_are_outliers():
    """Alone: it cannot leave them out, and the others are not about fidelity."""
    doubted = {name: row["doubt"] for name, row in scores.eval_rows({}, (), 0.0004).items()}
    assert doubted["core"] == doubted["core_hub"] == "counts the outliers, 0.04% of the tokens"
    plain = {name: row["doubt"] for name, row in scores.eval_rows({}, (), 0.0).items()}
    assert doubted | {"core": "", "core_hub": ""} == plain and plain["core"] == ""


def test_differences_in_core_are_doubted_where_there_are_outliers(run):
    summary, found = summarise(run), Stages(run).scores
    for outliers in (0.0, 0.01):
        marked = {
            row["metric"] for row in scores.differences(summary["retrain"], found, outliers) if row["doubted"]
        }
        assert marked == ({"ce_loss_score", "explained_variance_legacy"} if outliers else set())


def test_a_run_without_the_suite_compares_with_one_that_has_it_in_all_else(run):
    plain = summarise(run)
    absorb(run)
    suite = summarise(run)
    assert (
        plain["claims"]["C3"] != suite["claims"]["C3"]
        and plain["claims"]["C3"]["verdict"] == suite["claims"]["C3"]["verdict"]
    )
    for fresh, published in ((plain, suite), (suite, plain)):
        rows = compare(fresh, published)
        assert all(row["ok"] for row in rows) and len(rows) > 50
        assert not any("absorption" in row["metric"] for row in rows)
    both = compare(suite, suite)
    assert sum("absorption" in row["metric"] for row in both) == 6
    moved = summarise(run)
    moved["retrain"][0]["saebench"][FULL] += 1.01 * suite["tolerances"][FULL]["tolerance"][0]
    (row,) = [row for row in compare(moved, suite) if not row["ok"]]
    assert FULL in row["metric"]
