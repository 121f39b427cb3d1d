"""Claims on rows whose effect is known: verdicts, paired intervals, comparison at measured L0."""

import math

import pytest
import scipy.stats

from dmsae_lib import claims
from dmsae_lib.claims import FAILS, HOLDS, OPEN

KS, SEEDS = (24, 48, 96), (0, 1, 2)


def line(l0, seed):
    """The baseline: linear in log L0, with its own level for every seed."""
    return 0.9 + 0.02 * math.log(l0) + 0.003 * seed


def sae(core, k, seed, effect=0.0, l0=None, unbound=False, top1=None):
    l0 = l0 or float(k)
    scores = None if top1 is None else {"probe_top1": line(l0, seed) + top1, "probe_top5": line(l0, seed) + top1}
    return {"core": core, "k": k, "seed": seed, "L0": {"core": 0.0, "non_core": l0, "total": l0}, "unbound": unbound,
            "loss_recovered": line(l0, seed) + effect, "fvu": 0.1, "saebench": scores}


def arm(core, effect, noise=0.0005, ks=KS, **more):
    return [sae(core, k, seed, effect + noise * (seed - 1), l0=1.03 * k, **more) for k in ks for seed in SEEDS]


BASELINE = [sae("none", k, seed, top1=0.0) for k in KS for seed in SEEDS]


def test_interval_by_hand():
    # mean 2.5, standard deviation sqrt(5/3), t(0.975, 3) = 3.182446305
    half = 3.182446305 * math.sqrt(5 / 3) / 2
    assert claims.t_interval([1, 2, 3, 4]) == pytest.approx([2.5 - half, 2.5 + half], abs=1e-8)
    assert claims.t_interval([3.0]) is None and claims.t_interval([]) is None


def test_interval_against_scipy_stats():
    values = [0.31, -0.2, 0.47, 0.11, 0.05]
    expected = scipy.stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=scipy.stats.sem(values))
    assert claims.t_interval(values) == pytest.approx(expected)


@pytest.mark.parametrize("interval, above, verdict", [
    ([0.1, 0.2], True, HOLDS), ([0.1, 0.2], False, FAILS), ([-0.2, -0.1], True, FAILS), ([-0.2, -0.1], False, HOLDS),
    ([-0.1, 0.2], True, OPEN), ([0.0, 0.2], True, OPEN), ([0.0, 0.0], False, OPEN), (None, True, OPEN)])
def test_decide(interval, above, verdict):
    assert claims.decide(interval, 0.0, above) == verdict


@pytest.mark.parametrize("verdicts, expected", [
    ([HOLDS, HOLDS], HOLDS), ([HOLDS, OPEN], OPEN), ([HOLDS, OPEN, FAILS], FAILS), ([], OPEN)])
def test_overall_takes_deciding_parts_only(verdicts, expected):
    reported_only = {"verdict": FAILS, "decides": False}
    assert claims.overall([{"verdict": v, "decides": True} for v in verdicts] + [reported_only]) == expected


@pytest.mark.parametrize("l0", [24.0, 30.0, 48.0, 77.7, 96.0, 24 * 0.97, 96 * 1.03])
def test_interpolation_is_exact_for_a_line_in_log_l0(l0):
    for seed in SEEDS:
        assert claims.baseline_at(BASELINE, seed, l0, "loss_recovered") == pytest.approx(line(l0, seed), abs=1e-12)


@pytest.mark.parametrize("l0", [24 * 0.95, 96 * 1.05])
def test_no_baseline_beyond_its_own_range(l0):
    assert claims.baseline_at(BASELINE, 0, l0, "loss_recovered") is None
    assert claims.baseline_at(BASELINE, 7, 48.0, "loss_recovered") is None  # no baseline of that seed


def test_a_baseline_at_one_k_serves_at_its_own_l0_only():
    one = [sae("none", 48, 0)]
    assert claims.baseline_at(one, 0, 49.0, "loss_recovered") == pytest.approx(line(48, 0))
    assert claims.baseline_at(one, 0, 60.0, "loss_recovered") is None


