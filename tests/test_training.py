"""One training step against plain autograd and against SAELens; the frozen core; the Trainer and its checkpoints."""

import math
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dmsae_lib.artifacts import UserError
from dmsae_lib.config import TrainingConfig
from dmsae_lib.sae import MatryoshkaSAE
from dmsae_lib.training import (
    StepStats,
    Trainer,
    apply_step,
    learning_rate,
    make_optimizer,
    match_frequency,
    step_gradients,
    train_sae,
)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytestmark = pytest.mark.usefixtures("one_thread")

D_IN, D_SAE, CORE, PREFIXES, BATCH, K = 16, 60, 7, (8, 21), 96, 9
NAMES = ("free_rows", "W_dec", "b_enc", "b_dec")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_sae(core: int = CORE, core_sparsity: str = "relu", prefixes: tuple = PREFIXES, perturb: float = 0.2) -> MatryoshkaSAE:
    """Initialised and then perturbed, so that encoder and decoder, and all biases, differ."""
    rows = torch.nn.functional.normalize(random(core, D_IN, seed=1), dim=1) if core else None
    sae = MatryoshkaSAE(D_IN, D_SAE, prefixes, rows, core_sparsity)
    sae.initialise(0, batch(99))
    with torch.no_grad():
        for seed, parameter in enumerate(sae.parameters(), start=2):
            parameter += perturb / math.sqrt(D_IN) * random(*parameter.shape, seed=seed)
        sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_dec, dim=1))
    return sae


def batch(seed: int, size: int = BATCH) -> Tensor:
    """Mean ||x||^2 near 1, with a mean that is not zero."""
    return (random(size, D_IN, seed=1000 + seed) + 0.3) / math.sqrt(D_IN)


# ---------------------------------------------------------------------------------------- the reference


def top_mask(a: Tensor, n: int) -> Tensor:
    """The n largest positive entries of the whole batch."""
    top = torch.topk(a.flatten(), min(n, a.numel()))
    mask = torch.zeros(a.numel(), dtype=torch.bool)
    mask[top.indices[top.values > 0]] = True
    return mask.view_as(a)


def reference(sae: MatryoshkaSAE, x: Tensor, k: int, k_min: int = 1, alpha: float = 0.0, k_aux: int = 0,
              dead: Tensor | None = None) -> dict[str, Tensor]:  # fmt: skip
    """The objective of method.md, section 1, written out with autograd in float64: loss, aux and the four gradients."""
    free, W_dec, b_enc, b_dec = (getattr(sae, name).detach().double().requires_grad_(True) for name in NAMES)
    x, c = x.double(), sae.n_core
    a = torch.relu((x - b_dec) @ torch.cat([sae.core_rows.double(), free]).T + b_enc)
    core, others = a[:, :c], a[:, c:]
    if sae.core_sparsity == "relu":  # the core is exempt, and the others get what it leaves
        kept = top_mask(others.detach(), max(len(x) * k_min, len(x) * k - int((core > 0).sum())))
        f = torch.cat([core, others * kept], dim=1)
    else:
        f = a * top_mask(a.detach(), len(x) * k)
    loss, xhat = 0.0, None
    for free_latents in sae.prefixes:
        n = c + free_latents
        xhat = f[:, :n] @ W_dec[:n] + b_dec
        loss = loss + ((x - xhat) ** 2).sum(1).mean()
    aux = torch.zeros((), dtype=torch.float64)
    if dead is not None and k_aux:
        residual = (x - xhat).detach()
        pre = others[:, dead]  # before selection
        top = pre.topk(min(k_aux, len(dead)), dim=1)
        pre = torch.zeros_like(pre).scatter(1, top.indices, top.values)
        rebuilt = pre @ W_dec[c + dead]
        aux = ((residual - rebuilt) ** 2).sum(1).mean() / ((residual - residual.mean(0)) ** 2).sum(1).mean()
    (loss + alpha * aux).backward()
    return {"loss": (loss + alpha * aux).detach(), "aux": aux.detach(), "f": f.detach(),
            **{name: p.grad for name, p in zip(NAMES, (free, W_dec, b_enc, b_dec))}}  # fmt: skip


