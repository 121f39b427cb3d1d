"""The training objective in its plainest form: dense float64 matrices, a full sort, autograd.

Slow, and short enough to be checked by eye against the method. :mod:`dmsae_lib.sae.step` computes the same;
tests hold the two together, and the benchmark sets them side by side.
"""

import torch
from torch import Tensor

from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.sae.select import batch_topk, free_budget

TRAINED = ("free_rows", "W_dec", "b_enc", "b_dec")


def reference_gradients(
    sae: MatryoshkaSAE,
    x: Tensor,
    k: int,
    k_min: int = 1,
    aux_alpha: float = 1 / 32,
    k_aux: int = 0,
    dead: Tensor | None = None,
) -> dict[str, Tensor]:
    """loss, aux, the activations f (B, d_sae), and the gradient of every trained parameter, for ``x`` (B,
    d_in).

    Arguments as in :func:`dmsae_lib.sae.step.step_gradients`.
    """
    free_rows, W_dec, b_enc, b_dec = (
        getattr(sae, name).detach().double().requires_grad_(True) for name in TRAINED
    )
    x, c = x.double(), sae.n_core
    W_enc = torch.cat([sae.core_rows.double(), free_rows]).T
    a = torch.relu((x - b_dec) @ W_enc + b_enc)
    if sae.core_sparsity == "relu":  # the core is exempt, and the others get what it leaves
        budget = int(free_budget(len(x), k, a[:, :c].count_nonzero(), k_min))
        f = torch.cat([a[:, :c], a[:, c:] * batch_topk(a[:, c:].detach(), budget)[0]], dim=1)
    else:
        f = a * batch_topk(a.detach(), len(x) * k)[0]

    loss, xhat = x.new_zeros(()), b_dec
    for m in sae.prefixes:
        xhat = f[:, : c + m] @ W_dec[: c + m] + b_dec
        loss = loss + (x - xhat).square().sum(1).mean()

    aux = x.new_zeros(())
    if dead is not None and bool(dead.any()) and k_aux > 0:
        residual = (x - xhat).detach()
        a_dead = a[:, c:][:, dead]
        top = a_dead.topk(min(k_aux, a_dead.shape[1]), dim=1)
        rebuilt = torch.zeros_like(a_dead).scatter(1, top.indices, top.values) @ W_dec[c:][dead]
        aux = (residual - rebuilt).square().sum(1).mean() / (residual - residual.mean(0)).square().sum(
            1
        ).mean()
    loss = loss + aux_alpha * aux
    loss.backward()
    gradients = {name: p.grad for name, p in zip(TRAINED, (free_rows, W_dec, b_enc, b_dec))}
    return {"loss": loss.detach(), "aux": aux.detach(), "f": f.detach()} | gradients
