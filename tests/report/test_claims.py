"""Claims on rows whose effect is known: chains as units, comparison at measured L0, verdicts."""

import itertools
import math

import pytest

from dmsae_lib.config.sections import CONTROLS, NEW_ROWS, OF_LATENTS
from dmsae_lib.report import claims, equal_l0, evidence, shape
from dmsae_lib.report.series import replicates
from dmsae_lib.report.verdicts import FAILS, HOLDS, OPEN, part

KS, SEEDS, CHAINS = (24, 48, 96), (0, 1), ("main", "b", "c", "d", "e")
ABSORPTION, RAVEL = "absorption.mean_full_absorption_score", "ravel.disentanglement_score"


def line(l0, chain, seed):
    """The baseline's loss increase: linear in log L0, with its own level for every chain and seed."""
    return 0.9 - 0.1 * math.log(l0) + 0.05 * CHAINS.index(chain) + 0.003 * seed


def sae(
    core, k, chain="main", seed=0, effect=0.0, l0=None, unbound=False, core_l0=0.0, correlation=None, **scores
):
    """A retrain row whose loss, and whose ``scores``, lie as far from the baseline at its L0 as is said."""
    l0 = l0 or float(k)
    return {
        "chain": chain,
        "arm": core,
        "k": k,
        "seed": seed,
        "L0": {"core": core_l0, "free": l0 - core_l0, "total": l0},
        "unbound": unbound,
        "loss_increase": line(l0, chain, seed) + effect,
        "fvu": 0.1,
        "frequency_correlation": {
            "before": correlation if core not in NEW_ROWS else None,
            "next_k": correlation,
        },
        "saebench": {name: line(l0, chain, seed) + value for name, value in scores.items()} or None,
    }


def arm(core, effect=0.0, noise=0.001, ks=KS, chains=CHAINS, seeds=SEEDS, **more):
    """A chain's effect is ``effect`` + ``noise`` (its place - 2): -2, -1, 0, 1, 2 times the noise among
    five."""
    return [
        sae(core, k, chain, seed, effect + noise * (CHAINS.index(chain) - 2), l0=1.03 * k, **more)
        for k in ks
        for chain in chains
        for seed in seeds
    ]


def judged(name, rows=(), *, chains=None, identity=(), **sizes):
    """One claim of such evidence at the distillation k = 48, first prefix 25, an equal-L0 core."""
    sizes = {"k": 48, "prefixes": [25], "core_sparsity": "batchtopk"} | sizes
    return evidence.judged(name, evidence.Evidence(chains or {}, list(rows), list(identity), sizes))


BASELINE = [
    sae("none", k, chain, seed, probe_top1=0.0, probe_top5=0.0)
    for k in KS
    for chain in CHAINS
    for seed in SEEDS
]


def by_name(claim):
    return {(p["part"], p["k"]): p for p in claim["parts"]}


# ---------------------------------------- comparison at measured L0


@pytest.mark.parametrize("l0", [24.0, 30.0, 48.0, 77.7, 96.0, 24 * 0.97, 96 * 1.03])
def test_interpolation_is_exact_for_a_line_in_log_l0(l0):
    for chain, seed in itertools.product(CHAINS, SEEDS):
        found = equal_l0.baseline_at(BASELINE, chain, seed, l0, "loss_increase")
        assert found == pytest.approx(line(l0, chain, seed), abs=1e-12)


@pytest.mark.parametrize(
    "chain, seed, l0", [("main", 0, 24 * 0.95), ("main", 0, 96 * 1.05), ("main", 7, 48.0), ("x", 0, 48.0)]
)
def test_no_baseline_beyond_its_own_range_seed_and_chain(chain, seed, l0):
    assert equal_l0.baseline_at(BASELINE, chain, seed, l0, "loss_increase") is None


def test_a_baseline_at_one_k_serves_at_its_own_l0_only():
    one = [sae("none", 48)]
    assert equal_l0.baseline_at(one, "main", 0, 49.0, "loss_increase") == pytest.approx(line(48, "main", 0))
    assert equal_l0.baseline_at(one, "main", 0, 60.0, "loss_increase") is None


