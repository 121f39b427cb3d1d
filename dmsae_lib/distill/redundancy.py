"""Is a core one latent several times over? Near-copies within it, and how large it would be without them."""

from typing import Any

import torch
from torch import Tensor

from dmsae_lib.distill.attribution import smallest_cover
from dmsae_lib.distill.controls import cosines, geometry
from dmsae_lib.distill.identity import correlations

ALIKE = (0.7, 0.9)  # |cosine| of encoder rows, or correlation of activations, of a near-copy


def pairs_above(similarity: Tensor) -> dict[str, Any]:
    """Of a symmetric matrix (n, n): the largest similarity of two latents, and for each of ALIKE how many
    pairs are above it."""
    n = len(similarity)
    pairs = similarity[tuple(torch.triu_indices(n, n, offset=1))]
    above = {str(limit): int((pairs > limit).sum()) for limit in ALIKE}
    return {"largest": float(pairs.max()) if n > 1 else None, "pairs": above}


def without_copies(scores: Tensor, similarity: Tensor, coverage: float, limit: float) -> dict[str, Any]:
    """What is left of the smallest cover of ``scores`` (candidates,) where no two latents are near-copies.

    Strongest first, a candidate that is more alike than ``limit`` to one already taken is its copy.
    {merged, dropped}: the size where a copy's score counts for the one it is a copy of; and where it is lost,
    so that weaker candidates must make up for it (None where they cannot).
    """
    order = torch.argsort(scores, descending=True, stable=True)
    taken: list[int] = []
    merged, own = torch.zeros_like(scores), torch.zeros_like(scores)
    for i in order.tolist():
        near = [j for j in taken if similarity[i, j] > limit]
        if not near:
            taken.append(i)
            own[i] = scores[i]
        merged[max(near, key=lambda j: float(similarity[i, j])) if near else i] += scores[i]
    chosen = smallest_cover(merged, coverage)
    share = own.sort(descending=True).values.cumsum(0) / scores.sum()
    enough = share >= coverage - 1e-12
    return {"merged": len(chosen), "dropped": int(enough.nonzero()[0]) + 1 if enough.any() else None}


def redundancy(rows: Tensor, f: Tensor, scores: Tensor, coverage: float) -> dict[str, Any]:
    """How redundant the core is that ``coverage`` selects among candidates with these encoder rows
    (candidates, d_in), activations (tokens, candidates) and scores (candidates,).

    {size, rank, cosine, activation, without}: participation rank of its rows; :func:`pairs_above` of it by
    rows and by activations; :func:`without_copies` at each of ALIKE, by the larger of the two.
    """
    cosine, activation = cosines(rows, rows), correlations(f, f).float()
    chosen = smallest_cover(scores, coverage).sort().values
    inside = torch.meshgrid(chosen, chosen, indexing="ij")
    either = torch.maximum(cosine, activation)
    return {
        "size": len(chosen),
        "rank": geometry(rows[chosen])["rank"],
        "cosine": pairs_above(cosine[inside]),
        "activation": pairs_above(activation[inside]),
        "without": {str(limit): without_copies(scores, either, coverage, limit) for limit in ALIKE},
    }
