"""The benchmark: the contestants do the same work, from the same state, and what is written of it holds
together."""

import json
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cases, contestants, figure, inputs, language_model, measure, run
from benchmarks.cases import CORED, DENSE, DICTIONARY, MATRICES, OURS, SAELENS, SPARSE
from dmsae_lib.config import load_config
from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.store.artifacts import UserError, repository_root

ROOT = repository_root()
CASES = {case.name: case for case in cases.quick_cases()}
SHAPE = CASES["toy-clean"].shape
no_peer = pytest.mark.skipif(
    not (ROOT / measure.PEER_PYTHON).exists(),
    reason="dictionary_learning's environment is not set up (make bench-environment)",
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def toy(tmp_path_factory, one_thread):
    """The prepared inputs of the toy shape."""
    return inputs.prepare(SHAPE, tmp_path_factory.mktemp("inputs"), "cpu", report=lambda text: None)


@pytest.fixture(scope="module")
def record(tmp_path_factory, one_thread):
    """A record of every quick case, with made-up times: 2 ms a step for ours, 6 and 8 for the peers, 1 for
    the floor."""
    pace = {OURS: 2e-3, CORED: 3e-3, SAELENS: 8e-3, DICTIONARY: 6e-3, SPARSE: 2e-3, MATRICES: 4e-3}
    dense = {"floor": [1e-3, 5e-3, 1e-3], "five_gemms": [5e-3] * 3, "flat_topk": [1e-3] * 3}

    def made_up(case):
        seconds = {
            name: {"step": [pace[name] * case.n_saes] * 3} for name in case.contestants if name != DENSE
        }
        summary = {
            name: {"first_loss": 1.0, "dead": 0, "peak_bytes": 2**20, "torch": "2"} for name in seconds
        }
        return measure.record(case, "cpu", seconds | {DENSE: dense}, summary | {DENSE: {}}, 1.0)

    return run.result([made_up(case) | {"provenance": {}} for case in CASES.values()])


def test_floor_is_one_product():
    assert cases.L.floor_flops == 2 * 2048 * 512 * 16384
    counter = FlopCounterMode(display=False)
    with counter:
        torch.randn(SHAPE.batch_size, SHAPE.d_in) @ torch.randn(SHAPE.d_in, SHAPE.d_sae)
    assert SHAPE.floor_flops == counter.get_total_flops()


def test_five_products_are_those_of_a_dense_sae(toy):
    tensors, _ = inputs.load(toy, SHAPE, 0.0, "cpu")
    work = contestants.dense_work(CASES["toy-clean"], tensors)
    for name, factor in (("floor", 1), ("five_gemms", 5)):
        counter = FlopCounterMode(display=False)
        with counter:
            work[name](tensors["x"][0])
        assert counter.get_total_flops() == factor * SHAPE.floor_flops


@pytest.mark.parametrize(
    "shape", [cases.S, cases.M, cases.L, *(case.shape for case in cases.cuda_cases())], ids=lambda s: s.name
)
def test_prefixes_are_whole_shares_of_the_width(shape):
    assert [width / shape.d_sae for width in shape.widths] == [1 / 32, 3 / 32, 7 / 32, 15 / 32, 1]


def test_names_of_cases_are_unique():
    for order in (cases.cpu_cases(), cases.cuda_cases(), cases.quick_cases()):
        assert len({case.name for case in order}) == len(order)
        assert all(
            case.rounds * case.timed >= 10
            for case in order
            if "toy" not in case.shape.name and case.shape.d_in > 16
        )


def test_synthetic_activations_have_an_anisotropic_spectrum():
    x = inputs.synthetic_activations(4096, 32)
    spectrum = torch.linalg.eigvalsh(torch.cov(x.T)).flip(0)
    assert spectrum[0] > 8 * spectrum[-1] > 0  # white noise of this size: 1.4
    assert x.mean(0).norm() > 0.1 * x.norm(dim=1).mean()  # an offset, as residual streams have
    assert torch.equal(x[:100], inputs.synthetic_activations(4096, 32)[:100])


def build(name: str, case, path: Path):
    tensors, dead = inputs.load(path, case.shape, case.dead, "cpu")
    return contestants.build(name, case, tensors, dead, "cpu"), tensors["x"], len(dead)


@pytest.mark.parametrize("number", range(3))
def test_one_objective(toy, number):
    """Same weights, same batch: our loss is SAELens's (dictionary_learning's is compared in the run
    below)."""
    losses = []
    for name in (OURS, SAELENS):
        contestant, x, _ = build(name, CASES["toy-clean"], toy)
        losses.append(contestant.loss(contestant.step(x[number])))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_core_leaves_room(toy):
    """The row with a core is no special case: the core fires as often as its latents did, and the rest get
    their share."""
    contestant, x, _ = build(CORED, CASES["toy-clean"], toy)
    stats = contestant.step(x[0])[0]
    assert contestant.trainers[0].sae.n_core == SHAPE.n_core == SHAPE.d_sae // 4
    assert 0 < float(stats.l0_core) < 0.9 * SHAPE.k
    assert float(stats.l0_core + stats.l0_free) == pytest.approx(SHAPE.k)


def test_aux_losses_are_those_of_the_readme(toy):
    """Both let the d_in / 2 strongest dead latents of a token explain what the others leave. Ours takes them
    after ReLU and divides by the variance of what is left; SAELens does neither, and shrinks the term where
    few are dead."""
    case = CASES["toy-dead"]
    tensors, dead = inputs.load(toy, SHAPE, case.dead, "cpu")
    x, k_aux = tensors["x"][0], SHAPE.d_in // 2
    found = {}
    for name in (OURS, SAELENS):
        pair = [contestants.build(name, case, tensors, some, "cpu") for some in (dead, dead[:0])]
        found[name] = 32 * (pair[0].loss(pair[0].step(x)) - pair[1].loss(pair[1].step(x)))
    pre = (x - tensors["b_dec"]) @ tensors["W_enc"].T + tensors["b_enc"]
    kept = pre.relu().flatten().topk(SHAPE.k * len(x))
    f = torch.zeros(pre.numel()).scatter(0, kept.indices, kept.values).view_as(pre)
    residual = x - tensors["b_dec"] - f @ tensors["W_dec"]

    def error(activations):
        strongest = activations[:, dead].topk(k_aux, dim=1)
        explained = torch.zeros_like(activations[:, dead]).scatter(1, strongest.indices, strongest.values)
        return (explained @ tensors["W_dec"][dead] - residual).square().sum(1).mean()

    variance = (residual - residual.mean(0)).square().sum(1).mean()
    assert found[OURS] == pytest.approx(float(error(pre.relu()) / variance), rel=1e-3)
    assert found[SAELENS] == pytest.approx(float(error(pre) * min(len(dead) / k_aux, 1)), rel=1e-3)


@pytest.mark.parametrize("name", [OURS, SAELENS])
def test_dead_latents_are_dead_and_stay_so(toy, name):
    contestant, x, n = build(name, CASES["toy-dead"], toy)
    assert n == int(cases.DEAD * SHAPE.d_sae) > 0
    assert contestant.dead() == n
    for i in range(8):
        contestant.step(x[i % len(x)])
    assert contestant.dead() == n


@pytest.mark.parametrize("name", [OURS, SAELENS])
def test_no_latent_dies_in_a_clean_case(toy, name):
    contestant, x, _ = build(name, CASES["toy-clean"], toy)
    for i in range(8):
        contestant.step(x[i % len(x)])
    assert contestant.dead() == 0


def test_silenced_latents_are_positive_but_never_kept(toy):
    plain, _ = inputs.load(toy, SHAPE, 0.0, "cpu")
    tensors, dead = inputs.load(toy, SHAPE, cases.DEAD, "cpu")
    assert dead.min() >= SHAPE.n_core

    def positive(t):
        return torch.stack(
            [((x - t["b_dec"]) @ t["W_enc"][dead].T + t["b_enc"][dead]).relu() for x in t["x"]]
        )

    assert positive(tensors).max() <= 0.51 * tensors["threshold"]
    assert torch.equal(positive(tensors) > 0, positive(plain) > 0)


def test_many_step_every_sae(toy):
    contestant, x, _ = build(OURS, CASES["many-2"], toy)
    before = [trainer.sae.W_dec.clone() for trainer in contestant.trainers]
    contestant.step(x[0])
    after = [trainer.sae.W_dec for trainer in contestant.trainers]
    assert len(after) == 2 and torch.equal(*after)
    assert all(not torch.equal(old, new) for old, new in zip(before, after))


def test_ratios_are_of_medians(record):
    case = record["cases"][0]
    assert case["dense"]["floor"]["median"] == 1e-3
    assert case["times_faster_than"] == pytest.approx({SAELENS: 4.0, DICTIONARY: 3.0})
    assert case["contestants"][OURS]["tokens_per_second"] == pytest.approx(SHAPE.batch_size / 2e-3)
    assert not case["disturbed"]
    many = next(case for case in record["cases"] if case["kind"] == "many")
    assert many["contestants"][OURS]["times_floor"] == pytest.approx(2.0)  # per SAE
    assert many["contestants"][OURS]["tokens_per_second"] == pytest.approx(2 * SHAPE.batch_size / 4e-3)


def test_goals_name_the_faster_peer_and_the_leaner_one(record):
    case = record["cases"][0] | {"name": "L-clean", "shape": "L"}
    case["contestants"][OURS]["peak_bytes"] = 3 * 2**20
    found = {goal["goal"]: goal for goal in run.goals([case])}
    assert found["times faster than the faster peer"] == {
        "case": "L-clean",
        "goal": "times faster than the faster peer",
        "wanted": 5.0,
        "reached": pytest.approx(3.0),
        "met": False,
    }
    assert found["at most this many times the floor"]["met"]
    assert found["peak memory over the leaner peer's, at most"]["reached"] == 3.0
    without = {name: row for name, row in case["contestants"].items() if name != DICTIONARY}
    assert run.goals([case | {"contestants": without}]) == []


def test_schema(record):
    schema = json.loads((ROOT / "benchmarks" / "bench.schema.json").read_text())
    jsonschema.validate(record, schema)
    for published in (ROOT / "results" / "bench").glob("bench.json"):
        jsonschema.validate(json.loads(published.read_text()), schema)


def test_figure_is_drawn_from_the_json_alone(record, tmp_path):
    for folder in ("a", "b"):
        figure.draw(json.loads(json.dumps(record)), tmp_path / folder)
    for name in ("bench.png", "bench.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    drawn = figure.make(record)
    for axes in drawn.axes[:2]:  # without dead latents and with
        assert [bar.get_height() for bar in axes.patches] == pytest.approx([2.0, 8.0, 6.0])
    assert [line.get_label() for line in drawn.axes[2].lines] == [
        "ours",
        "SAELens",
        "dictionary_learning",
        "encoder's product",
    ]


def test_figure_without_a_peer_or_a_part(record, tmp_path):
    few = [
        case | {"contestants": {OURS: case["contestants"][OURS]}}
        for case in record["cases"]
        if case["kind"] == "step"
    ]
    figure.draw(record | {"cases": few}, tmp_path)
    assert (tmp_path / "bench.png").is_file()


def test_unknown_case_is_named(tmp_path):
    with pytest.raises(UserError, match="no case 'S-claen': use one of .*S-clean"):
        run.bench(cases.cpu_cases(), ["S-claen"], "cpu", tmp_path, tmp_path, report=lambda text: None)


def test_worker_that_fails_says_why(tmp_path):
    worker = measure.Worker(OURS, CASES["toy-clean"], tmp_path / "missing.safetensors", "cpu", ROOT)
    with pytest.raises(UserError, match="process of ours ended early: .*missing.safetensors"):
        worker.answer()
    worker.stop()


@no_peer
def test_interleaved_run(tmp_path):
    """The real thing at toy size: four processes that take turns, dictionary_learning's from its own
    environment."""
    result = run.bench(
        cases.quick_cases(), ["toy-dead"], "cpu", tmp_path / "work", tmp_path / "out", lambda text: None
    )
    assert result == json.loads((tmp_path / "out" / "bench.json").read_text())
    jsonschema.validate(result, json.loads((ROOT / "benchmarks" / "bench.schema.json").read_text()))
    (case,) = result["cases"]
    rows = case["contestants"]
    assert set(rows) == {OURS, SAELENS, DICTIONARY}
    assert len({row["torch"] for row in rows.values()}) == 1
    assert all(
        len(row["seconds"]) == case["timed_steps"] and min(row["seconds"]) > 0 for row in rows.values()
    )
    # AuxK included
    assert rows[OURS]["first_loss"] == pytest.approx(rows[DICTIONARY]["first_loss"], rel=1e-5)
    assert {row["dead"] for row in rows.values()} == {int(cases.DEAD * SHAPE.d_sae)}
    if sys.platform == "linux":
        # values, gradients and two moments of encoder and decoder
        weights = 4 * 4 * 2 * SHAPE.d_in * SHAPE.d_sae
        assert all(row["peak_bytes"] > weights for row in rows.values())


def test_the_halves_of_a_language_model_are_timed_beside_plain_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(language_model, "lacks", lambda name: ("more", "") if "smollm2" in name else None)
    said: list[str] = []
    found = language_model.bench(tmp_path, rounds=2, report=said.append)
    assert json.loads((tmp_path / "language_model.json").read_text()) == found
    assert "smollm2-135m-instruct is left out" in said[-1]
    for row in found["models"]:
        assert row["model"] == "wheeltext-4x128" and row["from_the_hook"]
        speed, tokens = row["tokens_per_second"], row["rows"] * row["context_size"]
        assert speed["lower"] == pytest.approx(2 * tokens / sum(row["seconds"]["lower"]))
        assert row["of_plain"]["upper"] == pytest.approx(speed["upper"] / speed["plain upper"])
        assert row["met"] == {half: ratio >= 0.8 for half, ratio in row["of_plain"].items()}


def test_plain_transformers_compute_the_same_halves(one_thread):
    config = load_config("default").model
    ours = LanguageModel(config)
    plain = language_model.Plain(ours.folder, ours.layer, "float32")
    tokens = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        resid = ours.lower(tokens)
        assert torch.allclose(plain.lower(tokens), plain.model.model.norm(resid), atol=1e-4)
        assert torch.allclose(plain.upper(resid), ours.logits(tokens), atol=1e-3)
