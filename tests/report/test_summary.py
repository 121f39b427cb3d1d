"""The summary of a synthetic run: known rows, schema, comparison with a published one."""

import copy
import csv
import itertools
import json
import shutil

import pytest
from builders import asked, factory

from dmsae_lib.config.sections import ARMS, CONTROLS, LONGER, Chain
from dmsae_lib.report.layout import laid_out, readable
from dmsae_lib.report.results import Results, validate
from dmsae_lib.report.reviewers import QUESTIONS
from dmsae_lib.report.stages import Stages
from dmsae_lib.report.summary import _bare_model, summarise, write_summary
from dmsae_lib.report.what_is_a_core import RECORD
from dmsae_lib.saebench import Task
from dmsae_lib.store import artifacts
from dmsae_lib.store.artifacts import ArtifactError, UserError, load, write

SMALL = factory.config(cycles=2, ks=(48, 64), seeds=(0, 1), controls={"random": 2, "most_frequent": 1})
CORE = {"core_sparsity": "batchtopk", "core_decoder_init": "encoder"}
EXEMPT = {"core_sparsity": "relu", "core_decoder_init": "random"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return factory.build_run(tmp_path_factory.mktemp("summary"), factory.config(ks=(48, 64, 96)))


@pytest.fixture(scope="module")
def summary(run):
    return summarise(run)


@pytest.fixture
def small(tmp_path):
    return factory.build_run(tmp_path, SMALL, scored=False)


def test_cycles_and_final_core(summary):
    validate(summary)
    assert [row["core_out"] for row in summary["cycles"]] == factory.SIZES
    assert [row["core_in"] for row in summary["cycles"]] == [0, *factory.SIZES[:-1]]
    last = summary["cycles"][-1]
    assert (
        last["kept"] == 108
        and last["origins"]["2"] == 23
        and last["core_share"] == pytest.approx(49 / 64, rel=1e-5)
    )
    assert last["fvu"]["full"] == 0.2205 and last["loss_increase"] == {"prefix0": 0.245, "full": 0.07}
    assert summary["cycles"][0]["parent"] is None and len(last["parent"]) == 64
    assert last["jaccard"] == pytest.approx(107 / 115, rel=1e-5) and summary["cycles"][0]["jaccard"] is None
    assert last["placebos"]["random_directions"]["kept"] == 2 and summary["cycles"][0]["placebos"] == {}
    sizes = {"all_of_last": 112, "last_two": 108, "every_since_first": 108, "alive_since_0": 23}
    final = {"reading": "last_two", "size": 108, "sizes": sizes, "lineage": "core_lineage.json"}
    assert summary["final_core"] == final


def test_retrain_rows(summary):
    assert len(summary["retrain"]) == 3 * 2 * 3 + sum(factory.CONTROLS.values())
    row = next(r for r in summary["retrain"] if (r["k"], r["arm"], r["seed"]) == (64, "distilled", 2))
    assert row["loss_increase"] == pytest.approx(
        factory.loss_increase("distilled", row["L0"]["total"], 2), rel=1e-5
    )
    assert min(row["frequency_correlation"].values()) > 0.9 and row["core_rows"] == factory.ROWS
    found = {
        r["arm"]: r["frequency_correlation"] for r in summary["retrain"] if r["k"] == 64 and r["seed"] == 0
    }
    assert found["pca"]["before"] is None and abs(found["random"]["before"]) < 0.9
    assert found["none"] == {"before": None, "next_k": None}
    assert row["saebench"]["probe_top1"] == pytest.approx(
        factory.probe("distilled", 64.32, 1) + 0.004, rel=1e-5
    )
    assert {(r["k"], r["unbound"]) for r in summary["retrain"] if r["arm"] == "distilled"} == {
        (48, True),
        (64, False),
        (96, False),
    }
    baselines = {"dense": 0.93, "best_channel": 0.72, "majority": 0.5, "n_sets": 2, "dropped": ["c"]}
    assert summary["probing_baselines"] == baselines
    assert {row["arm"] for row in summary["heatmap"]} == {"none", "distilled"}


def test_claims_and_answers_of_the_known_effects(summary):
    claims = summary["claims"]
    # one chain decides nothing about cores
    assert {name for name, claim in claims.items() if claim["verdict"] != "not decidable"} == {"C3"}
    assert claims["C3"]["verdict"] == "holds"
    found = {(p["part"], p["k"]): p for p in claims["C4"]["parts"]}
    gap = factory.EFFECT["distilled"] - factory.EFFECT["random"]
    assert (
        found["random", 64]["value"] == pytest.approx(gap, abs=1e-5)
        and found["random (not run)", 96]["n"] == 0
    )
    # The least gap: one draw, that of seed 0, where the jitter of the control is a tenth more.
    gap = factory.EFFECT["distilled"] - factory.EFFECT["most_frequent"] + 0.1 * factory.JITTER
    assert claims["C4"]["value"] == pytest.approx(gap, abs=1e-5) and claims["C4"]["n"] == 1
    assert claims["C5"]["value"] == pytest.approx(factory.EFFECT["distilled"], abs=1e-5)
    assert (
        claims["C3"]["value"] == pytest.approx(1.5 * factory.EFFECT["distilled"], abs=1e-5)
        and claims["C3"]["n"] == 3
    )
    assert claims["C1"]["value"] == pytest.approx(5 / 105, rel=1e-5) and claims["C1"]["interval"] is None
    answers = summary["reviewers"]
    assert answers["R5"]["numbers"]["distilled_minus_most_frequent"] == {
        "mean": pytest.approx(gap, abs=1e-5),
        "interval": None,
        "n": 1,
        "varied": "training seed (one distilled core)",
    }
    assert answers["R6"]["answer"].startswith("There is one distillation seed")
    assert answers["R13"]["numbers"]["C3"] == {"n": 3, "varied": "training seed (one distilled core)"}
    assert answers["R4"]["numbers"]["core"]["n"] == 112 and answers["R4"]["numbers"]["core"]["min"] == 0.2
    assert answers["R3"]["numbers"]["longer_fresh"]["tokens"] == 2_400_000
    assert answers["R10"]["numbers"][-1]["aggregators"]["abs_mean"]["size"] == 56
    row = next(n for n in answers["R1"]["numbers"] if (n["arm"], n["k"]) == ("random_directions", 64))
    assert row["n"] == 1 and row["L0"]["core"] == 52


def test_published_files_tell_the_same(run, tmp_path):
    folder = write_summary(run)
    results = Results(folder)
    assert [int(row["core_out"]) for row in results.table("cycles.csv")] == factory.SIZES
    assert len(results.table("retrain.csv")) == len(results.summary["retrain"])
    assert {int(row["cycle"]) for row in results.table("history_cycles.csv")} == set(range(8))
    assert float(results.table("history_cycles.csv")[-1]["tokens"]) == 292 * 1024  # the last row is kept
    lineage = json.loads((folder / "core_lineage.json").read_text())
    assert len(lineage["latents"]) == 112 and len(lineage["readings"]["last_two"]) == 108
    assert [len(core["ids"]) for core in lineage["cycles"]] == factory.SIZES
    assert len((folder / "summary.json").read_text().splitlines()) < 2500
    with open(folder / "claims.csv", newline="") as handle:
        assert {row["claim"] for row in csv.DictReader(handle)} == {"C1", "C2", "C3", "C4", "C5", "C7"}


def test_a_run_without_scores_is_summarised(small):
    summary = summarise(small)
    assert all(row["saebench"] is None for row in summary["retrain"]) and summary["probing_baselines"] is None
    assert summary["claims"]["C3"]["value"] is None


def test_claims_over_five_chains_of_known_effects(tmp_path):
    """Open competition: five chains are judged, the sixth, with the paper's core, is not."""
    retrain = {"retrain": [arm for arm in ARMS if arm not in LONGER]}
    chains = [Chain(name=f"seed{n}", seed=n, **CORE, **retrain) for n in range(1, 5)]
    config = factory.config(cycles=2, ks=(64, 96), seeds=(0,), controls={})
    config = config.model_copy(
        update={
            "training": config.training.model_copy(update=CORE),
            "distill": config.distill.model_copy(
                update={"chains": [*chains, Chain(name="relu", retrain=["distilled"], **EXEMPT)]}
            ),
            "retrain": config.retrain.model_copy(update={"arms": retrain["retrain"]}),
        }
    )
    names = ["main", *(chain.name for chain in chains)]
    like = {"size": 9, "cosine_above": 0.5, "activation_above": 0.5, "span": 0.5, "span_chance": 0.3}
    identity = []
    for i, (a, b) in enumerate(itertools.combinations(names, 2)):
        identity += [
            {"a": a, "b": b, "kind": "cores", "cosine": 0.7 + 0.01 * i, "activation": 0.6 + 0.01 * i} | like,
            {"a": a, "b": b, "kind": "plain", "cosine": 0.4, "activation": 0.4} | like,
            {"a": a, "b": b, "kind": "random", "cosine": 0.2, "activation": None} | like,
        ]
    summary = summarise(factory.build_run(tmp_path, config, scored=False), identity)
    claims = summary["claims"]
    verdicts = {name: claim["verdict"] for name, claim in claims.items()}
    others = {"C1": "does not hold", "C3": "not decidable"}
    assert verdicts == dict.fromkeys(claims, "holds") | others
    assert {name for name, claim in claims.items() if claim["n"] != 5} == {"C3"}
    assert len(claims["C4"]["parts"]) == 2 * len(CONTROLS)
    # Chain i lies 0.001 (i - 1) beyond the effect.
    assert claims["C5"]["value"] == pytest.approx(factory.EFFECT["distilled"] + factory.JITTER, abs=1e-5)
    assert claims["C2"]["parts"][0]["p"] == pytest.approx(2 / 252, rel=1e-5)
    relu = [row for row in summary["retrain"] if row["chain"] == "relu"]
    assert len(relu) == 2 and len(summary["chains"]["relu"]["cycles"]) == 3
    stability = summary["reviewers"]["R6"]
    assert (
        stability["numbers"]["sizes"] == {name: 71 + i for i, name in enumerate(names)}
        and "plain 0.400" in stability["answer"]
    )


def test_a_stage_made_from_something_else_is_refused(small):
    old = load(small.cycle(1, "attribution"), "attribution")
    with write(old.folder, "attribution", old.parents) as again:
        again.json("record.json", old.json("record.json") | {"candidates": 1})
        again.csv("table.csv", old.csv("table.csv"))
    with pytest.raises(
        ArtifactError, match="cycle_1/core was made from another attribution .*make reproduce"
    ):
        summarise(small)


def test_a_retrained_sae_that_the_index_does_not_know_is_refused(small):
    """One of another core, left by an earlier run: it has the same harvest."""
    old = load(small.retrained(64, "distilled", 0), "sae")
    with write(old.folder, "sae", old.parents) as again:
        again.json("metrics.json", old.json("metrics.json") | {"dead": 77})
        again.csv("history.csv", old.csv("history.csv"))
    with pytest.raises(
        ArtifactError, match="k64/distilled-seed0 is not among those that .*retrain/index was made from"
    ):
        summarise(small)


def test_scores_of_another_sae_are_refused(small):
    task = Task(64, "distilled", 0, "core", 0)
    factory.write_scores(small, task, {"metrics": {}}, {"sae": "0" * 64})
    with pytest.raises(ArtifactError, match="distilled-seed0/core-seed0 was made from another sae"):
        summarise(small)


def test_a_missing_stage_is_named(small):
    shutil.rmtree(small.cycle(1, "attribution"))
    with pytest.raises(ArtifactError, match="no attribution artefact .*cycle_1"):
        summarise(small)


def spoilt(path, value=None):
    """A function that sets (or, without a value, deletes) what a dotted path names in a summary."""

    def spoil(summary):
        *parents, last = (int(p) if p.isdigit() else p for p in path.split("."))
        for key in parents:
            summary = summary[key]
        if value is None:
            del summary[last]
        else:
            summary[last] = value

    return spoil


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoilt("cyclse", []), "cyclse"),
        (spoilt("claims.C2.detail"), "claims.C2.detail"),
        (spoilt("claims.C1.verdict", "true"), "verdict"),
        (spoilt("cycles.0.L0.noncore", 3), "noncore"),
        (spoilt("cycles.3"), "one row per cycle, 0 to 7"),
        (spoilt("cycles.2.origins", {"0": 1}), "core_out in cycle 2"),
        (spoilt("retrain.0.arm", "destilled"), "destilled"),
        (spoilt("retrain.0.seed", 1), "same chain, k, arm and seed"),
        (spoilt("retrain.0.L0.total", 10.0), "not the sum"),
        (spoilt("inputs.threads", "2"), "threads"),
        (spoilt("reviewers.R4.numbers"), "reviewers.R4.numbers"),
        (spoilt("claims.C4.interval", [0.1]), "interval"),
        (spoilt("sizes.n_cycles", 0), "n_cycles"),
        (spoilt("cycles.1.fvu.full"), "cycles.1.fvu: .*lacks 'full'"),
        (spoilt("cycles.1.L0.free"), "cycles.1.L0"),
        (spoilt("sizes.aggregator", "mode"), "sizes.aggregator"),
    ],
)
def test_schema_refuses(summary, spoil, message):
    broken = copy.deepcopy(summary)
    spoil(broken)
    with pytest.raises(UserError, match=message):
        validate(broken)


