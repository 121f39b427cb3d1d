"""The cores that notebook 05 retrains with: the distilled one and its controls, from the artefacts of all cycles."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from dmsae_lib import artifacts
from dmsae_lib.config import Run
from dmsae_lib.core import Core, Pool, candidate_pool, control_core, final_core, read_core
from dmsae_lib.sae import load_sae
from dmsae_lib.seeds import generator
from dmsae_lib.settings import CONTROLS, LONGER


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
        sae = artifacts.load(run.cycle(t, "sae", chain), "sae", f"stages STAGE={run.stage(t, 'train', chain)}")
        made_by = f"stages STAGE={run.stage(t, 'attribute', chain)}"
        table = artifacts.load(run.cycle(t, "attribution", chain), "attribution", made_by)
        frequency = torch.tensor([float(row["frequency"]) for row in table.csv("table.csv")], dtype=torch.float64)
        cycles.append((t, load_sae(sae), frequency))
    last = cfg.distill.cycles
    core = artifacts.load(run.cycle(last, "core", chain), "core", f"stages STAGE={run.stage(last, 'distill', chain)}")
    return Arms(final_core(read_core(core), cfg.distill.final_core), candidate_pool(cycles), cfg.seed, chain)


def core_rows(arms: Arms, arm: str, seed: int, x: Tensor) -> tuple[Tensor | None, float | None]:
    """Encoder rows (size, d_in) of an arm's core, None without one; and its overlap with the distilled core.

    ``x`` (tokens, d_in) are normalised activations, of which some controls are made. The overlap is None for rows that are
    no latents, and for arms without a core.
    """
    if arm == "none" or arm in LONGER:
        return None, None
    if arm not in CONTROLS:
        return arms.core.rows, 1.0
    rows, ids = control_core(arm, arms.core, arms.pool, x, generator(arms.seed, "control", arms.chain, arm, seed))
    members = {latent.id for latent in arms.core.latents}
    return rows, sum(name in members for name in ids) / len(rows) if ids else None


def rows_hash(rows: Tensor) -> str:
    """sha256 of encoder rows: an SAE depends on which rows it was given, however they were chosen."""
    return hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest()