def test_advantage_is_the_effect_whatever_the_measured_l0():
    found = equal_l0.advantage(BASELINE + arm("distilled", 0.02), "distilled", 48, "loss_increase")
    assert found == pytest.approx({(c, s): 0.018 + 0.001 * i for i, c in enumerate(CHAINS) for s in SEEDS})
    means = equal_l0.by_chain(found | {("e", 1): 0.030})
    assert means == pytest.approx({"main": 0.018, "b": 0.019, "c": 0.020, "d": 0.021, "e": 0.026})


def test_unbound_rows_enter_no_comparison():
    rows = BASELINE + arm("distilled", 0.02) + arm("random", 0.04)
    for row in rows:
        if row["arm"] == "distilled" and (row["k"] == 24 or row["chain"] == "e"):
            row["unbound"] = True
    assert equal_l0.bound_ks(rows) == [48, 96]
    assert equal_l0.advantage(rows, "distilled", 24, "loss_increase") == {}
    assert {chain for chain, _ in equal_l0.over_control(rows, "random", 48)} == set(CHAINS) - {"e"}
    assert "unbound k: [24]" in judged("C5", rows)["detail"]


# ---------------------------------------- C1, C2: the cycles


def cycles(sizes, kept=None, **placebos):
    """Cycle rows; ``kept`` and the ``placebos``, by kind, are counts by cycle."""
    kept, rows = kept or [0, *sizes[:-1]], []
    for t, size in enumerate(sizes):
        core_in = sizes[t - 1] if t else 0
        row = {"cycle": t, "core_in": core_in, "core_out": size, "kept": kept[t]}
        nulls = {kind: {"core_in": core_in, "kept": counts[t]} for kind, counts in placebos.items()}
        rows.append(row | {"jaccard": 0.75 if t else None, "placebos": nulls if t else {}})
    return rows


def named(rows):
    return dict(zip(CHAINS, rows))


@pytest.mark.parametrize(
    "last, verdict",
    [
        ([108, 109, 110, 111], HOLDS),
        ([100, 114, 107, 109], HOLDS),
        ([138, 140, 142, 139], FAILS),
        ([78, 80, 79, 77], FAILS),
        ([109], OPEN),
        ([107, 108, 109, 107], OPEN),
        ([90, 125, 108, 128], OPEN),
    ],
)
def test_core_settles(last, verdict):
    """100, then about 108, then the last size: an equivalence within 10 %."""
    claim = judged("C1", chains=named([cycles([80, 100, 107 + i % 3, size]) for i, size in enumerate(last)]))
    changes = [
        sum(size / (107 + i % 3) - 1 for i, size in enumerate(last)) / len(last),
        sum((107 + i % 3) / 100 - 1 for i in range(len(last))) / len(last),
    ]
    assert claim["verdict"] == verdict and claim["n"] == len(last)
    assert claim["value"] == pytest.approx(max(changes, key=abs)) and "0.75, 0.75" in claim["detail"]


def test_both_of_the_last_two_cycles_must_be_settled():
    claim = judged("C1", chains=named([cycles([80, 100 + i, 300, 301 + i]) for i in range(4)]))
    assert claim["verdict"] == FAILS and [p["verdict"] for p in claim["parts"]] == [FAILS, HOLDS]


@pytest.mark.parametrize(
    "n, core, placebo, verdict",
    [(5, 40, 10, HOLDS), (5, 10, 40, FAILS), (5, 22, 24, OPEN), (3, 40, 10, OPEN), (1, 40, 10, OPEN)],
)
def test_core_is_reselected_more_than_placebo_rows(n, core, placebo, verdict):
    rows = [
        cycles([50, 50, 50], [0, core + i, core + i], data_points=[0, placebo - i, placebo + i])
        for i in range(n)
    ]
    claim = judged("C2", chains=named(rows))
    assert claim["verdict"] == verdict and claim["n"] == n
    assert claim["value"] == pytest.approx((core + (n - 1) / 2 - placebo) / 50)
    found = by_name(claim)
    assert {name: p["decides"] for (name, _), p in found.items()} == {
        "above data_points": True,
        "above data_points, cycle 1": False,
        "above data_points, cycle 2": False,
    }
    assert {p["test"] for p in claim["parts"]} == {"permutation"}
    assert found["above data_points, cycle 1", None]["value"] == pytest.approx((core - placebo + n - 1) / 50)
    assert "66.7%" in claim["detail"]  # uniform selection: 50 of 50 + 25


