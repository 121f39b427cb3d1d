"""What is published stands in a regime where it can mean something, and follows the rules that it states."""

import json
from pathlib import Path

import pytest

from dmsae_lib.config import load_config
from dmsae_lib.report.equal_l0 import L0_MARGIN
from dmsae_lib.report.regime import choose_rate
from dmsae_lib.report.results import Results

ROOT = Path(__file__).parents[2]
PUBLISHED = [name for name in ("default", "extended") if (ROOT / "results" / name / "summary.json").is_file()]


@pytest.fixture(params=PUBLISHED)
def results(request) -> Results:
    return Results(ROOT / "results" / request.param)


def test_every_gate_of_the_regime_is_passed(results):
    """Of cycle 0; those of what is compared at other k's are reported, met or not."""
    judged = [gate for gate in results.summary["regime"] if gate["bound"] is not None]
    assert len(judged) > 4 and all(gate["value"] < gate["bound"] for gate in judged[:4])


def test_the_learning_rate_is_the_one_that_the_rule_takes(results):
    path = results.folder / "learning_rate.json"
    if not path.is_file():
        pytest.skip("no sweep in this configuration")
    sweep = json.loads(path.read_text())
    assert (
        choose_rate(sweep["rows"])
        == sweep["chosen"]
        == sweep["configured"]
        == load_config("default").training.lr
    )
    assert {row["with_core"] for row in sweep["rows"]} == {True, False} and len(sweep["rows"]) >= 6
    assert load_config("extended").training.lr == sweep["configured"]


def test_it_was_made_from_todays_configuration(results):
    config = load_config(results.summary["config"])
    assert results.summary["inputs"]["config_hash"] == config.hash


def test_saes_that_are_compared_have_the_same_l0(results):
    """Thresholds are set on other text, which moves the measured L0 of all of them alike: what counts is that
    an SAE lies near the baseline of its own chain, seed and k, to which it is compared by interpolation."""
    rows = results.summary["retrain"]
    baseline = {
        (row["chain"], row["k"], row["seed"]): row["L0"]["total"] for row in rows if row["arm"] == "none"
    }
    ratios = [
        row["L0"]["total"] / baseline[place]
        for row in rows
        if not row["unbound"] and (place := (row["chain"], row["k"], row["seed"])) in baseline
    ]
    assert len(ratios) > 10 and all(abs(ratio - 1) < L0_MARGIN for ratio in ratios)


def test_control_cores_are_as_large_and_of_the_same_norms(results):
    """A control that is smaller, shorter or all but one direction proves nothing by losing."""
    for row in results.summary["retrain"]:
        if row["core_rows"] is None:
            continue
        mine = next(
            r for r in results.summary["retrain"] if r["arm"] == "distilled" and r["chain"] == row["chain"]
        )
        assert row["core_size"] == mine["core_size"]
        if row["arm"] in ("random_directions", "data_points", "pca", "rotated"):
            assert row["core_rows"]["norm"] == pytest.approx(mine["core_rows"]["norm"], rel=1e-4)
        if row["arm"] == "rotated":
            assert row["core_rows"]["rank"] == pytest.approx(mine["core_rows"]["rank"], rel=1e-3)
