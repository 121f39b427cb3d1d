"""From a harvest to finished SAEs: train, calibrate, measure, write. Notebooks 02, 05 and 09 share it."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmsae_lib.config.run import Run
from dmsae_lib.config.sections import CoreSettings, TrainingConfig
from dmsae_lib.data.activations import (
    START,
    Cursor,
    Losses,
    StoredActivations,
    StreamedActivations,
    reference_losses,
)
from dmsae_lib.data.contexts import Contexts
from dmsae_lib.data.corpus import SPLITS
from dmsae_lib.data.language_model import LanguageModel, choose_device
from dmsae_lib.data.prefetch import prefetched
from dmsae_lib.distill.core import geometry
from dmsae_lib.distill.evaluation import (
    Lowered,
    calibrate_threshold,
    calibration_residuals,
    evaluate,
    lower_all,
)
from dmsae_lib.interop import load_foreign, save_foreign
from dmsae_lib.sae.model import MatryoshkaSAE, save_sae
from dmsae_lib.sae.training import Trainer, match_frequency, train_saes
from dmsae_lib.store import artifacts
from dmsae_lib.store.artifacts import Artifact, hash_json
from dmsae_lib.store.seeds import generator

MATCH_BATCHES = 8  # batches on which `core_bias_init: match_frequency` measures
SAMPLE = 2**14  # activations that controls are made of


@dataclass
class Harvest:
    """What every SAE of a run shares: the model, the tokens of each split, the scale, the reference
    losses."""

    artifact: Artifact
    record: dict[str, Any]
    model: LanguageModel
    splits: dict[str, Contexts]
    run: Run

    @cached_property
    def calibration(self) -> list[Tensor]:
        """The activations on which every SAE's threshold is set."""
        return calibration_residuals(self.model, self.splits["select"])

    def losses(self, split: str) -> Losses:
        """The model's losses on `test`, which every result is set against, or on another split."""
        if split == "test":
            return Losses(*(self.record[f"{name}_loss"] for name in Losses._fields))
        mean = self.artifact.tensors("mean.safetensors")["mean"].to(self.model.device)
        return reference_losses(self.model, self.splits[split], mean)

    @cached_property
    def sample(self) -> Tensor:
        """Normalised activations (SAMPLE or fewer, d_in) on the CPU, whatever is trained."""
        found, size = [], self.run.config.training.batch_size
        for x, (epoch, _, _) in self.source().batches(size, self.run.config.seed, "sample"):
            if epoch and found:  # all there are; a second time they would be copies
                return torch.cat(found)
            found.append(x.cpu())
            if sum(map(len, found)) >= SAMPLE:
                return torch.cat(found)[:SAMPLE]
        raise AssertionError("batches are endless")

    @cached_property
    def tested(self) -> Lowered | None:
        """The model's lower half on the test split, or None where that is too large to keep."""
        return lower_all(self.model, self.splits["test"])

    def source(self, fresh: bool = False) -> StoredActivations | StreamedActivations:
        """Training activations of one cycle, stored or streamed as configured; ``fresh``: the stream of all
        tokens."""
        data, record = self.run.config.data, self.record
        if data.store == "disk" and not fresh:
            return StoredActivations(self.artifact, record["scale"], self.model.device)
        split = self.splits["train"]
        if not fresh:
            split = split.first(data.train_tokens)
        return StreamedActivations(self.model, split, data, record["scale"])


def open_harvest(run: Run) -> Harvest:
    """Load and verify the harvest of ``run`` and the model it was made with; UserError if they do not fit."""
    artifact = artifacts.load(run.folder / "harvest", "harvest", "stages STAGE=harvest")
    record = artifact.json("record.json")
    model = LanguageModel(run.config.model, choose_device(run.config.device))
    if record["model"]["hash"] != model.hash or record["model"]["hook_name"] != model.hook_name:
        raise artifacts.ArtifactError(
            f"The harvest in {artifact.folder} was made with another model or hook than "
            f"{run.config.model.name} at {model.hook_name}: delete it and run make again."
        )
    model.outlier_limit = record["outlier_limit"]
    splits = {name: Contexts.load(artifact, name, model.bos) for name in SPLITS}
    return Harvest(artifact, record, model, splits, run)


