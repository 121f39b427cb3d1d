"""The rows that stand beside the distilled core: control cores of equal size, and placebo chains.

A control is a function, bound to its name in config.sections.ARMS. To add one, write it here with its
decorator and name it there in its family: ``of latents`` orders the positions of a pool of latents that some
cycle trained, of which the first are taken; ``new rows`` makes unit rows that nothing ever selected, which
get the norms of the core's rows.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dmsae_lib.config.run import Run
from dmsae_lib.config.sections import CONTROLS, LONGER, NEW_ROWS, OTHER_CHAIN
from dmsae_lib.distill.core import Candidates, Core, final_core, read_candidates, read_core
from dmsae_lib.store.artifacts import UserError
from dmsae_lib.store.seeds import generator

NEAR_COPY = 0.9  # |cosine| of encoder rows above which a latent is a copy of another (method, section 5)
ROUNDING = 1e-4  # cosines of one row with itself, at another norm, differ from 1 by less

Function = Callable[..., Tensor]
FUNCTIONS: dict[str, Function] = {}  # of each control


def control(name: str) -> Callable[[Function], Function]:
    """Binds a function to a control: ``new rows`` (core rows, activations, random) to unit rows (size, d_in),
    ``of latents`` (core, pool, random) to positions in the pool, in order of preference."""
    if name not in CONTROLS:
        raise ValueError(f"{name} is no control in config.sections.ARMS: name it there, with its family")

    def bind(function: Function) -> Function:
        FUNCTIONS[name] = function
        return function

    return bind


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """|cosine| of rows (n, d_in) and (m, d_in), (n, m)."""
    return (F.normalize(a, dim=1) @ F.normalize(b, dim=1).T).abs()


@dataclass
class Pool(Candidates):
    """The first-prefix latents of all cycles, near-copies left out: what cores could have been made of."""

    copies: int = 0  # how many were left out


def candidate_pool(cycles: Sequence[Candidates]) -> Pool:
    """The union over cycles, of two rows within |cos| > NEAR_COPY the earlier one (method, section 5).

    A draw of copies would span less than the distilled core, and lose for that reason alone.
    """
    ids = [name for part in cycles for name in part.ids]
    rows = torch.cat([part.rows for part in cycles])
    frequency = torch.cat([part.frequency for part in cycles])
    near = cosines(rows, rows) > NEAR_COPY
    kept: list[int] = []
    for i in range(len(rows)):
        if not near[i, kept].any():
            kept.append(i)
    return Pool([ids[i] for i in kept], rows[kept], frequency[kept], len(ids) - len(kept))


@control("random")
def _random(core: Core, pool: Pool, random: Generator) -> Tensor:
    return torch.randperm(len(pool.ids), generator=random)


@control("random_outside")
def _random_outside(core: Core, pool: Pool, random: Generator) -> Tensor:
    """Those that are no near-copy of a core latent."""
    outside = (~(cosines(pool.rows, core.rows) > NEAR_COPY).any(1)).nonzero().squeeze(1)
    return outside[torch.randperm(len(outside), generator=random)]


@control("most_frequent")
def _most_frequent(core: Core, pool: Pool, random: Generator) -> Tensor:
    return torch.argsort(pool.frequency, descending=True, stable=True)


@control("random_directions")
def _random_directions(rows: Tensor, x: Tensor, random: Generator) -> Tensor:
    return F.normalize(torch.randn(rows.shape, generator=random), dim=1)


@control("data_points")
def _data_points(rows: Tensor, x: Tensor, random: Generator) -> Tensor:
    """Random activations, less their mean."""
    _enough("data_points", len(rows), len(x), "raise data.train_tokens or lower sae.prefixes[0]")
    chosen = torch.randperm(len(x), generator=random)[: len(rows)]
    return F.normalize((x - x.mean(0))[chosen], dim=1)


@control("pca")
def _pca(rows: Tensor, x: Tensor, random: Generator) -> Tensor:
    """The leading principal directions, each with both signs, so that ReLU sees both."""
    _enough("pca", len(rows), 2 * rows.shape[1], "lower sae.prefixes[0]")
    centred = x - x.mean(0)
    directions = torch.linalg.eigh((centred.T @ centred).double()).eigenvectors.flip(1).T.float()
    return torch.stack([directions, -directions], dim=1).flatten(0, 1)[: len(rows)]


@control("rotated")
def _rotated(rows: Tensor, x: Tensor, random: Generator) -> Tensor:
    """The core's rows, turned at random within their own span; mutual cosines stay."""
    basis = torch.linalg.svd(rows, full_matrices=False).Vh[: torch.linalg.matrix_rank(rows)]
    turn = torch.linalg.qr(torch.randn(len(basis), len(basis), generator=random)).Q
    return F.normalize(rows @ basis.T @ turn @ basis, dim=1)


def _enough(kind: str, size: int, most: int, remedy: str) -> None:
    if size > most:
        raise UserError(
            f"The control core {kind} needs {size} rows and can have {most} at most: {remedy}, or drop it."
        )


class Frozen(NamedTuple):
    """Encoder rows (size, d_in); of latents also the ids, and frequencies (size,) in their own cycle."""

    rows: Tensor
    ids: list[str] | None = None
    frequency: Tensor | None = None


