"""A small SAE with random weights, and its batches."""

import math

import torch
from reference import TRAINED
from torch import Tensor

from dmsae_lib.config.sections import TrainingConfig
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.store.seeds import generator

D_IN, D_SAE, CORE, PREFIXES, BATCH, K = 16, 60, 7, (8, 21), 96, 9


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(seed: int, size: int = BATCH) -> Tensor:
    """Mean ||x||^2 near 1, with a mean that is not zero."""
    return (random(size, D_IN, seed=1000 + seed) + 0.3) / math.sqrt(D_IN)


def make_sae(core: int = CORE, core_sparsity: str = "relu", prefixes: tuple = PREFIXES) -> MatryoshkaSAE:
    """Initialised and then perturbed, so that encoder and decoder, and all biases, differ."""
    rows = torch.nn.functional.normalize(random(core, D_IN, seed=1), dim=1) if core else None
    sae = MatryoshkaSAE(D_IN, D_SAE, prefixes, rows, core_sparsity)
    sae.initialise(generator(0, "init", "free"), batch(99))
    with torch.no_grad():
        for seed, parameter in enumerate(sae.parameters(), start=2):
            parameter += 0.2 / math.sqrt(D_IN) * random(*parameter.shape, seed=seed)
        sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_dec, dim=1))
    return sae


def config(**changes) -> TrainingConfig:
    return TrainingConfig(**{"k": K, "batch_size": BATCH, "lr": 3e-3, **changes})


def gradients(sae: MatryoshkaSAE) -> dict[str, Tensor]:
    return {name: getattr(sae, name).grad.clone() for name in TRAINED}