@dataclass(frozen=True)
class Job:
    """One SAE to train: where it goes, what it starts from, and in which order it sees the data."""

    folder: Path
    training: TrainingConfig  # its k included
    seed: int  # of the initialisation, whose stream is named by the folder: no two SAEs of a run start alike
    order: str  # jobs with the same order share one pass over the data
    order_seed: int
    core_rows: Tensor | None = None
    core_hash: str | None = None
    warm_rows: Tensor | None = None  # rows to start from, not frozen (their hash is core_hash)
    core_frequency: Tensor | None = None  # for `core_bias_init: match_frequency`
    factor: int = 1  # multiple of the tokens of one cycle
    fresh: bool = False  # every token once, instead of epochs over one cycle's tokens
    prefix0: bool = False  # measure the loss recovered from prefix 0 as well
    measured_on: str = "test"  # or select, for what is chosen by the result
    record: dict[str, Any] = field(default_factory=dict)  # what metrics.json says besides


def stream_of(job: Job, harvest: Harvest) -> str:
    """The name of the random stream that the SAE is initialised from: its place in the run."""
    return job.folder.relative_to(harvest.run.folder).as_posix()


def parents_of(job: Job, harvest: Harvest) -> dict[str, str]:
    """Hashes of all that the SAE depends on, the settings included."""
    cfg, without = harvest.run.config, set(TrainingConfig.NO_EFFECT)
    if job.core_hash is None:
        # so chains that differ in these alone can share their cycle 0
        without |= set(CoreSettings.model_fields)
    settings = {
        "sae": cfg.sae.model_dump(),
        "training": job.training.model_dump(exclude=without),
        "seed": job.seed,
        "stream": stream_of(job, harvest),
        "order": [job.order, job.order_seed],
        "factor": job.factor,
        "fresh": job.fresh,
        "warm": job.warm_rows is not None,
        "measured_on": job.measured_on,
        "threads": cfg.threads,
    }
    if cfg.data.store == "stream" or job.fresh:  # shuffled within a buffer, whose blocks the cursor counts
        settings["buffer"] = [cfg.data.buffer_rows, cfg.model.batch_rows]
    parents = {"harvest": harvest.artifact.hash, "settings": hash_json(settings)}
    return parents | ({"core": job.core_hash} if job.core_hash else {})


def finished(job: Job, harvest: Harvest) -> Artifact | None:
    """The job's artefact if it is there, whole, and made from the same parents."""
    if not (job.folder / "manifest.json").is_file():
        return None
    found = artifacts.load(job.folder, "sae")
    return found if found.parents == dict(sorted(parents_of(job, harvest).items())) else None


def fit(jobs: Sequence[Job], harvest: Harvest, report: Callable[[str], None] = print) -> list[Artifact]:
    """Train every SAE that is missing, calibrate its threshold on `select`, measure it on `test`, write its
    artefact.

    Jobs of one order share a pass over the data, at most ``training.together`` at a time; each SAE comes out
    as if it were trained alone. A killed call goes on from the checkpoints. Returns the artefacts in the
    order of ``jobs``.
    """
    found = [finished(job, harvest) for job in jobs]
    streams: dict[tuple, list[Job]] = {}
    for job, artifact in zip(jobs, found):
        if artifact is None:
            streams.setdefault((job.fresh, job.order, job.order_seed, job.training.batch_size), []).append(
                job
            )
    for members in streams.values():
        together = members[0].training.together
        for start in range(0, len(members), together):
            _fit_together(members[start : start + together], harvest, report)
    return [artifact or artifacts.load(job.folder, "sae") for job, artifact in zip(jobs, found)]


def adopt(
    folder: Path, where: str, harvest: Harvest, record: dict[str, Any], as_cycle_0: bool = False
) -> Artifact:
    """The artefact of an SAE that was trained elsewhere, measured as ours are, at its own thresholds.

    ``as_cycle_0`` puts it into our form and gauge, so that a core is distilled from it as from our own; else
    it is kept as its own library computes it, to compare with. Raises UserError where it does not fit the
    run's model or cannot be used.
    """
    config, model = harvest.run.config, harvest.model
    foreign, scale = load_foreign(where, model), harvest.record["scale"]
    sae = foreign.source(scale, config.distill.from_prefixes) if as_cycle_0 else foreign
    parents = {
        "harvest": harvest.artifact.hash,
        "settings": hash_json([config.threads, sae.prefixes]),
        "source": foreign.hash,
    }
    if (folder / "manifest.json").is_file():
        found = artifacts.load(folder, "sae")
        if found.parents == dict(sorted(parents.items())):
            return found
    with artifacts.write(folder, "sae", parents) as writer:
        measured = evaluate(
            sae.folded(scale) if as_cycle_0 else sae,
            model,
            harvest.splits["test"],
            harvest.losses("test"),
            as_cycle_0,
            harvest.tested,
        )
        if as_cycle_0:
            save_sae(writer, sae, scale)
        else:
            save_foreign(writer, foreign)
        writer.json(
            "metrics.json",
            record
            | measured
            | {
                "d_sae": sae.d_sae,
                "core_size": 0,
                "prefixes": list(sae.prefixes),
                "imported": foreign.record,
            },
        )
    return artifacts.load(folder, "sae")


