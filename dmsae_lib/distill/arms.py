"""The cores that notebook 05 retrains with: the distilled one and its controls, from the artefacts of all
cycles."""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dmsae_lib.config.run import Run
from dmsae_lib.config.sections import CONTROLS, LONGER
from dmsae_lib.distill.core import Core, Frozen, Pool, candidate_pool, control_core, final_core, read_core
from dmsae_lib.sae.model import load_folded
from dmsae_lib.store.seeds import generator


@dataclass
class Arms:
    """What one distillation chain gives its retraining."""

    core: Core
    pool: Pool
    seed: int  # of the chain
    chain: str

    @property
    def frequency(self) -> Tensor:
        """Share of tokens on which each core latent fired in its last cycle, (size,)."""
        return torch.tensor([latent.frequency for latent in self.core.latents])


def open_arms(run: Run, chain: str = "main") -> Arms:
    """Load a chain's cores and first prefixes; ArtifactError where a cycle is missing."""
    cfg, cycles = run.config.for_chain(chain), []
    for t in range(cfg.distill.cycles + 1):
        table = run.load(t, "attribution", chain).csv("table.csv")
        frequency = torch.tensor([float(row["frequency"]) for row in table], dtype=torch.float64)
        cycles.append((t, load_folded(run.load(t, "sae", chain)), frequency))
    core = read_core(run.load(cfg.distill.cycles, "core", chain))
    return Arms(final_core(core, cfg.distill.final_core), candidate_pool(cycles), cfg.seed, chain)


def frozen(arms: Arms, arm: str, seed: int, x: Tensor) -> Frozen | None:
    """What an arm freezes; ``warm_start`` and ``cold_start`` only begin with such rows. None where the SAE is
    an ordinary one.

    ``x`` (tokens, d_in) are normalised activations, of which some controls are made.
    """
    if arm == "none" or arm in LONGER:
        return None
    random = generator(arms.seed, "control", arms.chain, arm, seed)
    if arm in CONTROLS:
        return control_core(arm, arms.core, arms.pool, x, random)
    if arm == "cold_start":  # what free latents start with
        return Frozen(F.normalize(torch.randn(arms.core.rows.shape, generator=random), dim=1))
    return Frozen(arms.core.rows, [latent.id for latent in arms.core.latents], arms.frequency)


def overlap(arms: Arms, ids: list[str] | None) -> float | None:
    """Share of latents ``ids`` that the distilled core holds; None for rows that are no latents."""
    members = {latent.id for latent in arms.core.latents}
    return None if ids is None else sum(name in members for name in ids) / len(ids)


def rows_hash(rows: Tensor) -> str:
    """sha256 of encoder rows: an SAE depends on which rows it was given, however they were chosen."""
    return hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest()