def test_a_claim_that_nobody_judges_is_refused_and_a_new_one_may_be_missing(summary):
    """Whoever adds a claim can read what was published before."""
    validate(summary | {"claims": {"C1": summary["claims"]["C1"]}})
    with pytest.raises(UserError, match="claims: C9 is none of C1, C2"):
        validate(summary | {"claims": summary["claims"] | {"C9": summary["claims"]["C1"]}})


def test_when_where_and_how_fast_it_was_made_is_not_in_the_summary(small, monkeypatch):
    folder = write_summary(small)
    before = load(folder, "summary")
    texts = {name: (folder / name).read_bytes() for name in [*before.files, "manifest.json"]}
    monkeypatch.setattr(Stages, "notebooks", lambda _: {"train": [90.0, 9.0]})
    monkeypatch.setattr(artifacts, "provenance", lambda *_: {"commit": "another", "created": "1999"})
    write_summary(small)
    again = load(folder, "summary")
    assert again.hash == before.hash and texts == {name: (folder / name).read_bytes() for name in texts}
    assert again.provenance["stages"]["seconds"] == Results(folder).made["seconds"] == {"train": 99.0}
    assert Results(folder).made["processes"] == {"train": 2}
    assert again.provenance["commit"] == "another" != before.provenance["commit"]
    assert Results(folder).made["versions"] == before.provenance["versions"]