def test_advantage_is_the_effect_whatever_the_measured_l0():
    rows = BASELINE + arm("distilled", -0.02)
    gains = claims.advantage(rows, "distilled", 48, "loss_recovered")
    assert gains == pytest.approx({0: -0.0205, 1: -0.02, 2: -0.0195})


def test_unbound_rows_enter_no_comparison():
    rows = BASELINE + arm("distilled", -0.02) + arm("random", -0.04)
    for row in rows:
        if row["core"] == "distilled" and (row["k"] == 24 or row["seed"] == 2):
            row["unbound"] = True
    assert claims.bound_ks(rows) == [48, 96]
    assert claims.advantage(rows, "distilled", 24, "loss_recovered") == {}
    assert sorted(claims.advantage(rows, "distilled", 48, "loss_recovered")) == [0, 1]
    assert len(claims.over_control(rows, "random", 48)) == 2
    assert claims.serves_all_k(rows)["detail"].count("unbound: [24]") == 1


def cycles(sizes, kept=None):
    kept = kept or [0, *sizes[:-1]]
    return [{"cycle": t, "core_in": sizes[t - 1] if t else 0, "core_out": size, "kept": kept[t]}
            for t, size in enumerate(sizes)]


@pytest.mark.parametrize("last_sizes, verdict", [
    ([110, 111, 112], HOLDS), ([138, 140, 142], FAILS), ([110], OPEN), ([100, 112, 140], OPEN)])
def test_core_settles(last_sizes, verdict):
    claim = claims.core_settles([cycles([80, 105, 108, last]) for last in last_sizes])
    change = sum(abs(last - 108) / 108 for last in last_sizes) / len(last_sizes)
    assert claim["verdict"] == verdict and claim["n"] == len(last_sizes)
    assert claim["value"] == pytest.approx(max(3 / 105, change))


def test_both_of_the_last_two_cycles_must_be_settled():
    claim = claims.core_settles([cycles([80, 108, last]) for last in (108, 109, 110)])
    assert claim["verdict"] == FAILS and claim["value"] == pytest.approx(28 / 80)
    assert [p["verdict"] for p in claim["parts"]] == [FAILS, HOLDS]


def test_core_settles_says_whether_it_shrinks():
    assert "shrinks" in claims.core_settles([cycles([126, 107, 92])])["detail"]
    assert "grows" in claims.core_settles([cycles([105, 110, 112])])["detail"]
    assert "keeps its size" in claims.core_settles([cycles([105, 112, 112])])["detail"]


@pytest.mark.parametrize("kept, verdict", [
    ([48, 49, 50], HOLDS), ([20, 21, 22], FAILS), ([48], OPEN), ([20, 33, 50], OPEN)])
def test_core_is_reselected(kept, verdict):
    # c = 50, m_0 = 25: uniform selection would keep 2/3 of the 60, 40 of them.
    claim = claims.core_is_reselected([cycles([50, 60], [0, n]) for n in kept], 25)
    assert claim["verdict"] == verdict
    assert claim["value"] == pytest.approx(sum(kept) / len(kept) / 60 - 50 / 75)


@pytest.mark.parametrize("top1, effect, verdict", [
    (0.02, -0.01, OPEN),  # as claimed in all that was run; absorption, SCR, TPP and RAVEL were not
    (-0.02, -0.01, FAILS),  # probing below the baseline
    (0.02, 0.01, FAILS)])  # loss recovered above the baseline
def test_beats_baseline(top1, effect, verdict):
    rows = BASELINE + arm("distilled", effect, top1=top1)
    claim = claims.beats_baseline(rows, 48)
    assert claim["verdict"] == verdict and claim["value"] == pytest.approx(top1) and claim["n"] == 3
    by_name = {(p["part"], p["k"]): p for p in claim["parts"]}
    assert not by_name["sparse probing, top 1", 96]["decides"]  # the claim is about low k
    assert by_name["full absorption (not run)", None]["verdict"] == OPEN
    assert "full absorption" in claim["detail"].partition("not run")[2]


