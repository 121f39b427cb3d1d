"""Does the attribution mean what it says? What the loss really does, and integrated gradients beside it.

In the reconstruction xhat(f) = b_dec + sum_i f_i d_i from core and first prefix (:mod:`.attribution`), put in
place of the residual at every usable position, for a candidate i, summed over the tokens t of a context:

    ablation      L(f without f_i) - L(f): what the loss does when f_i is 0 at all positions of the context
    attribution   sum_t A_i(t) = sum_t f_i(t) <g_t, d_i>: the same with its sign turned, to first order
    integrated    sum_t IG_i(t) = sum_t f_i(t) mean_s <g_t(alpha_s), d_i>, alpha_s = (s - 1/2) / steps

g_t(alpha) is the gradient at b_dec + alpha (xhat - b_dec), taken at all positions together: integrated
gradients (Sundararajan, Taly and Yan 2017, arXiv 1703.01365, equation 1) of the loss from f = 0 to f, by the
midpoint rule. They are complete: over all candidates and tokens they sum to L(f) - L(0), up to the rule's
error, which :func:`describe` reports.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from dmsae_lib.data.contexts import Contexts
from dmsae_lib.data.language_model import LanguageModel, token_losses
from dmsae_lib.distill.attribution import attribute, contributions, jaccard, smallest_cover
from dmsae_lib.distill.harvest import Harvest
from dmsae_lib.sae.model import FoldedSAE, load_folded
from dmsae_lib.store import artifacts
from dmsae_lib.store.artifacts import Artifact, hash_json
from dmsae_lib.store.seeds import generator

STEPS = 8  # of the integral
DEEPEST = 2  # number of the last prefix whose latents are tried as candidates
DRAWS = 3  # random sets beside those that a score selects


class Replaced:
    """One batch of contexts with a reconstruction from candidates' activations in place of its residual.

    f: (tokens, candidates) at the usable positions; row: (tokens,) the context that each of them is of.
    """

    def __init__(self, model: LanguageModel, sae: FoldedSAE, batch: Contexts):
        self.model, self.batch, self.resid = model, batch, model.lower(batch.tokens)
        self.usable = model.usable(batch, self.resid)
        self.row = self.usable.nonzero()[:, 0]
        n = sae.n_core + sae.prefixes[0]
        self.b_dec, self.W_dec = sae.b_dec, sae.W_dec[:n]
        self.f = sae.encode(self.resid[self.usable], first=n)

    def losses(self, f: Tensor) -> Tensor:
        """Next-token losses, nats, summed over each context, (rows,) float64, for activations ``f``."""
        return self._losses(f @ self.W_dec + self.b_dec)

    def without(self, i: int) -> Tensor:
        """The activations with candidate ``i`` at 0."""
        f = self.f.clone()
        f[:, i] = 0
        return f

    def gradient(self, alpha: float) -> Tensor:
        """dL/dxhat at the activations alpha f, (tokens, d_in)."""
        with torch.enable_grad():
            put = (alpha * self.f @ self.W_dec + self.b_dec).requires_grad_(True)
            (g,) = torch.autograd.grad(self._losses(put).sum(), put)
        return g

    def by_context(self, values: Tensor) -> Tensor:
        """Sums over each context of values (tokens, n): (rows, n) float64."""
        zeros = torch.zeros(len(self.resid), values.shape[1], dtype=torch.float64, device=values.device)
        return zeros.index_add(0, self.row, values.double())

    def _losses(self, put: Tensor) -> Tensor:
        resid = self.resid.masked_scatter(self.usable[..., None], put)
        return token_losses(self.model.upper(self.batch.tokens, resid), self.batch).double().sum(1)


@dataclass
class Effects:
    """What each candidate (core first, then prefix 0) does to the loss, measured and attributed.

    ablation, attribution, integrated: (contexts, candidates) float64, nats; see the module. absolute_A,
    absolute_IG: (candidates,) sums of |A| and |IG| over tokens. active: (candidates,) tokens where f > 0.
    totals: (4,) L(f), L(0), the number of losses in them, and of tokens.
    """

    ablation: Tensor
    attribution: Tensor
    integrated: Tensor
    absolute_A: Tensor
    absolute_IG: Tensor
    active: Tensor
    totals: Tensor

    @property
    def tokens(self) -> int:
        return int(self.totals[3])

    def scores(self) -> dict[str, Tensor]:
        """By name, (candidates,), what a core could be selected by; nats per token, and the frequency."""
        found = {
            "mean_abs": self.absolute_A,
            "abs_mean": self.attribution.sum(0).abs(),
            "ig_mean_abs": self.absolute_IG,
            "ig_abs_mean": self.integrated.sum(0).abs(),
            "ablation": self.ablation.sum(0).abs(),
            "ablation_by_context": self.ablation.abs().sum(0),
            "frequency": self.active,
        }
        return {name: summed / self.tokens for name, summed in found.items()}

    def rows(self) -> list[dict[str, Any]]:
        """One per candidate: its scores, and with their sign the changes of the loss per token that follow
        when it is ablated: measured, promised by A and by IG."""
        changes = {"measured": self.ablation, "promised": -self.attribution, "ig_promised": -self.integrated}
        columns = {name: change.sum(0) / self.tokens for name, change in changes.items()} | self.scores()
        values = {name: column.tolist() for name, column in columns.items()}
        return [
            {"index": i} | {name: column[i] for name, column in values.items()}
            for i in range(self.ablation.shape[1])
        ]


@torch.no_grad()
def measure(model: LanguageModel, sae: FoldedSAE, contexts: Contexts, steps: int = STEPS) -> Effects:
    """Ablate every candidate in turn and attribute to it, on the same contexts.

    Costs one pass through the upper half of the model for every candidate, and ``steps`` + 1 with gradients.
    """
    sae = sae.to(model.device)
    by_context: dict[str, list[Tensor]] = {"ablation": [], "attribution": [], "integrated": []}
    summed: dict[str, Tensor] = {}

    def add(name: str, values: Tensor) -> None:
        summed[name] = summed.get(name, torch.zeros(())) + values.double().cpu()

    for batch in contexts.batches(model.config.batch_rows, model.device):
        one = Replaced(model, sae, batch)
        whole, nothing = one.losses(one.f), one.losses(torch.zeros_like(one.f))
        sizes = torch.tensor([float(batch.usable()[:, 1:].sum()), float(len(one.f))])
        add("totals", torch.cat([torch.stack([whole.sum(), nothing.sum()]).cpu(), sizes]))
        add("active", (one.f > 0).sum(0))
        steps_taken = [one.gradient((step + 0.5) / steps) for step in range(steps)]
        for name, short, g in (
            ("attribution", "A", one.gradient(1.0)),
            ("integrated", "IG", torch.stack(steps_taken).mean(0)),
        ):
            values = contributions(one.f, g, sae)
            add(f"absolute_{short}", values.double().abs().sum(0))
            by_context[name].append(one.by_context(values).cpu())
        changes = [one.losses(one.without(i)) - whole for i in range(one.f.shape[1])]
        by_context["ablation"].append(torch.stack(changes, dim=1).cpu())
    return Effects(**{name: torch.cat(parts) for name, parts in by_context.items()}, **summed)


@torch.no_grad()
def kept_alone(
    model: LanguageModel, sae: FoldedSAE, contexts: Contexts, sets: Mapping[str, Iterable[int]]
) -> dict[str, float]:
    """{name of a set: loss with its candidates alone, minus that with all candidates, nats per token}."""
    sae = sae.to(model.device)
    chosen = {name: torch.tensor(sorted(members), dtype=torch.long) for name, members in sets.items()}
    lost, targets = dict.fromkeys(chosen, 0.0), 0
    for batch in contexts.batches(model.config.batch_rows, model.device):
        one = Replaced(model, sae, batch)
        whole = float(one.losses(one.f).sum())
        targets += int(batch.usable()[:, 1:].sum())
        for name, members in chosen.items():
            f = torch.zeros_like(one.f)
            f[:, members] = one.f[:, members]
            lost[name] += float(one.losses(f).sum()) - whole
    return {name: value / targets for name, value in lost.items()}


def alike(x: Tensor, y: Tensor) -> dict[str, float | None]:
    """{pearson, spearman, slope} of ``y`` on ``x``, any shape; slope: of the best line through 0."""
    x, y = x.double().flatten(), y.double().flatten()
    if len(x) < 2 or x.min() == x.max() or y.min() == y.max():
        return {"pearson": None, "spearman": None, "slope": None}
    slope = float((x * y).sum() / x.square().sum())
    found = {"pearson": pearsonr(x.numpy(), y.numpy()), "spearman": spearmanr(x.numpy(), y.numpy())}
    values: dict[str, float | None] = {name: float(result.statistic) for name, result in found.items()}
    return values | {"slope": slope}


def describe(effects: Effects, coverage: float) -> dict[str, Any]:
    """What the effects say of the attribution.

    agreement: promised against measured changes of the loss, of A and of IG, over candidates and over pairs
    of candidate and context; the scores without their sign; and as a ceiling the measured changes of one half
    of the contexts against those of the other. sets: for each score the size of the set with ``coverage`` of
    it, and its Jaccard index with those of ``mean_abs`` and ``ablation_by_context``. loss_of_all: L(0) -
    L(f), nats per token; first_order, completeness: the sums of A and of IG over L(f) - L(0). hurting: how
    many candidates the loss is lower without.
    """
    scores, measured = effects.scores(), effects.ablation
    halves = [measured[half::2] for half in (0, 1)]
    chosen = {name: smallest_cover(score, coverage).tolist() for name, score in scores.items()}
    agreement = {}
    for name, promised in (("A", effects.attribution), ("IG", effects.integrated)):
        agreement[name] = alike(-promised.sum(0), measured.sum(0))
        agreement[f"{name}, by context"] = alike(-promised, measured)
    for name in ("mean_abs", "ig_mean_abs", "frequency"):
        agreement[f"size, {name}"] = alike(scores[name], scores["ablation_by_context"])
    agreement["halves of the contexts"] = alike(*(half.sum(0) for half in halves))
    against = {"jaccard": "mean_abs", "jaccard_ablation": "ablation_by_context"}
    whole, nothing, targets, tokens = effects.totals.tolist()
    return {
        "candidates": measured.shape[1],
        "contexts": len(measured),
        "tokens": int(tokens),
        "loss_of_all": (nothing - whole) / targets,
        "first_order": float(effects.attribution.sum()) / (whole - nothing),
        "completeness": float(effects.integrated.sum()) / (whole - nothing),
        "hurting": int((measured.sum(0) < 0).sum()),
        "agreement": agreement,
        "sets": {
            name: {"size": len(members)} | {key: jaccard(members, chosen[of]) for key, of in against.items()}
            for name, members in chosen.items()
        },
    }


def rivals(effects: Effects, coverage: float, seed: int, cycle: int) -> dict[str, list[int]]:
    """Sets of candidates of one size, that of the smallest one with ``coverage`` of ``mean_abs``: the first
    by each score, and random ones."""
    scores = effects.scores()
    size, n = len(smallest_cover(scores["mean_abs"], coverage)), len(effects.active)
    orders = {name: torch.argsort(score, descending=True, stable=True) for name, score in scores.items()}
    for draw in range(DRAWS):
        orders[f"random {draw}"] = torch.randperm(n, generator=generator(seed, "rivals", cycle, draw))
    return {name: order[:size].tolist() for name, order in orders.items()}


def deeper(
    model: LanguageModel, sae: FoldedSAE, contexts: Contexts, coverage: float, aggregator: str
) -> list[dict[str, Any]]:
    """A row for each prefix, 0 to DEEPEST, whose latents (and the core) are the candidates, at their own
    reconstruction: how many there are, are selected, and are so from among those of prefix 0; and how many of
    those selected there are selected again."""
    rows, first = [], None
    for prefix, free in enumerate(sae.prefixes[: DEEPEST + 1]):
        scores = attribute(model, sae, contexts, aggregator=aggregator, prefix=prefix).scores[aggregator]
        chosen = set(smallest_cover(scores, coverage).tolist())
        first = first or chosen
        shallow = sum(i < sae.n_core + sae.prefixes[0] for i in chosen)
        row = {"prefix": prefix, "free": free, "candidates": len(scores), "selected": len(chosen)}
        rows.append(row | {"shallow": shallow, "again": len(chosen & first), "first": len(first)})
    return rows


def ablated(harvest: Harvest, cycle: int) -> Artifact:
    """The artefact with a cycle's effects in the main chain: made once, as long as nothing changes.

    effects.safetensors: :class:`Effects`, on the first ``distill.ablation_tokens`` of the select split.
    record.json: ``kept``, of each of :func:`rivals` what :func:`kept_alone` gives on as many tokens of the
    test split, and ``deeper``.
    """
    run, model = harvest.run, harvest.model
    cfg, trained = run.config.distill, run.load(cycle, "sae")
    what = [cfg.ablation_tokens, cfg.coverage, cfg.aggregator, STEPS, DEEPEST, DRAWS, run.config.threads]
    parents = {"harvest": harvest.artifact.hash, "sae": trained.hash, "settings": hash_json(what)}
    folder = run.folder / "what_is_a_core" / f"cycle_{cycle}"
    if found := artifacts.made(folder, "ablation", parents):
        return found
    sae = load_folded(trained).to(model.device)
    select, test = (harvest.splits[name].first(cfg.ablation_tokens) for name in ("select", "test"))
    with artifacts.write(folder, "ablation", parents) as writer:
        effects = measure(model, sae, select)
        sets = rivals(effects, cfg.coverage, run.config.seed, cycle)
        record = {"kept": kept_alone(model, sae, test, sets), "kept_size": len(sets["mean_abs"])}
        record["deeper"] = deeper(model, sae, select, cfg.coverage, cfg.aggregator)
        writer.tensors("effects.safetensors", vars(effects))
        writer.json("record.json", record)
    return artifacts.load(folder, "ablation")
