"""Training one Matryoshka SAE with a frozen core: the page to read.

:func:`step_gradients` is one training step's loss and gradients in closed form (tests hold it to autograd);
:func:`train_sae` wraps it in Adam, the schedule, thresholds, checkpoints and progress.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dmsae_lib import artifacts
from dmsae_lib.artifacts import UserError
from dmsae_lib.config import TrainingConfig
from dmsae_lib.sae import MatryoshkaSAE
from dmsae_lib.sparsity import batch_topk, non_core_budget

NEAR_BUDGET = 0.75  # method and house: above this share of k, the core starves the free latents


@dataclass
class StepStats:
    """What one step knows anyway. ``loss`` is the objective; fvu is that of the full reconstruction on the batch."""

    loss: Tensor
    aux: Tensor
    fvu: Tensor
    l0_core: float
    l0_free: float
    smallest_kept: Tensor
    fired: Tensor  # (d_sae,) bool


@torch.no_grad()
def step_gradients(sae: MatryoshkaSAE, x: Tensor, k: int, k_min: int = 1, aux_alpha: float = 1 / 32,
                   k_aux: int = 0, dead: Tensor | None = None, last_threshold: float = 0.0) -> StepStats:
    """Fill ``.grad`` of the SAE's four parameters with the gradient of the objective on the batch ``x`` (B, d_in).

        L = sum_j mean_b ||x - xhat_j||^2  +  aux_alpha * L_aux                                     (method, section 1)

    over the nested reconstructions xhat_j, all of which contain b_dec and the whole core. With e_j = xhat_j - x, a
    latent of segment j sees the suffix sum S_j = e_j + e_(j+1) + ..., so each weight takes part in one matrix product
    forward and one or two backward, as if there were no nesting.

    Args:
        k, k_min: target total L0 and floor of the free latents' L0 (method, section 2).
        dead: indices of the dead free latents, counted from the first free one; AuxK acts on them alone.
        last_threshold: last step's smallest kept activation, to look at few candidates; changes nothing in the result.
    """
    batch, c = len(x), sae.n_core
    centred = x - sae.b_dec
    f_core = F.linear(centred, sae.core_rows, sae.b_enc[:c]).relu_()
    a = F.linear(centred, sae.free_rows, sae.b_enc[c:]).relu_()  # (B, d_sae - c), before selection

    if sae.core_sparsity == "relu":
        budget = non_core_budget(batch, k, int(torch.count_nonzero(f_core)), k_min)
        mask, smallest = batch_topk(a, budget, last_threshold)
    else:
        joint, smallest = batch_topk(torch.cat([f_core, a], dim=1), batch * k, last_threshold)
        f_core, mask = f_core * joint[:, :c], joint[:, c:]
    f = a * mask

    # Nested errors, each from the one before: e_j = e_(j-1) + (segment j) W_dec
    bounds = [0, *sae.prefixes]
    errors = [torch.addmm(sae.b_dec - x, f_core, sae.W_dec[:c])]
    for j, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        errors.append(torch.addmm(errors[j], f[:, start:stop], sae.W_dec[c + start : c + stop]))
    errors = errors[1:]  # there is no core-only term
    loss = sum(e.square().sum(dtype=torch.float64) for e in errors) / batch
    residual = -errors[-1]
    variance = (x - x.mean(0)).square().sum(dtype=torch.float64)
    fvu = errors[-1].square().sum(dtype=torch.float64) / variance

    # Backward, from the outermost segment in
    grad_dec = torch.empty_like(sae.W_dec)
    grad_f = torch.empty_like(f)
    suffix = torch.zeros_like(x)
    for j in reversed(range(len(errors))):
        suffix += errors[j]
        start, stop = bounds[j], bounds[j + 1]
        grad_dec[c + start : c + stop] = f[:, start:stop].T @ suffix
        torch.mm(suffix, sae.W_dec[c + start : c + stop].T, out=grad_f[:, start:stop])
    grad_dec[:c] = f_core.T @ suffix
    grad_core = where_active(suffix @ sae.W_dec[:c].T, f_core)
    grad_f = where_active(grad_f, f)
    unit = 2 / batch
    grad_dec.mul_(unit), grad_f.mul_(unit), grad_core.mul_(unit)
    grad_b_dec = suffix.sum(0) * unit

    aux = x.new_zeros((), dtype=torch.float64)
    if dead is not None and len(dead) and k_aux > 0:
        aux = _add_aux(sae, a, residual, dead, k_aux, aux_alpha, grad_dec, grad_f)
        loss = loss + aux_alpha * aux

    sae.free_rows.grad = grad_f.T @ centred
    sae.W_dec.grad = grad_dec
    sae.b_enc.grad = torch.cat([grad_core.sum(0), grad_f.sum(0)])
    rows = torch.cat([sae.core_rows, sae.free_rows])
    sae.b_dec.grad = grad_b_dec - sae.b_enc.grad @ rows  # b_dec is subtracted before the encoder, too

    fired = torch.cat([f_core.amax(0), f.amax(0)]) > 0
    active = torch.count_nonzero(f_core), torch.count_nonzero(mask)
    return StepStats(loss, aux, fvu, int(active[0]) / batch, int(active[1]) / batch, smallest, fired)


def where_active(grad: Tensor, f: Tensor) -> Tensor:
    """``grad`` where ``f`` > 0, else 0: ReLU's own backward, one pass where a product with a mask takes two."""
    return torch.ops.aten.threshold_backward(grad, f, 0)


