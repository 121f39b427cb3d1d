"""What only a GPU or another order of sums would show, made visible on a CPU: duplicates, waits for the host,
NaN at the end, a model that lies elsewhere than the SAE, low precision."""

from types import SimpleNamespace

import pytest
import torch
from builders.sae import CORE, D_SAE, batch, config, gradients, make_sae, random
from reference import TRAINED, reference_gradients
from torch import Tensor

from dmsae_lib.config import load_config
from dmsae_lib.data.contexts import Contexts
from dmsae_lib.data.language_model import LanguageModel, next_token_loss
from dmsae_lib.distill import attribution
from dmsae_lib.distill.attribution import TOLERANCE, contributions, gradient_at_prefix0
from dmsae_lib.sae import step as step_module
from dmsae_lib.sae.entries import SPARSE_BELOW
from dmsae_lib.sae.loop import train_saes
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.sae.select import Kept
from dmsae_lib.sae.step import step_gradients
from dmsae_lib.sae.training import Trainer
from dmsae_lib.store.artifacts import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

DENSE_K = D_SAE // 2 + 1  # above SPARSE_BELOW of the free latents: dense products


def small(d_in: int) -> MatryoshkaSAE:
    """A core of 4 and a first prefix of 8, in the units of the model's residual."""
    return make_sae(4, "relu", (8, 20), 40, random(50, d_in)).requires_grad_(False)


@pytest.mark.parametrize("seed", range(3))
def test_dense_products_do_not_depend_on_the_order_of_the_kept_entries(monkeypatch, seed):
    """With the core in the selection the list names (row, latent 0) more than once: whichever is written last
    must not win."""
    assert DENSE_K > SPARSE_BELOW["cpu"] * (D_SAE - CORE)
    sae, x, keep = make_sae(CORE, "batchtopk"), batch(seed), step_module.keep_largest

    def shuffled(*arguments):
        kept = keep(*arguments)
        order = torch.randperm(len(kept.row), generator=torch.Generator().manual_seed(seed))
        return Kept(kept.row[order], kept.latent[order], kept.value[order], kept.smallest)

    monkeypatch.setattr(step_module, "keep_largest", shuffled)
    step_gradients(sae, x, DENSE_K)
    expected = reference_gradients(sae, x, DENSE_K)
    for name in TRAINED:
        wanted = expected[name]
        assert float((gradients(sae)[name] - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max()), name


@pytest.mark.parametrize("core, core_sparsity", [(0, "relu"), (CORE, "relu"), (CORE, "batchtopk")])
@pytest.mark.parametrize("k", [9, DENSE_K])
def test_a_step_of_fixed_shapes_asks_the_device_for_nothing(monkeypatch, core, core_sparsity, k):
    """No tensor is made of Python's numbers and no number is taken out of a tensor: either waits for a
    GPU."""
    sae, x = make_sae(core, core_sparsity), batch(0)
    dead = torch.zeros(D_SAE - core, dtype=torch.bool)
    dead[5:9] = True

    def waits(*_, **__):
        raise AssertionError("this would wait for the device")

    with monkeypatch.context() as patch:
        for name in (
            "item",
            "tolist",
            "__bool__",
            "__int__",
            "__float__",
            "__index__",
            "nonzero",
            "numpy",
            "cpu",
        ):
            patch.setattr(Tensor, name, waits)
        for name in ("tensor", "as_tensor", "from_numpy", "nonzero"):
            patch.setattr(torch, name, waits)
        step_gradients(sae, x, k, k_aux=4, dead=dead, fixed_shapes=True)
    expected = reference_gradients(sae, x, k, k_aux=4, dead=dead)
    for name in TRAINED:
        assert float((gradients(sae)[name] - expected[name]).abs().max()) <= 1e-5 * float(
            expected[name].abs().max()
        ), name


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_never_reaches_the_end_of_a_training(tmp_path, number):
    """A GPU is asked at checkpoints alone; a training that is shorter than their interval must be asked at
    its end."""
    x = [batch(step) for step in range(4)]
    x[-1][0, 0] = number
    trainer = Trainer(make_sae(), config(), steps=4)
    trainer.waits = True  # as on a GPU: nothing is checked within a step
    finished = []
    with pytest.raises(UserError, match="Step 3: the activations hold NaN or Inf"):
        train_saes(
            [trainer],
            lambda cursor: iter([(one, (0, 0, i)) for i, one in enumerate(x)]),
            [tmp_path / "c"],
            [{}],
            finished.append,
            lambda line: None,
        )
    assert not finished and not (tmp_path / "c").exists()


def test_attribution_takes_the_sae_to_the_model(monkeypatch):
    """Notebook 05 loads SAEs to the CPU, wherever the model lies."""
    seen = []

    def recorded(model, sae, batch, prefix):
        seen.append(sae.W_dec.device.type)
        n = sae.n_core + sae.prefixes[0]
        return torch.rand(5, n), torch.rand(5, sae.d_in)

    monkeypatch.setattr(attribution, "gradient_at_prefix0", recorded)
    monkeypatch.setattr(attribution, "contributions", lambda f, g, sae: f)
    model = SimpleNamespace(device="meta", config=SimpleNamespace(batch_rows=1))
    attribution.attribute(model, make_sae(), Contexts(torch.zeros(2, 4), torch.zeros(2), 0))
    assert seen == ["meta", "meta"]


def test_attribution_encodes_candidates_alone(tiny_llama, random_split, monkeypatch):
    """Not all d_sae latents for the sake of the first few; so weights of the later ones may be anything."""
    select, widths = MatryoshkaSAE.select, []
    monkeypatch.setattr(
        MatryoshkaSAE, "select", lambda sae, a, *more: widths.append(a.shape[-1]) or select(sae, a, *more)
    )
    sae, split = small(tiny_llama.d_model), random_split(6)
    batch = next(split.batches(6, "cpu"))
    f, g = gradient_at_prefix0(tiny_llama, sae, batch)
    with torch.no_grad():
        sae.free_rows[8:], sae.b_enc[12:] = float("nan"), float("nan")
    again = gradient_at_prefix0(tiny_llama, sae, batch)
    assert widths == [12, 12] and f.shape[1] == 12
    assert torch.equal(again[0], f) and torch.equal(again[1], g) and bool(torch.isfinite(f).all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_closed_form_equals_autograd_as_far_as_the_models_type_goes(dtype):
    """The check of notebook 03, the reconstruction summed in another order as a GPU may do: float32's bound
    is too tight for bfloat16, whose own one holds."""
    model = LanguageModel(load_config("smoke").model.model_copy(update={"dtype": dtype}), "cpu")
    tokens = torch.randint(3, 4000, (16, 128), generator=torch.Generator().manual_seed(0))
    sae, batch = small(model.d_model), Contexts(tokens, torch.full((16,), 128), model.bos)
    f, g = gradient_at_prefix0(model, sae, batch)
    A = contributions(f, g, sae)
    with torch.enable_grad():
        resid, usable = model.lower(tokens), batch.usable()
        leaf = f.clone().requires_grad_(True)
        put = resid.clone()
        order = torch.randperm(leaf.shape[1], generator=torch.Generator().manual_seed(0))
        put[usable] = leaf[:, order] @ sae.W_dec[: leaf.shape[1]][order] + sae.b_dec
        loss, _ = next_token_loss(model.upper(tokens, put), batch)
        (gradient,) = torch.autograd.grad(loss, leaf)
    difference = float((A - f * gradient).abs().max() / A.abs().max())
    assert 0 < difference < TOLERANCE[dtype]
    assert dtype == "float32" or difference > TOLERANCE["float32"]