def control_core(kind: str, core: Core, pool: Pool, x: Tensor, random: Generator) -> Frozen:
    """A control: as many rows as ``core`` has. ``x`` (tokens, d_in) are normalised activations."""
    if kind not in FUNCTIONS:
        raise UserError(f"There is no control core {kind!r}: use one of {', '.join(FUNCTIONS)}.")
    if kind in NEW_ROWS:
        return Frozen(_new_rows(kind, core.rows, x, random))
    order = FUNCTIONS[kind](core, pool, random)
    if len(order) < len(core):
        raise UserError(
            f"The control core {kind} needs {len(core)} latents and all first prefixes together hold "
            f"{len(order)} that differ: raise sae.prefixes[0] or distill.cycles, or drop the control."
        )
    chosen = order[: len(core)]
    return Frozen(pool.rows[chosen], [pool.ids[i] for i in chosen], pool.frequency[chosen])


def _new_rows(kind: str, rows: Tensor, x: Tensor, random: Generator) -> Tensor:
    """Rows that no training has selected, with the norms of ``rows`` (size, d_in)."""
    return FUNCTIONS[kind](rows, x, random) * rows.norm(dim=1, keepdim=True)


def placebo_rows(kind: str, core: Core, survivors: Tensor, x: Tensor, random: Generator) -> Tensor:
    """Encoder rows (size of ``core``, d_in) of a placebo chain: those selected again, then new ones.

    A core in cycle t holds what all selections before have kept. So does a placebo chain: its ``survivors``
    (n, d_in) stay, and rows that nothing ever selected fill it up, with the norms of the core's rows. No row
    is in it twice: a principal component that has survived is not drawn again.
    """
    new = _new_rows(kind, core.rows, x, random)
    there = (F.normalize(new, dim=1) @ F.normalize(survivors, dim=1).T > 1 - ROUNDING).any(1)
    return torch.cat([survivors, new[~there]])[: len(core)]


@dataclass
class Arms:
    """What one distillation chain gives its retraining, and the final cores of those that differ in seed."""

    core: Core
    pool: Pool
    seed: int  # of the chain
    chain: str
    others: list[Core] = field(default_factory=list)

    def frozen(self, arm: str, seed: int, x: Tensor) -> Frozen | None:
        """What an arm freezes, or begins with where it is unfrozen; None where the SAE is an ordinary one."""
        if arm == "none" or arm in LONGER:
            return None
        random = generator(self.seed, "control", self.chain, arm, seed)
        if arm in CONTROLS:
            return control_core(arm, self.core, self.pool, x, random)
        if arm == "cold_start":  # what free latents start with
            return Frozen(F.normalize(torch.randn(self.core.rows.shape, generator=random), dim=1))
        if arm == OTHER_CHAIN:  # whole, whatever its size; draws beyond the last chain begin again
            if not self.others:
                raise UserError(f"The arm {arm} needs another chain's core, and there is none: add a chain.")
            other = self.others[seed % len(self.others)]
            return Frozen(other.rows, None, other.frequency)
        if arm in ("distilled", "warm_start"):
            return Frozen(self.core.rows, [latent.id for latent in self.core.latents], self.core.frequency)
        raise UserError(f"retrain names the arm {arm}, and Arms.frozen makes nothing of it: write it there.")

    def overlap(self, ids: list[str] | None) -> float | None:
        """Share of latents ``ids`` that the distilled core holds; None for rows that are no latents."""
        members = {latent.id for latent in self.core.latents}
        return None if ids is None else sum(name in members for name in ids) / len(ids)


def open_arms(run: Run, chain: str = "main") -> Arms:
    """From the core artefacts of a chain's cycles, and with the arm ``other_chain`` from those of others;
    ArtifactError where one is missing."""
    cfg = run.config.for_chain(chain)
    made = [run.load(t, "core", chain) for t in range(cfg.distill.cycles + 1)]
    pool = candidate_pool([read_candidates(artifact) for artifact in made])
    asked = run.config.other_chains(chain) if OTHER_CHAIN in run.config.arms(chain) else []
    others = [open_final_core(run, name) for name in asked]
    return Arms(open_final_core(run, chain), pool, cfg.seed, chain, others)


def open_final_core(run: Run, chain: str = "main") -> Core:
    """The final core of a chain, as the configuration reads it; ArtifactError where it is missing."""
    distill = run.config.distill
    return final_core(read_core(run.load(distill.cycles, "core", chain)), distill.final_core)


def rows_hash(rows: Tensor) -> str:
    """sha256 of encoder rows: an SAE depends on which rows it was given, however they were chosen."""
    return hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest()


def geometry(rows: Tensor) -> dict[str, float]:
    """{rank, norm, norm_min, norm_max} of encoder rows (size, d_in).

    ``rank`` is the participation rank (sum e)^2 / sum e^2 of the eigenvalues e of the rows' Gram matrix: size
    for orthogonal rows of one norm, 1 for copies of one row. A control of lower rank is weaker for being
    redundant alone.
    """
    eigenvalues, norms = torch.linalg.svdvals(rows.double()).square(), rows.double().norm(dim=1)
    rank = eigenvalues.sum() ** 2 / eigenvalues.square().sum()
    found = {"rank": rank, "norm": norms.mean(), "norm_min": norms.min(), "norm_max": norms.max()}
    return {name: float(value) for name, value in found.items()}
