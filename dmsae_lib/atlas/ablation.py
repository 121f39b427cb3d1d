"""What removing one latent does to the loss.

The latent's contribution f_i(x) d_i is taken off the model's own residual stream at every usable position,
all else stays: the other latents, and what the SAE does not reconstruct. So no error of the SAE is in the
difference, and of a latent that nearly always fires the constant part is removed too.
"""

from collections.abc import Iterator
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from dmsae_lib.data.contexts import Contexts
from dmsae_lib.data.language_model import LanguageModel, lowered, token_losses
from dmsae_lib.report.verdicts import t_interval
from dmsae_lib.sae.model import FoldedSAE

ABLATED_TOKENS = 2048  # one pass of the upper half per latent over so many tokens


def mean_losses(model: LanguageModel, batch: Contexts, resid: Tensor) -> Tensor:
    """Each context's mean next-token loss with ``resid`` at the hook, nats, (rows,); NaN without a target."""
    losses = token_losses(model.upper(batch.tokens, resid), batch)
    return (losses.sum(1) / batch.usable()[:, 1:].sum(1)).cpu()


def without(sae: FoldedSAE, resid: Tensor, f: Tensor, latent: int) -> Tensor:
    """``resid`` (..., d_in) less what ``latent`` writes where its activations are ``f`` (...)."""
    return resid - f[..., None] * sae.W_dec[latent]


@torch.no_grad()
def _changes(
    model: LanguageModel, sae: FoldedSAE, contexts: Contexts, latents: list[int]
) -> Iterator[tuple[int, Tensor]]:
    for batch, resid in lowered(model, contexts):
        f = sae.encode(resid)[..., latents] * model.usable(batch, resid)[..., None]
        whole = mean_losses(model, batch, resid)
        for j, latent in enumerate(latents):
            change = torch.zeros_like(whole)  # where it does not fire in the batch
            if f[..., j].any():
                change = mean_losses(model, batch, without(sae, resid, f[..., j], latent)) - whole
            yield j, change[whole.isfinite()]


def ablate(
    model: LanguageModel, sae: FoldedSAE, contexts: Contexts, latents: list[int]
) -> list[dict[str, Any]]:
    """For each latent {change, interval, contexts}: the mean over contexts of the change of a context's mean
    next-token loss, in nats, its 95 % t interval with contexts as units (None where all are alike), and their
    number."""
    found: list[list[float]] = [[] for _ in latents]
    for j, change in _changes(model, sae, contexts, latents):
        found[j] += change.tolist()
    return [{"change": fmean(one), "interval": t_interval(one), "contexts": len(one)} for one in found]
