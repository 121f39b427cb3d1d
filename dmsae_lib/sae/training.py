"""Training SAEs around :func:`dmsae_lib.sae.step.step_gradients`: Adam, schedule, thresholds, checkpoints,
progress."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dmsae_lib.config.sections import TrainingConfig
from dmsae_lib.data.activations import START, Cursor
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.sae.step import StepStats, apply_step, step_gradients
from dmsae_lib.store import artifacts
from dmsae_lib.store.artifacts import UserError

NEVER = 2**62  # no step has this number
LOOK = 100  # steps between two looks at whether latents are still dead, where looking waits for the device
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

    def __init__(self, sae: MatryoshkaSAE, config: TrainingConfig, steps: int, name: str = ""):
        """``name`` is what progress lines call it."""
        self.sae, self.config, self.steps, self.name = sae, config, steps, name
        self.optimizer = make_optimizer(sae, config)
        self.step, self.cursor = 0, START
        device = sae.W_dec.device
        self.since_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)  # tokens
        self.last_threshold = 0.0
        self.clipped = torch.zeros((), dtype=torch.int64, device=device)
        # the first with a bad loss, with bad activations
        self.bad_step = torch.full((2,), NEVER, device=device)
        tokens = steps * config.batch_size
        self.dead_window = config.dead_window or max(tokens // 50, 40 * config.batch_size)
        self.k_aux = config.k_aux or sae.d_in // 2
        self.beta = min(0.999, max(0.0, 1 - 10 / steps))  # method, section 2
        self.history: list[dict[str, float]] = []
        self.waits = device.type == "cuda"  # whether asking for a number waits for the device
        # what the host knows of dead latents, and until which step
        self.look_again, self.some_dead = 0, False

    def train_step(self, x: Tensor) -> StepStats:
        """One batch ``x`` (batch_size, d_in): gradients, Adam step, threshold, dead counters.

        UserError where ``x`` has another shape, or activations or loss are not finite: before they are
        applied on a CPU, by the next :meth:`check_finite` on a GPU.
        """
        config, sae = self.config, self.sae
        if x.ndim != 2 or x.shape[1] != sae.d_in:
            raise UserError(
                f"Activations have the shape {tuple(x.shape)}: give batches (batch_size, {sae.d_in})."
            )
        rate = self.optimizer.param_groups[0]["lr"] = learning_rate(self.step, self.steps, config)
        stats = step_gradients(
            sae,
            x,
            config.k,
            config.k_min,
            config.aux_alpha,
            self.k_aux,
            self._dead(),
            self.last_threshold,
            config.autocast,
            fixed_shapes=self.waits,
        )
        bad = torch.stack([~torch.isfinite(stats.loss), ~torch.isfinite(x).all()])
        self.bad_step = torch.where(bad, self.bad_step.clamp(max=self.step), self.bad_step)
        if not self.waits:
            self.check_finite()
            self.last_threshold = float(stats.smallest_kept) or self.last_threshold
        self.clipped += apply_step(sae, self.optimizer, config.grad_clip) > config.grad_clip
        smallest = stats.smallest_kept.double()
        moved = self.beta * sae.threshold_ema + (1 - self.beta) * smallest if self.step else smallest
        sae.threshold_ema.copy_(torch.where(smallest > 0, moved, sae.threshold_ema))
        self.since_fired = torch.where(stats.fired, 0, self.since_fired + len(x))
        self.step += 1
        if self.step % max(1, self.steps // 60) == 0 or self.step in (1, self.steps):
            core, free = float(stats.l0_core), float(stats.l0_free)
            self.history.append(
                {
                    "step": self.step,
                    "tokens": self.step * config.batch_size,
                    "loss": float(stats.loss),
                    # a batch without variance has none
                    "fvu": fvu if math.isfinite(fvu := float(stats.fvu)) else None,
                    "aux": float(stats.aux),
                    "L0_core": core,
                    "L0_free": free,
                    "L0_total": core + free,
                    "dead": int(self.dead.sum()),
                    "threshold": float(sae.threshold_ema),
                    "lr": rate,
                }
            )
        return stats

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
            source = "the activations" if activations == loss else "the loss"
            raise UserError(
                f"Step {loss}: {source} hold NaN or Inf; lower training.lr (now {self.config.lr}) or look at "
                "data.outlier_norm. The last checkpoint is kept."
            )

    def save(self, folder: Path, parents: dict[str, str]) -> None:
        """Write a checkpoint, unless a step has failed: the one before is kept then."""
        self.check_finite()
        with artifacts.write(folder, "checkpoint", parents) as writer:
            moments = {
                f"{i}.{key}": value
                for i, state in self.optimizer.state_dict()["state"].items()
                for key, value in state.items()
            }
            writer.tensors(
                "state.safetensors",
                {
                    **{f"sae.{k}": v for k, v in self.sae.state_dict().items()},
                    **{f"adam.{k}": v for k, v in moments.items()},
                    "since_fired": self.since_fired,
                },
            )
            writer.json(
                "state.json",
                {
                    "step": self.step,
                    "steps": self.steps,
                    "cursor": self.cursor,
                    "clipped": int(self.clipped),
                    "last_threshold": self.last_threshold,
                    "history": self.history,
                },
            )

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
        self.clipped.fill_(state["clipped"])
        self.step, self.cursor = state["step"], tuple(state["cursor"])
        self.last_threshold, self.history = state["last_threshold"], state["history"]
        return True


class _Progress:
    """Lines for the reader: now and then, at the end of each SAE, and when a core takes most of the
    budget."""

    def __init__(self, trainers: Sequence[Trainer], report: Callable[[str], None]):
        self.trainers, self.report, self.started, self.told = trainers, report, time.perf_counter(), 0.0
        self.before, self.total = (sum(getattr(t, name) for t in trainers) for name in ("step", "steps"))
        self.warned: set[int] = set()

    def look(self, trainer: Trainer, stats: StepStats) -> None:
        config, now, label = trainer.config, time.perf_counter(), f"{trainer.name}  " if trainer.name else ""
        latest = trainer.history[-1]
        share = latest["L0_core"] / config.k
        if latest["step"] == trainer.step and share > NEAR_BUDGET and id(trainer) not in self.warned:
            self.warned.add(id(trainer))
            self.report(
                f"{label}WARNING step {trainer.step}: the core's L0 is {latest['L0_core']:.1f}, {share:.0%} "
                f"of k = {config.k}: little is left for the free latents; raise training.k or lower "
                "sae.prefixes[0]."
            )
        if now - self.told > 10 or trainer.step == trainer.steps:
            self.told, done = now, sum(t.step for t in self.trainers)
            rate = (done - self.before) / (now - self.started)  # of all SAEs together
            core, free = float(stats.l0_core), float(stats.l0_free)
            self.report(
                f"{label}step {trainer.step}/{trainer.steps}  {rate * config.batch_size:,.0f} tokens/s  "
                f"ETA {(self.total - done) / rate:.0f} s  loss {float(stats.loss):.4f}  "
                f"L0 {core:.1f} + {free:.1f} = {core + free:.1f}  dead {int(trainer.dead.sum())}"
            )


def _set_aside(checkpoint: Path) -> Path:
    """Give a checkpoint another name, where the next one does not replace it; one that lay there already is
    removed."""
    aside = checkpoint.with_name(f"{checkpoint.name}.aside")
    artifacts.remove(aside)
    with artifacts.explain_os_errors(aside):
        return checkpoint.rename(aside)


Batches = Callable[[Cursor], Iterable[tuple[Tensor, Cursor]]]


def train_saes(
    trainers: Sequence[Trainer],
    batches: Batches,
    checkpoints: Sequence[Path],
    parents: Sequence[dict[str, str]],
    finish: Callable[[int], None] = lambda i: None,
    report: Callable[[str], None] = print,
) -> None:
    """Train all ``trainers`` on one pass over the batches, each to its own number of steps and from its own
    checkpoint.

    Every SAE comes out as if it were trained alone: each sees every batch once, in order, whatever the others
    do.

    Args:
        batches: given a cursor, yields (x (batch_size, d_in), next cursor) from there on. checkpoints: their
        folders; who writes the finished SAE removes them. parents: per SAE the hashes of all that its
        training depends on; a checkpoint of anything else is set aside. finish: called with a trainer's
        number as soon as it has made its last step.
    """
    for trainer, folder, made_from in zip(trainers, checkpoints, parents):
        if trainer.resume(folder, made_from):
            report(f"resumed at step {trainer.step}/{trainer.steps}")
        elif (folder / "manifest.json").is_file():
            report(
                f"the checkpoint in {folder} was made with other settings or data: set aside as "
                f"{_set_aside(folder).name}, "
                "training starts at step 0"
            )
    todo = [i for i, trainer in enumerate(trainers) if trainer.step < trainer.steps]

    def ended_well(i: int) -> None:
        trainers[i].check_finite()  # on a GPU nobody may have asked since the last checkpoint
        finish(i)

    for i, trainer in enumerate(trainers):
        if trainer.step >= trainer.steps:
            ended_well(i)
    if not todo:
        return
    behind = min((trainers[i] for i in todo), key=lambda trainer: trainer.step)
    progress, saved = _Progress([trainers[i] for i in todo], report), time.perf_counter()
    step = behind.step
    for x, cursor in batches(behind.cursor):
        for i in todo:
            trainer = trainers[i]
            if trainer.step == step:  # after a kill between two checkpoints some are ahead
                stats = trainer.train_step(x)
                trainer.cursor = cursor
                progress.look(trainer, stats)
        step += 1
        ended = [i for i in todo if trainers[i].step == trainers[i].steps]
        now, every = time.perf_counter(), trainers[todo[0]].config.checkpoint_seconds
        if now - saved > every or ended and now - progress.started > every:
            for i in todo:
                trainers[i].save(checkpoints[i], parents[i])
            saved = time.perf_counter()
        for i in ended:
            ended_well(i)
        todo = [i for i in todo if i not in ended]
        if not todo:
            return
    raise UserError(
        f"The activations ended at step {step} of {max(trainers[i].steps for i in todo)}: data.train_tokens "
        "is too "
        "low for the run."
    )
