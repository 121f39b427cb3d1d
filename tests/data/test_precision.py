"""dtype: auto, and bfloat16 held against float32."""

from types import SimpleNamespace

import pytest
import torch
from builders.models import BOS, save_model

from dmsae_lib.config.sections import ModelConfig
from dmsae_lib.data.contexts import Contexts
from dmsae_lib.data.language_model import LanguageModel, choose_dtype, describe, next_token_loss
from dmsae_lib.data.precision import compared
from dmsae_lib.distill import harvest

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def folder(one_thread, tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model") / "model", confidence=4.0))


@pytest.fixture(scope="module")
def contexts():
    tokens = torch.randint(3, 320, (6, 16), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = BOS
    return Contexts(tokens.int(), torch.tensor([16, 16, 9, 16, 16, 16]).int(), BOS)


def loaded(folder: str, dtype: str) -> LanguageModel:
    return LanguageModel(ModelConfig(name=folder, hook_name=HOOK, context_size=16, batch_rows=4, dtype=dtype))


@pytest.mark.parametrize(
    "processor, dtype",
    [({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16"), ({"avx2": True}, "float32")],
)
def test_auto_is_what_the_processor_can_do(monkeypatch, folder, processor, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    assert choose_dtype("auto", "cpu") == dtype and choose_dtype("float32", "cpu") == "float32"
    model = loaded(folder, "auto")
    assert describe(model)["dtype"] == model.config.dtype == dtype
    assert model.logits(torch.tensor([[BOS, 5]])).dtype == getattr(torch, dtype)


@torch.no_grad()
def test_the_differences_are_those_of_the_first_batch(folder, contexts):
    found = compared(coarse := loaded(folder, "bfloat16"), contexts)
    batch, losses, errors = next(contexts.batches(4, "cpu")), [], []
    for model in (coarse, exact := loaded(folder, "float32")):
        total, count = next_token_loss(model.logits(batch.tokens), batch)
        losses.append(float(total) / count)
    for row in range(4):
        for at in range(1, int(batch.lengths[row])):
            ours, theirs = (one.lower(batch.tokens)[row, at] for one in (coarse, exact))
            errors.append(float((ours - theirs).norm() / theirs.norm()))
    assert found["tokens"] == len(errors) == 15 * 3 + 8
    assert found["loss_difference"] == pytest.approx(losses[0] - losses[1], abs=1e-6)
    assert found["residual_error"]["max"] == pytest.approx(max(errors), rel=1e-4)
    assert 0 < found["residual_error"]["median"] <= found["residual_error"]["max"] < 0.05
    assert 0 < abs(found["loss_difference"]) < 0.1


def test_there_is_nothing_to_compare_in_float32(folder, contexts):
    assert compared(loaded(folder, "float32"), contexts) is None


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_upper_half_leaves_out_what_is_below_and_gives_the_same(tmp_path, one_thread, family, dtype):
    folder = save_model(tmp_path / "model", family, layers=3, confidence=4.0)
    config = ModelConfig(name=str(folder), hook_name="blocks.1.hook_resid_post", context_size=16, dtype=dtype)
    model = LanguageModel(config)
    assert model.skips_below
    tokens, ran = torch.tensor([[BOS, 7, 8, 9]]), []
    handles = [
        block.mlp.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(model.bridge.blocks)
    ]
    results = []
    for model.skips_below in (True, False):
        other = (2 * model.lower(tokens).roll(1, dims=1)).requires_grad_()
        ran.clear()
        logits = model.upper(tokens, other)
        assert ran == [2] if model.skips_below else ran == [0, 1, 2]
        logits.float().square().sum().backward()
        results.append((logits.detach(), other.grad))
    for handle in handles:
        handle.remove()
    assert all(map(torch.equal, *results)) and bool(results[0][1].any())
    assert torch.equal(
        model.upper(tokens, model.lower(tokens)), model.logits(tokens)
    )  # nothing is left behind


def test_a_run_goes_on_in_the_precision_of_its_harvest(monkeypatch, tmp_path, folder):
    """Wherever it is continued: `auto` is decided once."""
    asked = []
    record = {"model": {"hash": "h", "hook_name": HOOK, "dtype": "bfloat16"}, "outlier_limit": 1.0}
    monkeypatch.setattr(harvest.artifacts, "load", lambda *_: SimpleNamespace(json=lambda _: record))
    monkeypatch.setattr(harvest.Contexts, "load", lambda *_: None)

    def model(config, device):
        asked.append(config.dtype)
        return SimpleNamespace(hash="h", hook_name=HOOK, bos=0)

    monkeypatch.setattr(harvest, "LanguageModel", model)
    for dtype in ("auto", "float32"):
        config = ModelConfig(name=folder, hook_name=HOOK, context_size=16, dtype=dtype)
        harvest.open_harvest(
            SimpleNamespace(folder=tmp_path, config=SimpleNamespace(model=config, device="cpu"))
        )
    assert asked == ["bfloat16", "float32"]
