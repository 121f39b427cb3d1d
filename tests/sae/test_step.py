"""One training step in closed form against plain autograd, against SAELens, and an optimiser step by hand."""

import math

import pytest
import torch
from builders.sae import BATCH, CORE, D_IN, D_SAE, PREFIXES, K, batch, config, gradients, make_sae
from reference import TRAINED, reference_gradients
from torch import Tensor

from dmsae_lib.sae.entries import SPARSE_BELOW
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.sae.step import apply_step, step_gradients
from dmsae_lib.sae.training import make_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

DEAD = [0, 3, 4, 11, 20, 30, 31, 40, 52]


def dead(latents: list[int] = DEAD, core: int = CORE) -> Tensor:
    """(d_sae - c,) bool"""
    mask = torch.zeros(D_SAE - core, dtype=torch.bool)
    mask[latents] = True
    return mask


PATHS = {
    "sparse": {"share": 1.1},
    "dense": {"share": 0.0},
    "sparse, fixed shapes": {"share": 1.1, "fixed_shapes": True},
    "dense, fixed shapes": {"share": 0.0, "fixed_shapes": True},
}


def check(sae: MatryoshkaSAE, x: Tensor, tolerance: float = 1e-5, **settings) -> None:
    """Every path: loss, aux, gradients (relative to each one's largest entry) and statistics equal the
    reference's."""
    expected = reference_gradients(
        sae, x, **{name: value for name, value in settings.items() if name != "last_threshold"}
    )
    active = expected["f"] > 0
    for path, how in PATHS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(SPARSE_BELOW, "cpu", how["share"])
            stats = step_gradients(sae, x, fixed_shapes=how.get("fixed_shapes", False), **settings)
        assert float(stats.loss) == pytest.approx(float(expected["loss"]), rel=tolerance), path
        assert float(stats.aux) == pytest.approx(float(expected["aux"]), rel=tolerance), path
        for name in TRAINED:
            found, wanted = getattr(sae, name).grad, expected[name]
            assert found.shape == wanted.shape and found.dtype == sae.W_dec.dtype
            assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max()), (path, name)
        assert float(stats.l0_core) == int(active[:, : sae.n_core].sum()) / len(x), path
        assert float(stats.l0_free) == int(active[:, sae.n_core :].sum()) / len(x), path
        assert torch.equal(stats.fired, active.any(0)), path
        at_stake = expected["f"][:, sae.n_core if sae.core_sparsity == "relu" else 0 :]
        smallest = float(at_stake[at_stake > 0].min()) if bool((at_stake > 0).any()) else 0.0
        assert float(stats.smallest_kept) == pytest.approx(smallest, rel=tolerance, abs=1e-6), path


@pytest.mark.parametrize(
    "core, core_sparsity", [(0, "relu"), (CORE, "relu"), (0, "batchtopk"), (CORE, "batchtopk")]
)
@pytest.mark.parametrize(
    "aux",
    [
        {},
        {"dead": DEAD, "k_aux": 4, "aux_alpha": 1 / 32},
        {"dead": DEAD, "k_aux": 4, "aux_alpha": 5.0},
        {"dead": DEAD, "k_aux": 50, "aux_alpha": 5.0},
        {"dead": DEAD[:1], "k_aux": 1, "aux_alpha": 5.0},
    ],
    ids=["no-aux", "aux", "heavy-aux", "k_aux-above-dead", "one-dead"],
)
def test_gradients_equal_autograd(core, core_sparsity, aux):
    aux = aux | ({"dead": dead(aux["dead"], core)} if aux else {})
    for seed in range(3):
        check(make_sae(core, core_sparsity), batch(seed), k=K, **aux)
    check(make_sae(core, core_sparsity).double(), batch(0).double(), tolerance=1e-12, k=K, **aux)


@pytest.mark.parametrize("core", [0, CORE])
def test_gradients_at_the_ends_of_the_budget(core):
    check(make_sae(core), batch(0), k=1)
    check(make_sae(core), batch(0), k=D_SAE)  # more than there are positive activations
    check(make_sae(core), batch(0), k=1, k_min=3)
    check(make_sae(core), batch(0), k=K, last_threshold=0.2)