def _fit_together(jobs: Sequence[Job], harvest: Harvest, report: Callable[[str], None]) -> None:
    shared = jobs[0]
    source = harvest.source(shared.fresh)

    def batches(cursor: Cursor) -> Iterator[tuple[Tensor, Cursor]]:
        stream = source.batches(shared.training.batch_size, shared.order_seed, shared.order, cursor)
        return prefetched(stream, shared.training.prefetch)

    with contextlib.closing(batches(START)) as start:
        first = next(start)[0]
        more = [first]
        if any(job.training.core_bias_init == "match_frequency" for job in jobs):
            more += [next(start)[0] for _ in range(MATCH_BATCHES - 1)]
    trainers = [_trainer(job, harvest, first, more) for job in jobs]
    checkpoints = [job.folder.with_name(f".{job.folder.name}.checkpoint") for job in jobs]

    def finish(i: int) -> None:
        _write(jobs[i], harvest, trainers[i])
        artifacts.remove(checkpoints[i])

    train_saes(trainers, batches, checkpoints, [parents_of(job, harvest) for job in jobs], finish, report)


def _trainer(job: Job, harvest: Harvest, first: Tensor, more: list[Tensor]) -> Trainer:
    cfg, training, warm = harvest.run.config, job.training, 0 if job.warm_rows is None else len(job.warm_rows)
    # rows that start warm are in every reconstruction, as a core is
    prefixes = [warm + m for m in cfg.sae.prefixes]
    sae = MatryoshkaSAE(harvest.model.d_model, cfg.sae.d_sae, prefixes, job.core_rows, training.core_sparsity)
    sae.initialise(
        generator(job.seed, "init", stream_of(job, harvest)),
        first.cpu(),
        training.core_decoder_init,
        job.warm_rows,
    )
    if training.core_bias_init == "match_frequency" and sae.n_core and job.core_frequency is not None:
        match_frequency(sae, torch.cat(more).cpu(), job.core_frequency)
    return Trainer(
        sae.to(harvest.model.device), training, cfg.steps(job.factor), f"k{training.k}/{job.folder.name}"
    )


def _write(job: Job, harvest: Harvest, trainer: Trainer) -> None:
    """Calibrate, measure and write one trained SAE."""
    model, training, sae = harvest.model, job.training, trainer.sae
    with artifacts.write(job.folder, "sae", parents_of(job, harvest)) as writer:
        folded = sae.folded(harvest.record["scale"])
        unbound = calibrate_threshold(
            folded, model, harvest.splits["select"], training.k, training.k_min, harvest.calibration
        )
        sae.threshold.copy_(folded.threshold / harvest.record["scale"])
        at_hand = harvest.tested if job.measured_on == "test" else None
        measured = evaluate(
            folded,
            model,
            harvest.splits[job.measured_on],
            harvest.losses(job.measured_on),
            job.prefix0,
            at_hand,
        )
        core_frequency = measured.pop("core_frequency")
        save_sae(writer, sae, harvest.record["scale"])
        writer.json(
            "metrics.json",
            job.record
            | measured
            | {
                "k": training.k,
                "d_sae": sae.d_sae,
                "core_size": sae.n_core,
                "prefixes": list(sae.prefixes),
                "unbound": unbound,
                "threshold": float(folded.threshold),
                "threshold_ema": float(folded.threshold_ema),
                "steps": trainer.steps,
                "tokens": trainer.steps * training.batch_size,
                "seed": job.seed,
                "clipped_steps": int(trainer.clipped),
                "core_frequency": core_frequency,
                "core_rows": geometry(sae.core_rows.cpu()) if sae.n_core else None,
                **training.core_settings(),
            },
        )
        writer.csv(
            "history.csv",
            [
                {name: math.nan if value is None else value for name, value in row.items()}
                for row in trainer.history
            ],
        )
