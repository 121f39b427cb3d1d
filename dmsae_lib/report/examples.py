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
    """Each latent's ``n`` strongest activations, one per context: {activation, before, token, after}."""
    values, positions = [], []
    for batch, resid in lowered(model, contexts):
        f = sae.encode(resid)[..., latents] * model.usable(batch, resid)[..., None]
        strongest = f.max(dim=1)  # (rows, latents)
        values.append(strongest.values.cpu())
        positions.append(strongest.indices.cpu())
    position = torch.cat(positions)
    best, where = torch.cat(values).topk(min(n, len(position)), dim=0)
    found = []
    for j in range(len(latents)):
        ranked = zip(best[:, j].tolist(), where[:, j].tolist())
        found.append([_snippet(model, contexts, v, r, int(position[r, j])) for v, r in ranked if v > 0])
    return found


def document_window(contexts: Contexts, row: int, at: int, before: int, after: int) -> tuple[int, int]:
    """[start, stop) of the positions around ``at`` in a context, at most so many, inside its document."""
    tokens = contexts.tokens[row, : int(contexts.lengths[row])].tolist()
    start = max((i + 1 for i in range(at) if tokens[i] == contexts.bos), default=0)
    stop = next((i for i in range(at + 1, len(tokens)) if tokens[i] == contexts.bos), len(tokens))
    return max(start, at - before), min(stop, at + 1 + after)


def _snippet(model: LanguageModel, contexts: Contexts, value: float, row: int, at: int) -> dict[str, Any]:
    start, stop = document_window(contexts, row, at, BEFORE, AFTER)
    tokens = contexts.tokens[row, :stop].tolist()
    parts = {"before": tokens[start:at], "token": tokens[at : at + 1], "after": tokens[at + 1 :]}
    return {"activation": value} | {name: model.tokenizer.decode(part) for name, part in parts.items()}


@torch.no_grad()
def direct_logits(directions: Tensor, model: LanguageModel) -> Tensor:
    """What each decoder row (latents, d_in) adds to the logits, (latents, vocabulary), less its mean.

    The direct path only: the final norm's weights are applied, its scale and the layers between are not.
    """
    norm = model.bridge.ln_final.original_component
    weight = getattr(norm, "weight", None)
    gain = 1.0 if weight is None else weight.float() + (1.0 if "Gemma" in type(norm).__name__ else 0.0)
    effects = (directions.to(model.device) * gain) @ model.bridge.W_U.float()
    return effects - effects.mean(dim=1, keepdim=True)


def logit_effects(directions: Tensor, model: LanguageModel, n: int = 6) -> list[dict[str, list[str]]]:
    """For each decoder row (latents, d_in) the tokens whose logits it raises and lowers most, by
    :func:`direct_logits`."""

    def words(scores: Tensor) -> list[str]:
        return [model.tokenizer.decode([token]) for token in scores.topk(n).indices.tolist()]

    effects = direct_logits(directions, model)
    return [{"raises": words(row), "lowers": words(-row)} for row in effects]


def as_cell(text: str) -> str:
    """``text`` for a cell of a Markdown table, whatever is in it; what cannot be printed is marked."""
    unseen = "\N{REPLACEMENT CHARACTER}"
    shown = "".join(char if char.isprintable() or char == "\n" else unseen for char in text)
    return shown.translate(str.maketrans({"|": "\\|", "\n": "⏎", "`": "'", "*": "\\*", "<": "&lt;"}))


def marked(context: dict[str, Any]) -> str:
    """One entry of :func:`top_contexts` in a cell, its token in bold."""
    before, token, after = (as_cell(context[part]) for part in ("before", "token", "after"))
    return f"{before}{' ' * token.startswith(' ')}**{token.strip() or '␣'}**{after}"