def test_no_dead_latents_no_aux():
    sae, x = make_sae(), batch(0)
    step_gradients(sae, x, K)
    plain = gradients(sae)
    for mask, k_aux in ((None, 4), (dead([]), 4), (dead(), 0)):
        for fixed_shapes in (False, True):
            stats = step_gradients(sae, x, K, dead=mask, k_aux=k_aux, fixed_shapes=fixed_shapes)
            assert float(stats.aux) == 0 and all(
                torch.equal(plain[name], gradients(sae)[name]) for name in TRAINED
            )


def test_aux_enters_once_and_reaches_dead_latents_alone():
    """alpha times the normalised loss, once; the residual is a constant, so no living latent feels it."""
    sae, x = make_sae().double(), batch(0).double()
    found = {}
    for alpha in (0.0, 1 / 32, 0.5):
        stats = step_gradients(sae, x, K, aux_alpha=alpha, k_aux=4, dead=dead())
        found[alpha] = (float(stats.loss), gradients(sae))
    aux = float(stats.aux)
    assert 0.2 < aux < 5  # of order 1: measured in units of the residual's variance
    for alpha in (1 / 32, 0.5):
        assert found[alpha][0] - found[0.0][0] == pytest.approx(alpha * aux, rel=1e-9)
        for name in TRAINED:
            assert torch.allclose(
                found[alpha][1][name] - found[0.0][1][name],
                2 * alpha * (found[0.5][1][name] - found[0.0][1][name]),
                rtol=1e-9,
                atol=1e-12,
            )
    changed = {name: found[0.5][1][name] - found[0.0][1][name] for name in ("free_rows", "W_dec", "b_enc")}
    for name, start in (("free_rows", 0), ("W_dec", CORE), ("b_enc", CORE)):
        latents = changed[name].reshape(len(changed[name]), -1).abs().amax(1).nonzero().squeeze(1) - start
        assert set(latents.tolist()) <= set(DEAD) and len(latents) >= 4


def test_aux_share_of_the_loss_falls_with_alpha_alone():
    """L_aux is divided by the residual's variance: its size does not depend on the input's."""
    small, large = make_sae(), make_sae()
    with torch.no_grad():
        for parameter in (large.b_enc, large.b_dec):
            parameter *= 100.0
    one = step_gradients(small, batch(0), K, k_aux=4, dead=dead())
    two = step_gradients(large, 100 * batch(0), K, k_aux=4, dead=dead())
    assert float(two.aux) == pytest.approx(float(one.aux), rel=1e-4)
    assert float(two.loss) > 1000 * float(one.loss)


