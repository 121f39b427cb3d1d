"""Intervals, p values and verdicts against closed forms, scipy's own tests, and the error rates that they
promise."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from dmsae_lib.report.verdicts import (
    FAILS,
    HOLDS,
    OPEN,
    decided,
    group_part,
    holm,
    overall,
    part,
    permutation_p,
    pseudo_values,
    t_interval,
)

VALUES = [0.31, -0.2, 0.47, 0.11, 0.05]


def verdict(*parts):
    return overall(decided(list(parts)))


def test_interval_by_hand():
    # mean 2.5, standard deviation sqrt(5/3), t(0.975, 3) = 3.182446305
    half = 3.182446305 * math.sqrt(5 / 3) / 2
    assert t_interval([1, 2, 3, 4]) == pytest.approx([2.5 - half, 2.5 + half], abs=1e-8)


@pytest.mark.parametrize("values", [[], [3.0], [3.0, 3.0, 3.0], [0.3, 0.1 + 0.2, 0.3]])
def test_copies_have_no_interval_and_decide_nothing(values):
    assert t_interval(values) is None
    for side, bound in (("above", 0.0), ("below", 0.0), ("within", 9.0)):
        found = part("p", values, bound, side)
        assert found["p"] is None and verdict(found) == OPEN


def test_interval_and_p_against_scipy():
    expected = scipy.stats.t.interval(0.95, 4, loc=sum(VALUES) / 5, scale=scipy.stats.sem(VALUES))
    assert t_interval(VALUES) == pytest.approx(expected)
    for bound in (-0.3, 0.0, 0.2):
        assert part("p", VALUES, bound)["p"] == pytest.approx(scipy.stats.ttest_1samp(VALUES, bound).pvalue)


def test_p_of_equivalence_is_that_of_two_one_sided_tests():
    low = scipy.stats.ttest_1samp(VALUES, -0.4, alternative="greater").pvalue
    high = scipy.stats.ttest_1samp(VALUES, 0.4, alternative="less").pvalue
    assert part("p", VALUES, 0.4, "within")["p"] == pytest.approx(2 * max(low, high))


@pytest.mark.parametrize(
    "side, centres",
    [
        ("above", {2.0: HOLDS, 1.02: OPEN, 0.98: OPEN, 0.0: FAILS}),
        ("below", {2.0: FAILS, 1.02: OPEN, 0.98: OPEN, -3.0: HOLDS}),
        ("within", {0.0: HOLDS, 0.5: HOLDS, -0.98: OPEN, -1.02: OPEN, 1.02: OPEN, 2.0: FAILS, -2.0: FAILS}),
    ],
)
def test_a_part_is_decided_by_the_side_of_its_interval(side, centres):
    for centre, expected in centres.items():
        found = part("p", [centre - 0.1, centre, centre + 0.1, centre], 1.0, side)
        low, high = found["interval"]
        inside = {"above": low > 1, "below": high < 1, "within": -1 < low and high < 1}[side]
        assert decided([found])[0]["verdict"] == expected and (expected == HOLDS) == inside


def test_permutation_p_is_exact():
    a, b = [0.9, 0.7, 0.8, 0.35], [0.4, 0.1, 0.75]
    for way, mine in zip(("greater", "less"), permutation_p(a, b)):
        theirs = scipy.stats.permutation_test(
            (a, b), lambda x, y: np.mean(x) - np.mean(y), alternative=way, n_resamples=np.inf
        )
        assert mine == pytest.approx(theirs.pvalue)
    assert permutation_p([2, 3, 4], [0, 0, 1]) == pytest.approx((1 / math.comb(6, 3), 1))
    assert permutation_p([1, 1], [1, 1]) == (1, 1)


# the smallest two-sided p of 3 and 3 is .1
@pytest.mark.parametrize("n, expected", [(1, OPEN), (3, OPEN), (4, HOLDS)])
def test_two_groups_of_chains(n, expected):
    core, null = [0.90 + 0.01 * i for i in range(n)], [0.50 + 0.02 * i for i in range(n)]
    found = group_part("p", core, null)
    assert found["p"] == (None if n == 1 else pytest.approx(2 / math.comb(2 * n, n))) and found["n"] == n
    assert found["value"] == pytest.approx(sum(core) / n - sum(null) / n)
    assert verdict(found) == expected
    assert verdict(group_part("p", null, core)) == {HOLDS: FAILS, OPEN: OPEN}[expected]
    if n > 1:
        theirs = scipy.stats.ttest_ind(core, null, equal_var=False).confidence_interval()
        assert found["interval"] == pytest.approx(list(theirs))


def test_a_null_that_is_always_zero_can_be_beaten_but_two_constants_decide_nothing():
    assert verdict(group_part("p", [0.8, 0.9, 0.85, 0.95], [0.0] * 4)) == HOLDS
    assert verdict(group_part("p", [0.8] * 4, [0.0] * 4)) == OPEN
    assert group_part("p", [], [])["value"] is None and verdict(group_part("p", [], [])) == OPEN


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0] and holm([]) == []


def test_one_part_among_many_does_not_refute_the_claim_by_chance():
    against = part("p", [-0.5, -0.1, -0.3, -0.4, -0.1])
    assert 0.01 < against["p"] < 0.05 and verdict(against) == FAILS
    others = [part("p", [0.5, 0.1, 0.3, 0.4, 0.1]) for _ in range(4)]
    assert verdict(against, *others) == OPEN
    # the family is the same whatever ran
    assert verdict(against, *(part("p (not run)", []) for _ in range(4))) == OPEN
    assert verdict(part("p", [-0.5, -0.4, -0.45, -0.4, -0.5]), *others) == FAILS


def test_parts_that_are_reported_do_not_decide_and_do_not_count():
    against, away = [-0.5, -0.1, -0.3, -0.4, -0.1], [-0.5, -0.4, -0.45, -0.4, -0.5]
    reported = [part("p", away, decides=False) for _ in range(9)]
    assert verdict(part("p", against), *reported) == FAILS and verdict(part("p", VALUES), *reported) == OPEN
    found = decided([part("p", [0.5, 0.1, 0.3, 0.4, 0.1]), *reported])
    assert overall(found) == HOLDS and {p["verdict"] for p in found[1:]} == {FAILS}
    assert overall([]) == OPEN == overall(decided(reported))


def test_error_rates_at_the_bounds():
    """Five chains, 14 parts, every mean at its bound: how often the claim is refuted, by the rule and by
    single intervals."""
    random, n, rule, single = np.random.default_rng(0), 600, 0, 0
    for _ in range(n):
        # parts of the same chains: independent, or correlated
        chains = random.normal(size=(5, 1)) * random.choice([0, 1])
        parts = [part("p", values) for values in (chains + random.normal(size=(5, 14))).T]
        rule += verdict(*parts) == FAILS
        single += any(p["interval"][1] < 0 for p in parts)
    assert rule / n < 0.05 < 0.15 < single / n


def test_a_claim_with_one_part_at_its_bound_is_seldom_granted():
    random, n = np.random.default_rng(1), 800
    for side, bound in (("above", 0.0), ("within", 1.0)):
        granted = 0
        for _ in range(n):
            noise = random.normal(size=(5, 3))
            granted += (
                verdict(
                    *(
                        part("p", bound + far + noise[:, i], bound, side)
                        for i, far in enumerate((0, 9, 9) if side == "above" else (0, -1, -1))
                    )
                )
                == HOLDS
            )
        assert granted / n < 0.04


def test_pseudo_values_of_a_sum_are_its_terms():
    terms = {"a": 0.3, "b": 0.1, "c": 0.7, "d": 0.2}
    pairs = {(x, y): (terms[x] + terms[y]) / 2 for x, y in itertools.combinations(terms, 2)}
    assert pseudo_values(pairs) == pytest.approx(list(terms.values()))


def test_pseudo_values_have_the_mean_of_the_pairs_and_need_three_chains():
    pairs = {pair: i**2 for i, pair in enumerate(itertools.combinations("abcde", 2))}
    found = pseudo_values(pairs)
    assert len(found) == 5 and sum(found) / 5 == pytest.approx(sum(pairs.values()) / 10)
    assert pseudo_values({("a", "b"): 0.4}) == [0.4] and pseudo_values({}) == []


def test_pairs_of_chains_are_not_taken_for_independent():
    """Mean 0 over pairs of five chains: how often it is called positive or negative, by pseudo-values and by
    the ten pairs."""
    random, n, jackknife, pairs_alone = np.random.default_rng(2), 600, 0, 0
    for _ in range(n):
        x = random.normal(size=5)
        pairs = {(i, j): x[i] + x[j] + 0.3 * random.normal() for i, j in itertools.combinations(range(5), 2)}
        jackknife += part("p", pseudo_values(pairs))["p"] < 0.05
        pairs_alone += part("p", pairs.values())["p"] < 0.05
    assert jackknife / n < 0.07 < 0.2 < pairs_alone / n