def test_beats_baseline_on_everything_that_the_claim_names():
    """Absorption is better when it is lower; what was scored at some k's alone is judged there."""
    more = {"absorption.mean_full_absorption_score": -0.1, "scr.scr_metric_threshold_20": 0.1,
            "tpp.tpp_threshold_20_total_metric": 0.1, "ravel.disentanglement_score": -0.1}  # fmt: skip
    rows = BASELINE + arm("distilled", -0.01, top1=0.02)
    for worse in (None, *more):
        for row in rows:
            row["saebench"] = {name: value for name, value in row["saebench"].items() if name.startswith("probe")}
            if row["k"] in (24, 48):
                row["saebench"] |= {name: line(row["L0"]["total"], row["seed"]) + (row["core"] == "distilled") * gain
                                    * (-1 if name == worse else 1) for name, gain in more.items()}  # fmt: skip
        claim = claims.beats_baseline(rows, 48)
        assert claim["verdict"] == (FAILS if worse else HOLDS)
        assert {p["k"] for p in claim["parts"] if p["part"] == "full absorption"} == {24, 48}
        assert "not run" not in claim["detail"]


def test_unscored_saes_leave_probing_open():
    claim = claims.beats_baseline([sae("none", 48, 0), sae("distilled", 48, 0)], 48)
    assert claim["verdict"] == OPEN and claim["value"] is None and "not measured" in claim["detail"]


@pytest.mark.parametrize("random, expected", [(-0.04, HOLDS), (-0.01, FAILS), (-0.02, OPEN)])
def test_beats_random_cores(random, expected):
    others = arm("frequency_matched", -0.05, noise=-0.0004) + arm("random_directions", -0.06, noise=-0.0004)
    rows = BASELINE + arm("distilled", -0.02) + arm("random", random, noise=-0.0005) + others
    claim = claims.beats_random_cores(rows, 48)
    assert claim["verdict"] == expected and claim["value"] == pytest.approx(-0.02 - random)
    # Differences are 0.001 (seed - 1) around the mean.
    half = 4.302652730 * 0.001 / math.sqrt(3)
    assert claim["interval"] == pytest.approx([-0.02 - random - half, -0.02 - random + half])


def test_a_control_that_was_not_run_leaves_the_claim_open():
    claim = claims.beats_random_cores(BASELINE + arm("distilled", -0.02) + arm("random", -0.04), 48)
    assert claim["verdict"] == OPEN
    assert {p["part"]: p["verdict"] for p in claim["parts"]}["random_directions (not run)"] == OPEN


@pytest.mark.parametrize("effect, random_ks, verdict", [
    (-0.004, KS, HOLDS), (-0.02, KS, FAILS), (-0.004, (48,), OPEN), (-0.01, KS, OPEN)])
def test_serves_all_k(effect, random_ks, verdict):
    rows = BASELINE + arm("distilled", effect) + arm("random", effect - 0.02, noise=-0.0005, ks=random_ks)
    claim = claims.serves_all_k(rows)
    assert claim["verdict"] == verdict and claim["value"] == pytest.approx(effect)


def test_nothing_bound_is_not_decidable():
    rows = BASELINE + arm("distilled", -0.004, unbound=True)
    assert claims.serves_all_k(rows)["verdict"] == OPEN and claims.serves_all_k(rows)["value"] is None
    assert claims.beats_baseline(rows, 48)["verdict"] == OPEN
    assert claims.beats_random_cores(rows, 48)["verdict"] == OPEN


def test_chains_with_the_same_core_settings_are_further_seeds():
    sizes = {"k": 48, "prefixes": [32], "core_sparsity": "relu", "core_bias_init": "zero", "core_decoder_init": "random"}
    chain = {"core_sparsity": "relu", "core_bias_init": "zero", "core_decoder_init": "random", "cycles": cycles([105, 108, 111])}
    summary = {"sizes": sizes, "retrain": BASELINE, "cycles": cycles([105, 110, 112]),
               "chains": {"seed1": chain, "topk": chain | {"core_sparsity": "batchtopk"}}}
    judged = claims.judge(summary)
    assert list(judged) == ["C1", "C2", "C3", "C4", "C5"]
    assert judged["C1"]["n"] == judged["C2"]["n"] == 2 and judged["C1"]["interval"]
