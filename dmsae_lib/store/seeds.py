"""Random streams by name: a new consumer of randomness changes nothing for the others."""

import hashlib

import torch


def generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator that depends on ``seed`` and the names alone: ``generator(0, "order", "cycle", 3)``."""
    text = "/".join([str(seed), *map(str, names)])
    value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(value)
