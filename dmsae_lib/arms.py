"""The cores that notebook 05 retrains with: the distilled one and its controls, from the artefacts of all cycles."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dmsae_lib import artifacts
from dmsae_lib.artifacts import hash_json
from dmsae_lib.config import Run
from dmsae_lib.core import Core, Pool, candidate_pool, control_core, final_core, read_core
from dmsae_lib.sae import load_sae
from dmsae_lib.settings import LONGER


@dataclass
class Arms:
    core: Core
    pool: Pool
    parents: dict[str, str]  # every cycle's SAE and the last core

    @cached_property
    def hash(self) -> str:
        """What every SAE with a core depends on."""
        return hash_json([self.parents, [latent.id for latent in self.core.latents]])

    @property
    def frequency(self) -> Tensor:
        """Share of tokens on which each core latent fired in its last cycle, (size,)."""
        return torch.tensor([latent.frequency for latent in self.core.latents])


def open_arms(run: Run) -> Arms:
    """Load the main chain's cores and first prefixes; ArtifactError where a cycle is missing."""
    cfg, cycles, parents = run.config, [], {}
    for t in range(cfg.distill.cycles + 1):
        sae = artifacts.load(run.cycle(t, "sae"), "sae", f"stages STAGE=cycle_{t}_train")
        table = artifacts.load(run.cycle(t, "attribution"), "attribution", f"stages STAGE=cycle_{t}_attribute")
        frequency = torch.tensor([float(row["frequency"]) for row in table.csv("table.csv")], dtype=torch.float64)
        cycles.append((t, load_sae(sae), frequency))
        parents[f"cycle_{t}"] = sae.hash
    last = artifacts.load(run.cycle(cfg.distill.cycles, "core"), "core", f"stages STAGE=cycle_{cfg.distill.cycles}_distill")
    return Arms(final_core(read_core(last), cfg.distill.final_core), candidate_pool(cycles), parents | {"core": last.hash})


def core_rows(arms: Arms, arm: str, seed: int) -> tuple[Tensor | None, float | None]:
    """Encoder rows (size, d_in) of an arm's core, None without one; and its overlap with the distilled core."""
    if arm == "none" or arm in LONGER:
        return None, None
    if arm == "distilled":
        return arms.core.rows, 1.0
    return control_core(arm, arms.core, arms.pool, seed)
