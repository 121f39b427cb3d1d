"""What an SAE is worth on held-out text: L0, FVU by prefix, loss recovered, dead latents; its threshold."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmsae_lib.data.activations import Losses, usable_residuals
from dmsae_lib.data.contexts import Contexts
from dmsae_lib.data.language_model import LanguageModel, lowered, next_token_loss
from dmsae_lib.interop.foreign import Foreign
from dmsae_lib.sae.model import FoldedSAE
from dmsae_lib.sae.select import between_nth
from dmsae_lib.store.artifacts import Artifact, made

CALIBRATION_TOKENS = 2**17  # at most this many tokens of the split are held in memory: 1.2 GB at width 2304
SHARED_BYTES = 2**30  # residuals of the test split up to this size are kept for all SAEs of a call
SMALLEST_CUT = 1e-6  # an activation below which all are looked at
RARE = 1e-3  # a latent that fires on a smaller share of the tokens all but never fires
UNBOUND = 0.01  # method, section 2: total L0 further from k is left out of equal-L0 comparisons

Lowered = list[tuple[Contexts, Tensor]]


@torch.no_grad()
def lower_all(model: LanguageModel, contexts: Contexts) -> Lowered | None:
    """Every batch with its residual at the hook, to share between SAEs; None if that is too large."""
    if contexts.tokens.numel() * model.d_model * 4 > SHARED_BYTES:
        return None
    return list(lowered(model, contexts))


def calibration_residuals(model: LanguageModel, contexts: Contexts) -> list[Tensor]:
    """The activations on which thresholds are set: those of the first contexts, (n, d_in) per batch."""
    return list(usable_residuals(model, contexts.first(CALIBRATION_TOKENS)))


@torch.no_grad()
def calibrate_threshold(sae: FoldedSAE, residuals: list[Tensor], k: int, k_min: int) -> bool:
    """Set ``sae.threshold`` so that total L0 = k on the residuals; True if that cannot be had (``unbound``).

    The EMA of the training thresholds overshoots or undershoots k (3-9 % in published SAEs), so comparisons
    need this. Where the core alone leaves less than k_min, the free latents get k_min and the SAE is unbound.
    """
    start = sae.n_core if sae.core_sparsity == "relu" else 0
    tokens, cut = sum(map(len, residuals)), float(sae.threshold_ema)
    while True:  # as a rule once: the threshold of the training is near
        cut = cut / 2 if cut > SMALLEST_CUT else 0.0
        found, in_core = [], 0
        for x in residuals:
            a = sae.pre_activations(x)
            in_core += int((a[:, :start] > 0).sum())
            a = a[:, start:]
            found.append(a[a > cut])
        above, wanted = torch.cat(found), max(tokens * k_min, tokens * k - in_core)
        if len(above) > wanted or cut == 0.0:
            break
    sae.threshold.fill_(between_nth(above, wanted))
    total = (in_core + int((above > sae.threshold.to(above.dtype)).sum())) / tokens
    return abs(total - k) > UNBOUND * k


class _FVU:
    """sum ||x - xhat||^2 / sum ||x - mean||^2, accumulated over batches in float64."""

    def __init__(self, d_in: int):
        self.error, self.square, self.total, self.count = 0.0, 0.0, torch.zeros(d_in, dtype=torch.float64), 0

    def add(self, x: Tensor, xhat: Tensor) -> None:
        self.error += float((x - xhat).square().sum(dtype=torch.float64))
        self.square += float(x.square().sum(dtype=torch.float64))
        self.total += x.sum(0, dtype=torch.float64).cpu()
        self.count += len(x)

    def value(self) -> float:
        return self.error / (self.square - float(self.total.square().sum()) / self.count)


def loss_recovered(loss: float, clean: float, ablated: float) -> float:
    """(L_ablated - L_sae) / (L_ablated - L_clean): 1 for a perfect reconstruction, 0 for the ablation."""
    return (ablated - loss) / (ablated - clean)


@torch.no_grad()
def evaluate(
    sae: FoldedSAE | Foreign,
    model: LanguageModel,
    contexts: Contexts,
    losses: Losses,
    with_prefix0: bool = True,
    at_hand: Lowered | None = None,
) -> dict[str, Any]:
    """Metrics on the usable positions of ``contexts``, on which the model has ``losses``.

    Returns L0 {core, free, total} at the calibrated and at the EMA threshold, fvu by prefix size and "full",
    ce_loss (nats, full reconstruction), loss_increase {prefix0, full} (nats, ce_loss - clean), loss_recovered
    {prefix0, full} against zero ablation and loss_recovered_mean (full) against mean ablation, dead (latents
    that never fired here), rare (the share of latents that fired on less than RARE of the tokens), and the
    core's firing frequencies.

    ``with_prefix0``: the entries prefix0 are there. ``at_hand``: :func:`lower_all` of the contexts.
    """
    c, last = sae.n_core, len(sae.prefixes) - 1
    fvus = [_FVU(sae.d_in) for _ in sae.prefixes]
    fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_dec.device)
    fired_at_ema = torch.zeros(2, dtype=torch.int64)  # core, all
    place = {"prefix0": 0, "full": last} if with_prefix0 else {"full": last}
    summed = dict.fromkeys(place, 0.0)
    n_tokens = n_targets = 0
    for batch, resid in at_hand or lowered(model, contexts):
        usable = model.usable(batch, resid)
        x = resid[usable]
        a = sae.pre_activations(x)
        f = sae.select(a)
        fired += (f > 0).sum(0)
        at_ema = sae.select(a, sae.threshold_ema) > 0
        fired_at_ema += torch.tensor([int(at_ema[:, :c].sum()), int(at_ema.sum())])
        n_tokens += len(x)
        for j, fvu in enumerate(fvus):
            xhat = sae.decode_prefix(f, j)
            fvu.add(x, xhat)
            if wanted := [name for name, at in place.items() if at == j]:  # both, of a single prefix
                put = resid.clone()
                put[usable] = xhat
                loss, count = next_token_loss(model.upper(batch.tokens, put), batch)
                for name in wanted:
                    summed[name] += float(loss)
        n_targets += count

    def l0(core: float, total: float) -> dict[str, float]:
        return {"core": core, "free": total - core, "total": total}

    ce, clean = {name: value / n_targets for name, value in summed.items()}, losses.clean
    return {
        "L0": l0(int(fired[:c].sum()) / n_tokens, int(fired.sum()) / n_tokens),
        "L0_ema": l0(*(fired_at_ema / n_tokens).tolist()),
        "dead": int((fired == 0).sum()),
        "rare": float((fired < RARE * n_tokens).float().mean()),
        "tokens_tested": n_tokens,
        "fvu": dict(zip([*map(str, sae.prefixes[:-1]), "full"], (fvu.value() for fvu in fvus))),
        "ce_loss": ce["full"],
        "loss_increase": {name: value - clean for name, value in ce.items()},
        "loss_recovered": {name: loss_recovered(value, clean, losses.zero) for name, value in ce.items()},
        "loss_recovered_mean": loss_recovered(ce["full"], clean, losses.mean),
        "core_frequency": _summary((fired[:c] / n_tokens).tolist()),
    }


def made_sae(folder: Path, parents: dict[str, str]) -> Artifact | None:
    """The SAE in ``folder`` if it was made from these parents and measured as :func:`evaluate` does now.

    Earlier releases had another name for the L0 of the free latents: what they made is made again.
    """
    found = made(folder, "sae", parents)
    return found if found and "free" in found.json("metrics.json")["L0"] else None


def _summary(values: list[float]) -> dict[str, Any] | None:
    return {"mean": sum(values) / len(values), "max": max(values), "values": values} if values else None
