"""Random numbers, latents, and a small SAE of random weights with its batches."""

import math

import torch
from reference import TRAINED
from torch import Tensor

from dmsae_lib.config.sections import TrainingConfig
from dmsae_lib.distill.core import Latent
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.store.seeds import generator

D_IN, D_SAE, CORE, PREFIXES, BATCH, K = 16, 60, 7, (8, 21), 96, 9


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latent(cycle: int, index: int, selected: list[int] | None = None, frequency: float = 0.0) -> Latent:
    """One that was first selected in ``cycle``, at ``index``."""
    return Latent(f"c{cycle}:{index}", cycle, index, index, selected or [cycle], 0.0, 0.0, frequency)


def batch(seed: int, size: int = BATCH) -> Tensor:
    """Mean ||x||^2 near 1, with a mean that is not zero."""
    return (random(size, D_IN, seed=1000 + seed) + 0.3) / math.sqrt(D_IN)


def make_sae(
    core: int = CORE,
    core_sparsity: str = "relu",
    prefixes: tuple = PREFIXES,
    d_sae: int = D_SAE,
    first: Tensor | None = None,
) -> MatryoshkaSAE:
    """Initialised on ``first`` and then perturbed, so that encoder and decoder, and all biases, differ."""
    first = batch(99) if first is None else first
    d_in = first.shape[1]
    rows = torch.nn.functional.normalize(random(core, d_in, seed=1), dim=1) if core else None
    sae = MatryoshkaSAE(d_in, d_sae, prefixes, rows, core_sparsity)
    sae.initialise(generator(0, "init", "free"), first)
    with torch.no_grad():
        for seed, parameter in enumerate(sae.parameters(), start=2):
            parameter += 0.2 / math.sqrt(d_in) * random(*parameter.shape, seed=seed)
        sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_dec, dim=1))
    return sae


def config(**changes) -> TrainingConfig:
    return TrainingConfig(**{"k": K, "batch_size": BATCH, "lr": 3e-3, **changes})


def gradients(sae: MatryoshkaSAE) -> dict[str, Tensor]:
    return {name: getattr(sae, name).grad.clone() for name in TRAINED}


def with_rows(model, rows: int):
    """The same model, read ``rows`` contexts at a time."""
    other = object.__new__(type(model))
    other.__dict__.update(model.__dict__, config=model.config.model_copy(update={"batch_rows": rows}))
    return other
