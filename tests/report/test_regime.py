"""The gates of the regime and the rule for the learning rate, by hand."""

import math

import pytest

from dmsae_lib.config import load_config
from dmsae_lib.report.regime import choose_rate, compared_gates, core_by_rate, gates, still_falling


def history(values):
    return [{"step": str(10 * i), "fvu": str(value)} for i, value in enumerate(values, start=1)]


def test_a_curve_that_still_falls_is_told_from_a_flat_one():
    """Quarters of the 40 rows before the decay: rows 21-30 against rows 31-40."""
    assert still_falling(history([0.5] * 50), 0.2) == pytest.approx(0)
    assert still_falling(history([1.0] * 30 + [0.9] * 10 + [0.1] * 10), 0.2) == pytest.approx(
        0.1
    )  # not the decay's own fall
    assert still_falling(history([1 / (i + 1) for i in range(50)]), 0.2) > 0.1
    assert still_falling(history([0.3]), 0.2) == pytest.approx(0)  # too short to say
    assert still_falling(history([1.0, math.nan] * 25), 0.2) == pytest.approx(0)  # some batches have no FVU
    assert still_falling(history([math.nan] * 9), 0.2) == 1


def test_gates_by_hand():
    config = load_config("smoke", ["training.k=16", "retrain.ks=[16]"])
    record = {"candidates": 20, "core": {"selected": 5, "frequency": 0.2}}
    found = {gate["gate"]: gate for gate in gates(config, 128, {"rare": 0.4}, history([0.5] * 50), record)}
    assert [(gate["value"], gate["ok"]) for gate in found.values()] == [
        (0.2, True),
        (0.25, True),
        (0.125, True),
        (0.4, False),
        (pytest.approx(0), True),
    ]
    assert [gate["bound"] is None for gate in found.values()] == [False, True, False, False, False]
    dense = gates(
        config, 63, {"rare": 0.1}, history([0.5] * 50), record | {"core": {"selected": 5, "frequency": 0.31}}
    )
    assert [gate["ok"] for gate in dense] == [False, True, False, True, True]
    assert gates(config, 64, {"rare": 0.1}, history([0.5] * 50), record)[2]["ok"]  # k / d_in of exactly .25


def test_gates_on_what_is_compared():
    rows = [
        {"arm": arm, "k": k, "rare": rare}
        for arm, k, rare in [
            ("none", 8, 0.3),
            ("none", 8, 0.4),
            ("distilled", 8, 0.2),
            ("none", 16, 0.1),
            ("pca", 16, 0.9),
        ]
    ]
    found = compared_gates(16, [13, 11], rows)
    assert [(gate["value"], gate["ok"]) for gate in found] == [
        (13 / 16, False),
        (pytest.approx(0.35), False),
        (0.2, True),
        (0.1, True),
    ]
    assert compared_gates(16, [], []) == [] and compared_gates(16, [11], [])[0]["ok"]


def row(lr, core, loss, rare=0.1, seed=0):
    return {"lr": lr, "with_core": core, "loss_increase": loss, "rare": rare, "seed": seed}


def test_the_rate_is_the_best_of_those_that_keep_latents_alive():
    """Both kinds of SAE count: in the mean loss, and each by itself in what all but never fires, on average
    over chains."""
    table = [
        row(lr, core, loss, rare)
        for lr, *pair, rare in [(1, 0.5, 0.5, 0.1), (2, 0.3, 0.4, 0.1), (3, 0.2, 0.45, 0.1)]
        for core, loss in zip((False, True), pair)
    ]
    table += [row(4, False, 0.1), row(4, True, 0.1, rare=0.30), row(4, True, 0.1, rare=0.38, seed=1)]
    assert choose_rate(table) == 3
    assert choose_rate([row(1, False, 0.5, rare=0.5), row(1, True, 0.5)]) is None
    table[-1]["rare"] = 0.31
    assert choose_rate(table) == 4


def test_each_kind_of_sae_at_its_own_best_rate():
    table = [
        row(lr, core, loss + 0.01 * seed * core, seed=seed)
        for lr, *pair in [(1, 0.5, 0.4), (2, 0.3, 0.45)]
        for core, loss in zip((False, True), pair)
        for seed in (0, 1, 2)
    ]
    found = core_by_rate(table)
    assert [(row["lr"], row["lr_core"]) for row in found] == [(1, 1), (2, 2), (2, 1)]
    assert [row["difference"] for row in found] == pytest.approx([-0.09, 0.16, 0.11])
    half = 4.302653 * 0.01 / 3**0.5  # Student's t with two degrees of freedom
    assert found[2]["interval"] == pytest.approx([0.11 - half, 0.11 + half], rel=1e-5)
