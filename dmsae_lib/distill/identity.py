"""Do two distillation chains find the same latents, or only the same subspace? (claim C7)

Latents of two cores are matched one to one, by the |cosine| of their encoder rows and apart from that by the
correlation of their activations on the same tokens; the spans are compared by their principal angles, since a
subspace can agree where its latents do not. Beside the cores stand equally many latents of plain SAEs and
random rows: of many rows in few dimensions some pair is always near.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dmsae_lib.config.run import Run
from dmsae_lib.distill.controls import cosines
from dmsae_lib.distill.core import final_core, read_core
from dmsae_lib.sae.model import FoldedSAE, load_folded
from dmsae_lib.store.seeds import generator

# A matched pair above this |cosine|, or correlation, counts as the same latent (method, section 7).
SAME = 0.7


def matched(similarity: Tensor) -> Tensor:
    """The similarities (min(n, m),) of the one-to-one matching of rows with columns whose sum is largest."""
    rows, columns = linear_sum_assignment(similarity.numpy(), maximize=True)
    return similarity[torch.from_numpy(rows), torch.from_numpy(columns)]


def correlations(f: Tensor, g: Tensor) -> Tensor:
    """(n, m): Pearson over tokens of columns of ``f`` (tokens, n) and ``g`` (tokens, m); 0 for a dead one."""
    f, g = (F.normalize(a.double() - a.double().mean(0), dim=0) for a in (f, g))
    return f.T @ g


def span_overlap(a: Tensor, b: Tensor) -> float:
    """Mean squared cosine of the principal angles between two sets' spans: 1 where one lies in the other.

    Two random subspaces of dimensions p <= q in d dimensions have q / d.
    """
    left, right = (torch.linalg.qr(rows.double().T).Q for rows in (a, b))
    return float(torch.linalg.svdvals(left.T @ right).square().mean())


def compared(a: Tensor, b: Tensor, f: Tensor | None = None, g: Tensor | None = None) -> dict[str, Any]:
    """How alike encoder rows (n, d_in) and (m, d_in) are, and activations (tokens, n) and (tokens, m).

    {size, cosine, cosine_above, activation, activation_above, span, span_chance}: means over the matched
    pairs, and the share of them above SAME; None for activations that are not given.
    """
    found: dict[str, Any] = {"size": min(len(a), len(b))}
    activation = None if f is None or g is None else correlations(f, g)
    for name, similarity in {"cosine": cosines(a, b), "activation": activation}.items():
        pairs = None if similarity is None else matched(similarity)
        found[name] = None if pairs is None else float(pairs.mean())
        found[f"{name}_above"] = None if pairs is None else float((pairs > SAME).float().mean())
    return found | {"span": span_overlap(a, b), "span_chance": max(len(a), len(b)) / a.shape[1]}


@torch.no_grad()
def identity_rows(run: Run, residuals: Sequence[Tensor]) -> list[dict[str, Any]]:
    """A row for each pair of chains and kind: cores, plain (first latents of cycle 0's SAEs) and random.

    ``residuals``: unnormalised activations (n, d_in) of the test split.
    """
    distill, chains = run.config.distill, run.config.replicates
    of: dict[str, dict[str, tuple[Tensor, Tensor | None]]] = {}
    for chain in chains if len(chains) > 1 else []:
        core = final_core(read_core(run.load(distill.cycles, "core", chain)), distill.final_core)
        sae, plain = (load_folded(run.load(t, "sae", chain)) for t in (distill.cycles, 0))
        where = [latent.index for latent in core.latents]
        of[chain] = {"cores": (core.rows, _activations(sae, residuals, where))}
        if not distill.from_sae:  # else it is the same SAE in every chain
            first = list(range(len(core)))
            of[chain]["plain"] = plain.free_rows[: len(core)].cpu(), _activations(plain, residuals, first)
        random = generator(run.config.seed, "identity", chain)
        of[chain]["random"] = torch.randn(core.rows.shape, generator=random), None
    found = []
    for a, b in combinations(of, 2):
        for kind in of[a]:
            (rows_a, f), (rows_b, g) = of[a][kind], of[b][kind]
            found.append({"a": a, "b": b, "kind": kind} | compared(rows_a, rows_b, f, g))
    return found


def _activations(sae: FoldedSAE, residuals: Sequence[Tensor], latents: list[int]) -> Tensor:
    """(tokens, latents) on the CPU."""
    sae = sae.to(residuals[0].device)
    return torch.cat([sae.encode(x)[:, latents].cpu() for x in residuals])
