"""What the tests of SAEBench's evals share: SAEs of given rows, benches, and a process's state."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmsae_lib.config.sections import ModelConfig, SaebenchConfig, SuiteConfig
from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.sae.model import FoldedSAE
from dmsae_lib.saebench.runner import Bench


def sae_of(encoder: Tensor, decoder: Tensor | None = None, threshold: float = 0.0) -> FoldedSAE:
    """Latents that read ``encoder`` (d_sae, d_in) and write ``decoder``, by default the same rows."""
    sae = FoldedSAE(encoder.shape[1], len(encoder), (1,))
    rows = {"free_rows": encoder, "W_dec": encoder if decoder is None else decoder}
    sae.load_state_dict(sae.state_dict() | rows)
    sae.threshold.fill_(threshold)
    return sae.requires_grad_(False)


def make_bench(
    cache: Path, rows: np.ndarray | None = None, sets: list[str] | None = None, **settings: Any
) -> Bench:
    """A bench with settings of the sections saebench and saebench.suite, paths included."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    suite = {name: value for name, value in settings.items() if name in SuiteConfig.model_fields}
    own = {name: value for name, value in settings.items() if name not in suite}
    rows = np.empty((0, 0), dtype=np.int64) if rows is None else rows
    return Bench(SaebenchConfig(suite=SuiteConfig(**suite), **own), rows, tuple(sets or ()), cache)


def load_model(folder: Path, layer: int = 0, context: int = 32) -> LanguageModel:
    hook = f"blocks.{layer}.hook_resid_post"
    return LanguageModel(ModelConfig(name=str(folder), hook_name=hook, context_size=context))


def state(*places: Path) -> tuple[Any, ...]:
    """What an eval must leave as it was: settings and random numbers, and the files in ``places``."""
    draws = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
    files = {path for place in places for path in place.rglob("*") if "__pycache__" not in path.parts}
    return torch.is_grad_enabled(), torch.get_num_threads(), *draws, files