def test_every_kind_of_placebo_must_be_beaten():
    def rows(points):
        return named(
            [
                cycles([50, 50], [0, 40 + i], random_directions=[0, i], data_points=[0, points + i])
                for i in range(5)
            ]
        )

    assert judged("C2", chains=rows(3))["verdict"] == HOLDS
    claim = judged("C2", chains=rows(40))
    assert claim["verdict"] == OPEN and claim["value"] == 0


def test_without_placebo_rows_reselection_is_not_decidable():
    claim = judged("C2", chains=named([cycles([50, 50], [0, 40 + i]) for i in range(5)]))
    assert claim["verdict"] == OPEN and claim["value"] is None and "not run" in claim["detail"]
    assert [p["part"] for p in claim["parts"]] == ["above placebo rows (not run)"]


# ---------------------------------------- C3: DMSAE and its baseline


def scored(top1=0.02, effect=0.01, chains=("main",), seeds=(0, 1, 2), **scores):
    """A baseline, and distilled SAEs that are ``top1`` better in probing, by seed and chain a little more."""
    rows = []
    for k, (i, c), s in itertools.product(KS, enumerate(chains), seeds):
        jitter = 0.001 * (s - 1)
        rows.append(sae("none", k, c, s, probe_top1=0, probe_top5=0, **dict.fromkeys(scores, 0)))
        rows.append(
            sae(
                "distilled",
                k,
                c,
                s,
                effect + 0.001 * (s + i),
                probe_top1=top1 + jitter + 0.001 * i,
                probe_top5=top1 - jitter + 0.001 * i,
                **{name: value + jitter for name, value in scores.items()},
            )
        )
    return rows


@pytest.mark.parametrize(
    "top1, effect, verdict",
    [
        (0.02, 0.01, HOLDS),
        (0.02, -0.01, HOLDS),  # a loss that is a little lower is not "better"
        (-0.02, 0.01, FAILS),
        (0.02, -0.05, FAILS),
        (0.001, 0.01, OPEN),
        (0.02, -0.0205, OPEN),
    ],
)
def test_beats_baseline(top1, effect, verdict):
    claim = judged("C3", scored(top1, effect))
    assert claim["verdict"] == verdict and claim["value"] == pytest.approx(top1) and claim["n"] == 3
    assert "training seed" in claim["varied"]
    assert {(name, k) for name, k in by_name(claim)} == {
        # the claim is about low k
        *itertools.product(("sparse probing, top 1", "sparse probing, top 5"), (24, 48)),
        *itertools.product(("loss increase",), KS),
    }
    assert "not run: full absorption" in claim["detail"]


@pytest.mark.parametrize("better", [1, -1])
def test_what_else_was_run_does_not_change_the_question(better):
    more = {ABSORPTION: -0.1 * better, RAVEL: -0.1 * better, "scr.scr_metric_threshold_20": 0.1 * better}
    claim, alone = judged("C3", scored(**more)), judged("C3", scored())
    assert claim["verdict"] == HOLDS and [p for p in claim["parts"] if p["decides"]] == alone["parts"]
    found = by_name(claim)
    expected = HOLDS if better > 0 else FAILS
    assert found["full absorption", 24]["verdict"] == found["RAVEL", 96]["verdict"] == expected
    assert not found["full absorption", 24]["decides"] and ("full absorption", 96) not in found
    assert claim["detail"].partition("not run: ")[2].startswith("TPP")


