"""sae_bench's TPP and SCR: planted answers, sae_bench's own path as reference, what the seed governs,
caches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from builders.models import save_model
from builders.saebench import load_model, make_bench, sae_of

from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.data.workers import Workers
from dmsae_lib.sae.model import FoldedSAE, MatryoshkaSAE
from dmsae_lib.saebench import class_pairs, perturbation
from dmsae_lib.saebench.adapter import Adapter, undisturbed
from dmsae_lib.store.artifacts import Artifact, UserError

CONTEXT, WIDTH = 16, 32
CLASSES = ("oak", "elm", "ash")
ATTRIBUTES, BIASED = perturbation.ATTRIBUTES, perturbation.BIASED
pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    # sae_bench keeps the first epoch of the best test accuracy: on planted texts the first, so the probe must
    # learn fast
    monkeypatch.setattr(perturbation, "PROBE", perturbation.PROBE | {"lr": 0.05})
    monkeypatch.setattr(perturbation, "PROBE_STEPS", 100)
    monkeypatch.setattr(perturbation, "probing_texts", set)
    monkeypatch.setattr(perturbation, "TPP_SETS", ("trees",))
    monkeypatch.setattr(perturbation, "SCR_PAIRS", ("jobs",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny", context=CONTEXT)


@pytest.fixture(scope="module")
def llama(folder) -> LanguageModel:
    return load_model(folder, context=CONTEXT)


def tree_texts(name: str, seed: int) -> class_pairs.Texts:
    return {
        split: {label: [f"{label} {seed} {i}" for i in range(*numbers)] for label in CLASSES}
        for split, numbers in (("train", (0, 90)), ("test", (90, 150)))
    }


def job_texts(name: str, seed: int) -> class_pairs.Texts:
    def texts(jobs: str, genders: str, start: int, n: int) -> list[str]:
        kinds = [(job, gender) for job in jobs for gender in genders]
        return [
            f"{job}{gender} {seed} {i}"
            for job, gender in kinds
            for i in range(start, start + n // len(kinds))
        ]

    sides = {
        "male / female": ("pn", "m"),
        "female_data_only": ("pn", "f"),
        "professor / nurse": ("p", "mf"),
        "nurse_data_only": ("n", "mf"),
        BIASED: ("p", "m"),
        "female_nurse_data_only": ("n", "f"),
    }
    return {
        split: {label: texts(*side, start, n) for label, side in sides.items()}
        for split, start, n in (("train", 0, 100), ("test", 1000, 100))
    }


def noise(model: LanguageModel, texts: list[str], scale: float) -> torch.Tensor:
    """(texts, 5 tokens, d_model): noise on the channels from the ninth on, which no planted latent reads or
    writes."""
    x = scale * torch.randn(len(texts), 5, model.d_model, generator=torch.Generator().manual_seed(len(texts)))
    x[..., :8] = 0
    return x


@pytest.fixture
def trees(monkeypatch):
    """Channel i is 3 on the texts of class i, noise on channels that no latent of a class reads."""

    def residuals(model, texts, context):
        x = noise(model, texts, 0.3)
        for row, text in zip(x, texts):
            row[:, CLASSES.index(text.split()[0])] = 3
        return list(x)

    monkeypatch.setattr(perturbation, "tpp_texts", tree_texts)
    monkeypatch.setattr(perturbation, "_residuals", residuals)


@pytest.fixture
def jobs(monkeypatch):
    """Channel 0 is 2 or -2 (professor or nurse), channel 1 is 1 or -1 (male or female)."""

    def residuals(model, texts, context):
        x = noise(model, texts, 0.3)
        for row, text in zip(x, texts):
            row[:, 0], row[:, 1] = 2 if text[0] == "p" else -2, 1 if text[1] == "m" else -1
        return list(x)

    monkeypatch.setattr(perturbation, "scr_texts", job_texts)
    monkeypatch.setattr(perturbation, "_residuals", residuals)


def both_signs() -> FoldedSAE:
    rows = torch.eye(WIDTH)[[0, 1, 2, 3, 4]]
    return sae_of(torch.cat([rows, -rows]))


def blind() -> FoldedSAE:
    """Latents for channels that hold nothing but noise."""
    return sae_of(torch.eye(WIDTH)[20:28])


def run_tpp(sae: FoldedSAE, model: LanguageModel, cache: Path) -> dict:
    return perturbation.run_perturbation(sae, model, make_bench(cache), 0, scr=False)


def run_scr(sae: FoldedSAE, model: LanguageModel, cache: Path) -> dict:
    return perturbation.run_perturbation(sae, model, make_bench(cache), 0, scr=True)


def prepared(model: LanguageModel, cache: Path, seed: int = 0) -> Artifact:
    return perturbation.prepare_perturbation(Workers(model), make_bench(cache), seed, scr=False)["trees"]


def test_tpp_of_one_latent_per_class_and_of_latents_that_mix_classes(llama, tmp_path, trees, monkeypatch):
    real = perturbation._shared

    def ideal(*arguments, **options):
        arrays, record = real(*arguments, **options)
        for i, label in enumerate(CLASSES):  # a trained probe may also use what speaks against its class
            arrays |= {
                f"weight/{label}": np.eye(1, WIDTH, i, dtype=np.float32),
                f"bias/{label}": np.float32([-1.5]),
            }
        return arrays, record

    monkeypatch.setattr(perturbation, "_shared", ideal)
    planted = run_tpp(both_signs(), llama, tmp_path)
    # 10 latents: no n = 10
    assert list(planted["metrics"]) == [f"tpp_threshold_{n}_total_metric" for n in (2, 5)]
    assert all(value == 1 for value in planted["probe_accuracy"]["trees"].values())  # of the trained probes
    assert set(planted["metrics"].values()) == {0.5}  # half of a probe's texts are of its class

    everywhere = torch.zeros(WIDTH)
    everywhere[:3] = 1
    reads = torch.eye(WIDTH)[:3] + 0.5 * everywhere  # most on its own class, but on the others too
    mixed = run_tpp(sae_of(reads, 3 * everywhere.expand(3, -1)), llama, tmp_path)
    assert mixed["sets"]["trees"]["scores"]["tpp_threshold_2_intended_diff_only"] == 0.5
    assert mixed["metrics"] == {"tpp_threshold_2_total_metric": 0}
    assert set(run_tpp(blind(), llama, tmp_path)["metrics"].values()) == {0}


def test_scr_gives_back_what_a_planted_bias_took(llama, tmp_path, jobs):
    planted = run_scr(both_signs(), llama, tmp_path)
    accuracy = planted["probe_accuracy"]["jobs"]
    assert accuracy["professor / nurse"] == 1 and accuracy["male / female"] > 0.95
    assert accuracy[f"{BIASED} probe on male / female data"] < 0.6  # the probe follows the job
    assert (
        planted["metrics"]["scr_metric_threshold_2"]
        == planted["sets"]["jobs"]["scores"]["scr_dir2_threshold_2"]
        > 0.9
    )
    useless = run_scr(blind(), llama, tmp_path)
    assert useless["metrics"]["scr_metric_threshold_2"] == pytest.approx(0, abs=0.1)
    assert planted["ties"] == useless["ties"] == []


def test_a_tie_is_none_and_counted(llama, tmp_path, jobs, monkeypatch):
    real = perturbation._shared

    def tied(*arguments, **options):
        arrays, record = real(*arguments, **options)
        record["probe_accuracy"] |= {f"{BIASED} probe on {label} data": 0.75 for label in ATTRIBUTES}
        return arrays, record

    monkeypatch.setattr(perturbation, "_shared", tied)
    found = run_scr(both_signs(), llama, tmp_path)
    assert found["ties"] == ["jobs"] and set(found["metrics"].values()) == {None}


def by_sae_bench(adapter: Adapter, made, ns: list[int], pad: bool) -> dict[str, float]:
    """TPP through sae_bench's functions on padded tokens and the SAE itself."""
    held, record = made.tensors("shared.safetensors"), made.json("shared.json")
    width = record["padded_to"] if pad else int(held["lengths"].max())
    texts = torch.zeros(len(held["lengths"]), width, WIDTH)
    for row, tokens in zip(texts, held["residuals"].split(held["lengths"].tolist())):
        row[: len(tokens)] = tokens
    halves = {
        split: {label: texts[held[f"{split}/{label}"]] for label in sorted(CLASSES)}
        for split in ("train", "test")
    }
    with undisturbed(), torch.no_grad():
        from sae_bench.evals.scr_and_tpp import main
        from sae_bench.evals.sparse_probing.probe_training import Probe

        probes = {}
        for label in CLASSES:
            probes[label] = Probe(WIDTH, torch.float32)
            probes[label].net.weight.copy_(held[f"weight/{label}"])
            probes[label].net.bias.copy_(held[f"bias/{label}"])
        torch.manual_seed(0)
        effects = main.get_all_node_effects_for_one_sae(
            adapter, probes, record["classes"], False, halves["train"], 125
        )
        torch.manual_seed(0)
        ablated = main.perform_feature_ablations(
            probes, adapter, 125, halves["test"], effects, ns, record["classes"], 500, False
        )
        return main.create_tpp_plotting_dict(ablated, record["probe_accuracy"])[0]


