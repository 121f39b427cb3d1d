"""Gradient x activation through the most nested reconstruction.

With xhat_0 (core + first prefix) in place of the residual stream and g_t = dL/dxhat_0(t), the contribution of
latent i at token t is A_i(t) = f_i(x_t) <g_t, d_i>: exactly the derivative that autograd through f would give
times f, from one gradient at xhat_0, so no graph as wide as the SAE is ever built (method, section 3).
"""

from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from dmsae_lib.data.contexts import Contexts
from dmsae_lib.data.language_model import LanguageModel, next_token_loss
from dmsae_lib.sae.model import FoldedSAE

# By how much of max |A| the closed form and autograd may differ: rounding in the model's own type, through
# all its layers.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
COVERAGES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
# Bins of the quantile's histogram, logarithmic: 2,000 over 20 decades is a relative resolution of 2.3 %.
BINS, LOW, HIGH = 2000, -14.0, 6.0


@torch.enable_grad()
def gradient_at_prefix0(model: LanguageModel, sae: FoldedSAE, batch: Contexts) -> tuple[Tensor, Tensor]:
    """Activations f (n, candidates) and gradients g (n, d_in) at the usable positions of one batch of
    contexts.

    The loss is summed over tokens, so g does not depend on the batch. BOS and padding keep the model's own
    residual.
    """
    resid = model.lower(batch.tokens)
    usable = model.usable(batch, resid)
    candidates = sae.n_core + sae.prefixes[0]
    with torch.no_grad():
        f = sae.encode(resid, first=candidates)
        xhat = sae.decode_prefix(f, 0)
    put = torch.where(usable[..., None], xhat, resid).requires_grad_(True)
    loss, _ = next_token_loss(model.upper(batch.tokens, put), batch)
    (g,) = torch.autograd.grad(loss, put)
    return f[usable], g[usable]


def contributions(f: Tensor, g: Tensor, sae: FoldedSAE) -> Tensor:
    """A (n, candidates): f_i(x_t) <g_t, d_i>, nats."""
    return f * (g @ sae.W_dec[: f.shape[1]].T)


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
        columns = {name: s.tolist() for name, s in self.scores.items()}
        columns |= {
            "mean_activation": self.mean_activation.tolist(),
            "half_a": self.halves[0].tolist(),
            "half_b": self.halves[1].tolist(),
        }
        n = len(self.halves[0])
        return [
            {
                "index": i,
                "is_core": int(i < self.n_core),
                **{name: column[i] for name, column in columns.items()},
            }
            for i in range(n)
        ]


def attribute(
    model: LanguageModel,
    sae: FoldedSAE,
    contexts: Contexts,
    quantile: float = 0.99,
    aggregator: str = "mean_abs",
) -> AttributionTable:
    """Aggregate A over the usable tokens of ``contexts``; ``sae`` is folded (unnormalised activations), and
    moved to the model.

    mean_abs is mean_t |A|, abs_mean is |mean_t A|, frequency the share of tokens where the latent is active,
    and quantile the ``quantile`` of |A| over those tokens. The halves hold ``aggregator``'s score on even and
    odd contexts.
    """
    sae, n = sae.to(model.device), sae.n_core + sae.prefixes[0]
    sums = [_Sums(n), _Sums(n)]
    for half in (0, 1):
        for batch in contexts[half::2].batches(model.config.batch_rows, model.device):
            f, g = gradient_at_prefix0(model, sae, batch)
            sums[half].add(f, contributions(f, g, sae))
    whole = sums[0] + sums[1]
    halves = (sums[0].scores(quantile)[aggregator], sums[1].scores(quantile)[aggregator])
    active = whole.active.clamp_min(1)
    return AttributionTable(
        whole.scores(quantile), halves, whole.activation / active, whole.tokens, sae.n_core
    )


class _Sums:
    """Running sums over tokens, all in float64 on the CPU."""

    def __init__(self, n: int):
        self.absolute, self.signed, self.active, self.activation = (
            torch.zeros(n, dtype=torch.float64) for _ in range(4)
        )
        self.histogram, self.tokens = torch.zeros(n, BINS, dtype=torch.float64), 0

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

    def __add__(self, other: "_Sums") -> "_Sums":
        both = _Sums(len(self.absolute))
        for name, value in vars(self).items():
            setattr(both, name, value + getattr(other, name))
        return both

    def scores(self, quantile: float) -> dict[str, Tensor]:
        below = self.histogram.cumsum(1)
        bins = (below < quantile * self.active.clamp_min(1)[:, None]).sum(1)
        value = 10 ** (LOW + (bins + 0.5) / BINS * (HIGH - LOW))
        return {
            "mean_abs": self.absolute / self.tokens,
            "abs_mean": (self.signed / self.tokens).abs(),
            "quantile": torch.where(self.active > 0, value, 0.0),
            "frequency": self.active / self.tokens,
        }


def smallest_cover(scores: Tensor, coverage: float) -> Tensor:
    """Indices, strongest first, of the smallest set whose share of the total score is at least ``coverage``.

    Ties go to the lower index. A latent with score 0 is never needed.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    share = scores[order].cumsum(0) / scores.sum()
    n = int((share < coverage - 1e-12).sum()) + 1  # the slack is float64 rounding of the cumulative sum
    return order[: min(n, int((scores > 0).sum()))]


def jaccard(a: Tensor, b: Tensor) -> float:
    a, b = set(a.tolist()), set(b.tolist())
    return len(a & b) / len(a | b) if a | b else 1.0


def _spearman(a: Tensor, b: Tensor) -> float | None:
    rho = float(spearmanr(a.numpy(), b.numpy()).statistic) if len(a) > 1 else float("nan")
    return None if rho != rho else rho


def describe(table: AttributionTable, coverage: float, aggregator: str) -> dict[str, Any]:
    """record.json: sizes by aggregator, how stable the ranking is between halves, and core size against
    coverage."""
    default = table.scores[aggregator]
    chosen = smallest_cover(default, coverage)
    compared = {
        name: {
            "size": len(smallest_cover(s, coverage)),
            "jaccard": jaccard(smallest_cover(s, coverage), chosen),
            "spearman": _spearman(s, default),
        }
        for name, s in table.scores.items()
    }
    a, b = table.halves
    stability = {
        "spearman": _spearman(a, b),
        "jaccard": jaccard(smallest_cover(a, coverage), smallest_cover(b, coverage)),
    }
    curve = [[c, len(smallest_cover(default, c))] for c in COVERAGES]
    return {
        "candidates": len(default),
        "tokens": table.tokens,
        "aggregators": compared,
        "stability": stability,
        "coverage_curve": curve,
    }


def selected_again(table: AttributionTable, coverage: float, aggregator: str) -> dict[str, Any]:
    """What the selection makes of the frozen rows: {core_in, kept, rows, selected}, and the chosen
    candidates' median frequency.

    ``kept`` of the ``core_in`` frozen rows, those numbered ``rows``, are among the ``selected``; for a
    placebo's rows that is the null of claim C2.
    """
    chosen = smallest_cover(table.scores[aggregator], coverage)
    rows = sorted(chosen[chosen < table.n_core].tolist())
    return {
        "core_in": table.n_core,
        "kept": len(rows),
        "rows": rows,
        "selected": len(chosen),
        "frequency": float(table.scores["frequency"][chosen].median()),
    }
