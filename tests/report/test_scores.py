"""SAEBench in the summary: which evals ran, each SAE's numbers, and differences whose value is known."""

import csv

import pytest
from builders import factory

from dmsae_lib.config import RunConfig
from dmsae_lib.figures import FIGURES
from dmsae_lib.report import scores
from dmsae_lib.report.agreement import compare
from dmsae_lib.report.equal_l0 import CHAIN, SEED
from dmsae_lib.report.page import results_page
from dmsae_lib.report.results import Results, validate
from dmsae_lib.report.series import ARMS, OTHER_KINDS, lenders
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


def test_a_chain_that_was_not_scored_is_in_no_difference(run):
    """However much worse it is; and losses are better when they are lower."""
    summary = summarise(run)
    rows = summary["retrain"]
    other = [
        row | {"chain": "b", "loss_increase": row["loss_increase"] + 1, "saebench": None}
        for row in rows
        if row["arm"] == "distilled"
    ]
    for sparsity in ("relu", "batchtopk"):
        settings = {name: summary["sizes"][name] for name in ("core_bias_init", "core_decoder_init")}
        chain = {"seed": 1, "cycles": summary["cycles"], "core_sparsity": sparsity} | settings
        more = summary | {"retrain": rows + other, "chains": {"b": chain}}
        assert scores.differences(more, {}) == scores.differences(summary, {})
    loss = [row for row in summary["differences"] if row["metric"] == "loss_increase"]
    found = [(row["k"], row["n"], row["better"], row["sign"]) for row in loss]
    assert found == [(64, 3, -1, "+"), (96, 3, -1, "+")]
    assert all(row["value"] == pytest.approx(factory.EFFECT["distilled"], rel=1e-4) for row in loss)


ABOVE = {"relu0": 0.05, "relu1": 0.07, "relu2": 0.09}  # probing accuracy of each chain over its baseline
CHAINS = [{"name": "seed1", "seed": 1, "seeds": [0], "retrain": ["none", "distilled"]}] + [
    {"name": name, "seed": seed, "core_sparsity": "relu", "seeds": [0], "retrain": ["distilled"]}
    | {"core_decoder_init": "random"}
    for seed, name in enumerate(ABOVE)
]


def scored_chains(tmp_path, *chains, main: float = 0.02):
    """The summary of a run in which the chains beside the main one, of equal-L0 cores, are scored in a single
    metric, absorption: the main chain's distilled SAEs ``main`` above their baseline of .3, those of ABOVE by
    as much above the baseline of their own seed, .3 or, in chain seed1, .4; further draws count .01 each."""
    resolved = factory.config(cycles=2, ks=(64, 96), controls={}).model_dump(mode="json")
    resolved["training"] |= {"core_sparsity": "batchtopk", "core_decoder_init": "encoder"}
    resolved["distill"]["chains"] = CHAINS
    resolved["saebench"]["chains"] = ["main", *chains]
    run = factory.build_run(tmp_path, RunConfig.model_validate(resolved))
    levels = {"main": (0.3, 0.3 + main), "seed1": (0.4, 0.4 + main)}
    levels |= {"relu0": (None, 0.35), "relu1": (None, 0.47), "relu2": (None, 0.39)}
    for chain in ("main", *chains):
        for seed in (0, 1, 2) if chain == "main" else (0,):
            for draw in (0, 1) if seed == 0 else (0,):
                for arm, level in zip(("none", "distilled"), levels[chain]):
                    if level is not None:
                        value = level + (0.01 * draw if arm == "distilled" else 0)
                        task = Task(64, arm, seed, "absorption", draw, chain)
                        factory.write_scores(run, task, {"metrics": {FULL.partition(".")[2]: value}})
    return run, summarise(run)


def of_metric(summary, metric=FULL, k=64):
    return {row["core"]: row for row in summary["differences"] if (row["metric"], row["k"]) == (metric, k)}