def _add_aux(sae: MatryoshkaSAE, a: Tensor, residual: Tensor, dead: Tensor, k_aux: int, alpha: float,
             grad_dec: Tensor, grad_f: Tensor) -> Tensor:
    """AuxK: the ``k_aux`` strongest dead latents of each row reconstruct the detached residual.

    L_aux = mean_b ||r - rhat||^2 / mean_b ||r - mean r||^2, on activations before selection: otherwise dead latents get
    no gradient (dictionary_learning after 13 Jan 2025). Adds its gradients in place and returns L_aux.
    """
    c = sae.n_core
    a_dead = a[:, dead]
    if k_aux < len(dead):
        kept = torch.zeros_like(a_dead, dtype=torch.bool).scatter_(1, a_dead.topk(k_aux, dim=1).indices, True)
        a_dead = a_dead * kept
    error = a_dead @ sae.W_dec[c + dead] - residual
    variance = (residual - residual.mean(0)).square().sum(dtype=torch.float64)
    if variance == 0:
        return variance
    unit = 2 * alpha / float(variance)
    grad_dec[c + dead] += (a_dead.T @ error) * unit
    grad_f[:, dead] += where_active(error @ sae.W_dec[c + dead].T, a_dead) * unit
    return error.square().sum(dtype=torch.float64) / variance


@torch.no_grad()
def apply_step(sae: MatryoshkaSAE, optimizer: torch.optim.Optimizer, grad_clip: float) -> Tensor:
    """One Adam step with unit-norm decoder rows; returns the gradient's norm before clipping.

    The gradient part along each decoder row is removed, since the row is scaled back to norm 1 afterwards.
    """
    grad = sae.W_dec.grad
    grad -= (grad * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
    norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), grad_clip)
    optimizer.step()
    sae.W_dec.copy_(F.normalize(sae.W_dec, dim=1))
    return norm


def make_optimizer(sae: MatryoshkaSAE, config: TrainingConfig) -> torch.optim.Adam:
    return torch.optim.Adam(sae.parameters(), lr=config.lr, betas=config.betas, fused=True)


def learning_rate(step: int, steps: int, config: TrainingConfig) -> float:
    """Linear warm-up over the first ``warmup`` of the steps, linear decay to 0 over the last ``decay``."""
    up = (step + 1) / max(1.0, config.warmup * steps)
    down = (steps - step) / max(1.0, config.decay * steps)
    return config.lr * min(1.0, up, down)


@torch.no_grad()
def match_frequency(sae: MatryoshkaSAE, x: Tensor, frequency: Tensor) -> None:
    """Set the core's b_enc so that latent i fires on the share ``frequency[i]`` of ``x`` (tokens, d_in)."""
    pre = (x - sae.b_dec) @ sae.core_rows.T
    for i, share in enumerate(frequency.clamp(0, 1).tolist()):
        sae.b_enc[i] = -torch.quantile(pre[:, i], 1 - share)


