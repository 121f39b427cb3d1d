"""sae_bench's core eval: known answers, a plain recomputation, and passes that are shared."""

from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from builders.models import BOS, save_model
from builders.saebench import load_model, make_bench, sae_of

from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.sae.model import FoldedSAE, MatryoshkaSAE
from dmsae_lib.saebench import core
from dmsae_lib.saebench.core import core_metrics, run_core
from dmsae_lib.store.artifacts import UserError

CONTEXT = 32
pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request, tmp_path_factory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("models") / f"not a llama but {request.param}"
    return load_model(save_model(folder, request.param, confidence=8.0), layer=1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> LanguageModel:
    return load_model(save_model(tmp_path_factory.mktemp("models") / "tiny", confidence=8.0))


def greedy_rows(model: LanguageModel, rows: int = 7) -> np.ndarray:
    """Rows that the model itself continues greedily, so that its loss is low; one boundary inside, one padded
    row."""
    tokens = torch.randint(3, 300, (rows, 2), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = BOS
    while tokens.shape[1] < CONTEXT:
        tokens = torch.cat([tokens, model.logits(tokens)[:, -1:].argmax(-1)], dim=1)
    tokens[1, 12] = BOS
    tokens[2, 20:] = BOS
    return tokens.numpy()


def identity_sae(d: int, threshold: float = 0.0) -> FoldedSAE:
    """Positive and negative part of each channel: an exact reconstruction."""
    return sae_of(torch.cat([torch.eye(d), -torch.eye(d)]), threshold=threshold)


def core_sae(model: LanguageModel) -> FoldedSAE:
    """An untrained SAE with a ReLU core of 4 and a threshold on the rest, scaled to the activations."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(4, model.d_model, generator=generator), dim=1)
    x = model.lower(torch.randint(3, 300, (4, CONTEXT), generator=generator)).flatten(0, 1)
    sae = MatryoshkaSAE(model.d_model, 64, (8, 16), rows).requires_grad_(False)
    sae.initialise(torch.Generator().manual_seed(0), x)
    sae.threshold.fill_(float(sae.pre_activations(x).quantile(0.8)))
    return sae.folded(1.0)


def test_an_exact_reconstruction_scores_1_and_zero_ablation_0(model):
    # The hook is the last layer's: below it, positions left alone (BOS) would reach the others by attention.
    tokens = greedy_rows(model)
    exact = core_metrics(identity_sae(model.d_model), model, tokens)
    assert exact["ce_loss_with_ablation"] > exact["ce_loss_without_sae"] + 1  # there is something to recover
    assert exact["ce_loss_score"] == pytest.approx(1, abs=1e-6)
    assert exact["l0"] == model.d_model and exact["cossim"] == pytest.approx(1, abs=1e-5)
    nothing = core_metrics(identity_sae(model.d_model, threshold=float("inf")), model, tokens)
    assert nothing["ce_loss_score"] == pytest.approx(0, abs=1e-6)
    assert nothing["l0"] == 0 and nothing["cossim"] is None
    bench = make_bench(None, np.concatenate([tokens, tokens[::-1]]), core_rows=len(tokens))
    assert run_core(identity_sae(model.d_model), model, bench, seed=0) == {"metrics": exact}


def test_it_agrees_with_a_plain_recomputation(llama):
    from transformers import AutoModelForCausalLM

    tokens, sae = greedy_rows(llama), core_sae(llama)
    found = core_metrics(sae, llama, tokens)
    ids = torch.from_numpy(tokens)
    usable = ids != llama.bos
    active = sae.encode(llama.lower(ids)[usable]) > 0
    assert found["l0"] == pytest.approx(float(active.sum(1).float().mean()), rel=1e-6)
    assert 4 < found["l0"] < 32 and active[:, :4].any() and active[:, 4:].any()

    def replaced(module, given, out):
        return torch.where(usable[..., None], sae(out), out)

    plain = AutoModelForCausalLM.from_pretrained(llama.folder)
    plain.model.layers[0].register_forward_hook(replaced)
    with torch.no_grad():
        logits = plain(ids).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    assert found["ce_loss_with_sae"] == pytest.approx(float(losses[usable[:, :-1]].mean()), rel=1e-4)


def test_every_row_counts_once_whatever_the_batch(llama):
    tokens, sae = greedy_rows(llama, rows=6), core_sae(llama)
    l0 = core_metrics(sae, llama, tokens, batch_rows=6)["l0"]
    for batch_rows in (1, 4):  # 4 does not divide 6
        assert core_metrics(sae, llama, tokens, batch_rows)["l0"] == pytest.approx(l0, rel=1e-6)


@pytest.mark.parametrize("kept", [2**29, 400_000, 0])  # every batch, one of its two passes, none
def test_passes_without_an_sae_are_shared_and_change_nothing(llama, monkeypatch, kept):
    tokens = greedy_rows(llama)
    batch = len(tokens) * CONTEXT * llama.bridge.cfg.d_vocab * 4
    assert 2 * batch > 400_000 > 1.2 * batch
    monkeypatch.setattr(core, "SHARED_BYTES", kept)
    monkeypatch.setattr(core.SharedPasses, "known", WeakKeyDictionary())
    saes = [core_sae(llama), identity_sae(llama.d_model)]
    alone = []
    for sae in saes:
        core.SharedPasses.known.clear()
        alone.append(core_metrics(sae, llama, tokens))
    core.SharedPasses.known.clear()
    full = []  # passes through the whole model
    handle = llama.bridge.unembed.register_forward_hook(lambda *_: full.append(1))
    try:
        assert [core_metrics(sae, llama, tokens) for sae in (*saes, *saes)] == [*alone, *alone]
    finally:
        handle.remove()
    assert len(full) == {2**29: 2 + 4, 400_000: 1 + 4 + 4, 0: 3 * 4}[kept]
    other = greedy_rows(llama)
    other[0, 1] += 1
    again = core_metrics(saes[0], llama, other)
    assert again["ce_loss_without_sae"] != alone[0]["ce_loss_without_sae"]


def test_bad_input_is_one_sentence(llama):
    with pytest.raises(UserError, match="reads 8 channels"):
        core_metrics(identity_sae(8), llama, greedy_rows(llama))
    with pytest.raises(UserError, match="raise data.test_tokens"):
        core_metrics(identity_sae(llama.d_model), llama, np.empty((0, CONTEXT), dtype=np.int64))


def test_an_outside_model(test_model):
    model = load_model(test_model, layer=1)
    text = "Once upon a time, there was a little girl. " * 60
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = np.array([[model.bos, *ids[i : i + CONTEXT - 1]] for i in range(0, 4 * CONTEXT, CONTEXT)])
    found = core_metrics(identity_sae(model.d_model), model, tokens)
    assert found["ce_loss_score"] == pytest.approx(1, abs=1e-6) and found["ce_loss_without_sae"] < 4