def test_unscored_saes_leave_probing_open():
    claim = judged("C3", BASELINE + arm("distilled", 0.01))
    assert (
        claim["verdict"] == OPEN
        and claim["value"] is None
        and "not run: sparse probing, top 1" in claim["detail"]
    )
    assert by_name(claim)["sparse probing, top 1 (not run)", 24]["decides"]
    assert by_name(claim)["loss increase", 48]["n"] == len(SEEDS)


def test_with_several_scored_chains_training_seeds_decide_and_chains_are_reported():
    claim, alone = judged("C3", scored(chains=CHAINS)), judged("C3", scored())
    deciding = [p for p in claim["parts"] if p["decides"]]
    assert deciding == alone["parts"] and (claim["varied"], claim["n"]) == (equal_l0.SEED, 3)
    over = [p for p in claim["parts"] if p["part"].endswith(", over chains")]
    assert len(over) == len(deciding) and {p["n"] for p in over} == {5}
    top1 = next(p for p in over if (p["part"], p["k"]) == ("sparse probing, top 1, over chains", 48))
    assert top1["value"] == pytest.approx(0.022)  # chains differ from the main one by 0 .. .004


def test_chains_decide_where_each_has_one_training_seed():
    rows = [row for row in scored(chains=CHAINS) if row["seed"] == SEEDS[0]]
    claim = judged("C3", rows)
    assert claim["varied"] == equal_l0.CHAIN and claim["n"] == 5 and {p["n"] for p in claim["parts"]} == {5}
    assert all(p["decides"] for p in claim["parts"])


# ---------------------------------------- C4, C5: against the controls


def against_controls(distilled=0.01, control=0.03, worst=None, controls=CONTROLS, chains=CHAINS, ks=KS):
    found = BASELINE + arm("distilled", distilled, chains=chains)
    for name in controls:
        effect = worst if worst is not None and name == "pca" else control
        found += arm(name, effect, -0.001, ks=ks, chains=chains, seeds=(0,))
    return found


@pytest.mark.parametrize("worst, verdict", [(None, HOLDS), (-0.01, FAILS), (0.01, OPEN)])
def test_every_control_must_be_beaten_at_every_bound_k(worst, verdict):
    rows = against_controls(worst=worst)
    claim = judged("C4", rows)
    assert claim["verdict"] == verdict and len(claim["parts"]) == len(CONTROLS) * len(KS) and claim["n"] == 5
    assert claim["value"] == pytest.approx(0.01 - (0.03 if worst is None else worst))
    assert claim["varied"] == equal_l0.CHAIN
    # Chains' differences are 0.002 (-2 .. 2) around the mean; t(0.975, 4) = 2.776445105.
    half = 2.776445105 * 0.002 * math.sqrt(2.5 / 5)
    assert claim["interval"] == pytest.approx([claim["value"] - half, claim["value"] + half])
    assert judged("C5", rows)["verdict"] == verdict


@pytest.mark.parametrize(
    "given, name, n, found",
    [
        ({"controls": CONTROLS[1:]}, "random (not run)", 5, {0, 5}),
        ({"ks": KS[1:]}, "random (not run)", 5, {0, 5}),
        ({"chains": ("main",)}, "random", 1, {1}),
    ],
)
def test_a_control_that_was_not_run_leaves_the_claims_open(given, name, n, found):
    rows = against_controls(**given)
    for claim in (judged("C4", rows), judged("C5", rows)):
        assert claim["verdict"] == OPEN and claim["n"] == n and (name, 24) in by_name(claim)
        assert {p["n"] for p in claim["parts"]} == found


def test_retraining_seeds_of_one_chain_are_no_chains():
    """Two seeds that agree closely say nothing about other cores."""
    assert {p["n"] for p in judged("C4", against_controls(chains=("main",)))["parts"]} == {1}


@pytest.mark.parametrize("effect, verdict", [(0.01, HOLDS), (-0.5, HOLDS), (0.02, OPEN), (0.04, FAILS)])
def test_serves_all_k(effect, verdict):
    claim = judged("C5", against_controls(distilled=effect, control=effect + 0.02))
    assert claim["verdict"] == verdict and claim["value"] == pytest.approx(effect)
    assert {(p["bound"], p["side"]) for p in claim["parts"]} == {(0.0, "below"), (0.02, "below")}


