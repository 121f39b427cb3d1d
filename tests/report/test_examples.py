"""Top contexts and logit effects of latents whose meaning is known, on a tiny random model."""

import re

import pytest
import torch

from dmsae_lib.data.contexts import Contexts
from dmsae_lib.report.examples import as_cell, logit_effects, marked, top_contexts
from dmsae_lib.sae.model import MatryoshkaSAE


def test_the_strongest_context_is_where_the_planted_latent_fires(tiny_llama):
    model = tiny_llama
    tokens = torch.randint(3, len(model.tokenizer), (5, 16), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = model.bos
    split = Contexts(tokens, torch.full((5,), 16), model.bos)
    resid = model.lower(tokens)
    sae = MatryoshkaSAE(model.d_model, 8, [2, 4])
    with torch.no_grad():
        sae.free_rows[0] = torch.nn.functional.normalize(resid[3, 9], dim=0)
    (found,) = top_contexts(sae, model, split, [0], n=2)
    along = (resid[:, 1:] @ sae.free_rows[0].detach()).clamp_min(0)
    assert found[0]["activation"] == pytest.approx(along.max().item(), rel=1e-5)
    assert found[0]["activation"] >= found[1]["activation"] > 0
    row, position = divmod(int(along.argmax()), 15)
    assert found[0]["token"] == model.tokenizer.decode([int(tokens[row, position + 1])])


def test_logit_effects_follow_the_unembedding(tiny_llama):
    model = tiny_llama
    column = 7
    direction = model.bridge.W_U[:, column].float()
    (effect,) = logit_effects(direction[None], model, n=model.bridge.W_U.shape[1])
    order = (direction @ model.bridge.W_U.float()).argsort(descending=True).tolist()
    assert effect["raises"] == [model.tokenizer.decode([token]) for token in order]
    assert effect["lowers"] == effect["raises"][::-1]


def test_any_text_stays_in_its_cell():
    """Every control and formatting character of the first planes, and what Markdown or HTML would read."""
    hostile = "".join(map(chr, range(0x3000))) + "\u2028\u2029\ufeff\U000e0001</td><script>|*`"
    cell = as_cell(hostile)
    assert len(cell.splitlines()) == 1 and all(char.isprintable() for char in cell)
    assert "<" not in cell and "`" not in cell and not re.search(r"(?<!\\)[|*]", cell)
    context = {"before": "a | b\r\n", "token": " \x0bc", "after": "\x1b[0m"}
    assert (
        marked(context)
        == "a \\| b\N{REPLACEMENT CHARACTER}⏎ **\N{REPLACEMENT CHARACTER}c**\N{REPLACEMENT CHARACTER}[0m"
    )
