"""The core: frozen encoder rows with their lineage, how it is selected, and its final readings."""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from dmsae_lib.distill.attribution import smallest_cover
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.store.artifacts import Artifact, ArtifactError, UserError, Writer

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Latent:
    """One core latent: where it comes from and how it did in the last cycle that selected it.

    id: c<first cycle>:<index in that cycle's SAE>. index: in the SAE that this core was distilled from.
    selected: every cycle that selected it, in order. share: of the score of all candidates. frequency: share
    of tokens where it is active.
    """

    __pydantic_config__ = STRICT  # where a core is read that others may have written

    id: Annotated[str, Field(pattern=r"^c[0-9]+:[0-9]+$")]
    first_cycle: Count
    first_index: Count
    index: Count
    selected: Annotated[list[Count], Field(min_length=1)]
    score: Annotated[float, Field(ge=0)]
    share: Share
    frequency: Share


@dataclass
class Core:
    """Encoder rows (size, d_in) float32 for normalised activations, and whose they are, in order."""

    cycle: int
    rows: Tensor
    latents: list[Latent]
    parent: str | None = None  # hash of the core that the cycle trained with

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def W_enc(self) -> Tensor:
        """(d_in, size): the first columns of an encoder."""
        return self.rows.T.contiguous()

    @property
    def d_in(self) -> int:
        return self.rows.shape[1]

    @property
    def frequency(self) -> Tensor:
        """Share of tokens on which each latent fired in its last cycle, (size,)."""
        return torch.tensor([latent.frequency for latent in self.latents])

    def describe(self, coverage: float, aggregator: str) -> dict[str, Any]:
        """core.json of a run's core."""
        origins = Counter(str(latent.first_cycle) for latent in self.latents)
        kept = sum(latent.first_cycle < self.cycle for latent in self.latents)
        made = {
            "cycle": self.cycle,
            "size": len(self),
            "kept": kept,
            "origins": dict(sorted(origins.items())),
        }
        made |= {"parent": self.parent, "coverage": coverage, "aggregator": aggregator}
        return made | {"latents": [asdict(latent) for latent in self.latents]}


@dataclass
class Candidates:
    """Free latents of first prefixes, which cores are made of: ids, rows (n, d_in), frequency (n,)."""

    ids: list[str]
    rows: Tensor
    frequency: Tensor  # share of tokens, in their own cycle

    @classmethod
    def of(cls, cycle: int, sae: MatryoshkaSAE, frequency: Tensor) -> "Candidates":
        """Those of one cycle; ``frequency`` is that of all its candidates, the core's first."""
        c, m = sae.n_core, sae.prefixes[0]
        ids = [f"c{cycle}:{c + i}" for i in range(m)]
        return cls(ids, sae.free_rows[:m].detach(), frequency[c : c + m])


def distil(
    cycle: int,
    sae: MatryoshkaSAE,
    scores: Tensor,
    frequency: Tensor,
    previous: Core | None,
    coverage: float,
    parent: str | None,
) -> Core:
    """C(t): the smallest set of candidates (core first, then prefix 0) with share >= ``coverage``.

    Latents of the previous core that are not selected again drop out. The new core keeps the candidates'
    order, so old latents come first.
    """
    if float(scores.sum()) <= 0:
        raise UserError(
            f"Cycle {cycle}: no candidate contributes to the loss (all attribution scores are 0); "
            "raise data.select_tokens or training.k."
        )
    old, share = previous.latents if previous else [], scores / scores.sum()
    latents, rows = [], torch.cat([sae.core_rows, sae.free_rows])
    chosen = sorted(smallest_cover(scores, coverage).tolist())
    for index in chosen:
        new = Latent(f"c{cycle}:{index}", cycle, index, index, [], 0, 0, 0)
        before = old[index] if index < sae.n_core else new
        now = {"index": index, "selected": [*before.selected, cycle], "score": float(scores[index])}
        latents.append(replace(before, **now, share=float(share[index]), frequency=float(frequency[index])))
    return Core(cycle, rows[chosen].detach().clone(), latents, parent)


def save_core(writer: Writer, core: Core, candidates: Candidates, coverage: float, aggregator: str) -> None:
    """A cycle's core, and what it was selected from besides the core before: controls are made of that."""
    writer.tensors("core.safetensors", {"W_enc": core.W_enc})
    writer.json("core.json", core.describe(coverage, aggregator))
    writer.tensors("candidates.safetensors", {"rows": candidates.rows, "frequency": candidates.frequency})
    writer.json("candidates.json", candidates.ids)


def read_core(artifact: Artifact) -> Core:
    record = artifact.json("core.json")
    rows = artifact.tensors("core.safetensors")["W_enc"].T.contiguous()
    return Core(record["cycle"], rows, [Latent(**latent) for latent in record["latents"]], record["parent"])


def read_candidates(artifact: Artifact) -> Candidates:
    """ArtifactError for a core of an earlier release, which kept none."""
    if "candidates.json" not in artifact.files:
        what = f"{artifact.folder} holds a core without the candidates that controls are drawn from"
        raise ArtifactError(what, "delete it and run make again")
    return Candidates(artifact.json("candidates.json"), **artifact.tensors("candidates.safetensors"))


# Which latents of the last core, C(T), the paper's "final core" may mean: by the cycles that selected one,
# and T.
READINGS = {
    "all_of_last": lambda selected, T: True,
    "last_two": lambda selected, T: T - 1 in selected,
    "every_since_first": lambda selected, T: selected[0] < T and selected == list(range(selected[0], T + 1)),
    "alive_since_0": lambda selected, T: selected == list(range(T + 1)),
}


def reading_members(last: Core, reading: str) -> list[int]:
    """Positions in the last core of the latents that belong to the final core under a reading."""
    fits = READINGS[reading]
    return [i for i, latent in enumerate(last.latents) if fits(latent.selected, last.cycle)]


def final_core(last: Core, reading: str) -> Core:
    """The final core under a reading; UserError if it is empty."""
    members = reading_members(last, reading)
    if not members:
        raise UserError(
            f"distill.final_core is {reading}: no latent of the last core fits that reading; use all_of_last."
        )
    return Core(last.cycle, last.rows[members], [last.latents[i] for i in members], last.parent)