def test_another_kind_of_core_is_compared_apart_with_the_baseline_of_its_own_seed(tmp_path):
    """The third chain's seed is no other's, so it has no baseline."""
    run, summary = scored_chains(tmp_path, "seed1", *ABOVE)
    assert lenders(summary) == {"main": "main", "seed1": "seed1", "relu0": "main", "relu1": "seed1"}
    found = of_metric(summary)
    assert list(found) == [None, "ReLU"]
    main, relu = found.values()
    assert (main["n"], main["value"], main["varied"]) == (3, pytest.approx(0.02), SEED)
    assert relu["varied"] == CHAIN  # one training seed each
    assert (relu["n"], relu["value"]) == (2, pytest.approx(0.06))  # of .05 and .07
    half = 12.706204736 * 0.01
    assert relu["interval"] == pytest.approx([0.06 - half, 0.06 + half], abs=1e-6)
    # of the first chain, relu0: .05 and .06
    assert (relu["evaluation"]["n"], relu["evaluation"]["value"]) == (2, pytest.approx(0.055))
    rows = {(r["chain"], r["arm"], r["seed"]): r["saebench"] for r in summary["retrain"] if r["k"] == 64}
    assert rows["relu1", "distilled", 0][FULL] == pytest.approx(0.47)
    assert rows["seed1", "none", 0][FULL] == pytest.approx(0.4)
    with open(write_summary(run) / "saebench_scores.csv", newline="") as handle:
        table = [r for r in csv.DictReader(handle) if r["chain"] == "relu2" and r["name"] == "absorption"]
    assert {float(row["value"]) for row in table} == {0.39, 0.4}


def test_a_baseline_that_was_not_scored_is_compared_in_loss_alone(tmp_path):
    """Chain seed1, which relu1 is compared with, is there without scores."""
    _, summary = scored_chains(tmp_path, *ABOVE)
    relu, loss = of_metric(summary)["ReLU"], of_metric(summary, "loss_increase")["ReLU"]
    assert (relu["n"], relu["value"], relu["varied"]) == (1, pytest.approx(0.05), SEED)
    assert (loss["n"], loss["varied"]) == (2, CHAIN)


def test_claims_count_scored_replicates_and_no_other_kind_of_core(tmp_path):
    (_, plain), (_, relu), (_, both) = (
        scored_chains(tmp_path / str(n), *chains) for n, chains in enumerate(((), ABOVE, ("seed1", *ABOVE)))
    )
    assert plain["claims"]["C3"] == relu["claims"]["C3"] and plain["claims"]["C3"]["varied"] == SEED
    assert of_metric(plain) == {None: of_metric(relu)[None]} and of_metric(plain)[None]["n"] == 3
    assert of_metric(plain)[None]["varied"] == SEED
    parts = [p for p in both["claims"]["C3"]["parts"] if p["part"].startswith("full absorption")]
    found = [(p["part"], p["n"], p["decides"]) for p in parts]
    assert found == [("full absorption", 3, False), ("full absorption, over chains", 2, False)]
    assert [p["value"] for p in parts] == [pytest.approx(0.02)] * 2


def test_a_page_and_a_figure_show_each_kind_of_core_beside_the_main_one(tmp_path):
    run, summary = scored_chains(tmp_path, "relu0")
    page = results_page("x", summary, {"hardware": {"cores": 2, "cpu": "toy"}, "seconds": {"train": 60.0}})
    main, relu = page.split("## Differences to the baseline")[1].split("## Time")[0].split("ReLU core:")
    assert "equal-L0 core:" in main and "| full absorption (lower) | 64 | +0.020" in main
    assert "| full absorption (lower) | 64 | +0.050 | 1 | ? |" in relu
    figure = FIGURES["4_saebench_vs_l0"](Results(write_summary(run)))
    above, below = figure.axes[1], figure.axes[5]
    assert above.get_title(loc="left") == "full absorption\n↓ better"
    marks = [line for line in below.lines if len(line.get_xdata()) == 1 and line.get_marker() != "None"]
    drawn = {(line.get_marker(), line.get_ydata()[0]) for line in marks}
    looks = {None: ARMS["distilled"][2], "ReLU": OTHER_KINDS[0][1]}
    rows = [row for row in summary["differences"] if row["metric"] == FULL]
    assert len(rows) == 2 and drawn == {(looks[row["core"]], row["value"]) for row in rows}


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
        summary["language_model"]["outliers"]["test"] = outliers
        marked = {row["metric"] for row in scores.differences(summary, found) if row["doubted"]}
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