def dense_sae() -> FoldedSAE:
    """Random latents with biases, about half of them active on any text, and on the zero vector."""
    generator = torch.Generator().manual_seed(0)
    sae = MatryoshkaSAE(WIDTH, 24, (8,)).requires_grad_(False)
    sae.initialise(torch.Generator().manual_seed(0), torch.randn(64, WIDTH, generator=generator))
    sae.b_dec.copy_(torch.randn(WIDTH, generator=generator))
    return sae.folded(1.0)


@pytest.mark.parametrize("ragged", [False, True])
def test_pooled_texts_give_what_sae_bench_computes_token_by_token(llama, tmp_path, monkeypatch, ragged):
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(3, WIDTH, generator=generator)

    def residuals(model, texts, context):
        return [
            shift[CLASSES.index(text.split()[0])]
            + 2
            * torch.randn(
                int(torch.randint(2, 15, (), generator=generator)) if ragged else 7,
                WIDTH,
                generator=generator,
            )
            for text in texts
        ]

    monkeypatch.setattr(perturbation, "tpp_texts", tree_texts)
    monkeypatch.setattr(perturbation, "_residuals", residuals)
    monkeypatch.setattr(perturbation, "TOKENS", 100)
    sae = dense_sae()
    found = run_tpp(sae, llama, tmp_path)["sets"]["trees"]
    made = prepared(llama, tmp_path)
    theirs = by_sae_bench(Adapter(sae, llama), made, [2, 5, 10, 20], pad=True)
    # a text of 360 on the border, after rounding
    assert found["padded"] == pytest.approx(theirs, abs=2 / 360)
    assert found["padded"] != pytest.approx(found["scores"], abs=0.02)  # zeros count there
    if not ragged:
        assert found["scores"] == pytest.approx(
            by_sae_bench(Adapter(sae, llama), made, [2, 5, 10, 20], pad=False), abs=2 / 360
        )