def gradients(sae: MatryoshkaSAE) -> dict[str, Tensor]:
    return {name: getattr(sae, name).grad.clone() for name in NAMES}


def check(sae: MatryoshkaSAE, x: Tensor, tolerance: float = 1e-5, **settings) -> StepStats:
    """Loss, aux, gradients (relative to each one's largest entry) and statistics equal the reference's."""
    stats = step_gradients(sae, x, **settings)
    named = {"alpha" if name == "aux_alpha" else name: value for name, value in settings.items() if name != "last_threshold"}
    expected = reference(sae, x, **named)
    assert float(stats.loss) == pytest.approx(float(expected["loss"]), rel=tolerance)
    assert float(stats.aux) == pytest.approx(float(expected["aux"]), rel=tolerance)
    for name in NAMES:
        found, wanted = getattr(sae, name).grad, expected[name]
        assert found.shape == wanted.shape and found.dtype == sae.W_dec.dtype
        assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max()), name
    active = expected["f"] > 0
    assert stats.l0_core == int(active[:, : sae.n_core].sum()) / len(x)
    assert stats.l0_free == int(active[:, sae.n_core :].sum()) / len(x)
    assert torch.equal(stats.fired, active.any(0))
    return stats


# ---------------------------------------------------------------------------------------- loss and gradients

DEAD = torch.tensor([0, 3, 4, 11, 20, 30, 31, 40, 52])


@pytest.mark.parametrize("core, core_sparsity", [(0, "relu"), (CORE, "relu"), (CORE, "batchtopk")])
@pytest.mark.parametrize("aux", [
    {}, {"dead": DEAD, "k_aux": 4, "aux_alpha": 1 / 32}, {"dead": DEAD, "k_aux": 4, "aux_alpha": 5.0},
    {"dead": DEAD, "k_aux": 50, "aux_alpha": 5.0}, {"dead": DEAD[:1], "k_aux": 1, "aux_alpha": 5.0},
], ids=["no-aux", "aux", "heavy-aux", "k_aux-above-dead", "one-dead"])  # fmt: skip
def test_gradients_equal_autograd(core, core_sparsity, aux):
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
    for dead, k_aux in ((None, 4), (torch.tensor([], dtype=torch.int64), 4), (DEAD, 0)):
        stats = step_gradients(sae, x, K, dead=dead, k_aux=k_aux)
        assert float(stats.aux) == 0 and all(torch.equal(plain[name], gradients(sae)[name]) for name in NAMES)


def test_aux_enters_once_and_reaches_dead_latents_alone():
    """alpha times the normalised loss, once; the residual is a constant, so no living latent feels it."""
    sae, x = make_sae().double(), batch(0).double()
    found = {}
    for alpha in (0.0, 1 / 32, 0.5):
        stats = step_gradients(sae, x, K, aux_alpha=alpha, k_aux=4, dead=DEAD)
        found[alpha] = (float(stats.loss), gradients(sae))
    aux = float(stats.aux)
    assert 0.5 < aux < 2  # dead latents that know nothing explain about nothing of the residual's variance
    for alpha in (1 / 32, 0.5):
        assert found[alpha][0] - found[0.0][0] == pytest.approx(alpha * aux, rel=1e-9)
        for name in NAMES:
            assert torch.allclose(found[alpha][1][name] - found[0.0][1][name],
                                  2 * alpha * (found[0.5][1][name] - found[0.0][1][name]), rtol=1e-9, atol=1e-12)
    changed = {name: found[0.5][1][name] - found[0.0][1][name] for name in ("free_rows", "W_dec", "b_enc")}
    for name, start in (("free_rows", 0), ("W_dec", CORE), ("b_enc", CORE)):
        latents = changed[name].reshape(len(changed[name]), -1).abs().amax(1).nonzero().squeeze(1) - start
        assert set(latents.tolist()) <= set(DEAD.tolist()) and len(latents) >= 4


