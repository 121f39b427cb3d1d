"""The door to language models: the split model equals the whole one, and what counts as a token."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from builders.models import BOS, EOS, save_model
from conftest import CONTEXT

from dmsae_lib.config.sections import ModelConfig
from dmsae_lib.data import language_model
from dmsae_lib.data.contexts import Contexts
from dmsae_lib.data.language_model import LanguageModel, next_token_loss
from dmsae_lib.data.model_folder import load_tokenizer, model_hash, resolve


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_gemma2"])
def model(request) -> LanguageModel:
    return request.getfixturevalue(request.param)


@pytest.fixture
def tokens() -> torch.Tensor:
    tokens = torch.randint(3, 300, (5, CONTEXT), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = BOS
    return tokens


def plain(model: LanguageModel, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32, **options).eval()


def test_the_split_model_is_the_whole_one(model, tokens):
    resid = model.lower(tokens)
    assert (
        resid.shape == (5, CONTEXT, model.d_model)
        and resid.dtype == torch.float32
        and not resid.requires_grad
    )
    assert torch.equal(model.upper(tokens, resid), model.logits(tokens))
    moved = resid + torch.randn(resid.shape, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(model.upper(tokens, moved), model.logits(tokens), atol=1e-2)


def test_logits_and_residuals_are_those_of_transformers(model, tokens):
    with torch.no_grad():
        found = plain(model)(tokens, output_hidden_states=True)
    logits = model.logits(tokens)
    assert logits.shape == found.logits.shape and logits.std() > 0.5  # not trivially alike
    assert (logits - found.logits).abs().max() < 1e-4
    assert (model.lower(tokens) - found.hidden_states[model.layer + 1]).abs().max() < 1e-4


def test_gemma_2_brings_what_sets_it_apart(tiny_gemma2, tokens):
    """Each of its features changes the logits, so the comparison above would notice if one got lost."""
    config = plain(tiny_gemma2).config
    assert config.num_key_value_heads < config.num_attention_heads and config.sliding_window < CONTEXT
    with torch.no_grad():
        whole = plain(tiny_gemma2)(tokens).logits
        assert whole.abs().max() < config.final_logit_softcapping
        for changed in (
            {"attn_logit_softcapping": 1e6},
            {"final_logit_softcapping": 1e6},
            {"sliding_window": CONTEXT},
        ):
            other = plain(tiny_gemma2, attn_implementation="eager", **changed)(tokens).logits
            assert (other - whole).abs().max() > 0.05, changed


def test_the_upper_part_depends_on_what_is_put_in_at_the_hook_and_before_it_on_nothing(model, tokens):
    resid = model.lower(tokens)
    others = tokens.roll(1, dims=0)
    assert torch.equal(model.upper(others, resid), model.upper(tokens, resid))


def test_the_gradient_at_the_hook_equals_finite_differences(model, tokens):
    contexts = Contexts(tokens, torch.full((len(tokens),), CONTEXT), model.bos)
    resid = model.lower(tokens).requires_grad_(True)
    loss, _ = next_token_loss(model.upper(tokens, resid), contexts)
    (gradient,) = torch.autograd.grad(loss, resid)
    with torch.no_grad():
        for seed in range(5):
            direction = torch.randn(resid.shape, generator=torch.Generator().manual_seed(seed))
            direction /= direction.norm()
            h = 0.05  # float32: the loss, of a few hundred nats, is known to about 1e-5
            moved = [model.upper(tokens, resid + sign * h * direction) for sign in (1, -1)]
            ends = [float(next_token_loss(logits, contexts)[0]) for logits in moved]
            expected = float((gradient * direction).sum())
            assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(expected, abs=0.01 * float(gradient.norm()))


@pytest.mark.parametrize("settings", [{"hook_name": "blocks.2.hook_resid_post"}, {"dtype": "bfloat16"}])
def test_it_can_be_split_at_the_last_layer_and_in_bfloat16(tiny_gemma2, tokens, settings):
    model = LanguageModel(tiny_gemma2.config.model_copy(update=settings))
    resid = model.lower(tokens)
    assert resid.dtype == torch.float32 and torch.equal(model.upper(tokens, resid), model.logits(tokens))
    assert not torch.equal(model.upper(tokens, 2 * resid.roll(1, dims=0)), model.logits(tokens))
    assert (model.logits(tokens).float() - tiny_gemma2.logits(tokens)).abs().mean() < 0.1


def test_the_model_is_frozen_and_stops_at_the_hook(model, tokens):
    assert not any(p.requires_grad for p in model.bridge.parameters()) and not model.bridge.training
    ran = []
    handles = [
        block.attn.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(model.bridge.blocks)
    ]
    model.lower(tokens)
    for handle in handles:
        handle.remove()
    assert ran == list(range(model.layer + 1))


def test_passes_of_two_threads_do_not_meet(model, tokens):
    """A prefetching thread lowers while the main thread evaluates: neither may see the other's hooks."""
    with torch.no_grad():
        resid, logits = model.lower(tokens), model.logits(tokens)
        other = torch.zeros_like(resid)
        replaced = model.upper(tokens, other)
        with ThreadPoolExecutor(1) as thread:
            ahead = thread.map(lambda _: torch.equal(model.lower(tokens), resid), range(100))
            for _ in range(50):
                assert torch.equal(model.upper(tokens, other), replaced)
                assert torch.equal(model.logits(tokens), logits)
            assert all(ahead)


