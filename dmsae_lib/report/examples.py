"""What core latents respond to and what they do to the next token: the rows of the qualitative table
(reviewers' R7)."""

from typing import Any

import torch
from torch import Tensor

from dmsae_lib.data.contexts import Contexts
from dmsae_lib.data.language_model import LanguageModel, lowered
from dmsae_lib.sae.model import FoldedSAE

BEFORE, AFTER = 12, 4  # tokens of context shown around the strongest activation


@torch.no_grad()
def top_contexts(
    sae: FoldedSAE, model: LanguageModel, contexts: Contexts, latents: list[int], n: int = 3
) -> list[list[dict[str, Any]]]:
    """For each latent its ``n`` strongest activations, at most one per context: {activation, before, token,
    after}."""
    values, positions = [], []
    for batch, resid in lowered(model, contexts):
        f = sae.encode(resid)[..., latents] * model.usable(batch, resid)[..., None]
        strongest = f.max(dim=1)  # (rows, latents)
        values.append(strongest.values.cpu())
        positions.append(strongest.indices.cpu())
    value, position = torch.cat(values), torch.cat(positions)
    best = value.topk(min(n, len(value)), dim=0)
    found = []
    for j in range(len(latents)):
        rows = [
            (float(v), int(r), int(position[int(r), j]))
            for v, r in zip(best.values[:, j], best.indices[:, j])
            if v > 0
        ]
        found.append([_snippet(model, contexts, *row) for row in rows])
    return found


def _snippet(model: LanguageModel, contexts: Contexts, value: float, row: int, at: int) -> dict[str, Any]:
    tokens = contexts.tokens[row, : int(contexts.lengths[row])].tolist()
    # stay inside the document
    boundary = max((i + 1 for i in range(at) if tokens[i] == model.bos), default=0)
    stop = next((i for i in range(at + 1, len(tokens)) if tokens[i] == model.bos), len(tokens))
    text = [
        model.tokenizer.decode(part)
        for part in (
            tokens[max(boundary, at - BEFORE) : at],
            tokens[at : at + 1],
            tokens[at + 1 : min(stop, at + 1 + AFTER)],
        )
    ]
    return {"activation": value, "before": text[0], "token": text[1], "after": text[2]}


@torch.no_grad()
def logit_effects(directions: Tensor, model: LanguageModel, n: int = 6) -> list[dict[str, list[str]]]:
    """For each decoder row (latents, d_in) the tokens whose logits it raises and lowers most.

    The direct path only: the final norm's weights are applied, its scale and the layers between are not.
    """
    norm = model.bridge.ln_final.original_component
    weight = getattr(norm, "weight", None)
    gain = 1.0 if weight is None else weight.float() + (1.0 if "Gemma" in type(norm).__name__ else 0.0)
    effects = (directions.to(model.device) * gain) @ model.bridge.W_U.float()
    effects = effects - effects.mean(dim=1, keepdim=True)

    def words(order: Tensor) -> list[str]:
        return [model.tokenizer.decode([int(token)]) for token in order]

    return [
        {"raises": words(row.topk(n).indices), "lowers": words((-row).topk(n).indices)} for row in effects
    ]


def as_cell(text: str) -> str:
    """``text`` as it is in a cell of a Markdown table, whatever the tokens hold; what cannot be printed is
    marked."""
    text = "".join(
        char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text
    )
    return (
        text.replace("|", "\\|").replace("\n", "⏎").replace("`", "'").replace("*", "\\*").replace("<", "&lt;")
    )


def marked(context: dict[str, Any]) -> str:
    """One entry of :func:`top_contexts` in a cell, its token in bold."""
    before, token, after = (as_cell(context[part]) for part in ("before", "token", "after"))
    return f"{before}{' ' * token.startswith(' ')}**{token.strip() or '␣'}**{after}"
