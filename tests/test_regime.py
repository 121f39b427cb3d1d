"""The gates of the regime and the rule for the learning rate, by hand."""

import pytest

from dmsae_lib.config import load_config
from dmsae_lib.regime import choose_rate, gates, still_falling


def history(values):
    return [{"step": str(10 * i), "fvu": str(value)} for i, value in enumerate(values, start=1)]


def test_a_curve_that_still_falls_is_told_from_a_flat_one():
    """Quarters of the 40 rows before the decay: rows 21-30 against rows 31-40."""
    assert still_falling(history([0.5] * 50), 0.2) == pytest.approx(0)
    assert still_falling(history([1.0] * 30 + [0.9] * 10 + [0.1] * 10), 0.2) == pytest.approx(0.1)  # not the decay's own fall
    assert still_falling(history([1 / (i + 1) for i in range(50)]), 0.2) > 0.1
    assert still_falling(history([0.3]), 0.2) == pytest.approx(0)  # too short to say


def test_gates_by_hand():
    config = load_config("smoke", ["training.k=16", "retrain.ks=[16]"])
    record = {"candidates": 20, "core": {"selected": 5, "frequency": 0.2}}
    found = {gate["gate"]: gate for gate in gates(config, 128, {"rare": 0.4}, history([0.5] * 50), record)}
    assert [(gate["value"], gate["ok"]) for gate in found.values()] == [
        (0.2, True), (0.25, True), (0.125, True), (0.4, False), (pytest.approx(0), True)]
    assert [gate["bound"] is None for gate in found.values()] == [False, True, False, False, False]
    dense = gates(config, 63, {"rare": 0.1}, history([0.5] * 50), record | {"core": {"selected": 5, "frequency": 0.31}})
    assert [gate["ok"] for gate in dense] == [False, True, False, True, True]
    assert gates(config, 64, {"rare": 0.1}, history([0.5] * 50), record)[2]["ok"]  # k / d_in of exactly .25


def row(lr, loss, rare=0.1):
    return {"lr": lr, "loss_increase": loss, "rare": rare}


def test_the_rate_is_the_best_of_those_that_keep_latents_alive():
    """Both SAEs count: in the mean loss, and each by itself in what all but never fires."""
    table = [row(1, 0.5), row(1, 0.5), row(2, 0.3), row(2, 0.4), row(3, 0.2), row(3, 0.45), row(4, 0.1), row(4, 0.1, rare=0.34)]
    assert choose_rate(table) == 3
    assert choose_rate([row(1, 0.5, rare=0.5)]) is None