def test_one_prefix_and_no_core_is_plain_batchtopk():
    """Against the usual formula: top B k of ReLU(W_enc (x - b_dec) + b_enc), squared error, nothing else."""
    sae, x = make_sae(core=0, prefixes=()), batch(0)
    W_enc, W_dec, b_enc, b_dec = (
        t.detach().double().requires_grad_(True)
        for t in (sae.W_enc.contiguous(), sae.W_dec, sae.b_enc, sae.b_dec)
    )
    hidden = torch.relu((x.double() - b_dec) @ W_enc + b_enc).flatten()
    top = hidden.topk(K * BATCH)
    f = torch.zeros_like(hidden).scatter(0, top.indices, top.values).view(BATCH, D_SAE)
    loss = (f @ W_dec + b_dec - x.double()).pow(2).sum(-1).mean()
    loss.backward()
    stats = step_gradients(sae, x, K)
    assert float(stats.loss) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert stats.l0_free == K and stats.l0_core == 0
    assert float(stats.smallest_kept) == pytest.approx(float(top.values[-1].detach()), rel=1e-5)
    for name, wanted in (
        ("free_rows", W_enc.grad.T),
        ("W_dec", W_dec.grad),
        ("b_enc", b_enc.grad),
        ("b_dec", b_dec.grad),
    ):
        assert float((getattr(sae, name).grad - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max()), name


def test_fvu_of_the_batch():
    sae, x = make_sae(), batch(0)
    xhat = reference_gradients(sae, x, K)["f"] @ sae.W_dec.detach().double() + sae.b_dec.detach().double()
    error, spread = (x - xhat).square().sum(), (x.double() - x.double().mean(0)).square().sum()
    assert float(step_gradients(sae, x, K).fvu) == pytest.approx(float(error / spread), rel=1e-5)


def test_bfloat16_products_give_float32_gradients_near_the_exact_ones():
    """8 bits of mantissa are 0.4 % a product. Everything is kept here: a selection flips where activations
    are close."""
    sae, x = make_sae(), batch(0)
    step_gradients(sae, x, D_SAE, k_aux=4, dead=dead())
    exact = gradients(sae)
    step_gradients(sae, x, D_SAE, k_aux=4, dead=dead(), bf16=True)
    for name, gradient in gradients(sae).items():
        assert gradient.dtype == torch.float32
        assert 0 < float((gradient - exact[name]).norm()) <= 0.02 * float(exact[name].norm()), name
    assert all(p.dtype == torch.float32 for p in sae.parameters())


def saelens_copy(sae: MatryoshkaSAE, aux_coefficient: float):
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )

    other = MatryoshkaBatchTopKTrainingSAE(
        MatryoshkaBatchTopKTrainingSAEConfig(
            d_in=D_IN,
            d_sae=D_SAE,
            k=K,
            matryoshka_widths=list(sae.prefixes),
            rescale_acts_by_decoder_norm=False,
            apply_b_dec_to_input=True,
            aux_loss_coefficient=aux_coefficient,
            dtype="float32",
            device="cpu",
        )
    )
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            getattr(other, name).copy_(getattr(sae, name))
    return other


