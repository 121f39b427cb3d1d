"""Random numbers, latents and SAEs of random weights."""

import torch
from torch import Tensor

from dmsae_lib.distill.core import Latent


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latent(cycle: int, index: int, selected: list[int] | None = None, frequency: float = 0.0) -> Latent:
    """One that was first selected in ``cycle``, at ``index``."""
    return Latent(f"c{cycle}:{index}", cycle, index, index, selected or [cycle], 0.0, 0.0, frequency)
