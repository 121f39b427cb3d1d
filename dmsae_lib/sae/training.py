"""One SAE in training: schedule, thresholds, dead latents and checkpoints around the closed-form step."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmsae_lib.config.sections import TrainingConfig
from dmsae_lib.data.activations import START
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.sae.step import StepStats, apply_step, step_gradients
from dmsae_lib.store import artifacts
from dmsae_lib.store.artifacts import UserError

NEVER = 2**62  # no step has this number
LOOK = 100  # steps between two looks at whether latents are still dead, where looking waits for the device


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

    def __init__(self, sae: MatryoshkaSAE, config: TrainingConfig, steps: int, name: str = ""):
        """``name`` is what progress lines call it."""
        self.sae, self.config, self.steps, self.name = sae, config, steps, name
        self.optimizer = make_optimizer(sae, config)
        self.step, self.cursor = 0, START
        device = sae.W_dec.device
        self.waits = device.type == "cuda"  # whether asking for a number waits for the device
        self.since_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)  # tokens
        self.last_threshold = 0.0
        self.clipped = torch.zeros((), dtype=torch.int64, device=device)
        self.bad_step = torch.full((2,), NEVER, device=device)  # first with a bad loss, with bad activations
        tokens = steps * config.batch_size
        self.dead_window = config.dead_window or max(tokens // 50, 40 * config.batch_size)
        self.k_aux = config.k_aux or sae.d_in // 2
        self.beta = min(0.999, max(0.0, 1 - 10 / steps))  # method, section 2
        self.history: list[dict[str, Any]] = []
        self.look_again, self.some_dead = 0, False  # what the host knows of dead latents, until which step

    def train_step(self, x: Tensor) -> StepStats:
        """One batch ``x`` (batch_size, d_in): gradients, Adam step, threshold, dead counters.

        UserError where ``x`` has another shape, or activations or loss are not finite: before they are
        applied on a CPU, by the next :meth:`check_finite` on a GPU.
        """
        cfg, sae = self.config, self.sae
        if x.ndim != 2 or x.shape[1] != sae.d_in:
            shape = tuple(x.shape)
            raise UserError(f"Activations have the shape {shape}: give batches (batch_size, {sae.d_in}).")
        rate = self.optimizer.param_groups[0]["lr"] = learning_rate(self.step, self.steps, cfg)
        dead, threshold = self._dead(), self.last_threshold
        bf16 = cfg.autocast is True  # fit has said what auto comes to
        stats = step_gradients(
            sae, x, cfg.k, cfg.k_min, cfg.aux_alpha, self.k_aux, dead, threshold, bf16, self.waits
        )
        bad = torch.stack([~torch.isfinite(stats.loss), ~torch.isfinite(x).all()])
        self.bad_step = torch.where(bad, self.bad_step.clamp(max=self.step), self.bad_step)
        if not self.waits:
            self.check_finite()
            self.last_threshold = float(stats.smallest_kept) or self.last_threshold
        self.clipped += apply_step(sae, self.optimizer, cfg.grad_clip) > cfg.grad_clip
        smallest = stats.smallest_kept.double()
        moved = self.beta * sae.threshold_ema + (1 - self.beta) * smallest if self.step else smallest
        sae.threshold_ema.copy_(torch.where(smallest > 0, moved, sae.threshold_ema))
        self.since_fired = torch.where(stats.fired, 0, self.since_fired + len(x))
        self.step += 1
        if self.step % max(1, self.steps // 60) == 0 or self.step in (1, self.steps):
            self.history.append(self._row(stats, rate))
        return stats

    def _row(self, stats: StepStats, rate: float) -> dict[str, Any]:
        """history.csv's row of the last step."""
        loss, fvu, core, free = (float(v) for v in (stats.loss, stats.fvu, stats.l0_core, stats.l0_free))
        row: dict[str, Any] = {"step": self.step, "tokens": self.step * self.config.batch_size, "loss": loss}
        row |= {"fvu": fvu if math.isfinite(fvu) else None, "aux": float(stats.aux)}  # no variance, no FVU
        row |= {"L0_core": core, "L0_free": free, "L0_total": core + free, "dead": int(self.dead.sum())}
        return row | {"threshold": float(self.sae.threshold_ema), "lr": rate}

    @property
    def dead(self) -> Tensor:
        """(d_sae - c,) bool: the free latents that have not fired for ``dead_window`` tokens."""
        return self.since_fired[self.sae.n_core :] >= self.dead_window

    def _dead(self) -> Tensor | None:
        """:attr:`dead`, or None where there are none.

        The host looks only when the oldest counter may have run out, and now and then while there are dead
        latents: an empty mask changes nothing.
        """
        if self.step >= self.look_again:
            left = self.dead_window - int(self.since_fired[self.sae.n_core :].max())
            self.some_dead = left <= 0
            until = math.ceil(left / self.config.batch_size) if left > 0 else LOOK if self.waits else 1
            self.look_again = self.step + until
        return self.dead if self.some_dead else None

    def check_finite(self) -> None:
        """UserError if any step so far met NaN or Inf, naming the first and where they came from."""
        loss, activations = self.bad_step.tolist()
        if loss < NEVER:
            source, lr = "the activations" if activations == loss else "the loss", self.config.lr
            raise UserError(
                f"Step {loss}: {source} hold NaN or Inf; lower training.lr (now {lr}) or look at "
                "data.outlier_norm. The last checkpoint is kept."
            )

    def save(self, folder: Path, parents: dict[str, str]) -> None:
        """Write a checkpoint, unless a step has failed: the one before is kept then."""
        self.check_finite()
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": value for name, value in state.items()}
        names = ("step", "steps", "cursor", "last_threshold", "history")
        record = {name: getattr(self, name) for name in names} | {"clipped": int(self.clipped)}
        with artifacts.write(folder, "checkpoint", parents) as writer:
            writer.tensors("state.safetensors", tensors | {"since_fired": self.since_fired})
            writer.json("state.json", record)

    def resume(self, folder: Path, parents: dict[str, str]) -> bool:
        """Go on from the checkpoint in ``folder`` if it is there and made from the same parents."""
        checkpoint = artifacts.made(folder, "checkpoint", parents)
        if checkpoint is None or (state := checkpoint.json("state.json"))["steps"] != self.steps:
            return False
        if any("L0_free" not in row for row in state["history"]):
            return False  # of an earlier release, whose rows have other names: no table holds both
        tensors = checkpoint.tensors("state.safetensors")
        self.sae.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("sae.")})
        adam = self.optimizer.state_dict()
        for key in tensors:
            if key.startswith("adam."):
                _, index, name = key.split(".", 2)
                adam["state"].setdefault(int(index), {})[name] = tensors[key]
        self.optimizer.load_state_dict(adam)
        self.since_fired.copy_(tensors["since_fired"])
        self.clipped.fill_(state["clipped"])
        self.step, self.cursor = state["step"], tuple(state["cursor"])
        self.last_threshold, self.history = state["last_threshold"], state["history"]
        return True
