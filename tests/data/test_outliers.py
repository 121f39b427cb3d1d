"""Outliers planted in a real model's residual stream: no consumer trains on them, replaces them or scores
them.

The property that holds each of them to it: a latent that fires at outliers alone, and there decodes to
something enormous, changes nothing that is measured.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from builders.models import save_model
from builders.run import execute, open_tiny, stage_of, write_settings
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from dmsae_lib.config.sections import ModelConfig
from dmsae_lib.data.activations import Losses, median_norm, reference_losses, usable_residuals
from dmsae_lib.data.language_model import LanguageModel, lowered, next_token_loss
from dmsae_lib.distill.attribution import attribute
from dmsae_lib.distill.evaluation import calibrate_threshold, calibration_residuals, evaluate
from dmsae_lib.distill.harvest import open_harvest
from dmsae_lib.report.examples import top_contexts
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.saebench import perturbation
from dmsae_lib.store.artifacts import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

LOUD = (17, 60, 61, 140)  # token ids
LATENT = 2  # the one that fires at outliers alone; in the first prefix


@pytest.fixture(scope="module")
def split(random_split):
    return random_split(40, seed=5)


def loud_model(folder, word=""):
    """A tiny Llama that embeds the loud ids, and those of ``word``, as one direction of length 3,000."""
    save_model(folder, context=32, confidence=4.0)
    ids = AutoTokenizer.from_pretrained(folder)(word, add_special_tokens=False)["input_ids"] if word else []
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][[*LOUD, *ids]] = 3000.0 * F.normalize(torch.arange(1.0, 33.0), dim=0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory, split):
    folder = loud_model(tmp_path_factory.mktemp("loud") / "llama")
    made = LanguageModel(
        ModelConfig(name=str(folder), hook_name="blocks.0.hook_resid_post", context_size=16, batch_rows=8)
    )
    made.outlier_limit = 10 * median_norm(made, split)
    return made


def loud(split) -> int:
    """How many outliers there are in a text."""
    inside = torch.arange(split.tokens.shape[1]) < split.lengths[:, None]
    return int((torch.isin(split.tokens, torch.tensor(LOUD)) & inside).sum())


def make_sae(echo: bool, core_sparsity: str = "relu") -> MatryoshkaSAE:
    """Random rows; with ``echo`` a latent that fires at outliers alone and decodes to 10,000 times what it
    finds."""
    random = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(64, 32, generator=random), dim=1)
    rows[LATENT] = F.normalize(torch.arange(1.0, 33.0), dim=0)
    sae = MatryoshkaSAE(32, 64, (10, 30), rows[:2], core_sparsity)
    with torch.no_grad():
        sae.free_rows.copy_(rows[2:])
        sae.W_dec.copy_(rows)
        sae.W_dec[LATENT] *= 1e4
        sae.b_enc[LATENT] = -1500.0 if echo else -math.inf
    return sae.requires_grad_(False)


def test_the_planted_positions_are_outliers_and_nothing_else_is(model, split):
    for batch, resid in lowered(model, split):
        tokens, inside = batch.tokens, torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
        expected = inside & (tokens != 0) & ~torch.isin(tokens, torch.tensor(LOUD))
        assert torch.equal(model.usable(batch, resid), expected)
        assert bool(
            (make_sae(True).encode(resid)[..., LATENT] > 1000)
            .eq(torch.isin(tokens, torch.tensor(LOUD)))
            .all()
        )
    assert loud(split) > 3


def test_residuals_that_are_not_finite_are_no_outliers(model, split):
    """They have to reach the check that names them."""
    batch, resid = next(lowered(model, split))
    for bad in (math.nan, math.inf):
        broken = resid.clone()
        broken[0, 1] = bad
        assert bool(model.usable(batch, broken)[0, 1])


@pytest.mark.parametrize("core_sparsity", ["relu", "batchtopk"])
def test_evaluation_and_calibration(model, split, core_sparsity):
    found = []
    for echo in (True, False):
        sae = make_sae(echo, core_sparsity)
        calibrate_threshold(sae, calibration_residuals(model, split), k=8, k_min=1)
        found.append(evaluate(sae, model, split, Losses(5.0, 9.0, 8.0)) | {"threshold": float(sae.threshold)})
    assert found[0] == found[1] and found[0]["fvu"]["full"] < 50
    assert found[0]["tokens_tested"] == int(split.usable_count().sum()) - loud(split)


def test_attribution(model, split):
    with_echo, without = (attribute(model, make_sae(echo), split) for echo in (True, False))
    for name, scores in with_echo.scores.items():
        assert torch.equal(scores, without.scores[name])
    assert float(with_echo.scores["mean_abs"][LATENT]) == 0 and with_echo.tokens == without.tokens
    assert float(with_echo.scores["mean_abs"].sum()) > 0


def test_examples_and_whatever_else_takes_residuals(model, split):
    assert top_contexts(make_sae(True), model, split, [LATENT, 5])[0] == []
    assert max(float(x.norm(dim=1).max()) for x in usable_residuals(model, split)) < 1000


def test_class_means_of_texts(model):
    """TPP and SCR average over a text's tokens."""
    text = model.tokenizer.decode([*LOUD, 70, 71, 72])
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    (found,) = perturbation._residuals(model, [text], 16)
    assert (
        0 < len(found) == sum(token not in LOUD for token in ids) < len(ids)
        and float(found.norm(dim=1).max()) < 1000
    )


def test_a_run_knows_the_limit_that_its_harvest_measured(tmp_path):
    """From the record, whoever opens it: the sample that controls are made of, the stream and the thresholds'
    tokens hold none."""
    write_settings(tmp_path)
    folder = loud_model(tmp_path / "loud", "q")
    run = open_tiny(
        tmp_path,
        "loud",
        f"model.name={folder}",
        "model.hook_name=blocks.0.hook_resid_post",
        "data.outlier_norm=5",
        "data.store=stream",
        "data.buffer_rows=64",
    )
    # its weights are random; the harvest is written
    with pytest.raises(UserError, match="predicts this text no better"):
        execute(run, stage_of(run, "harvest"))
    harvest = open_harvest(run)
    assert (
        harvest.record["outliers_dropped"] > 3
        and harvest.model.outlier_limit == harvest.record["outlier_limit"] < 1000
    )
    limit = harvest.model.outlier_limit / harvest.record["scale"]
    assert float(harvest.sample.norm(dim=1).max()) <= limit * 1.0001
    assert max(float(x.norm(dim=1).max()) for x in harvest.calibration) <= harvest.model.outlier_limit
    with_them = harvest.model.outlier_limit = math.inf
    assert (
        max(float(x.norm(dim=1).max()) for x in usable_residuals(harvest.model, harvest.splits["select"]))
        > 1000
        < with_them
    )


def test_ablations_leave_outliers_where_they_are(model, split):
    """The loss is counted at the same positions for the clean model, for both ablations and for the SAE."""
    mean = torch.ones(32)
    sums, count = [0.0, 0.0, 0.0], 0
    for batch, resid in lowered(model, split):
        tokens, inside = batch.tokens, torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
        replaced = (inside & (tokens != 0) & ~torch.isin(tokens, torch.tensor(LOUD)))[..., None]
        count += int((inside & (tokens != 0))[:, 1:].sum())
        for i, put in enumerate((resid, resid * ~replaced, torch.where(replaced, mean, resid))):
            sums[i] += float(next_token_loss(model.upper(tokens, put), batch)[0])
    assert list(reference_losses(model, split, mean)) == pytest.approx(
        [total / count for total in sums], rel=1e-5
    )
