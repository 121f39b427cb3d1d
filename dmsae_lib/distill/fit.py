"""From a harvest to finished SAEs: train, calibrate, measure, write. Notebooks 02, 05 and 09 share it."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmsae_lib.config.sections import CoreSettings, TrainingConfig
from dmsae_lib.data.activations import Cursor
from dmsae_lib.data.prefetch import prefetched
from dmsae_lib.distill.controls import geometry
from dmsae_lib.distill.evaluation import calibrate_threshold, evaluate, made_sae
from dmsae_lib.distill.harvest import Harvest
from dmsae_lib.sae.loop import train_saes
from dmsae_lib.sae.model import MatryoshkaSAE, save_sae
from dmsae_lib.sae.training import Trainer, match_frequency
from dmsae_lib.store import artifacts
from dmsae_lib.store.artifacts import Artifact, hash_json
from dmsae_lib.store.seeds import generator

MATCH_BATCHES = 8  # batches on which `core_bias_init: match_frequency` measures


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
    if job.core_hash is None:  # so chains that differ in these alone can share their cycle 0
        without |= set(CoreSettings.model_fields)
    what = {"sae": cfg.sae.model_dump(), "training": job.training.model_dump(exclude=without)}
    start = {"seed": job.seed, "stream": stream_of(job, harvest), "warm": job.warm_rows is not None}
    data = {"order": [job.order, job.order_seed], "factor": job.factor, "fresh": job.fresh}
    settings: dict[str, Any] = what | start | data | {"measured_on": job.measured_on, "threads": cfg.threads}
    if cfg.data.store == "stream" or job.fresh:  # shuffled within a buffer, whose blocks the cursor counts
        settings["buffer"] = [cfg.data.buffer_rows, cfg.model.batch_rows]
    parents = {"harvest": harvest.artifact.hash, "settings": hash_json(settings)}
    return parents | ({"core": job.core_hash} if job.core_hash else {})


def fit(jobs: Sequence[Job], harvest: Harvest, report: Callable[[str], None] = print) -> list[Artifact]:
    """Train every SAE that is missing, calibrate it on `select`, measure it on `test`, write its artefact.

    Jobs of one order share a pass over the data, at most ``training.together`` at a time; each SAE comes out
    as if it were trained alone. A killed call goes on from the checkpoints. Returns the artefacts in the
    order of ``jobs``.
    """
    found = [made_sae(job.folder, parents_of(job, harvest)) for job in jobs]
    streams: dict[tuple, list[Job]] = {}
    for job, artifact in zip(jobs, found):
        if artifact is None:
            stream = job.fresh, job.order, job.order_seed, job.training.batch_size
            streams.setdefault(stream, []).append(job)
    for members in streams.values():
        together = members[0].training.together
        for start in range(0, len(members), together):
            _fit_together(members[start : start + together], harvest, report)
    return [artifact or artifacts.load(job.folder, "sae") for job, artifact in zip(jobs, found)]


def _fit_together(jobs: Sequence[Job], harvest: Harvest, report: Callable[[str], None]) -> None:
    shared = jobs[0]
    source, size = harvest.source(shared.fresh), shared.training.batch_size

    def batches(cursor: Cursor) -> Iterator[tuple[Tensor, Cursor]]:
        stream = source.batches(size, shared.order_seed, shared.order, cursor)
        return prefetched(stream, shared.training.prefetch)

    matching = any(job.training.core_bias_init == "match_frequency" for job in jobs)
    # closed: a stream would hold its first block of activations until the last SAE is trained
    with contextlib.closing(source.batches(size, shared.order_seed, shared.order)) as start:
        first = [next(start)[0] for _ in range(MATCH_BATCHES if matching else 1)]
    trainers = [_trainer(job, harvest, first) for job in jobs]
    checkpoints = [job.folder.with_name(f".{job.folder.name}.checkpoint") for job in jobs]

    def finish(i: int) -> None:
        _write(jobs[i], harvest, trainers[i])
        artifacts.remove(checkpoints[i])

    train_saes(trainers, batches, checkpoints, [parents_of(job, harvest) for job in jobs], finish, report)


def _trainer(job: Job, harvest: Harvest, first: list[Tensor]) -> Trainer:
    """``first``: the leading batches of what it will be trained on."""
    cfg, training, d_in = harvest.run.config, job.training, harvest.model.d_model
    if training.autocast == "auto":  # on whatever machine the run goes on
        training = training.model_copy(update={"autocast": harvest.model.config.dtype == "bfloat16"})
    warm = 0 if job.warm_rows is None else len(job.warm_rows)
    prefixes = [warm + m for m in cfg.sae.prefixes]  # rows that start warm are in each of them, as a core is
    sae = MatryoshkaSAE(d_in, cfg.sae.d_sae, prefixes, job.core_rows, training.core_sparsity)
    random = generator(job.seed, "init", stream_of(job, harvest))
    sae.initialise(random, first[0].cpu(), training.core_decoder_init, job.warm_rows)
    if training.core_bias_init == "match_frequency" and sae.n_core and job.core_frequency is not None:
        match_frequency(sae, torch.cat(first).cpu(), job.core_frequency)
    name = f"k{training.k}/{job.folder.name}"
    return Trainer(sae.to(harvest.model.device), training, cfg.steps(job.factor), name)


def _write(job: Job, harvest: Harvest, trainer: Trainer) -> None:
    """Calibrate, measure and write one trained SAE."""
    training, sae, scale, split = job.training, trainer.sae, harvest.scale, job.measured_on
    with artifacts.write(job.folder, "sae", parents_of(job, harvest)) as writer:
        folded = sae.folded(scale)
        unbound = calibrate_threshold(folded, harvest.calibration, training.k, training.k_min)
        sae.threshold.copy_(folded.threshold / scale)
        at_hand, contexts = harvest.tested if split == "test" else None, harvest.splits[split]
        measured = evaluate(folded, harvest.model, contexts, harvest.losses(split), job.prefix0, at_hand)
        sizes = {"d_sae": sae.d_sae, "core_size": sae.n_core, "prefixes": sae.prefixes}
        trained = {"k": training.k, "steps": trainer.steps, "tokens": trainer.steps * training.batch_size}
        trained |= {"seed": job.seed, "clipped_steps": int(trainer.clipped)}
        thresholds = {name: float(getattr(folded, name)) for name in ("threshold", "threshold_ema")}
        core = {"core_rows": geometry(sae.core_rows.cpu()) if sae.n_core else None, "unbound": unbound}
        record = job.record | measured | sizes | trained | thresholds | core | training.core_settings()
        # CSV has a word for what JSON has not
        rows = [{n: math.nan if v is None else v for n, v in row.items()} for row in trainer.history]
        save_sae(writer, sae, scale)
        writer.json("metrics.json", record)
        writer.csv("history.csv", rows)