def no_manifest(folder):
    (folder / "manifest.json").unlink()


def another_content(folder):
    with write(folder, "summary") as writer:
        writer.json("summary.json", {})


@pytest.mark.parametrize(
    "spoil, message",
    [
        (shutil.rmtree, "There is no .*summary.json: run `make reproduce`"),
        (no_manifest, "no summary artefact .*`make publish`"),
        (
            lambda folder: (folder / "summary.json").write_text("{"),
            "summary.json does not match its hash.*: run `make publish`",
        ),
        (
            lambda folder: (folder / "cycles.csv").unlink(),
            "cycles.csv is missing.: run `make publish` to write it again",
        ),
        (another_content, "does not follow its schema"),
    ],
)
def test_broken_results_are_one_sentence(small, tmp_path, spoil, message):
    folder = tmp_path / "published"
    shutil.copytree(write_summary(small), folder)
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        Results(folder)
    assert "\n" not in str(caught.value)


def test_layout_is_json_and_rounding_keeps_six_digits():
    value = readable(
        {"a": 0.123456789, "b": [1, 2.0, {"c": None, "d": True}], "long": ["word" * 9] * 30, "empty": []}
    )
    assert json.loads(laid_out(value)) == value and value["a"] == 0.123457 and value["b"][0] == 1
    assert max(map(len, laid_out(value).splitlines())) <= 160


