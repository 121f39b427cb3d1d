"""In which precision a language model computes, and what bfloat16 costs on a batch of text."""

from typing import Any

import torch

from dmsae_lib.data.contexts import Contexts
from dmsae_lib.data.language_model import LanguageModel, next_token_loss


@torch.no_grad()
def compared(model: LanguageModel, contexts: Contexts) -> dict[str, Any] | None:
    """A bfloat16 ``model`` beside the same weights in float32, on the first batch; None for a float32 one.

    ``loss`` and ``loss_float32`` in nats per token; ``residual_error``: the norm of the residuals' difference
    over their norm, the median and the largest over usable positions.
    """
    if model.config.dtype == "float32":
        return None
    exact = LanguageModel(model.config.model_copy(update={"dtype": "float32"}), model.device)
    batch = next(contexts.batches(model.config.batch_rows, model.device))
    ours, theirs = (one.lower(batch.tokens)[batch.usable()] for one in (model, exact))
    apart = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    losses = []
    for one in (model, exact):
        loss, count = next_token_loss(one.logits(batch.tokens), batch)
        losses.append(float(loss) / count)
    return {
        "tokens": len(ours),
        "loss": losses[0],
        "loss_float32": losses[1],
        "loss_difference": losses[0] - losses[1],
        "residual_error": {"median": float(apart.median()), "max": float(apart.max())},
    }
