"""Several SAEs trained on one pass over the activations, each as if alone; checkpoints and progress."""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch import Tensor

from dmsae_lib.data.activations import Cursor
from dmsae_lib.sae.step import StepStats
from dmsae_lib.sae.training import Trainer
from dmsae_lib.store import artifacts
from dmsae_lib.store.artifacts import UserError

NEAR_BUDGET = 0.75  # method and house: above this share of k, the core starves the free latents
Batches = Callable[[Cursor], Iterable[tuple[Tensor, Cursor]]]


class _Progress:
    """Lines for the reader: now and then, at the end of each SAE, where a core takes most of the budget."""

    def __init__(self, trainers: Sequence[Trainer], report: Callable[[str], None]):
        self.trainers, self.report, self.started, self.told = trainers, report, time.perf_counter(), 0.0
        self.before, self.total = sum(t.step for t in trainers), sum(t.steps for t in trainers)
        self.warned: set[int] = set()

    def look(self, trainer: Trainer, stats: StepStats) -> None:
        k, now, label = trainer.config.k, time.perf_counter(), f"{trainer.name}  " if trainer.name else ""
        latest = trainer.history[-1]
        l0 = latest["L0_core"]
        if latest["step"] == trainer.step and l0 > NEAR_BUDGET * k and id(trainer) not in self.warned:
            self.warned.add(id(trainer))
            self.report(
                f"{label}WARNING step {trainer.step}: the core's L0 is {l0:.1f}, {l0 / k:.0%} of k = {k}: "
                "little is left for the free latents; raise training.k or lower sae.prefixes[0]."
            )
        if now - self.told > 10 or trainer.step == trainer.steps:
            self.told, done = now, sum(t.step for t in self.trainers)
            rate = (done - self.before) / (now - self.started)  # of all SAEs together
            core, free, tokens = float(stats.l0_core), float(stats.l0_free), rate * trainer.config.batch_size
            self.report(
                f"{label}step {trainer.step}/{trainer.steps}  {tokens:,.0f} tokens/s  "
                f"ETA {(self.total - done) / rate:.0f} s  loss {float(stats.loss):.4f}  "
                f"L0 {core:.1f} + {free:.1f} = {core + free:.1f}  dead {int(trainer.dead.sum())}"
            )


def _start(trainer: Trainer, folder: Path, parents: dict[str, str], report: Callable[[str], None]) -> None:
    """Resume from the checkpoint in ``folder``, or set it aside where the next one does not replace it."""
    if trainer.resume(folder, parents):
        report(f"resumed at step {trainer.step}/{trainer.steps}")
    elif (folder / "manifest.json").is_file():
        aside = folder.with_name(f"{folder.name}.aside")
        artifacts.remove(aside)  # one alone: the disk must not fill with them
        with artifacts.explain_os_errors(aside):
            folder.rename(aside)
        report(
            f"the checkpoint in {folder} was made with other settings or data: set aside as {aside.name}, "
            "training starts at step 0"
        )


def train_saes(
    trainers: Sequence[Trainer],
    batches: Batches,
    checkpoints: Sequence[Path],
    parents: Sequence[dict[str, str]],
    finish: Callable[[int], None] = lambda i: None,
    report: Callable[[str], None] = print,
) -> None:
    """Train all on one pass over the batches, each to its own number of steps and from its own checkpoint.

    Every SAE comes out as if it were trained alone: each sees every batch once, in order, whatever the others
    do.

    Args:
        batches: given a cursor, yields (x (batch_size, d_in), next cursor) from there on.
        checkpoints: their folders; who writes the finished SAE removes them.
        parents: per SAE the hashes of all that it depends on; a checkpoint of anything else is set aside.
        finish: called with a trainer's number as soon as it has made its last step.
    """
    for trainer, folder, made_from in zip(trainers, checkpoints, parents):
        _start(trainer, folder, made_from, report)

    def still_training(numbers: Iterable[int]) -> list[int]:
        """Those of ``numbers`` that have steps to make; the others have ended, and are finished here."""
        left = []
        for i in numbers:
            if trainers[i].step < trainers[i].steps:
                left.append(i)
            else:
                trainers[i].check_finite()  # on a GPU nobody may have asked since the last checkpoint
                finish(i)
        return left

    todo = still_training(range(len(trainers)))
    if not todo:
        return
    behind = min((trainers[i] for i in todo), key=lambda trainer: trainer.step)
    progress, saved = _Progress([trainers[i] for i in todo], report), time.perf_counter()
    step, every = behind.step, trainers[todo[0]].config.checkpoint_seconds
    for x, cursor in batches(behind.cursor):
        for i in todo:
            trainer = trainers[i]
            if trainer.step == step:  # after a kill between two checkpoints some are ahead
                stats = trainer.train_step(x)
                trainer.cursor = cursor
                progress.look(trainer, stats)
        step += 1
        ended, now = any(trainers[i].step == trainers[i].steps for i in todo), time.perf_counter()
        if now - saved > every or ended and now - progress.started > every:
            for i in todo:
                trainers[i].save(checkpoints[i], parents[i])
            saved = time.perf_counter()
        todo = still_training(todo)
        if not todo:
            return
    steps = max(trainers[i].steps for i in todo)
    raise UserError(
        f"The activations ended at step {step} of {steps}: data.train_tokens is too low for the run."
    )
