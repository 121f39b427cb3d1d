"""Gradient x activation through the most nested reconstruction.

With xhat_0 (core + first prefix) in place of the residual stream and g_t = dL/dxhat_0(t), the contribution of
latent i at token t is A_i(t) = f_i(x_t) <g_t, d_i>: exactly the derivative that autograd through f would give
times f, from one gradient at xhat_0, so no graph as wide as the SAE is ever built (method, section 3).
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from dmsae_lib.config.sections import AGGREGATORS
from dmsae_lib.data.contexts import Contexts
from dmsae_lib.data.language_model import LanguageModel, next_token_loss
from dmsae_lib.sae.model import FoldedSAE
from dmsae_lib.store.artifacts import UserError

# By how much of max |A| the closed form and autograd may differ: rounding in the model's own type, through
# all layers.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
COVERAGES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
# Bins of the quantile's histogram, logarithmic: 2,000 over 20 decades is a relative resolution of 2.3 %.
BINS, LOW, HIGH = 2000, -14.0, 6.0


@torch.enable_grad()
def gradient_at_prefix0(
    model: LanguageModel, sae: FoldedSAE, batch: Contexts, prefix: int = 0
) -> tuple[Tensor, Tensor]:
    """Activations f (n, candidates) and gradients g (n, d_in) at the usable positions of one batch.

    The loss is summed over tokens, so g does not depend on the batch. BOS and padding keep the model's own
    residual. ``prefix``: that of the reconstruction, and of the candidates, where it is a deeper one.
    """
    resid = model.lower(batch.tokens)
    usable = model.usable(batch, resid)
    with torch.no_grad():
        f = sae.encode(resid, first=sae.n_core + sae.prefixes[prefix])
        xhat = sae.decode_prefix(f, prefix)
    put = torch.where(usable[..., None], xhat, resid).requires_grad_(True)
    loss, _ = next_token_loss(model.upper(batch.tokens, put), batch)
    (g,) = torch.autograd.grad(loss, put)
    return f[usable], g[usable]


def contributions(f: Tensor, g: Tensor, sae: FoldedSAE) -> Tensor:
    """A (n, candidates): f_i(x_t) <g_t, d_i>, nats."""
    return f * (g @ sae.W_dec[: f.shape[1]].T)


class Sums:
    """Sums over tokens, (candidates,) float64 on the CPU: what aggregators are made of."""

    def __init__(self, n: int):
        zeros = torch.zeros(4, n, dtype=torch.float64)
        self.absolute, self.signed, self.active, self.activation = zeros  # |A|, A, f > 0, f
        self.histogram = torch.zeros(n, BINS, dtype=torch.float64)  # of log10 |A|, where f > 0
        self.tokens = 0

    def add(self, f: Tensor, a: Tensor) -> None:
        f, a = f.double().cpu(), a.double().cpu()
        self.absolute += a.abs().sum(0)
        self.signed += a.sum(0)
        self.active += (f > 0).sum(0)
        self.activation += f.sum(0)
        self.tokens += len(f)
        token, latent = (f > 0).nonzero(as_tuple=True)
        place = (a[token, latent].abs().clamp_min(10**LOW).log10() - LOW) / (HIGH - LOW) * BINS
        flat = latent * BINS + place.long().clamp(0, BINS - 1)
        self.histogram += torch.bincount(flat, minlength=self.histogram.numel()).view_as(self.histogram)

    def __add__(self, other: "Sums") -> "Sums":
        both = Sums(len(self.absolute))
        for name, value in vars(self).items():
            setattr(both, name, value + getattr(other, name))
        return both


Aggregator = Callable[[Sums, float], Tensor]  # of the sums and distill.quantile, (candidates,)
SCORES: dict[str, Aggregator] = {}


def aggregator(function: Aggregator) -> Aggregator:
    """Binds a function to the aggregator of its name, which config.sections.AGGREGATORS must list."""
    if function.__name__ not in AGGREGATORS:
        raise ValueError(f"{function.__name__} is not in config.sections.AGGREGATORS: list it there")
    SCORES[function.__name__] = function
    return function


@aggregator
def mean_abs(sums: Sums, q: float) -> Tensor:
    return sums.absolute / sums.tokens


@aggregator
def abs_mean(sums: Sums, q: float) -> Tensor:
    return (sums.signed / sums.tokens).abs()


@aggregator
def quantile(sums: Sums, q: float) -> Tensor:
    """The ``q`` quantile of |A| over the tokens where the latent is active."""
    bins = (sums.histogram.cumsum(1) < q * sums.active.clamp_min(1)[:, None]).sum(1)
    return torch.where(sums.active > 0, 10 ** (LOW + (bins + 0.5) / BINS * (HIGH - LOW)), 0.0)


@aggregator
def frequency(sums: Sums, q: float) -> Tensor:
    """The share of tokens where the latent is active: no attribution at all, the control."""
    return sums.active / sums.tokens


@dataclass
class AttributionTable:
    """Scores of every candidate latent (core first, then prefix 0), each (candidates,) float64."""

    scores: dict[str, Tensor]  # by aggregator
    halves: tuple[Tensor, Tensor]  # the default score on even and on odd contexts
    mean_activation: Tensor  # over the tokens where the latent is active
    tokens: int
    n_core: int

    def rows(self) -> list[dict[str, Any]]:
        """table.csv: one row per candidate."""
        halves = {"half_a": self.halves[0], "half_b": self.halves[1]}
        columns = self.scores | {"mean_activation": self.mean_activation} | halves
        values = {name: column.tolist() for name, column in columns.items()}
        rows = [{"index": i, "is_core": int(i < self.n_core)} for i in range(len(self.mean_activation))]
        return [row | {name: column[i] for name, column in values.items()} for i, row in enumerate(rows)]


def attribute(
    model: LanguageModel,
    sae: FoldedSAE,
    contexts: Contexts,
    quantile: float = 0.99,
    aggregator: str = "mean_abs",
    prefix: int = 0,
) -> AttributionTable:
    """Aggregate A over the usable tokens of ``contexts``, by every aggregator; ``sae`` is moved to the model.

    ``quantile`` is that of the aggregator of this name; ``aggregator`` the one whose score the halves hold,
    on even and odd contexts. ``prefix``: that of the reconstruction and of the candidates.
    """
    if aggregator not in SCORES:
        known = ", ".join(SCORES)
        raise UserError(
            f"distill.aggregator is {aggregator}: no function is bound to it; use one of {known}."
        )
    sae, n = sae.to(model.device), sae.n_core + sae.prefixes[prefix]
    sums = Sums(n), Sums(n)
    for half in (0, 1):
        for batch in contexts[half::2].batches(model.config.batch_rows, model.device):
            f, g = gradient_at_prefix0(model, sae, batch, prefix)
            sums[half].add(f, contributions(f, g, sae))
    whole = sums[0] + sums[1]
    scores = {name: score(whole, quantile) for name, score in SCORES.items()}
    halves = SCORES[aggregator](sums[0], quantile), SCORES[aggregator](sums[1], quantile)
    mean_activation = whole.activation / whole.active.clamp_min(1)
    return AttributionTable(scores, halves, mean_activation, whole.tokens, sae.n_core)


def smallest_cover(scores: Tensor, coverage: float) -> Tensor:
    """Indices, strongest first, of the smallest set whose share of the total score is at least ``coverage``.

    Ties go to the lower index. A latent with score 0 is never needed.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    share = scores[order].cumsum(0) / scores.sum()
    n = int((share < coverage - 1e-12).sum()) + 1  # the slack is float64 rounding of the cumulative sum
    return order[: min(n, int((scores > 0).sum()))]


