"""Do two distillation chains find the same latents, or only the same subspace? (claim C7)

Latents of two cores are matched one to one, by the |cosine| of their encoder rows and apart from that by the
correlation of their activations on the same tokens; the spans are compared by their principal angles, since a
subspace can agree where its latents do not. Beside the cores stand equally many latents of plain SAEs and
random rows: of many rows in few dimensions some pair is always near. What agreement on the subspace alone
would give is seen where one of the cores is turned within its own span.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Generator, Tensor

from dmsae_lib.config.run import Run
from dmsae_lib.distill.controls import FUNCTIONS, cosines, open_final_core
from dmsae_lib.sae.model import FoldedSAE, load_folded
from dmsae_lib.store.seeds import generator

# A matched pair above this |cosine|, or correlation, counts as the same latent (method, section 7).
SAME = 0.7


def matching(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows and columns, (min(n, m),) each, the one-to-one matching with the largest sum pairs."""
    rows, columns = linear_sum_assignment(similarity.numpy(), maximize=True)
    return torch.from_numpy(rows), torch.from_numpy(columns)


def matched(similarity: Tensor) -> Tensor:
    """The similarities (min(n, m),) of the pairs of :func:`matching`."""
    return similarity[matching(similarity)]


def correlations(f: Tensor, g: Tensor) -> Tensor:
    """(n, m): Pearson over tokens of columns of ``f`` (tokens, n) and ``g`` (tokens, m); 0 for a dead one."""
    f, g = (F.normalize(a.double() - a.double().mean(0), dim=0) for a in (f, g))
    return f.T @ g


def span_overlap(a: Tensor, b: Tensor) -> float:
    """Mean squared cosine of the principal angles between two sets' spans: 1 where one lies in the other.

    Two random subspaces of dimensions p <= q in d dimensions have q / d.
    """
    return float(principal_cosines(a, b).square().mean())


def principal_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of the principal angles between the spans of rows, largest first, (min(n, m),) float64."""
    left, right = (torch.linalg.qr(rows.double().T).Q for rows in (a, b))
    return torch.linalg.svdvals(left.T @ right)


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


class Found(NamedTuple):
    """Latents of one chain: encoder rows (n, d_in), and activations (tokens, n) where they were run."""

    rows: Tensor
    f: Tensor | None = None


def _compared(mine: Found, theirs: Found) -> dict[str, Any]:
    return compared(mine.rows, theirs.rows, mine.f, theirs.f)


@torch.no_grad()
def found_by(run: Run, residuals: Sequence[Tensor], chains: Iterable[str]) -> dict[str, dict[str, Found]]:
    """{chain: {kind: latents}}: cores, plain (as many first latents of cycle 0's SAEs) and random rows.

    ``residuals``: unnormalised activations (n, d_in) of the test split.
    """
    distill = run.config.distill
    of: dict[str, dict[str, Found]] = {}
    for chain in chains:
        core = open_final_core(run, chain)
        sae, plain = (load_folded(run.load(t, "sae", chain)) for t in (distill.cycles, 0))
        where = [latent.index for latent in core.latents]
        of[chain] = {"cores": Found(core.rows, _activations(sae, residuals, where))}
        if not distill.from_sae:  # else it is the same SAE in every chain
            first = list(range(len(core)))
            rows = plain.free_rows[: len(core)].cpu()
            of[chain]["plain"] = Found(rows, _activations(plain, residuals, first))
        random = generator(run.config.seed, "identity", chain)
        of[chain]["random"] = Found(torch.randn(core.rows.shape, generator=random))
    return of


def identity_rows(run: Run, residuals: Sequence[Tensor]) -> list[dict[str, Any]]:
    """A row for each pair of the main chain's replicates and kind (see :func:`found_by`)."""
    chains = run.config.replicates
    of = found_by(run, residuals, chains if len(chains) > 1 else [])
    return [
        {"a": a, "b": b, "kind": kind} | _compared(of[a][kind], of[b][kind])
        for a, b in combinations(of, 2)
        for kind in of[a]
    ]


def turned(core: Found, x: Tensor, random: Generator) -> Found:
    """A core's rows turned at random within their span, each firing on ``x`` (tokens, d_in) as often as the
    latent that it was: what there is of a core if only its subspace is right."""
    rows = FUNCTIONS["rotated"](core.rows, x, random)
    found = Found(rows)
    if core.f is not None:
        projected = (x - x.mean(0)) @ rows.T
        silent = (core.f == 0).double().mean(0)
        cuts = [torch.quantile(column.double(), q) for column, q in zip(projected.T, silent)]
        found = Found(rows, (projected - torch.stack(cuts).float()).relu())
    return found


def agreement_rows(run: Run, residuals: Sequence[Tensor], chains: Sequence[str]) -> list[dict[str, Any]]:
    """As :func:`identity_rows`, of any chains, with a kind ``turned``: one chain's core against the other's
    :func:`turned`. Beside the means stand every matched pair's ``cosines`` and ``activations``, and the
    ``angles``: cosines of the principal angles of the spans; each sorted, largest first."""
    of, rows = found_by(run, residuals, chains if len(chains) > 1 else []), []
    x = torch.cat([one.cpu() for one in residuals])
    for a, b in combinations(of, 2):
        pairs = {kind: (of[a][kind], of[b][kind]) for kind in of[a]}
        random = generator(run.config.seed, "turned", a, b)
        pairs["turned"] = (of[a]["cores"], turned(of[b]["cores"], x, random))
        for kind, (mine, theirs) in pairs.items():
            row = {"a": a, "b": b, "kind": kind} | _compared(mine, theirs)
            lists = {"cosines": matched(cosines(mine.rows, theirs.rows)), "activations": torch.empty(0)}
            if mine.f is not None and theirs.f is not None:
                lists["activations"] = matched(correlations(mine.f, theirs.f))
            lists["angles"] = principal_cosines(mine.rows, theirs.rows)
            rows.append(row | {name: v.sort(descending=True).values.tolist() for name, v in lists.items()})
    return rows


def _activations(sae: FoldedSAE, residuals: Sequence[Tensor], latents: list[int]) -> Tensor:
    """(tokens, latents) on the CPU."""
    sae = sae.to(residuals[0].device)
    return torch.cat([sae.encode(x)[:, latents].cpu() for x in residuals])
