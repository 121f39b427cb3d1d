"""Ablation and integrated gradients against closed forms on toy losses, against a loop on a model, and by
their completeness."""

from types import SimpleNamespace

import pytest
import torch
from builders.sae import make_sae, random

from dmsae_lib.data.language_model import next_token_loss
from dmsae_lib.distill import ablation
from dmsae_lib.distill.ablation import alike, describe, kept_alone, measure, rivals

pytestmark = pytest.mark.usefixtures("one_thread")

CORE, PREFIX0, D_IN, POSITIONS = 3, 6, 16, 16
N = CORE + PREFIX0


@pytest.fixture
def toy(monkeypatch):
    """Maker of a model without layers: its loss at a position is a function of the residual put there."""
    table = random(300, D_IN, seed=5)

    def make(loss):
        monkeypatch.setattr(ablation, "token_losses", lambda resid, contexts: loss(resid))
        return SimpleNamespace(
            device="cpu",
            config=SimpleNamespace(batch_rows=4),
            lower=lambda tokens: table[tokens],
            usable=lambda contexts, resid: contexts.usable(),
            upper=lambda tokens, resid: resid,
        )

    return make


def small(d_in: int = D_IN):
    """An SAE about half of whose latents fire."""
    sae = make_sae(CORE, "batchtopk", (PREFIX0, 20), 40, random(200, d_in, seed=6))
    return sae.requires_grad_(False)


def by_hand(model, sae, contexts):
    """f (tokens, N), xhat (tokens, d_in), the context of every token."""
    resid, usable = model.lower(contexts.tokens.long()), contexts.usable()
    f = sae.encode(resid[usable], first=N)
    return f, f @ sae.W_dec[:N] + sae.b_dec, usable.nonzero()[:, 0]


def summed(values, row, rows):
    return torch.stack([values[row == r].double().sum(0) for r in range(rows)])


def test_of_a_loss_that_is_linear_in_xhat_attribution_is_ablation(toy, random_split):
    """And so are integrated gradients, after however many steps."""
    sae, contexts, w = small(), random_split(10, seed=1), random(D_IN, seed=7)
    model = toy(lambda resid: resid @ w)
    f, _, row = by_hand(model, sae, contexts)
    expected = summed(f * (sae.W_dec[:N] @ w), row, 10)
    effects = measure(model, sae, contexts, steps=1)
    scale = float(expected.abs().max())
    for found in (-effects.ablation, effects.attribution, effects.integrated):
        assert found.shape == (10, N) and float((found - expected).abs().max()) < 1e-5 * scale
    assert torch.equal(effects.active, (f > 0).sum(0).double()) and 0.1 < float((f > 0).float().mean()) < 0.9
    told = describe(effects, 0.9)
    assert told["first_order"] == pytest.approx(1, abs=1e-4) == told["completeness"]
    assert told["agreement"]["A, by context"]["pearson"] == pytest.approx(1, abs=1e-5)
    assert told["agreement"]["IG"]["slope"] == pytest.approx(1, abs=1e-4)


def test_of_a_quadratic_loss_all_three_have_their_closed_forms(toy, random_split):
    """L = ||xhat||^2 / 2: ablation -f <xhat, d> + f^2 |d|^2 / 2, A = f <xhat, d>, and on the straight way the
    mean gradient is that at its middle."""
    sae, contexts = small(), random_split(9, seed=2)
    model = toy(lambda resid: resid.square().sum(-1) / 2)
    f, xhat, row = by_hand(model, sae, contexts)
    d = sae.W_dec[:N]
    along = f * (xhat @ d.T)
    expected = {
        "ablation": -along + f.square() * d.square().sum(1) / 2,
        "attribution": along,
        "integrated": f * ((sae.b_dec + (xhat - sae.b_dec) / 2) @ d.T),
    }
    effects = measure(model, sae, contexts)
    for name, values in expected.items():
        found, wanted = getattr(effects, name), summed(values, row, 9)
        assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max()), name
    assert torch.allclose(effects.absolute_A, along.double().abs().sum(0), rtol=1e-5)
    assert describe(effects, 0.9)["completeness"] == pytest.approx(1, abs=1e-5)  # the midpoint rule is exact
    kept = kept_alone(model, sae, contexts, {"all": range(N), "none": [], "one": [4]})
    assert kept["all"] == pytest.approx(0, abs=1e-6)
    whole, nothing, targets, tokens = effects.totals.tolist()
    assert kept["none"] == pytest.approx((nothing - whole) / targets, rel=1e-5)
    alone = (f[:, 4:5] * d[4] + sae.b_dec).square().sum() / 2 - xhat.square().sum() / 2
    assert kept["one"] == pytest.approx(float(alone) / targets, rel=1e-4) and tokens == len(f)