def test_what_newer_harvests_say_of_the_model_is_told_and_older_ones_are_read(summary):
    names = ("bits_per_byte", "dtype", "bfloat16_loss", "weights")
    assert [summary["language_model"][name] for name in names] == [None] * 4
    older = copy.deepcopy(summary)
    for name in names:
        del older["language_model"][name]
    validate(older)
    record = {"clean_loss": 3.6, "zero_loss": 11.0, "mean_loss": 9.0, "scale": 150.0, "bits_per_byte": 1.3}
    record |= {"model": {"dtype": "bfloat16", "weights": "4-bit"}, "precision": {"loss_difference": -0.002}}
    found = _bare_model(record, {"train": 0.0, "test": 0.0})
    assert [found[name] for name in names] == [1.3, "bfloat16", -0.002, "4-bit"]


def test_answers_that_notebook_10_gives_are_taken_in(small):
    """R11 and R12 with their numbers, in the reviewers' order, and the record beside the summary; without the
    stage neither is there."""
    plain, known = summarise(small)["reviewers"], readable(asked.record())
    harvest = load(small.folder / "harvest", "harvest").hash
    with write(small.folder / "what_is_a_core" / "record", "what_is_a_core", {"harvest": harvest}) as writer:
        writer.json(RECORD, asked.record())
    folder = write_summary(small)
    found = json.loads((folder / "summary.json").read_text())["reviewers"]
    assert list(found) == [name for name in QUESTIONS if name in {*plain, "R11", "R12"}]
    assert not {"R11", "R12"} & plain.keys() and json.loads((folder / RECORD).read_text()) == known
    assert "in cycle 0 they sum to 101% of the loss" in found["R11"]["answer"]
    assert "A to 25%" in found["R11"]["answer"] and found["R11"]["numbers"]["2"]["kept"]["mean_abs"] == 0.1
    assert "6 of 12 (first prefix: 5), 24 of 48" in found["R12"]["answer"]
    with write(small.folder / "what_is_a_core" / "record", "what_is_a_core", {"harvest": "0" * 64}) as writer:
        writer.json(RECORD, asked.record())
    with pytest.raises(ArtifactError, match="was made from another harvest"):
        summarise(small)