@pytest.mark.parametrize("name", ["a folder", "my llama of 2024", "gemma-2 test", "gpt2", "llama/gemma"])
def test_a_folder_may_be_called_what_it_likes(tiny_llama, tokens, tmp_path, name):
    shutil.copytree(tiny_llama.folder, tmp_path / name)
    config = ModelConfig(name=str(tmp_path / name), hook_name=tiny_llama.hook_name, context_size=CONTEXT)
    model = LanguageModel(config)
    assert torch.equal(model.logits(tokens), tiny_llama.logits(tokens))
    assert model.hash == tiny_llama.hash and model.name_by_content == tiny_llama.name_by_content
    assert language_model.describe(model)["architecture"] == "LlamaForCausalLM"


def test_a_home_folder_and_a_relative_one_are_found(tiny_llama, tmp_path, monkeypatch):
    shutil.copytree(tiny_llama.folder, tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert resolve("~/model") == tmp_path / "model" and resolve("model") == Path("model")
    assert resolve("wheeltext-4x128").parent.name == "embedded"


def test_the_hash_changes_with_weights_configuration_and_tokenizer_alone(tmp_path):
    folder = save_model(tmp_path / "model")
    before = model_hash(folder)
    assert (
        model_hash(save_model(tmp_path / "same"))
        == before
        != model_hash(save_model(tmp_path / "other", seed=1))
    )
    (folder / "README.md").write_text("of no account")
    assert model_hash(folder) == before
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        assert model_hash(folder) != before
        (folder / name).write_bytes(content)
    assert model_hash(folder) == before


def test_a_tokenizer_without_bos_starts_contexts_with_eos(tmp_path):
    folder = save_model(tmp_path / "model")
    assert load_tokenizer(folder).bos_token_id == BOS
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("bos_token")
    path.write_text(json.dumps(settings))
    assert load_tokenizer(folder).bos_token_id == EOS


def random_batch(seed: int) -> Contexts:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 6, (7, 12), generator=generator)
    tokens[:, 0] = BOS
    return Contexts(tokens, torch.randint(1, 13, (7,), generator=generator), BOS)


@pytest.mark.parametrize("seed", range(3))
def test_next_token_loss_against_a_loop(seed):
    contexts = random_batch(seed)
    tokens, lengths = contexts.tokens, contexts.lengths
    logits = torch.randn(*tokens.shape, 6, generator=torch.Generator().manual_seed(seed + 10))
    total, count = 0.0, 0
    for row in range(len(tokens)):
        for at in range(1, int(lengths[row])):
            target = int(tokens[row, at])
            if target != BOS:
                total -= float(torch.log_softmax(logits[row, at - 1].double(), 0)[target])
                count += 1
    loss, n = next_token_loss(logits, contexts)
    assert (float(loss), n) == (pytest.approx(total, rel=1e-5), count)
    beyond = tokens.clone()
    beyond[torch.arange(12)[None, :] >= lengths[:, None]] = 5  # what stands in the padding is of no account
    assert float(next_token_loss(logits, Contexts(beyond, lengths, BOS))[0]) == float(loss)