def test_aux_share_of_the_loss_falls_with_alpha_alone():
    """L_aux is divided by the residual's variance: its size does not depend on the input's."""
    small, large = make_sae(), make_sae()
    with torch.no_grad():
        for parameter in (large.b_enc, large.b_dec):
            parameter *= 100.0
    one = step_gradients(small, batch(0), K, k_aux=4, dead=DEAD)
    two = step_gradients(large, 100 * batch(0), K, k_aux=4, dead=DEAD)
    assert float(two.aux) == pytest.approx(float(one.aux), rel=1e-4)
    assert float(two.loss) > 1000 * float(one.loss)


def test_one_prefix_and_no_core_is_plain_batchtopk():
    """Against the usual formula: top B k of ReLU(W_enc (x - b_dec) + b_enc), squared error, nothing else."""
    sae, x = make_sae(core=0, prefixes=()), batch(0)
    W_enc, W_dec, b_enc, b_dec = (t.detach().double().requires_grad_(True)
                                  for t in (sae.W_enc.contiguous(), sae.W_dec, sae.b_enc, sae.b_dec))  # fmt: skip
    hidden = torch.relu((x.double() - b_dec) @ W_enc + b_enc).flatten()
    top = hidden.topk(K * BATCH)
    f = torch.zeros_like(hidden).scatter(0, top.indices, top.values).view(BATCH, D_SAE)
    loss = (f @ W_dec + b_dec - x.double()).pow(2).sum(-1).mean()
    loss.backward()
    stats = step_gradients(sae, x, K)
    assert float(stats.loss) == pytest.approx(float(loss), rel=1e-6)
    assert stats.l0_free == K and stats.l0_core == 0
    assert float(stats.smallest_kept) == pytest.approx(float(top.values[-1]), rel=1e-5)
    for name, wanted in (("free_rows", W_enc.grad.T), ("W_dec", W_dec.grad), ("b_enc", b_enc.grad), ("b_dec", b_dec.grad)):
        assert float((getattr(sae, name).grad - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max()), name


def test_fvu_of_the_batch():
    sae, x = make_sae(), batch(0)
    xhat = reference(sae, x, K)["f"] @ sae.W_dec.detach().double() + sae.b_dec.detach().double()
    error, spread = (x - xhat).square().sum(), (x.double() - x.double().mean(0)).square().sum()
    assert float(step_gradients(sae, x, K).fvu) == pytest.approx(float(error / spread), rel=1e-5)


def test_autocast_gives_float32_gradients_near_the_exact_ones():
    """bfloat16 products over float32 weights: 8 bits of mantissa, so a few per cent of the largest entry."""
    sae, x = make_sae(), batch(0)
    step_gradients(sae, x, K, k_aux=4, dead=DEAD)
    exact = gradients(sae)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step_gradients(sae, x, K, k_aux=4, dead=DEAD)
    for name, gradient in gradients(sae).items():
        assert gradient.dtype == torch.float32
        assert float((gradient - exact[name]).norm()) <= 0.1 * float(exact[name].norm()), name


# ---------------------------------------------------------------------------------------- against SAELens


def saelens_copy(sae: MatryoshkaSAE, aux_coefficient: float):
    from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig

    other = MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, k=K, matryoshka_widths=list(sae.prefixes), rescale_acts_by_decoder_norm=False,
        apply_b_dec_to_input=True, aux_loss_coefficient=aux_coefficient, dtype="float32", device="cpu"))  # fmt: skip
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            getattr(other, name).copy_(getattr(sae, name))
    return other


