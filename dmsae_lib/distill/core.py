"""The core: frozen encoder rows with their lineage, how it is selected, its final readings, and its
controls."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dmsae_lib.config.sections import CONTROLS, NEW_ROWS, OF_LATENTS
from dmsae_lib.distill.attribution import smallest_cover
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.store import artifacts
from dmsae_lib.store.artifacts import Artifact, UserError

NEAR_COPY = 0.9  # |cosine| of encoder rows above which a latent is a copy of another (method, section 5)
ROUNDING = 1e-4  # cosines of one row with itself, at another norm, differ from 1 by less
READINGS = ("all_of_last", "last_two", "every_since_first", "alive_since_0")


@dataclass(frozen=True)
class Latent:
    """One core latent: where it comes from and how it did in the last cycle that selected it."""

    id: str  # "c<first cycle>:<index in that cycle's SAE>"
    first_cycle: int
    first_index: int
    index: int  # in the SAE of the cycle that this core was distilled from
    selected: list[int] = field(default_factory=list)  # every cycle that selected it
    score: float = 0.0
    share: float = 0.0  # of the total score of all candidates
    frequency: float = 0.0  # share of tokens where it is active


@dataclass
class Core:
    """W_enc rows (size, d_in) float32 in the gauge of unit normalised activations, and their lineage, in
    order."""

    cycle: int
    rows: Tensor
    latents: list[Latent]
    parent: str | None = None  # hash of the core that the cycle trained with

    def __len__(self) -> int:
        return len(self.rows)

    def describe(self, coverage: float, aggregator: str) -> dict[str, Any]:
        """core.json."""
        origins: dict[str, int] = {}
        for latent in self.latents:
            origins[str(latent.first_cycle)] = origins.get(str(latent.first_cycle), 0) + 1
        kept = sum(latent.first_cycle < self.cycle for latent in self.latents)
        return {
            "cycle": self.cycle,
            "size": len(self),
            "kept": kept,
            "origins": dict(sorted(origins.items())),
            "parent": self.parent,
            "coverage": coverage,
            "aggregator": aggregator,
            "latents": [asdict(latent) for latent in self.latents],
        }


def distil(
    cycle: int,
    sae: MatryoshkaSAE,
    scores: Tensor,
    frequency: Tensor,
    previous: Core | None,
    coverage: float,
    parent: str | None,
) -> Core:
    """C(t): the smallest set of candidates (core first, then prefix 0) with share >= ``coverage`` (method,
    section 4).

    Latents of the previous core that are not selected again drop out. The new core keeps the candidates'
    order, so old latents come first.
    """
    if float(scores.sum()) <= 0:
        raise UserError(
            f"Cycle {cycle}: no candidate contributes to the loss (all attribution scores are 0); "
            "raise data.select_tokens or training.k."
        )
    share = scores / scores.sum()
    latents, rows = [], torch.cat([sae.core_rows, sae.free_rows])
    chosen = sorted(smallest_cover(scores, coverage).tolist())
    for index in chosen:
        if index < sae.n_core:
            old = previous.latents[index]
            latent = replace(old, index=index, selected=[*old.selected, cycle])
        else:
            latent = Latent(f"c{cycle}:{index}", cycle, index, index, [cycle])
        latents.append(
            replace(
                latent,
                score=float(scores[index]),
                share=float(share[index]),
                frequency=float(frequency[index]),
            )
        )
    return Core(cycle, rows[chosen].detach().clone(), latents, parent)


def save_core(writer: artifacts.Writer, core: Core, coverage: float, aggregator: str) -> None:
    writer.tensors("core.safetensors", {"W_enc": core.rows.T})
    writer.json("core.json", core.describe(coverage, aggregator))


def read_core(artifact: Artifact) -> Core:
    record = artifact.json("core.json")
    rows = artifact.tensors("core.safetensors")["W_enc"].T.contiguous()
    return Core(record["cycle"], rows, [Latent(**latent) for latent in record["latents"]], record["parent"])


def reading_members(last: Core, reading: str) -> list[int]:
    """Positions in the last core of the latents that belong to the "final core" under a reading of the paper.

    all_of_last: all of C(T). last_two: those in C(T-1) too. every_since_first: selected in every cycle since
    their first and not new in the last. alive_since_0: selected in every cycle from 0 on.
    """
    T = last.cycle
    rules = {
        "all_of_last": lambda s: True,
        "last_two": lambda s: T - 1 in s,
        "every_since_first": lambda s: s[0] < T and s == list(range(s[0], T + 1)),
        "alive_since_0": lambda s: s == list(range(T + 1)),
    }
    return [i for i, latent in enumerate(last.latents) if rules[reading](latent.selected)]


def final_core(last: Core, reading: str) -> Core:
    """The final core under a reading; UserError if it is empty."""
    members = reading_members(last, reading)
    if not members:
        raise UserError(
            f"distill.final_core is {reading}: no latent of the last core fits that reading; use all_of_last."
        )
    return Core(last.cycle, last.rows[members], [last.latents[i] for i in members], last.parent)


@dataclass
class Pool:
    """The first-prefix latents of all cycles, near-copies left out: what cores could have been made of."""

    ids: list[str]
    rows: Tensor  # (n, d_in)
    frequency: Tensor  # (n,)
    copies: int = 0  # how many were left out


def candidate_pool(cycles: list[tuple[int, MatryoshkaSAE, Tensor]]) -> Pool:
    """Union over cycles of the free prefix-0 latents; each entry is (cycle, SAE, frequency of its
    candidates).

    Of two rows within |cos| > NEAR_COPY the earlier one stays (method, section 5): a draw of copies would
    span less than the distilled core, and lose for that reason alone.
    """
    ids, rows, frequency = [], [], []
    for cycle, sae, of_candidates in cycles:
        c, m = sae.n_core, sae.prefixes[0]
        ids += [f"c{cycle}:{c + i}" for i in range(m)]
        rows.append(sae.free_rows[:m].detach())
        frequency.append(of_candidates[c : c + m])
    rows, frequency = torch.cat(rows), torch.cat(frequency)
    near = cosines(rows, rows) > NEAR_COPY
    kept: list[int] = []
    for i in range(len(rows)):
        if not near[i, kept].any():
            kept.append(i)
    return Pool([ids[i] for i in kept], rows[kept], frequency[kept], len(ids) - len(kept))


class Frozen(NamedTuple):
    """Encoder rows (size, d_in) to freeze; where they are latents, their ids and how often they fired in
    their own cycle."""

    rows: Tensor
    ids: list[str] | None = None
    frequency: Tensor | None = None  # (size,)


def control_core(kind: str, core: Core, pool: Pool, x: Tensor, random: torch.Generator) -> Frozen:
    """A control: as many rows as ``core`` has.

    random: drawn from the pool without replacement. random_outside: from those that are no near-copy of a
    core latent. most_frequent: the pool's most often active latents. The others have the norms of the core's
    rows (method, section 5): random_directions: random ones. data_points: random activations of ``x``
    (tokens, d_in), less their mean. pca: the leading principal directions of ``x``, each with both signs, so
    that ReLU sees both. rotated: the core's rows, turned at random within their own span; norms and mutual
    cosines stay.
    """
    size = len(core)
    if kind in NEW_ROWS:
        return Frozen(_new_rows(kind, core.rows, x, random))
    if kind not in OF_LATENTS:
        raise UserError(f"There is no control core {kind!r}: use one of {', '.join(CONTROLS)}.")
    of = torch.arange(len(pool.ids))
    if kind == "random_outside":
        of = of[~(cosines(pool.rows, core.rows) > NEAR_COPY).any(1)]
    if len(of) < size:
        raise UserError(
            f"The control core {kind} needs {size} latents and all first prefixes together hold "
            f"{len(of)} that differ: raise sae.prefixes[0] or distill.cycles, or drop the control."
        )
    order = (
        torch.argsort(pool.frequency, descending=True, stable=True)
        if kind == "most_frequent"
        else of[torch.randperm(len(of), generator=random)]
    )
    chosen = order[:size]
    return Frozen(pool.rows[chosen], [pool.ids[i] for i in chosen], pool.frequency[chosen])


def placebo_rows(kind: str, core: Core, survivors: Tensor, x: Tensor, random: torch.Generator) -> Tensor:
    """Encoder rows (size of ``core``, d_in) of a placebo chain: rows of the chain that were selected again,
    then new ones.

    A core in cycle t holds what all selections before have kept. So does a placebo chain: its ``survivors``
    (n, d_in) stay, and rows that nothing ever selected fill it up, with the norms of the core's rows. No row
    is in it twice: a principal component that has survived is not drawn again.
    """
    new = _new_rows(kind, core.rows, x, random)
    there = (F.normalize(new, dim=1) @ F.normalize(survivors, dim=1).T > 1 - ROUNDING).any(1)
    return torch.cat([survivors, new[~there]])[: len(core)]


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """|cosine| of rows (n, d_in) and (m, d_in), (n, m)."""
    return (F.normalize(a, dim=1) @ F.normalize(b, dim=1).T).abs()


def _new_rows(kind: str, rows: Tensor, x: Tensor, random: torch.Generator) -> Tensor:
    """Rows that no training has selected, with the norms of ``rows`` (size, d_in)."""
    return _directions(kind, rows, x, random) * rows.norm(dim=1, keepdim=True)


def _directions(kind: str, rows: Tensor, x: Tensor, random: torch.Generator) -> Tensor:
    """Unit rows (size, d_in) that no training has selected."""
    size, d_in = rows.shape
    if kind == "random_directions":
        return F.normalize(torch.randn(size, d_in, generator=random), dim=1)
    if kind == "rotated":
        basis = torch.linalg.svd(rows, full_matrices=False).Vh[: torch.linalg.matrix_rank(rows)]
        turn = torch.linalg.qr(torch.randn(len(basis), len(basis), generator=random)).Q
        return F.normalize(rows @ basis.T @ turn @ basis, dim=1)
    most, setting = (
        (2 * d_in, "sae.prefixes[0]")
        if kind == "pca"
        else (len(x), "data.train_tokens or lower sae.prefixes[0]")
    )
    if size > most:
        raise UserError(
            f"The control core {kind} needs {size} rows and can have {most} at most: "
            f"{'lower' if kind == 'pca' else 'raise'} {setting}, or drop the control."
        )
    centred = x - x.mean(0)
    if kind == "data_points":
        return F.normalize(centred[torch.randperm(len(x), generator=random)[:size]], dim=1)
    directions = torch.linalg.eigh((centred.T @ centred).double()).eigenvectors.flip(1).T.float()
    return torch.stack([directions, -directions], dim=1).flatten(0, 1)[:size]


def geometry(rows: Tensor) -> dict[str, float]:
    """{rank, norm, norm_min, norm_max} of encoder rows (size, d_in).

    ``rank`` is the participation rank (sum e)^2 / sum e^2 of the eigenvalues e of the rows' Gram matrix: size
    for orthogonal rows of one norm, 1 for copies of one row. A control of lower rank is weaker for being
    redundant alone.
    """
    eigenvalues, norms = torch.linalg.svdvals(rows.double()).square(), rows.double().norm(dim=1)
    return {
        "rank": float(eigenvalues.sum() ** 2 / eigenvalues.square().sum()),
        "norm": float(norms.mean()),
        "norm_min": float(norms.min()),
        "norm_max": float(norms.max()),
    }