def jaccard(a: Iterable[Hashable], b: Iterable[Hashable]) -> float:
    """Of two sets: the share of their union that both have."""
    left, right = set(a), set(b)
    return len(left & right) / len(left | right) if left | right else 1.0


def _spearman(a: Tensor, b: Tensor) -> float | None:
    rho = float(spearmanr(a.numpy(), b.numpy()).statistic) if len(a) > 1 else float("nan")
    return None if rho != rho else rho


def describe(table: AttributionTable, coverage: float, aggregator: str) -> dict[str, Any]:
    """record.json: sizes by aggregator, how stable the ranking is between halves, size against coverage."""

    def alike(a: Tensor, b: Tensor) -> dict[str, float | None]:
        chosen = (smallest_cover(scores, coverage).tolist() for scores in (a, b))
        return {"jaccard": jaccard(*chosen), "spearman": _spearman(a, b)}

    default = table.scores[aggregator]
    sizes = {name: {"size": len(smallest_cover(scores, coverage))} for name, scores in table.scores.items()}
    return {
        "candidates": len(default),
        "tokens": table.tokens,
        "aggregators": {name: sizes[name] | alike(scores, default) for name, scores in table.scores.items()},
        "stability": alike(*table.halves),
        "coverage_curve": [[c, len(smallest_cover(default, c))] for c in COVERAGES],
    }


def selected_again(table: AttributionTable, coverage: float, aggregator: str) -> dict[str, Any]:
    """What the selection makes of the frozen rows, and the chosen candidates' median frequency.

    ``kept`` of the ``core_in`` frozen rows, those numbered ``rows``, are among the ``selected``; for a
    placebo's rows that is the null of claim C2.
    """
    chosen = smallest_cover(table.scores[aggregator], coverage)
    rows, firing = sorted(chosen[chosen < table.n_core].tolist()), table.scores["frequency"][chosen]
    counts = {"core_in": table.n_core, "kept": len(rows), "rows": rows, "selected": len(chosen)}
    return counts | {"frequency": float(firing.median())}
