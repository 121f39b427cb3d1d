"""Which latents an atlas shows, and where they come from.

The main chain's final core and, to compare, the free latents of the first prefix of the same SAE, that of the
last cycle; then the final cores of the other chains among ``RunConfig.exemplars``.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dmsae_lib.config.run import Run
from dmsae_lib.distill.core import Core, final_core, read_core
from dmsae_lib.report.layout import Row
from dmsae_lib.report.series import kind_name
from dmsae_lib.sae.model import FoldedSAE, load_folded


@dataclass
class Shown:
    """Latents of one SAE that stand together: the core of a chain, or the free latents beside it.

    ``latents``: {id, index (in the SAE), first_cycle (None: never selected), share (of the attribution in the
    last cycle), history: [{cycle, share, frequency} of every cycle that selected it]}. A latent's id is that
    of the record of cores, c<cycle>:<index> where it was trained.
    """

    chain: str
    role: str  # "core" or "free"
    kind: str  # of the chain's core, in a word
    sae: FoldedSAE
    latents: list[Row]
    sources: dict[str, str]  # {artefact: its hash}

    @property
    def name(self) -> str:
        return self.chain if self.role == "core" else f"{self.chain}-{self.role}"

    @property
    def indices(self) -> list[int]:
        return [latent["index"] for latent in self.latents]

    @property
    def rows(self) -> Tensor:
        """Encoder rows (latents, d_in)."""
        return self.sae.W_enc.T[self.indices]


def _history(cores: list[Core], latent_id: str) -> list[Row]:
    """{cycle, share, frequency} of every cycle that selected the latent."""
    named = [(core.cycle, one) for core in cores for one in core.latents if one.id == latent_id]
    return [{"cycle": t, "share": one.share, "frequency": one.frequency} for t, one in named]


def open_shown(run: Run, chain: str) -> list[Shown]:
    """The core of ``chain``, of the main one also the free latents of the first prefix."""
    cfg = run.config.for_chain(chain)
    last = cfg.distill.cycles
    made = {t: run.load(t, "core", chain) for t in range(last + 1)}
    trained, attribution = run.load(last, "sae", chain), run.load(last, "attribution", chain)
    opened = [trained, attribution, *made.values()]
    sources = {one.folder.relative_to(run.folder).as_posix(): one.hash for one in opened}
    cores, sae = [read_core(artifact) for artifact in made.values()], load_folded(trained)
    scores = torch.tensor([float(row[cfg.distill.aggregator]) for row in attribution.csv("table.csv")])
    share = (scores / scores.sum()).tolist()

    def described(latent_id: str, index: int) -> Row:
        history = _history(cores, latent_id)
        first = history[0]["cycle"] if history else None
        return {
            "id": latent_id,
            "index": index,
            "first_cycle": first,
            "share": share[index],
            "history": history,
        }

    core = [described(one.id, one.index) for one in final_core(cores[-1], cfg.distill.final_core).latents]
    kind = kind_name(cfg.training.core_settings())
    found = [Shown(chain, "core", kind, sae, core, sources)]
    if chain == "main":
        members, c = {one["index"] for one in core}, sae.n_core
        candidates = [i for i in range(c, c + sae.prefixes[0]) if i not in members]
        free = [described(f"c{last}:{i}", i) for i in candidates]
        found.append(Shown(chain, "free", kind, sae, free, sources))
    return [one for one in found if one.latents]


def nearest(shown: list[Shown]) -> list[list[list[Row]]]:
    """For each latent of each group its nearest other latent in every core shown: {group, id, cosine}.

    Near is a large |cosine| of encoder rows; the cosine keeps its sign.
    """
    cores = [group for group in shown if group.role == "core"]
    units = [F.normalize(core.rows, dim=1) for core in cores]
    found = []
    for group in shown:
        rows = F.normalize(group.rows, dim=1)
        near: list[list[Row]] = [[] for _ in group.latents]
        for core, others in zip(cores, units):
            cosine = rows @ others.T
            if core is group:
                cosine.fill_diagonal_(0)
            best = cosine.abs().argmax(1).tolist()
            for i, j in enumerate(best):
                if not (core is group and i == j):  # a core of a single latent
                    other = {"group": core.name, "id": core.latents[j]["id"]}
                    near[i].append(other | {"cosine": round(float(cosine[i, j]), 3)})
        found.append(near)
    return found