@pytest.mark.parametrize("with_dead", [False, True])
def test_equals_saelens_matryoshka_batchtopk(with_dead):
    """Same weights, same batch: the same terms and the same gradients. Intended differences, each set aside
    here:

    - SAELens has no core, so this is cycle 0. ``rescale_acts_by_decoder_norm`` is off: our decoder rows have
      norm 1 already, and the gradient part along them is removed by apply_step, not by the loss.
    - Its AuxK is not divided by the residual's variance and is scaled by min(1, dead / k_aux) instead; the
      coefficient below makes up for both (the residual is a constant).
    - Its AuxK takes pre-activations before the ReLU, ours after it: biases here make the dead ones positive.
    - Its k_aux is fixed at d_in / 2, ours by default as well.
    - Its threshold's average starts at 0, ours at the first batch's value (not part of the loss).
    """
    from sae_lens.saes.sae import TrainStepInput

    sae, x = make_sae(core=0), batch(0)
    alpha, mask = 1 / 32, dead(DEAD if with_dead else [], core=0)
    coefficient = 0.0
    if with_dead:
        with torch.no_grad():
            sae.b_enc[DEAD] += 3.0
            assert bool((sae.pre_activations(x)[:, DEAD] > 0).all())
        f = reference_gradients(sae, x, K)["f"]
        residual = x.double() - f @ sae.W_dec.detach().double() - sae.b_dec.detach().double()
        variance = (residual - residual.mean(0)).square().sum(1).mean()
        coefficient = alpha / (float(variance) * min(1.0, len(DEAD) / (D_IN // 2)))
    other = saelens_copy(sae, coefficient)
    output = other.training_forward_pass(
        TrainStepInput(x, {}, mask, n_training_steps=0, is_logging_step=False)
    )
    output.loss.backward()
    stats = step_gradients(sae, x, K, aux_alpha=alpha, k_aux=D_IN // 2, dead=mask if with_dead else None)

    assert float(stats.loss) == pytest.approx(float(output.loss.detach()), rel=1e-5)
    assert alpha * float(stats.aux) == pytest.approx(
        float(output.losses["auxiliary_reconstruction_loss"].detach()), rel=1e-5
    )
    terms = [
        output.losses[name].detach()
        for name in ("mse_loss", *(f"inner_mse_loss_{width}" for width in PREFIXES))
    ]
    assert float(stats.loss) - alpha * float(stats.aux) == pytest.approx(float(sum(terms)), rel=1e-5)
    assert torch.equal(stats.fired, (output.feature_acts.to_dense() > 0).any(0))
    for name, wanted in (
        ("free_rows", other.W_enc.grad.T),
        ("W_dec", other.W_dec.grad),
        ("b_enc", other.b_enc.grad),
        ("b_dec", other.b_dec.grad),
    ):
        assert float((getattr(sae, name).grad - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max()), name


@pytest.mark.parametrize("grad_clip", [1e-3, 0.5, 1e6])
def test_optimiser_steps_by_hand(grad_clip):
    """Parallel part removed, clipped by the norm over the four gradients, Adam with bias correction, rows
    rescaled."""
    sae = make_sae()
    optimizer = make_optimizer(sae, config())
    weights = {name: getattr(sae, name).detach().double() for name in TRAINED}
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in weights.items()}
    for step in range(1, 4):
        step_gradients(sae, batch(step), K)
        grads = {name: g.double() for name, g in gradients(sae).items()}
        unit = weights["W_dec"]
        grads["W_dec"] -= torch.einsum("ld,ld->l", grads["W_dec"], unit)[:, None] * unit
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        for name, g in grads.items():
            g = g * min(1.0, grad_clip / (norm + 1e-6))
            first, second = moments[name]
            first = 0.9 * first + 0.1 * g
            second = 0.999 * second + 0.001 * g * g
            moments[name] = (first, second)
            ahead = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            weights[name] = weights[name] - 3e-3 * ahead
        weights["W_dec"] = weights["W_dec"] / weights["W_dec"].norm(dim=1, keepdim=True)
        assert float(apply_step(sae, optimizer, grad_clip)) == pytest.approx(norm, rel=1e-5)
        for name in TRAINED:
            found = getattr(sae, name).detach().double()
            assert float((found - weights[name]).abs().max()) <= 2e-6, (name, step)  # steps are 3e-3 an entry
            weights[name] = found  # so that float32 rounding does not pile up
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(D_SAE), atol=1e-6)


def test_core_rows_are_out_of_the_clip_norm():
    sae = make_sae()
    step_gradients(sae, batch(0), K)
    sae.core_rows.grad = torch.full_like(sae.core_rows, 1e6)  # what a frozen parameter's gradient would add
    grads = gradients(sae)
    parallel = (grads["W_dec"] * sae.W_dec.detach()).sum(1, keepdim=True) * sae.W_dec.detach()
    expected = math.sqrt(
        sum(float(g.double().square().sum()) for g in {**grads, "W_dec": grads["W_dec"] - parallel}.values())
    )
    assert float(apply_step(sae, make_optimizer(sae, config()), 1.0)) == pytest.approx(expected, rel=1e-5)


def test_weight_decay_cannot_reach_the_core():
    sae = make_sae()
    before = sae.core_rows.clone()
    optimizer = torch.optim.AdamW(sae.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(3):
        step_gradients(sae, batch(step), K)
        apply_step(sae, optimizer, 1.0)
    assert torch.equal(sae.core_rows, before)


def test_a_core_above_the_budget_leaves_the_floor():
    sae = make_sae()
    with torch.no_grad():
        sae.b_enc[:CORE] = 5.0
    stats = step_gradients(sae, batch(0), k=CORE, k_min=2)
    assert stats.l0_core == CORE and stats.l0_free == 2
    assert step_gradients(sae, batch(0), k=CORE + 1, k_min=0).l0_free == 1


def test_core_latents_compete_under_batchtopk():
    sae = make_sae(core_sparsity="batchtopk")
    with torch.no_grad():
        sae.b_enc[:CORE] = 5.0
    stats = step_gradients(sae, batch(0), k=3)
    assert stats.l0_core == 3 and stats.l0_free == 0