def test_nothing_bound_is_not_decidable():
    rows = BASELINE + arm("distilled", 0.004, unbound=True)
    for claim in (judged("C5", rows), judged("C4", rows), judged("C3", rows)):
        assert claim["verdict"] == OPEN and claim["value"] is None


# ---------------------------------------- C6, C7: competition, identity


def competing(share=6.0, correlation=0.7, **pca):
    """Distilled SAEs with a core L0 of 6 and frequencies that correlate .7, controls with about 4 and .3, by
    chain."""
    rows = BASELINE + arm("warm_start", -0.005, ks=(48,)) + arm("cold_start", 0.002, ks=(48,))
    rows += arm("distilled", ks=(48,), seeds=(0,), core_l0=share, correlation=correlation)
    for control in CONTROLS:
        for i, chain in enumerate(CHAINS):
            row = sae(control, 48, chain, core_l0=4.0 - 0.3 * (i - 2), correlation=0.3 - 0.02 * (i - 2))
            rows.append(row | (pca if control == "pca" else {}))
    return rows


@pytest.mark.parametrize(
    "changes, verdict",
    [
        ({}, HOLDS),
        ({"correlation": 0.3}, OPEN),
        ({"correlation": 0.2}, FAILS),
        ({"share": 2.0}, FAILS),
        ({"frequency_correlation": {"before": None, "next_k": None}}, OPEN),
    ],
)
def test_the_core_wins_its_place(changes, verdict):
    claim = judged("C6", competing(**changes))
    assert claim["verdict"] == verdict and len(claim["parts"]) == 2 * len(CONTROLS)
    assert claim["value"] == pytest.approx((changes.get("share", 6.0) - 4.0) / 48) and claim["n"] == 5
    not_run = ("frequency correlation over k, above pca (not run)", 48)
    assert (not_run in by_name(claim)) == ("frequency_correlation" in changes)
    warm = "warm-started minus distilled, -0.0050 nats, minus the same nesting without the rows -0.0070."
    assert warm in claim["detail"]


def test_frequencies_are_compared_with_the_cycle_before_where_there_is_one():
    """Latents have one; new rows are compared by what they do at the next k."""
    rows = competing()
    names = {
        name.partition(" above ")[2]
        for name, _ in by_name(judged("C6", rows))
        if name.startswith("frequency correlation, ")
    }
    assert names == set(OF_LATENTS)
    for row in rows:
        if row["arm"] == "random":
            before = 0.9 + 0.01 * CHAINS.index(row["chain"])
            row["frequency_correlation"] |= {"before": before, "next_k": -1.0}
    parts = by_name(judged("C6", rows))
    assert parts["frequency correlation, above random", 48]["verdict"] == FAILS


def test_a_core_that_is_exempt_does_not_compete():
    claim = judged("C6", competing(), core_sparsity="relu")
    assert claim["verdict"] == OPEN and claim["parts"] == [] and "core_sparsity is relu" in claim["detail"]


def pairs(chains=CHAINS, cosine=0.6, activation=0.5):
    like = {"size": 20, "cosine_above": 0.25, "span": 0.5, "span_chance": 0.3, "activation_above": 0.1}

    def row(a, b, kind, value, correlation):
        by_chain = 0.01 * (CHAINS.index(a) + CHAINS.index(b)) / 2
        found = {"a": a, "b": b, "kind": kind, "cosine": value + by_chain}
        return found | {"activation": correlation and correlation + by_chain} | like

    kinds = (("cores", cosine, activation), ("plain", 0.4, 0.4), ("random", 0.2, None))
    return [
        row(a, b, kind, value, correlation) | ({} if kind == "cores" else {"cosine": value})
        for a, b in itertools.combinations(chains, 2)
        for kind, value, correlation in kinds
    ]


