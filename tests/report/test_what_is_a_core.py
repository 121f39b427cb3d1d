"""Open competition from the SAEs of a synthetic run with known effects, and the answers in words."""

import shutil

import pytest
from builders import asked, factory

from dmsae_lib.report import retrained, what_is_a_core
from dmsae_lib.report.retrained import retrained_rows
from dmsae_lib.report.what_is_a_core import answers, competition, means, principal_components

CONTROLS = {"random": 3, "pca": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = factory.config(cycles=1, ks=(48, 64, 96), controls=CONTROLS)
    return factory.build_run(tmp_path_factory.mktemp("competition"), config, scored=False)


@pytest.fixture
def without_frozen_rows(monkeypatch):
    """The factory's cores hold no candidates to draw from."""
    monkeypatch.setattr(retrained, "open_arms", lambda run, chain: None)
    monkeypatch.setattr(retrained, "LATENTS", ())


def test_competition_is_at_measured_l0_and_names_what_is_missing(run, without_frozen_rows):
    rows, missing, opened = retrained_rows(run, ["main"])
    assert not missing and len(rows) == len(opened) == 3 * 3 + 3 * 3
    found = {row["arm"]: row for row in competition(rows, 64)}
    assert list(found) == ["none", "distilled", "random", "pca"] and found["random"]["saes"] == 3
    for arm in ("distilled", "random", "pca"):
        over = found[arm]["loss_increase_over_baseline"]
        assert over["value"] == pytest.approx(factory.EFFECT[arm], abs=1e-4) and over["n"] == 3
    minus = found["pca"]["distilled_minus"]
    assert minus["value"] == pytest.approx(factory.EFFECT["distilled"] - factory.EFFECT["pca"], abs=1e-4)
    assert found["none"]["loss_increase_over_baseline"] is None and found["none"]["core_share"] == 0
    place = run.retrained(64, "pca", 1)
    shutil.move(place, place.with_name("aside"))
    try:
        rows, missing, _ = retrained_rows(run, ["main"])
    finally:
        shutil.move(place.with_name("aside"), place)
    assert missing == ["retrain/k64/pca-seed1"]
    assert {row["arm"]: row["saes"] for row in competition(rows, 64)}["pca"] == 2


def test_the_answers_follow_the_numbers_in_both_directions():
    record = asked.record()
    found = answers(record)
    assert list(found) == list(what_is_a_core.QUESTIONS) and all(
        text.endswith(".") for text in found.values()
    )
    (row,) = (row for row in record["competition"]["rows"] if row["arm"] == "pca")
    for interval, words in (
        ([0.001, 0.01], "yes"),
        ([-0.02, -0.01], "no, it is worse"),
        ([-1, 1], "no difference"),
    ):
        row["distilled_minus"] |= {"interval": interval}
        assert words in principal_components(record)[0]
    row["distilled_minus"] = row["distilled_minus"] | {"interval": None}
    assert "no interval decides" in principal_components(record)[0]
    record["competition"]["rows"].remove(row)
    assert "was trained yet" in principal_components(record)[0]
    record["agreement"] = []
    assert "not known" in answers(record)["Do chains agree on latents, or on a subspace?"]


def test_means_over_pairs_of_chains():
    rows = asked.agreement()
    rows[0]["cosine"] = 0.8  # cores of the first pair
    found = means(rows)["equal-L0"]
    assert found["cores"]["cosine"] == pytest.approx((0.8 + 0.5 + 0.5) / 3)
    assert found["random"]["activation"] is None and list(found) == ["cores", "turned", "plain", "random"]