@pytest.mark.parametrize("with_dead", [False, True])
def test_equals_saelens_matryoshka_batchtopk(with_dead):
    """Same weights, same batch: the same terms and the same gradients. Intended differences, each set aside here:

    - SAELens has no core, so this is cycle 0. ``rescale_acts_by_decoder_norm`` is off: our decoder rows have norm 1
      already, and the gradient part along them is removed by apply_step, not by the loss.
    - Its AuxK is not divided by the residual's variance and is scaled by min(1, dead / k_aux) instead; the coefficient
      below makes up for both (the residual is a constant).
    - Its AuxK takes pre-activations before the ReLU, ours after it: the biases here make the dead ones positive.
    - Its k_aux is fixed at d_in / 2, ours by default as well.
    - Its threshold's average starts at 0, ours at the first batch's value (not part of the loss).
    """
    from sae_lens.saes.sae import TrainStepInput

    sae, x = make_sae(core=0), batch(0)
    alpha, dead, mask = 1 / 32, None, torch.zeros(D_SAE, dtype=torch.bool)
    coefficient = 0.0
    if with_dead:
        dead, mask[DEAD] = DEAD, True
        with torch.no_grad():
            sae.b_enc[DEAD] += 3.0
            assert bool((sae.pre_activations(x)[:, DEAD] > 0).all())
        f = reference(sae, x, K)["f"]
        residual = x.double() - f @ sae.W_dec.detach().double() - sae.b_dec.detach().double()
        variance = (residual - residual.mean(0)).square().sum(1).mean()
        coefficient = alpha / (float(variance) * min(1.0, len(DEAD) / (D_IN // 2)))
    other = saelens_copy(sae, coefficient)
    output = other.training_forward_pass(TrainStepInput(x, {}, mask, n_training_steps=0, is_logging_step=False))
    output.loss.backward()
    stats = step_gradients(sae, x, K, aux_alpha=alpha, k_aux=D_IN // 2, dead=dead)

    assert float(stats.loss) == pytest.approx(float(output.loss), rel=1e-5)
    assert alpha * float(stats.aux) == pytest.approx(float(output.losses["auxiliary_reconstruction_loss"]), rel=1e-5)
    terms = [float(output.losses[f"inner_mse_loss_{width}"]) for width in PREFIXES] + [float(output.losses["mse_loss"])]
    assert float(stats.loss) - alpha * float(stats.aux) == pytest.approx(sum(terms), rel=1e-5)
    assert torch.equal(stats.fired, (output.feature_acts.to_dense() > 0).any(0))
    for name, wanted in (("free_rows", other.W_enc.grad.T), ("W_dec", other.W_dec.grad), ("b_enc", other.b_enc.grad),
                         ("b_dec", other.b_dec.grad)):  # fmt: skip
        assert float((getattr(sae, name).grad - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max()), name


# ---------------------------------------------------------------------------------------- one optimiser step


def config(**changes) -> TrainingConfig:
    return TrainingConfig(**{"k": K, "batch_size": BATCH, "lr": 3e-3, **changes})


@pytest.mark.parametrize("grad_clip", [1e-3, 0.5, 1e6])
def test_optimiser_steps_by_hand(grad_clip):
    """Parallel part removed, clipped by the norm over the four gradients, Adam with bias correction, rows rescaled."""
    sae = make_sae()
    optimizer = make_optimizer(sae, config())
    weights = {name: getattr(sae, name).detach().double() for name in NAMES}
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
        for name in NAMES:
            found = getattr(sae, name).detach().double()
            assert float((found - weights[name]).abs().max()) <= 2e-6, (name, step)  # steps are 3e-3 an entry
            weights[name] = found  # so that float32 rounding does not pile up
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(D_SAE), atol=1e-6)


@pytest.mark.parametrize("step, share", [(0, 0.2), (1, 0.4), (4, 1.0), (5, 1.0), (50, 1.0), (80, 1.0), (81, 0.95),
                                         (90, 0.5), (99, 0.05)])  # fmt: skip
def test_schedule(step, share):
    assert learning_rate(step, 100, config(lr=2.0, warmup=0.05, decay=0.2)) == pytest.approx(2.0 * share)


def test_schedule_without_warm_up_and_decay():
    assert {learning_rate(step, 10, config(lr=2.0, warmup=0, decay=0)) for step in range(10)} == {2.0}


# ---------------------------------------------------------------------------------------- the frozen core


@pytest.mark.parametrize("core_sparsity", ["relu", "batchtopk"])
def test_core_rows_are_out_of_reach(core_sparsity):
    sae = make_sae(core_sparsity=core_sparsity)
    trainer = Trainer(sae, config(lr=0.05, dead_window=2 * BATCH), steps=30)
    before = sae.core_rows.clone()
    start = {name: getattr(sae, name).detach().clone() for name in NAMES}
    for step in range(30):
        trainer.train_step(batch(step))
    assert torch.equal(sae.core_rows, before)
    assert all(not torch.allclose(getattr(sae, name), start[name]) for name in NAMES)
    assert not torch.allclose(sae.W_dec[:CORE], start["W_dec"][:CORE])  # the core's decoder and bias are trained
    assert not torch.allclose(sae.b_enc[:CORE], start["b_enc"][:CORE])
    assert {name for name, _ in sae.named_parameters()} == set(NAMES)
    optimised = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in optimised} == {id(getattr(sae, name)) for name in NAMES}
    storage = sae.core_rows.untyped_storage().data_ptr()
    assert all(p.untyped_storage().data_ptr() != storage for p in optimised)
    assert not sae.core_rows.requires_grad and sae.core_rows.grad is None


def test_core_rows_are_out_of_the_clip_norm():
    sae = make_sae()
    step_gradients(sae, batch(0), K)
    sae.core_rows.grad = torch.full_like(sae.core_rows, 1e6)  # what a frozen parameter's gradient would add
    grads = gradients(sae)
    parallel = (grads["W_dec"] * sae.W_dec.detach()).sum(1, keepdim=True) * sae.W_dec.detach()
    expected = math.sqrt(sum(float(g.double().square().sum()) for g in {**grads, "W_dec": grads["W_dec"] - parallel}.values()))
    assert float(apply_step(sae, make_optimizer(sae, config()), 1.0)) == pytest.approx(expected, rel=1e-5)


def test_weight_decay_cannot_reach_the_core():
    sae = make_sae()
    before = sae.core_rows.clone()
    optimizer = torch.optim.AdamW(sae.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(3):
        step_gradients(sae, batch(step), K)
        apply_step(sae, optimizer, 1.0)
    assert torch.equal(sae.core_rows, before)


def test_total_l0_is_k_where_the_core_leaves_room():
    trainer = Trainer(make_sae(), config(), steps=20)
    for step in range(20):
        stats = trainer.train_step(batch(step))
        assert 0 < stats.l0_core < K - 1
        assert (stats.l0_core + stats.l0_free) * BATCH == pytest.approx(K * BATCH, abs=1e-6)


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


def test_match_frequency_sets_the_firing_rates():
    sae, x = make_sae(), batch(0, size=4000)
    wanted = torch.tensor([0.0, 0.001, 0.05, 0.3, 0.5, 0.97, 1.0])
    match_frequency(sae, x, wanted)
    rates = (sae.pre_activations(x)[:, :CORE] > 0).float().mean(0)
    assert float((rates - wanted).abs().max()) <= 1.5 / len(x)  # one token more or less
    assert torch.equal(sae.b_enc[CORE:], make_sae().b_enc[CORE:])
    unseen = (sae.pre_activations(batch(1, size=4000))[:, :CORE] > 0).float().mean(0)
    assert float((unseen - wanted).abs().max()) <= 0.03  # three standard errors of a share at 4000 tokens


# ---------------------------------------------------------------------------------------- the Trainer


def source(start: tuple, stop_at: int | None = None) -> Iterator[tuple[Tensor, tuple]]:
    """Endless batches; the cursor's last number says which. ``stop_at`` plays a killed process."""
    index = start[2]
    while True:
        if index == stop_at:
            raise KeyboardInterrupt
        yield batch(index), (index // 7, 0, index + 1)
        index += 1


def new_trainer(steps: int = 40, **changes) -> Trainer:
    """Clipping now and then, and latents that die within the run, so that every piece of state matters."""
    return Trainer(make_sae(), config(**{"dead_window": 3 * BATCH, "grad_clip": 0.6, "checkpoint_seconds": 1e-9, **changes}), steps)


def state_of(trainer: Trainer) -> dict:
    optimizer = trainer.optimizer.state_dict()
    tensors = {**trainer.sae.state_dict(), "since_fired": trainer.since_fired}
    tensors |= {f"adam.{i}.{name}": value for i, entry in optimizer["state"].items() for name, value in entry.items()}
    plain = {name: getattr(trainer, name) for name in ("step", "cursor", "clipped", "last_threshold", "history")}
    return plain | {"tensors": tensors, "groups": optimizer["param_groups"]}


def assert_bit_equal(a: Trainer, b: Trainer) -> None:
    one, two = state_of(a), state_of(b)
    assert one["tensors"].keys() == two["tensors"].keys()
    for name, value in one["tensors"].items():
        assert value.dtype == two["tensors"][name].dtype and torch.equal(value, two["tensors"][name]), name
    for name in one.keys() - {"tensors"}:
        assert one[name] == two[name], name


@pytest.fixture(scope="module")
def uninterrupted(one_thread, tmp_path_factory) -> Trainer:
    trainer = new_trainer(checkpoint_seconds=1e9)
    train_sae(trainer, source, tmp_path_factory.mktemp("none") / "checkpoint", {}, report=lambda _: None)
    return trainer


def test_the_run_exercises_its_state(uninterrupted):
    assert 0 < uninterrupted.clipped < 40 and uninterrupted.history[-1]["dead"] > 0 and uninterrupted.history[-1]["aux"] > 0
    assert uninterrupted.sae.threshold_ema.dtype == torch.float64 and float(uninterrupted.sae.threshold_ema) > 0


def test_training_twice_gives_the_same_bits(uninterrupted, tmp_path):
    again = new_trainer()  # writing checkpoints changes nothing either
    train_sae(again, source, tmp_path / "checkpoint", {}, report=lambda _: None)
    assert_bit_equal(again, uninterrupted)


@pytest.mark.parametrize("stops", [[1], [23], [5, 6, 39]])
def test_resumed_equals_never_stopped(uninterrupted, tmp_path, stops):
    parents, folder, said = {"harvest": "a", "settings": "b"}, tmp_path / "checkpoint", []
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            train_sae(new_trainer(), lambda start, stop=stop: source(start, stop), folder, parents, report=said.append)
    resumed = new_trainer()
    train_sae(resumed, source, folder, parents, report=said.append)
    assert f"resumed at step {stops[-1]}/40" in said
    assert_bit_equal(resumed, uninterrupted)


def test_work_after_the_last_checkpoint_is_done_again(uninterrupted, tmp_path):
    killed = new_trainer()
    for x, cursor in source((0, 0, 0)):
        killed.train_step(x)
        killed.cursor = cursor
        if killed.step == 17:
            killed.save(tmp_path / "checkpoint", {"harvest": "a"})
        if killed.step == 20:
            break
    resumed = new_trainer(checkpoint_seconds=1e9)
    train_sae(resumed, source, tmp_path / "checkpoint", {"harvest": "a"}, report=lambda _: None)
    assert_bit_equal(resumed, uninterrupted)


def test_a_checkpoint_of_something_else_is_ignored(tmp_path):
    folder, parents = tmp_path / "checkpoint", {"harvest": "a", "settings": "b"}
    saved = new_trainer()
    saved.train_step(batch(0))
    saved.save(folder, parents)
    for other, steps in (({"harvest": "a", "settings": "c"}, 40), ({"harvest": "a"}, 40), (parents | {"core": "d"}, 40), (parents, 41)):
        fresh, untouched = new_trainer(steps), new_trainer(steps)
        assert not fresh.resume(folder, other)
        assert_bit_equal(fresh, untouched)
    assert not new_trainer().resume(tmp_path / "nothing", parents)
    assert new_trainer().resume(folder, {"settings": "b", "harvest": "a"})  # in any order


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_activations_name_the_step(tmp_path, value):
    def poisoned(start):
        for x, cursor in source(start):
            if cursor[2] == 4:
                x[5, 2] = value
            yield x, cursor

    trainer = new_trainer()
    with pytest.raises(UserError, match=r"^Step 3: the activations hold NaN or Inf; .*training\.lr .*data\.outlier_norm"):
        train_sae(trainer, poisoned, tmp_path / "checkpoint", {}, report=lambda _: None)
    assert all(bool(torch.isfinite(p).all()) for p in trainer.sae.parameters())  # the bad batch was not applied
    resumed = new_trainer()
    assert resumed.resume(tmp_path / "checkpoint", {}) and resumed.step == 3


def test_a_diverged_loss_is_told_apart():
    trainer = new_trainer()
    with torch.no_grad():
        trainer.sae.b_dec[0] = float("inf")
    with pytest.raises(UserError, match="Step 0: the loss hold"):
        trainer.train_step(batch(0))


def test_too_few_activations(tmp_path):
    with pytest.raises(UserError, match="ended at step 3 of 40: data.train_tokens"):
        train_sae(new_trainer(), lambda _: ((batch(i), (0, 0, i + 1)) for i in range(3)), tmp_path / "c", {}, report=lambda _: None)


@pytest.mark.parametrize("core_bias, warned", [(0.0, False), (5.0, True)])
def test_warning_when_the_core_fills_the_budget(tmp_path, core_bias, warned):
    """With the bias all 7 core latents fire on every token: 78 % of k = 9."""
    trainer, said = new_trainer(steps=5, lr=1e-5), []
    with torch.no_grad():
        trainer.sae.b_enc[:CORE] += core_bias
    train_sae(trainer, source, tmp_path / "checkpoint", {}, report=said.append)
    warnings = [line for line in said if "WARNING" in line]
    assert len(warnings) == int(warned)
    if warned:
        assert "step 1: the core's L0 is 7.0, 78% of k = 9" in warnings[0]
    assert "step 5/5" in said[-1] and all(word in said[-1] for word in ("tokens/s", "ETA", "loss", "L0", "dead"))


def test_threshold_average_and_dead_counters():
    """threshold_ema by its formula in float64; since_fired counts tokens since each latent's last activation."""
    trainer = Trainer(make_sae(), config(), steps=50)
    beta, average, counters = 1 - 10 / 50, None, torch.zeros(D_SAE, dtype=torch.int64)
    for step in range(8):
        x = batch(step)
        f = reference(trainer.sae, x, K)["f"]
        smallest = float(f[:, CORE:][f[:, CORE:] > 0].min())
        average = smallest if average is None else beta * average + (1 - beta) * smallest
        counters = torch.where((f > 0).any(0), 0, counters + BATCH)
        trainer.train_step(x)
        assert float(trainer.sae.threshold_ema) == pytest.approx(average, rel=1e-6)
        assert torch.equal(trainer.since_fired, counters)
        assert trainer.last_threshold == pytest.approx(smallest, rel=1e-5)
    assert Trainer(make_sae(), config(), steps=20_000).beta == 0.999 and Trainer(make_sae(), config(), steps=5).beta == 0.0


def test_defaults_that_depend_on_the_size():
    assert Trainer(make_sae(), config(), steps=10).dead_window == 40 * BATCH  # few steps: 40 batches
    assert Trainer(make_sae(), config(), steps=10_000).dead_window == 10_000 * BATCH // 50  # many: 2 % of the tokens
    assert Trainer(make_sae(), config(), steps=10).k_aux == D_IN // 2
    custom = Trainer(make_sae(), config(dead_window=5, k_aux=3), steps=10)
    assert (custom.dead_window, custom.k_aux) == (5, 3)


def test_history_columns():
    trainer = Trainer(make_sae(), config(), steps=120)
    for step in range(4):
        stats = trainer.train_step(batch(step))
    assert [row["step"] for row in trainer.history] == [1, 2, 4]
    assert list(trainer.history[0]) == ["step", "tokens", "loss", "fvu", "aux", "L0_core", "L0_non_core", "L0_total", "dead",
                                        "threshold", "lr"]  # fmt: skip
    last = trainer.history[-1]
    assert last["tokens"] == 4 * BATCH and last["L0_total"] == pytest.approx(K) and last["L0_core"] == stats.l0_core
    assert last["lr"] == learning_rate(3, 120, config())