def scaled(model, seed: int):
    x = model.lower(torch.arange(3, 19)[None]).flatten(0, 1)
    sae = make_sae(CORE, "relu", (PREFIX0, 20), 40, x).requires_grad_(False)
    sae.threshold.fill_(float(sae.pre_activations(x).median()))
    return sae


def test_integrated_gradients_are_complete_on_a_model(tiny_llama, random_split):
    """Their sum tends to L(f) - L(0) with the number of steps, which one gradient alone does not give."""
    sae, contexts = scaled(tiny_llama, 1), random_split(12, seed=3)
    gaps = []
    for steps in (1, 8, 64):
        effects = measure(tiny_llama, sae, contexts, steps)
        whole, nothing, *_ = effects.totals.tolist()
        gaps.append(abs(float(effects.integrated.sum()) - (whole - nothing)) / abs(whole - nothing))
    assert gaps[2] < 1e-3 and gaps[2] < gaps[0] / 10 and gaps[1] < gaps[0]


def test_ablation_on_a_model_is_what_a_loop_over_contexts_gives(tiny_llama, random_split):
    sae, contexts = scaled(tiny_llama, 1), random_split(12, seed=4)
    effects = measure(tiny_llama, sae, contexts)
    for row in (0, 3, 10):
        batch = next(contexts[row : row + 1].batches(1, "cpu"))
        resid, losses = tiny_llama.lower(batch.tokens), []
        for silent in (None, 2, 7):
            f = sae.encode(resid)[..., :N].clone()
            if silent is not None:
                f[..., silent] = 0
            put = torch.where(batch.usable()[..., None], f @ sae.W_dec[:N] + sae.b_dec, resid)
            losses.append(float(next_token_loss(tiny_llama.upper(batch.tokens, put), batch)[0]))
        whole, *without = losses
        for latent, loss in zip((2, 7), without):
            assert float(effects.ablation[row, latent]) == pytest.approx(loss - whole, abs=2e-4)


def test_rivals_are_as_many_as_the_attribution_selects(toy, random_split):
    model = toy(lambda resid: resid.square().sum(-1) / 2)
    effects = measure(model, small(), random_split(6, seed=5))
    sets = rivals(effects, 0.7, seed=0, cycle=2)
    order = torch.argsort(effects.absolute_A, descending=True).tolist()
    size = len(sets["mean_abs"])
    assert sets["mean_abs"] == order[:size] and 1 < size < N
    share = effects.absolute_A[order].cumsum(0) / effects.absolute_A.sum()
    assert share[size - 1] >= 0.7 > share[size - 2]
    assert all(len(set(members)) == size for members in sets.values())
    assert sets == rivals(effects, 0.7, seed=0, cycle=2)


def test_alike_by_hand():
    x = torch.tensor([1.0, 2.0, 4.0])
    assert alike(x, 3 * x) == pytest.approx({"pearson": 1, "spearman": 1, "slope": 3})
    assert alike(x, x.square())["spearman"] == pytest.approx(1)
    assert alike(x, torch.ones(3)) == {"pearson": None, "spearman": None, "slope": None}
