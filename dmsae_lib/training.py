"""Training one SAE around :func:`dmsae_lib.gradients.step_gradients`: Adam, schedule, thresholds, checkpoints, progress."""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from dmsae_lib import artifacts
from dmsae_lib.artifacts import UserError
from dmsae_lib.config import TrainingConfig
from dmsae_lib.gradients import StepStats, apply_step, step_gradients
from dmsae_lib.sae import MatryoshkaSAE

NEAR_BUDGET = 0.75  # method and house: above this share of k, the core starves the free latents


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
        stats = step_gradients(sae, x, config.k, config.k_min, config.aux_alpha, self.k_aux, dead, self.last_threshold,
                               config.autocast)
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
