"""A tiny model whose residual stream says which of a few characters stands at a position, and SAEs that read
it or not."""

from pathlib import Path

import torch
from builders.models import save_model
from builders.saebench import sae_of

from dmsae_lib.config.sections import ModelConfig
from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.sae.model import FoldedSAE

PLANTED = "ABCDEFGHIJ"  # the i-th has channel i of the residual stream for itself
NOISE = "MNOPQRSTUVWXYZ"
SIZE = 8.0  # of a planted channel
CONTEXT = 32


def planted_model(folder: Path, dtype: str = "float32", stir: float = 0.05) -> LanguageModel:
    """Two layers, hooked after the first, which adds only ``stir`` times what it would to the embeddings."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_model(folder, context=CONTEXT)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[:, : len(PLANTED)] = 0
        for channel, character in enumerate(PLANTED):
            (token,) = tokenizer.encode(character, add_special_tokens=False)
            embedding[token] = 0
            embedding[token, channel] = SIZE
        for part in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            part.weight.mul_(stir)
    model.save_pretrained(folder)
    return LanguageModel(
        ModelConfig(name=str(folder), hook_name="blocks.0.hook_resid_post", context_size=CONTEXT, dtype=dtype)
    )


def reading_sae(d_in: int, channels: list[int]) -> FoldedSAE:
    """Latent i is channel ``channels[i]`` where it is above half the size of a planted one."""
    return sae_of(torch.eye(d_in)[channels], threshold=SIZE / 2)