@pytest.mark.parametrize(
    "changes, verdict",
    [({}, OPEN), ({"activation": 0.3}, OPEN), ({"cosine": 0.3}, FAILS), ({"chains": CHAINS[:2]}, OPEN)],
)
def test_chains_agree(changes, verdict):
    """The activations of the cores exceed those of plain SAEs by the same in every pair, which decides
    nothing."""
    identity = pairs(**changes)
    claim = judged("C7", identity=identity)
    n = len(changes.get("chains", CHAINS))
    assert claim["verdict"] == verdict and claim["n"] == (n if n > 2 else 1)  # two chains are one pair
    # The terms of chain i are 0.01 i: pseudo-values are 0.2 + 0.01 i.
    assert claim["value"] == pytest.approx(changes.get("cosine", 0.6) - 0.4 + 0.01 * (n - 1) / 2)
    if n == 5:
        half = 2.776445105 * 0.01 * math.sqrt(2.5 / 5)
        assert claim["interval"] == pytest.approx([claim["value"] - half, claim["value"] + half])
    for row in identity:
        row["activation"] = row["activation"] if row["kind"] == "cores" else 0.4
    assert judged("C7", identity=identity)["verdict"] == (
        HOLDS if changes == {} else FAILS if n == 5 else OPEN
    )
    assert "cores: |cosine|" in claim["detail"] and "25.0% above .7" in claim["detail"]


def test_one_chain_agrees_with_nobody():
    claim = judged("C7", identity=[])
    assert claim["verdict"] == OPEN and claim["value"] is None and "one chain" in claim["detail"]


# ---------------------------------------- all of them


SETTINGS = {"core_sparsity": "batchtopk", "core_bias_init": "zero", "core_decoder_init": "encoder"}


def whole(**chains):
    """A summary; ``chains`` change the settings of further chains."""
    rows = [cycles([105, 108 + i, 110], [0, 90, 90 - i], data_points=[0, 5, i]) for i in range(5)]
    further = {
        name: SETTINGS | {"seed": i, "cycles": rows[i]} | chains.get(name, {})
        for i, name in enumerate(CHAINS)
        if i
    }
    competition = [row for row in competing() if row["arm"] != "none"]
    return {
        "sizes": {"k": 48, "prefixes": [32], **SETTINGS},
        "inputs": {"seed": 0},
        "cycles": rows[0],
        "chains": further,
        "retrain": scored(chains=CHAINS, seeds=(0,)) + competition,
        "identity": pairs(),
    }


def test_all_claims_are_judged_over_chains():
    found = claims.judge(whole())
    assert list(found) == ["C1", "C2", "C3", "C4", "C5", "C6", "C7"]
    for claim in found.values():
        assert claim["n"] == 5 and claim["parts"]
        shape.Claim.model_validate(claim)


@pytest.mark.parametrize("other", [{"core_sparsity": "relu"}, {"core_bias_init": "match_frequency"}])
def test_chains_of_another_kind_are_not_judged(other):
    summary = whole(e=other)
    assert list(replicates(summary)) == [*CHAINS[:4]]
    assert {claims.judge(summary)[name]["n"] for name in ("C1", "C2", "C3", "C4", "C6")} == {4}


def test_a_claim_is_one_function_and_one_line(monkeypatch):
    """It is judged like all others; what it is called need not be known anywhere else."""
    monkeypatch.setattr(evidence, "CLAIMS", dict(claims.CLAIMS))
    monkeypatch.setattr(claims, "CLAIMS", evidence.CLAIMS)

    @evidence.claim("C8", "The core is large.", "latents beyond 100")
    def core_is_large(found):
        parts = [part("last", [rows[-1]["core_out"] - 100 for rows in found.chains.values()])]
        return evidence.Finding(parts, parts[0], "Latents of the last core.")

    found = claims.judge(whole())["C8"]
    assert found["verdict"] == OPEN and found["value"] == 10  # 110 in every chain: no spread decides nothing
    assert found["claim"] == "The core is large." and found["varied"] == equal_l0.CHAIN