class Trainer:
    """State of one training run: everything a checkpoint must hold so that resuming equals never stopping."""

    def __init__(self, sae: MatryoshkaSAE, config: TrainingConfig, steps: int):
        self.sae, self.config, self.steps = sae, config, steps
        self.optimizer = make_optimizer(sae, config)
        self.step, self.cursor = 0, (0, 0, 0)
        self.since_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_dec.device)  # tokens
        self.last_threshold, self.clipped = 0.0, 0
        tokens = steps * config.batch_size
        self.dead_window = config.dead_window or max(tokens // 50, 40 * config.batch_size)
        self.k_aux = config.k_aux or sae.d_in // 2
        self.beta = min(0.999, max(0.0, 1 - 10 / steps))  # method, section 2
        self.history: list[dict[str, float]] = []

    def train_step(self, x: Tensor) -> StepStats:
        """One batch ``x`` (batch_size, d_in): gradients, Adam step, threshold, dead counters."""
        config, sae = self.config, self.sae
        dead = (self.since_fired[sae.n_core :] >= self.dead_window).nonzero().squeeze(1)
        rate = self.optimizer.param_groups[0]["lr"] = learning_rate(self.step, self.steps, config)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=config.autocast):
            stats = step_gradients(sae, x, config.k, config.k_min, config.aux_alpha, self.k_aux, dead, self.last_threshold)
        if not math.isfinite(float(stats.loss)):
            source = "the activations" if not bool(torch.isfinite(x).all()) else "the loss"
            raise UserError(f"Step {self.step}: {source} hold NaN or Inf; lower training.lr (now {config.lr}) or look at "
                            "data.outlier_norm. The last checkpoint is kept.")
        self.clipped += int(apply_step(sae, self.optimizer, config.grad_clip) > config.grad_clip)
        smallest = float(stats.smallest_kept)
        if smallest > 0:
            self.last_threshold = smallest
            old = float(sae.threshold_ema) if self.step else smallest
            sae.threshold_ema.fill_(self.beta * old + (1 - self.beta) * smallest)
        self.since_fired += len(x)
        self.since_fired[stats.fired] = 0
        self.step += 1
        if self.step % max(1, self.steps // 60) == 0 or self.step in (1, self.steps):
            self.history.append({
                "step": self.step, "tokens": self.step * config.batch_size, "loss": float(stats.loss),
                "fvu": float(stats.fvu), "aux": float(stats.aux), "L0_core": stats.l0_core, "L0_non_core": stats.l0_free,
                "L0_total": stats.l0_core + stats.l0_free, "dead": len(dead), "threshold": float(sae.threshold_ema),
                "lr": rate,
            })  # fmt: skip
        return stats

    def save(self, folder: Path, parents: dict[str, str]) -> None:
        with artifacts.write(folder, "checkpoint", parents) as writer:
            moments = {f"{i}.{key}": value for i, state in self.optimizer.state_dict()["state"].items()
                       for key, value in state.items()}
            writer.tensors("state.safetensors", {**{f"sae.{k}": v for k, v in self.sae.state_dict().items()},
                                                 **{f"adam.{k}": v for k, v in moments.items()},
                                                 "since_fired": self.since_fired})
            writer.json("state.json", {"step": self.step, "steps": self.steps, "cursor": self.cursor, "clipped": self.clipped,
                                       "last_threshold": self.last_threshold, "history": self.history})

    def resume(self, folder: Path, parents: dict[str, str]) -> bool:
        """Go on from the checkpoint in ``folder`` if it is there and made from the same parents."""
        if not (folder / "manifest.json").is_file():
            return False
        checkpoint = artifacts.load(folder, "checkpoint")
        state, tensors = checkpoint.json("state.json"), checkpoint.tensors("state.safetensors")
        if checkpoint.parents != dict(sorted(parents.items())) or state["steps"] != self.steps:
            return False
        self.sae.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("sae.")})
        adam = self.optimizer.state_dict()
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, index, name = key.split(".", 2)
                adam["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(adam)
        self.since_fired.copy_(tensors["since_fired"])
        self.step, self.cursor, self.clipped = state["step"], tuple(state["cursor"]), state["clipped"]
        self.last_threshold, self.history = state["last_threshold"], state["history"]
        return True


def train_sae(trainer: Trainer, batches: Callable[[tuple], Iterable[tuple[Tensor, tuple]]], checkpoint: Path,
              parents: dict[str, str], report: Callable[[str], None] = print) -> None:
    """Train to ``trainer.steps``, from the checkpoint where there is a fitting one.

    Args:
        batches: given a cursor, yields (x (batch_size, d_in), next cursor) from there on.
        checkpoint: the checkpoint's folder; the caller removes it once the finished SAE is written.
        parents: hashes of all that the training depends on; a checkpoint of anything else is ignored.
    """
    config = trainer.config
    resumed = trainer.resume(checkpoint, parents)
    if resumed:
        report(f"resumed at step {trainer.step}/{trainer.steps}")
    first, started, saved, told, warned = trainer.step, time.perf_counter(), time.perf_counter(), 0.0, False
    if trainer.step >= trainer.steps:
        return
    for x, cursor in batches(trainer.cursor):
        stats = trainer.train_step(x)
        trainer.cursor = cursor
        now = time.perf_counter()
        if stats.l0_core > NEAR_BUDGET * config.k and not warned:
            warned = True
            report(f"WARNING step {trainer.step}: the core's L0 is {stats.l0_core:.1f}, {stats.l0_core / config.k:.0%} of "
                   f"k = {config.k}: little is left for the free latents; raise training.k or lower sae.prefixes[0].")
        if now - told > 10 or trainer.step == trainer.steps:
            told, rate = now, (trainer.step - first) / (now - started)
            dead = int((trainer.since_fired >= trainer.dead_window).sum())
            report(f"step {trainer.step}/{trainer.steps}  {rate * config.batch_size:,.0f} tokens/s  "
                   f"ETA {(trainer.steps - trainer.step) / rate:.0f} s  loss {float(stats.loss):.4f}  "
                   f"L0 {stats.l0_core:.1f} + {stats.l0_free:.1f} = {stats.l0_core + stats.l0_free:.1f}  dead {dead}")
        if trainer.step == trainer.steps:
            return
        if now - saved > config.checkpoint_seconds:
            trainer.save(checkpoint, parents)
            saved = time.perf_counter()
    raise UserError(f"The activations ended at step {trainer.step} of {trainer.steps}: data.train_tokens is too low for the run.")
