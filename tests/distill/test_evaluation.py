"""Metrics with known answers through a real (tiny) language model, counts by hand, and the calibrated
threshold."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders.sae import with_rows

from dmsae_lib.data.activations import Losses, reference_losses, usable_residuals
from dmsae_lib.distill import evaluation
from dmsae_lib.distill.evaluation import (
    UNBOUND,
    calibrate_threshold,
    calibration_residuals,
    evaluate,
    loss_recovered,
    lower_all,
)
from dmsae_lib.sae.model import MatryoshkaSAE

pytestmark = pytest.mark.usefixtures("one_thread")

D_SAE, CORE, PREFIXES, K = 96, 6, (10, 30), 8


@pytest.fixture(scope="module")
def split(random_split):
    return random_split(40, seed=1)


@pytest.fixture(scope="module")
def losses(tiny_llama, split, residuals) -> Losses:
    found = reference_losses(tiny_llama, split, residuals.mean(0))
    # else the loss recovered means nothing
    assert abs(found.zero - found.clean) > 0.1 < abs(found.mean - found.clean)
    return found


@pytest.fixture(scope="module")
def residuals(tiny_llama, split) -> torch.Tensor:
    return torch.cat(list(usable_residuals(tiny_llama, split)))


def make_sae(d_in: int, core: int = CORE, core_sparsity: str = "relu", seed: int = 0) -> MatryoshkaSAE:
    """Random unit rows, in the units of the model's residual; not a good SAE, but every latent fires now and
    then."""
    random = torch.Generator().manual_seed(seed)
    sae = MatryoshkaSAE(
        d_in,
        D_SAE,
        PREFIXES,
        F.normalize(torch.randn(core, d_in, generator=random)) if core else None,
        core_sparsity,
    )
    with torch.no_grad():
        sae.free_rows.copy_(F.normalize(torch.randn(sae.free_rows.shape, generator=random), dim=1))
        sae.W_dec.copy_(torch.cat([sae.core_rows, sae.free_rows]))
        sae.b_enc[:core] = -0.5
    return sae.requires_grad_(False)


def identity_sae(d: int) -> MatryoshkaSAE:
    """Positive and negative part of each channel: an exact reconstruction from all latents, none from the
    first ones."""
    sae = MatryoshkaSAE(d, 2 * d, (1, d))
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    sae.free_rows.data.copy_(both)
    sae.W_dec.data.copy_(both)
    return sae.requires_grad_(False)


def constant_sae(point: torch.Tensor) -> MatryoshkaSAE:
    """Reconstructs everything as ``point``: no latent ever fires."""
    sae = make_sae(len(point), core=0)
    sae.b_dec.copy_(point)
    sae.b_enc.fill_(-1e6)
    return sae


# --- known answers


def test_a_perfect_reconstruction(tiny_llama, split, losses):
    found = evaluate(identity_sae(tiny_llama.d_model), tiny_llama, split, losses)
    assert found["fvu"]["full"] == pytest.approx(0, abs=1e-10)
    assert found["loss_recovered"]["full"] == pytest.approx(1, abs=1e-5)
    assert found["ce_loss"] == pytest.approx(losses.clean, abs=1e-5)
    assert found["loss_increase"]["full"] == pytest.approx(0, abs=1e-5)
    assert found["loss_recovered_mean"] == pytest.approx(1, abs=1e-5)


def test_the_mean_explains_nothing(tiny_llama, split, losses, residuals):
    """FVU is measured against the mean, not against zero."""
    found = evaluate(constant_sae(residuals.mean(0)), tiny_llama, split, losses)
    assert found["loss_recovered_mean"] == pytest.approx(0, abs=1e-5)
    assert found["loss_increase"]["full"] == pytest.approx(losses.mean - losses.clean, abs=1e-5)
    assert all(value == pytest.approx(1, abs=1e-6) for value in found["fvu"].values())
    assert found["dead"] == D_SAE and found["L0"]["total"] == 0


def test_zero_ablation_recovers_nothing(tiny_llama, split, losses, residuals):
    found = evaluate(constant_sae(torch.zeros(tiny_llama.d_model)), tiny_llama, split, losses)
    assert found["loss_recovered"]["full"] == pytest.approx(0, abs=1e-6)
    assert found["loss_recovered"]["prefix0"] == pytest.approx(0, abs=1e-6)
    assert found["ce_loss"] == pytest.approx(losses.zero, abs=1e-6)
    x = residuals.double()
    assert found["fvu"]["full"] == pytest.approx(
        float(x.square().sum() / (x - x.mean(0)).square().sum()), rel=1e-6
    )


def test_loss_recovered_by_hand():
    assert [loss_recovered(loss, clean=2.0, ablated=6.0) for loss in (2.0, 6.0, 3.0, 7.0)] == [
        1.0,
        0.0,
        0.75,
        -0.25,
    ]


def test_reference_losses_token_by_token(tiny_llama, split):
    """Targets that are BOS or padding do not count; BOS and padding positions keep their residual."""
    mean, sums, count = torch.linspace(-1, 2, tiny_llama.d_model), [0.0, 0.0, 0.0], 0
    for row, length in zip(split.tokens.tolist(), split.lengths.tolist()):
        tokens = torch.tensor([row[:length]])  # what follows cannot matter to a causal model
        resid = tiny_llama.lower(tokens)
        ablated = [torch.where((tokens == 0)[..., None], resid, put) for put in (torch.zeros(()), mean)]
        logits = [tiny_llama.logits(tokens), *(tiny_llama.upper(tokens, put) for put in ablated)]
        for t in [t for t in range(1, length) if row[t] != 0]:
            sums = [
                s - float(found[0, t - 1].double().log_softmax(-1)[row[t]]) for s, found in zip(sums, logits)
            ]
            count += 1
    assert reference_losses(tiny_llama, split, mean) == pytest.approx(
        tuple(total / count for total in sums), rel=1e-5
    )


def test_a_single_prefix_is_the_first_and_the_last(tiny_llama, split, losses):
    """Not nested at all: prefix 0 is the full reconstruction."""
    sae = MatryoshkaSAE(tiny_llama.d_model, D_SAE, ())
    sae.W_dec.data.copy_(
        F.normalize(torch.randn(D_SAE, tiny_llama.d_model, generator=torch.Generator().manual_seed(0)), dim=1)
    )
    sae.free_rows.data.copy_(sae.W_dec)
    found = evaluate(sae.requires_grad_(False), tiny_llama, split, losses)
    assert list(found["fvu"]) == ["full"] and abs(found["ce_loss"] - losses.clean) > 0.01
    expected = loss_recovered(found["ce_loss"], losses.clean, losses.zero)
    assert found["loss_recovered"] == pytest.approx({"prefix0": expected, "full": expected})
    assert (
        found["loss_increase"]["prefix0"]
        == found["loss_increase"]["full"]
        == pytest.approx(found["ce_loss"] - losses.clean)
    )


def test_rare_latents_are_counted_on_the_usable_positions(tiny_llama, split, losses, residuals):
    """One latent fires on every token, one on BOS alone, one on just under and one on just over one token in
    a thousand."""
    n = len(residuals)
    score = residuals[:, 0].sort(descending=True).values
    sae = MatryoshkaSAE(tiny_llama.d_model, 3, ())
    sae.free_rows.data[1:, 0] = 1.0
    few = math.ceil(evaluation.RARE * n) - 1
    sae.b_enc.data.copy_(
        torch.tensor(
            [
                1.0,
                -float(score[few - 1 : few + 1].mean()) if few else -float(score[0]) - 1e-3,
                -float(score[few + 1 : few + 3].mean()),
            ]
        )
    )
    assert evaluate(sae.requires_grad_(False), tiny_llama, split, losses)["rare"] == pytest.approx(1 / 3)


# --- against naive sums


@pytest.fixture(scope="module")
def sae(tiny_llama, split) -> MatryoshkaSAE:
    sae = make_sae(tiny_llama.d_model)
    sae.b_enc[-3:] = -1e6  # three dead latents
    calibrate_threshold(sae, calibration_residuals(tiny_llama, split), K, 1)
    sae.threshold_ema.copy_(1.2 * sae.threshold)
    return sae


@pytest.fixture(scope="module")
def found(tiny_llama, split, losses, sae) -> dict:
    return evaluate(sae, tiny_llama, split, losses)


def naive_activations(sae: MatryoshkaSAE, x: torch.Tensor, threshold: float) -> np.ndarray:
    a = np.maximum(0, (x.double() - sae.b_dec) @ sae.W_enc.double() + sae.b_enc).numpy()
    a[:, CORE:] *= a[:, CORE:] > threshold  # the core is a plain ReLU
    return a


def test_l0_by_part(residuals, sae, found):
    for threshold, key in ((float(sae.threshold), "L0"), (float(sae.threshold_ema), "L0_ema")):
        active = naive_activations(sae, residuals, threshold) > 0
        counted = {"core": active[:, :CORE].sum() / len(active), "free": active[:, CORE:].sum() / len(active)}
        counted["total"] = counted["core"] + counted["free"]
        # float32 may put two values across the threshold
        assert found[key] == pytest.approx(counted, abs=2 / len(active))
    active = naive_activations(sae, residuals, float(sae.threshold)) > 0
    assert 0 < found["L0"]["core"] < found["L0"]["total"] and found["L0_ema"]["total"] < found["L0"]["total"]
    assert found["dead"] == int((~active.any(0)).sum()) >= 3 and found["tokens_tested"] == len(residuals)
    frequency = active[:, :CORE].mean(0)
    assert found["core_frequency"]["values"] == pytest.approx(frequency.tolist(), abs=2 / len(active))
    assert found["core_frequency"]["max"] == max(found["core_frequency"]["values"])
    assert found["core_frequency"]["mean"] == pytest.approx(found["L0"]["core"] / CORE)


def test_fvu_by_prefix(residuals, sae, found):
    x, f = residuals.double().numpy(), naive_activations(sae, residuals, float(sae.threshold))
    spread = ((x - x.mean(0)) ** 2).sum()
    for name, free in zip(("10", "30", "full"), (*PREFIXES, D_SAE - CORE)):
        xhat = f[:, : CORE + free] @ sae.W_dec.double().numpy()[: CORE + free] + sae.b_dec.double().numpy()
        assert found["fvu"][name] == pytest.approx(((x - xhat) ** 2).sum() / spread, rel=2e-3), name
    assert list(found["fvu"]) == ["10", "30", "full"] and len(set(found["fvu"].values())) == 3


def test_loss_with_the_reconstruction_in_place(tiny_llama, split, losses, sae, found):
    """Context by context; the full one for ce_loss, core + first prefix for prefix0."""
    for j, key in ((0, "prefix0"), (2, "full")):
        total, count = 0.0, 0
        for row, length in zip(split.tokens.tolist(), split.lengths.tolist()):
            tokens = torch.tensor([row[:length]])
            resid = tiny_llama.lower(tokens)
            put = torch.where((tokens == 0)[..., None], resid, sae.decode_prefix(sae.encode(resid), j))
            logits = tiny_llama.upper(tokens, put)[0].double().log_softmax(-1)
            kept = [t for t in range(1, length) if row[t] != 0]
            total, count = total - sum(float(logits[t - 1, row[t]]) for t in kept), count + len(kept)
        clean, zero, mean = losses
        assert found["loss_recovered"][key] == pytest.approx(
            (zero - total / count) / (zero - clean), abs=1e-4
        )
        assert found["loss_increase"][key] == pytest.approx(total / count - clean, abs=1e-5)
        if key == "full":
            assert found["ce_loss"] == pytest.approx(total / count, rel=1e-5)
            assert found["loss_recovered_mean"] == pytest.approx(
                (mean - total / count) / (mean - clean), abs=1e-4
            )
    assert list(evaluate(sae, tiny_llama, split, losses, with_prefix0=False)["loss_recovered"]) == ["full"]


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_metrics_do_not_depend_on_the_batch_size(tiny_llama, split, losses, sae, found, rows):
    other = evaluate(sae, with_rows(tiny_llama, rows), split, losses)
    for key in ("L0", "L0_ema", "fvu", "loss_recovered"):
        assert other[key] == pytest.approx(found[key], rel=1e-3, abs=1e-4), key
    assert (other["dead"], other["tokens_tested"]) == (found["dead"], found["tokens_tested"])
    assert other["ce_loss"] == pytest.approx(found["ce_loss"], rel=1e-5)


@pytest.mark.parametrize("scale", [0.05, 20.0])
def test_metrics_do_not_depend_on_the_input_scale(tiny_llama, split, residuals, sae, found, scale):
    """An SAE trained on x / scale, folded, has the FVU and L0 it has on x / scale."""
    unit = MatryoshkaSAE(sae.d_in, D_SAE, PREFIXES, sae.core_rows)  # the same, as if trained on x / scale
    unit.requires_grad_(False).load_state_dict(sae.folded(1 / scale).state_dict())
    z = residuals / scale
    f = unit.encode(z)
    assert float((f > 0).sum()) / len(z) == pytest.approx(found["L0"]["total"], abs=3 / len(z))
    fvu = (z - unit.decode(f)).double().square().sum() / (z - z.double().mean(0)).square().sum()
    assert float(fvu) == pytest.approx(found["fvu"]["full"], rel=1e-3)
    again = evaluate(unit.folded(scale), tiny_llama, split, Losses(1.0, 2.0, 3.0))
    assert again["fvu"] == pytest.approx(found["fvu"], rel=1e-3) and again["ce_loss"] == pytest.approx(
        found["ce_loss"], rel=1e-4
    )
    assert again["L0"] == pytest.approx(found["L0"], abs=3 / len(z))


# --- the calibrated threshold


@pytest.mark.parametrize("core, core_sparsity", [(0, "relu"), (CORE, "relu"), (CORE, "batchtopk")])
@pytest.mark.parametrize("k", [4, K])
def test_total_l0_on_held_out_data(tiny_llama, random_split, core, core_sparsity, k):
    """Calibrated on one sample, k within 2 % on another of the same distribution (4,500 tokens each)."""
    sae = make_sae(tiny_llama.d_model, core, core_sparsity)
    sae.b_enc[:core] = -2.0
    model = with_rows(tiny_llama, 400)
    assert calibrate_threshold(sae, calibration_residuals(model, random_split(350, seed=2)), k, 1) is False
    here = torch.cat(list(usable_residuals(model, random_split(350, seed=2))))
    l0 = (sae.encode(here) > 0).float().sum(1).mean()
    assert float(l0) == pytest.approx(k, abs=2 / len(here))  # on its own sample to one activation or two
    held_out = torch.cat(list(usable_residuals(model, random_split(350, seed=3))))
    active = sae.encode(held_out) > 0
    assert float(active.float().sum(1).mean()) == pytest.approx(k, rel=0.02)
    if core:
        assert active[:, :core].any() and active[:, core:].any()


def test_unbound_where_the_core_alone_is_above_k(tiny_llama, split):
    sae = make_sae(tiny_llama.d_model)
    sae.b_enc[:CORE] = 100.0
    for k_min in (1, 2):
        assert calibrate_threshold(sae, calibration_residuals(tiny_llama, split), 4, k_min) is True
        x = torch.cat(list(usable_residuals(tiny_llama, split)))
        active = sae.encode(x) > 0
        assert bool(active[:, :CORE].all())
        # the floor
        assert float(active[:, CORE:].float().sum(1).mean()) == pytest.approx(k_min, abs=2 / len(x))


def test_unbound_where_too_few_latents_fire(tiny_llama, split):
    sae = make_sae(tiny_llama.d_model, core=0)
    assert calibrate_threshold(sae, calibration_residuals(tiny_llama, split), D_SAE, 1) is True
    assert float(sae.threshold) == 0.0  # every positive activation is kept


def test_bound_up_to_one_per_cent(tiny_llama, split):
    """The core fills the budget up to less than the floor: unbound exactly when the total passes k by 1 %."""
    sae = make_sae(tiny_llama.d_model)
    x = torch.cat(list(usable_residuals(tiny_llama, split)))
    sae.b_enc[:CORE] = 100.0
    sae.b_enc[0] = -1e6
    for share in (0.005, 0.1):
        sae.b_enc[0] = -torch.quantile((x - sae.b_dec) @ sae.core_rows[0], 1 - share)  # fires on this share
        unbound = calibrate_threshold(sae, calibration_residuals(tiny_llama, split), CORE, 1)
        total = float((sae.encode(x) > 0).float().sum(1).mean())
        assert total == pytest.approx(CORE + share, abs=3 / len(x))
        assert unbound == (abs(total - CORE) > UNBOUND * CORE) == (share == 0.1)
    assert not math.isnan(float(sae.threshold))


def test_what_saes_share_changes_nothing(tiny_llama, split, monkeypatch):
    sae = make_sae(tiny_llama.d_model)
    calibrate_threshold(sae, calibration_residuals(tiny_llama, split), 4, 1)
    lowered, losses = lower_all(tiny_llama, split), Losses(4.0, 8.0, 7.0)
    assert evaluate(sae, tiny_llama, split, losses, True, lowered) == evaluate(sae, tiny_llama, split, losses)
    monkeypatch.setattr(evaluation, "SHARED_BYTES", split.tokens.numel() * tiny_llama.d_model * 4 - 1)
    assert lower_all(tiny_llama, split) is None


@pytest.mark.parametrize("ema", [0.0, 1e-9, 1e-3, 1.0, 1e6])
def test_the_training_threshold_does_not_decide_the_calibrated_one(tiny_llama, split, ema):
    """Far too high, far too low, or none: it only says where to look first."""
    expected, sae = make_sae(tiny_llama.d_model), make_sae(tiny_llama.d_model)
    calibrate_threshold(expected, calibration_residuals(tiny_llama, split), 4, 1)
    sae.threshold_ema.fill_(ema)
    calibrate_threshold(sae, calibration_residuals(tiny_llama, split), 4, 1)
    assert float(sae.threshold) == float(expected.threshold) > 0
