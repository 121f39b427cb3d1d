"""Ablation against transformers alone: the block's own output is changed by a hook, the loss is torch's."""

from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
from builders.sae import random
from transformers import AutoModelForCausalLM

from dmsae_lib.atlas.ablation import ablate
from dmsae_lib.data.contexts import Contexts
from dmsae_lib.report.verdicts import t_interval
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.store.seeds import generator


@pytest.fixture(scope="module")
def sae(tiny_llama):
    d_in = tiny_llama.d_model
    made = MatryoshkaSAE(d_in, 12, [4], random(3, d_in), "batchtopk")
    made.initialise(generator(0, "test"), random(50, d_in, seed=1))
    made = made.folded(1.0)
    made.b_enc[5] = -1e3  # never fires
    return made


def change(model, sae, tokens: torch.Tensor, counted: torch.Tensor, latent: int) -> float:
    """Of one context's mean loss, in two forward passes."""

    def less(module, given, output):
        x = output[0] if isinstance(output, tuple) else output
        f = torch.relu((x - sae.b_dec) @ sae.W_enc[:, latent] + sae.b_enc[latent])
        f = torch.where(f > float(sae.threshold), f, 0.0) * counted
        new = x - f[..., None] * sae.W_dec[latent]
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def loss() -> float:
        nats = F.cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
        return float(nats[counted[1:]].mean())

    before = loss()
    handle = model.model.layers[0].register_forward_hook(less)
    after = loss()
    handle.remove()
    return after - before


@torch.no_grad()
def directly(tiny_llama, sae, split: Contexts, latent: int) -> list[float]:
    model, found = AutoModelForCausalLM.from_pretrained(tiny_llama.folder).eval(), []
    for tokens, length in zip(split.tokens.long(), split.lengths.tolist()):
        counted = torch.tensor([i < length and int(t) != split.bos for i, t in enumerate(tokens)])
        found.append(change(model, sae, tokens, counted, latent))
    return found


def test_the_change_of_loss_is_that_of_a_direct_computation(tiny_llama, sae, random_split):
    split = random_split(11)
    found = ablate(tiny_llama, sae, split, [1, 5, 7])
    for latent, row in zip([1, 7], (found[0], found[2])):
        expected = directly(tiny_llama, sae, split, latent)
        assert max(map(abs, expected)) > 1e-3
        assert row["change"] == pytest.approx(fmean(expected), abs=1e-5)
        assert row["interval"] == pytest.approx(t_interval(expected), abs=1e-5)
        assert row["contexts"] == len(expected)
    assert found[1] == {
        "change": 0.0,
        "interval": None,
        "contexts": 11,
    }  # where it never fires, nothing is removed