def test_residuals_are_the_models_own_without_bos(llama):
    texts = ["a cat", "def main(): return [x for x in range(10)]" * 3, "x"]
    found = perturbation._residuals(llama, texts, context=12)
    for text, resid in zip(texts, found):
        ids = llama.tokenizer(text, add_special_tokens=False)["input_ids"][:11]
        alone = llama.lower(torch.tensor([[llama.bos, *ids]]))[0, 1:]
        assert resid.shape == alone.shape and (resid - alone).abs().max() < 1e-5


def test_probes_that_know_nothing_are_not_run(llama, tmp_path, monkeypatch):
    def residuals(model, texts, context):
        return list(torch.randn(len(texts), 3, WIDTH, generator=torch.Generator().manual_seed(0)))

    monkeypatch.setattr(perturbation, "_residuals", residuals)
    monkeypatch.setattr(perturbation, "tpp_texts", tree_texts)
    monkeypatch.setattr(perturbation, "scr_texts", job_texts)
    for run, name in ((run_tpp, "trees"), (run_scr, "jobs")):
        found = run(both_signs(), llama, tmp_path)
        assert (
            found["metrics"] == {}
            and "less than 0.6" in found["not_run"]
            and list(found["left_out"]) == [name]
        )
        assert all(0 < value < 0.7 for value in found["probe_accuracy"][name].values())


def test_a_pair_whose_bias_costs_nothing_is_left_out(llama):
    accuracy = {label: 0.9 for label in ATTRIBUTES} | {
        f"{BIASED} probe on {label} data": value for label, value in zip(ATTRIBUTES, (0.9, 0.86))
    }
    record = {"probe_accuracy": accuracy, "classes": [*ATTRIBUTES, BIASED], "test_texts": 400}
    assert "standard error 0.025" in perturbation._poor(record, scr=True)  # 0.04 lost
    assert perturbation._poor(record | {"test_texts": 900}, scr=True) == ""


def test_nothing_is_left_behind_and_no_cache_is_taken_over(llama, folder, tmp_path, trees):
    state = torch.get_rng_state()
    first = run_tpp(both_signs(), llama, tmp_path)
    assert torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), state)
    (place,) = tmp_path.iterdir()
    made = (place / "shared.safetensors").stat().st_mtime_ns
    assert run_tpp(both_signs(), llama, tmp_path) == first
    assert (place / "shared.safetensors").stat().st_mtime_ns == made
    other = save_model(tmp_path.parent / "retrained", seed=1, context=CONTEXT)
    for n, (model, seed) in enumerate(
        (
            (load_model(other, context=CONTEXT), 0),
            (load_model(folder, layer=1, context=CONTEXT), 0),
            (llama, 1),
        ),
        2,
    ):
        artifact = prepared(model, tmp_path, seed)
        assert len(list(tmp_path.iterdir())) == n and artifact.parents == {"model": model.hash}
    with pytest.raises(UserError, match="reads 8 channels"):
        run_tpp(sae_of(torch.eye(8)), llama, tmp_path)
