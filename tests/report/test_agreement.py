"""Tolerances from replicates, and what counts as a disagreement."""

import copy
import math
import random

import pytest
from builders import factory
from scipy import stats

from dmsae_lib.config.sections import Chain
from dmsae_lib.report.agreement import CHANCE, FAR, Number, assess, compare, tolerances
from dmsae_lib.report.summary import summarise


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    """Three training seeds, and one more chain of the main one's kind."""
    config = factory.config(cycles=2, ks=(64, 96), seeds=(0, 1, 2), controls={"random": 3, "pca": 1})
    config = config.model_copy(
        update={"distill": config.distill.model_copy(update={"chains": [Chain(name="b", seed=1)]})}
    )
    return summarise(factory.build_run(tmp_path_factory.mktemp("run"), config))


def values(summary, arm, k, key):
    return [row[key] for row in summary["retrain"] if (row["arm"], row["k"]) == (arm, k)]


def test_a_tolerance_is_pooled_over_replicates_and_says_so(summary):
    """Losses of three seeds for two arms at two k's and of one control."""
    groups = [
        values(summary, arm, k, "loss_increase")
        for arm, k in [("none", 64), ("none", 96), ("distilled", 64), ("distilled", 96), ("random", 64)]
    ]
    squares = sum(stats.tvar(group) * (len(group) - 1) for group in groups)
    df = sum(len(group) - 1 for group in groups)
    found = summary["tolerances"]["loss_increase"]
    assert found["df"] == df == 10 and found["sd"] == pytest.approx(math.sqrt(squares / df), rel=1e-5)
    limit = stats.t.ppf(0.995, df) * math.sqrt(2 * squares / df)
    assert found["tolerance"] == [pytest.approx(limit, rel=1e-5), 0]
    assert found["source"] == "replicates of this run"


def test_what_was_measured_once_has_a_tolerance_by_decision(summary):
    found = tolerances(summary | {"chains": {}})
    size, bare = found["cycle.core_out"], found["bare model"]
    assert size["tolerance"] == [3.0, 0.1] and "claim C1" in size["source"]
    assert bare == summary["tolerances"]["bare model"] and bare["tolerance"] == [0.001, 0.0]
    assert summary["tolerances"]["cycle.core_out"]["df"] == 3 and found["cycle.fvu"]["df"] == 0


def test_replicates_that_do_not_differ_leave_rounding(summary):
    """Three cycles of two chains have one FVU each; and the L0 of no core, which is 0 whatever the seed,
    counts for nothing."""
    source = "replicates do not differ: rounding alone"
    found = {"tolerance": [0.0, 0.001], "sd": 0.0, "df": 3, "source": source}
    assert summary["tolerances"]["cycle.fvu"] == found
    cores = [row for row in summary["retrain"] if row["L0"]["core"]]
    groups = {(row["arm"], row["k"]) for row in cores}
    assert summary["tolerances"]["L0.core"]["df"] == len(cores) - len(groups)


def test_two_runs_that_differ_as_seeds_do_are_beyond_as_often_as_is_said(monkeypatch):
    """Simulated: 40 numbers with three replicates each, and a second run of all of them."""
    draw, beyond, total = random.Random(0), 0, 0
    for _ in range(60):
        numbers = [Number(f"{i}.{j}", "x", (i,), draw.gauss(i, 0.3)) for i in range(40) for j in range(3)]
        monkeypatch.setattr(
            "dmsae_lib.report.agreement._numbers", lambda summary, numbers=numbers: iter(numbers)
        )
        limit = tolerances({})["x"]["tolerance"][0]
        beyond += sum(
            abs(draw.gauss(i, 0.3) - number.value) > limit for i, number in ((n.group[0], n) for n in numbers)
        )
        total += len(numbers)
    assert beyond / total == pytest.approx(CHANCE, abs=0.003)


def test_an_equal_run_agrees_in_every_number(summary):
    rows = compare(copy.deepcopy(summary), summary)
    found = assess(rows)
    assert all(row["ok"] and not row["far"] for row in rows) and found["numbers"] == found["identical"] > 100
    assert not found["disagrees"] and found["verdicts"] == {} and found["expected"] == 0  # nothing moved


def moved(summary, times):
    fresh, step = copy.deepcopy(summary), summary["tolerances"]["loss_increase"]["tolerance"][0]
    for row in fresh["retrain"]:
        row["fvu"] += 1e-9
    fresh["retrain"][3]["loss_increase"] += times * step
    return assess(compare(fresh, summary))


def test_a_number_beyond_its_tolerance_is_chance_and_a_far_one_is_not(summary):
    assert moved(summary, 0.99)["beyond"] == 0
    assert moved(summary, 1.01)["beyond"] == 1 and not moved(summary, 1.01)["disagrees"]
    assert not moved(summary, 0.99 * FAR)["disagrees"] and moved(summary, 1.01 * FAR)["disagrees"]


def test_more_numbers_beyond_than_chance_puts_there_are_a_disagreement(summary):
    fresh, step = copy.deepcopy(summary), 1.5 * summary["tolerances"]["loss_increase"]["tolerance"][0]
    for row in fresh["retrain"]:
        row["loss_increase"] += step
    found = assess(compare(fresh, summary))
    assert found["beyond"] == len(fresh["retrain"]) and found["disagrees"]


@pytest.mark.parametrize(
    "before, after, disagrees",
    [
        ("holds", "does not hold", True),
        ("does not hold", "holds", True),
        ("holds", "not decidable", False),
        ("not decidable", "does not hold", False),
    ],
)
def test_a_decisive_verdict_that_turns_over_is_a_disagreement(summary, before, after, disagrees):
    """C3 among them: it asks the same question whatever was run."""
    published, fresh = copy.deepcopy(summary), copy.deepcopy(summary)
    published["claims"]["C3"]["verdict"], fresh["claims"]["C3"]["verdict"] = before, after
    found = assess(compare(fresh, published))
    assert found["verdicts"] == {"C3": (before, after)} and found["beyond"] == 0
    assert found["disagrees"] == disagrees


def test_a_number_that_one_side_lacks_is_a_disagreement(summary):
    fresh = copy.deepcopy(summary)
    gone = fresh["retrain"].pop()
    name = f"retrain[k={gone['k']}, {gone['arm']}, seed {gone['seed']}].fvu"
    for rows in (compare(fresh, summary), compare(summary, fresh)):
        assert name in {row["metric"] for row in rows if row["far"]} and assess(rows)["disagrees"]


def test_a_claim_that_one_side_was_not_asked_is_left_out(summary):
    fewer = summary | {"claims": {name: claim for name, claim in summary["claims"].items() if name != "C7"}}
    for rows in (compare(fewer, summary), compare(summary, fewer)):
        assert not assess(rows)["disagrees"] and "claims.C7" not in {row["metric"] for row in rows}
