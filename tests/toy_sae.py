"""A small SAE with random weights, its batches, and the training objective written out with plain autograd."""

import math

import torch
from torch import Tensor

from dmsae_lib.config import TrainingConfig
from dmsae_lib.sae import MatryoshkaSAE

D_IN, D_SAE, CORE, PREFIXES, BATCH, K = 16, 60, 7, (8, 21), 96, 9
NAMES = ("free_rows", "W_dec", "b_enc", "b_dec")  # everything that is trained


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(seed: int, size: int = BATCH) -> Tensor:
    """Mean ||x||^2 near 1, with a mean that is not zero."""
    return (random(size, D_IN, seed=1000 + seed) + 0.3) / math.sqrt(D_IN)


def make_sae(core: int = CORE, core_sparsity: str = "relu", prefixes: tuple = PREFIXES) -> MatryoshkaSAE:
    """Initialised and then perturbed, so that encoder and decoder, and all biases, differ."""
    rows = torch.nn.functional.normalize(random(core, D_IN, seed=1), dim=1) if core else None
    sae = MatryoshkaSAE(D_IN, D_SAE, prefixes, rows, core_sparsity)
    sae.initialise(0, batch(99))
    with torch.no_grad():
        for seed, parameter in enumerate(sae.parameters(), start=2):
            parameter += 0.2 / math.sqrt(D_IN) * random(*parameter.shape, seed=seed)
        sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_dec, dim=1))
    return sae


def config(**changes) -> TrainingConfig:
    return TrainingConfig(**{"k": K, "batch_size": BATCH, "lr": 3e-3, **changes})


def gradients(sae: MatryoshkaSAE) -> dict[str, Tensor]:
    return {name: getattr(sae, name).grad.clone() for name in NAMES}


def top_mask(a: Tensor, n: int) -> Tensor:
    """The n largest positive entries of the whole batch."""
    top = torch.topk(a.flatten(), min(n, a.numel()))
    mask = torch.zeros(a.numel(), dtype=torch.bool)
    mask[top.indices[top.values > 0]] = True
    return mask.view_as(a)


def reference(sae: MatryoshkaSAE, x: Tensor, k: int, k_min: int = 1, alpha: float = 0.0, k_aux: int = 0,
              dead: Tensor | None = None) -> dict[str, Tensor]:  # fmt: skip
    """The objective of a Matryoshka SAE with a core, with autograd in float64: loss, aux, activations, four gradients.

    ``k_aux`` strongest of the ``dead`` latents, before selection, reconstruct the residual, which is a constant there.
    """
    free, W_dec, b_enc, b_dec = (getattr(sae, name).detach().double().requires_grad_(True) for name in NAMES)
    x, c = x.double(), sae.n_core
    a = torch.relu((x - b_dec) @ torch.cat([sae.core_rows.double(), free]).T + b_enc)
    core, others = a[:, :c], a[:, c:]
    if sae.core_sparsity == "relu":  # the core is exempt, and the others get what it leaves
        kept = top_mask(others.detach(), max(len(x) * k_min, len(x) * k - int((core > 0).sum())))
        f = torch.cat([core, others * kept], dim=1)
    else:
        f = a * top_mask(a.detach(), len(x) * k)
    loss, xhat = 0.0, None
    for free_latents in sae.prefixes:
        n = c + free_latents
        xhat = f[:, :n] @ W_dec[:n] + b_dec
        loss = loss + ((x - xhat) ** 2).sum(1).mean()
    aux = torch.zeros((), dtype=torch.float64)
    if dead is not None and k_aux:
        residual = (x - xhat).detach()
        pre = others[:, dead]
        top = pre.topk(min(k_aux, len(dead)), dim=1)
        pre = torch.zeros_like(pre).scatter(1, top.indices, top.values)
        rebuilt = pre @ W_dec[c + dead]
        aux = ((residual - rebuilt) ** 2).sum(1).mean() / ((residual - residual.mean(0)) ** 2).sum(1).mean()
    (loss + alpha * aux).backward()
    return {"loss": (loss + alpha * aux).detach(), "aux": aux.detach(), "f": f.detach(),
            **{name: p.grad for name, p in zip(NAMES, (free, W_dec, b_enc, b_dec))}}  # fmt: skip
