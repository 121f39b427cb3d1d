"""From a harvest to a finished SAE: train, calibrate, measure, write. Notebooks 02 and 05 share it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmsae_lib import artifacts
from dmsae_lib.activations import StoredActivations, StreamedActivations, first_contexts, load_split
from dmsae_lib.artifacts import Artifact, hash_json
from dmsae_lib.config import Run, TrainingConfig
from dmsae_lib.corpus import SPLITS
from dmsae_lib.evaluation import calibrate_threshold, evaluate
from dmsae_lib.language_model import LanguageModel, choose_device
from dmsae_lib.sae import MatryoshkaSAE, save_sae
from dmsae_lib.training import Trainer, match_frequency, train_sae

MATCH_BATCHES = 8  # batches on which `core_bias_init: match_frequency` measures


@dataclass
class Harvest:
    """What every SAE of a run shares: the model, the tokens of each split, the scale, the reference losses."""

    artifact: Artifact
    record: dict[str, Any]
    model: LanguageModel
    splits: dict[str, dict[str, np.ndarray]]
    run: Run

    def source(self, fresh: bool = False) -> StoredActivations | StreamedActivations:
        """Training activations of one cycle, stored or streamed as configured; ``fresh``: the stream of all tokens."""
        data, record = self.run.config.data, self.record
        if data.store == "disk" and not fresh:
            return StoredActivations(self.artifact, record["scale"], self.model.device)
        split = self.splits["train"]
        if not fresh:
            split = first_contexts(split, data.train_tokens, self.model.bos)
        return StreamedActivations(self.model, split, data, record["scale"], record["outlier_limit"])


def open_harvest(run: Run) -> Harvest:
    """Load and verify the harvest of ``run`` and the model it was made with; UserError if they do not fit."""
    artifact = artifacts.load(run.folder / "harvest", "harvest", f"stages STAGE=harvest CONFIG={run.config.name}")
    record = artifact.json("record.json")
    model = LanguageModel(run.config.model, choose_device(run.config.device))
    if record["model"]["hash"] != model.hash or record["model"]["hook_name"] != model.hook_name:
        raise artifacts.ArtifactError(f"The harvest in {artifact.folder} was made with another model or hook than "
                                      f"{run.config.model.name} at {model.hook_name}: delete it and run make again.")
    return Harvest(artifact, record, model, {name: load_split(artifact, name) for name in SPLITS}, run)


@dataclass(frozen=True)
class Job:
    """One SAE to train: where it goes, what it starts from, and in which order it sees the data."""

    folder: Path
    k: int
    seed: int
    order: str  # name of the random order; jobs that share seed and order see the same batches
    core_rows: Tensor | None = None
    core_hash: str | None = None
    core_frequency: Tensor | None = None  # for `core_bias_init: match_frequency`
    factor: int = 1  # multiple of the tokens of one cycle
    fresh: bool = False  # every token once, instead of epochs over one cycle's tokens


def parents_of(job: Job, harvest: Harvest, training: TrainingConfig) -> dict[str, str]:
    """Hashes of all that the SAE depends on, the settings included."""
    cfg = harvest.run.config
    settings = {"sae": cfg.sae.model_dump(), "training": training.model_dump(exclude={"k", "checkpoint_seconds"}),
                "k": job.k, "seed": job.seed, "order": job.order, "factor": job.factor, "fresh": job.fresh,
                "threads": cfg.threads}
    parents = {"harvest": harvest.artifact.hash, "settings": hash_json(settings)}
    return parents | ({"core": job.core_hash} if job.core_hash else {})


def finished(job: Job, harvest: Harvest, training: TrainingConfig) -> Artifact | None:
    """The job's artefact if it is there, whole, and made from the same parents."""
    if not (job.folder / "manifest.json").is_file():
        return None
    found = artifacts.load(job.folder, "sae")
    return found if found.parents == dict(sorted(parents_of(job, harvest, training).items())) else None


def fit(job: Job, harvest: Harvest, training: TrainingConfig, record: dict[str, Any],
        report: Callable[[str], None] = print) -> dict[str, Any]:
    """Train one SAE, calibrate its threshold on `select`, measure it on `test`, and write its artefact.

    A killed call goes on from its checkpoint. Returns metrics.json, which holds ``record`` as well.
    """
    model, cfg = harvest.model, harvest.run.config
    parents = parents_of(job, harvest, training)
    training = training.model_copy(update={"k": job.k})
    source = harvest.source(job.fresh)

    def batches(cursor):
        return source.batches(training.batch_size, job.seed, job.order, cursor)

    sae = MatryoshkaSAE(model.d_model, cfg.sae.d_sae, cfg.sae.prefixes, job.core_rows, training.core_sparsity)
    start = batches((0, 0, 0))
    first = next(start)[0]
    sae.initialise(job.seed, first.cpu())
    if training.core_bias_init == "match_frequency" and sae.n_core and job.core_frequency is not None:
        more = [first, *(next(start)[0] for _ in range(MATCH_BATCHES - 1))]
        match_frequency(sae, torch.cat(more), job.core_frequency)
    trainer = Trainer(sae.to(model.device), training, cfg.steps(job.factor))
    checkpoint = job.folder.with_name(f".{job.folder.name}.checkpoint")
    with artifacts.write(job.folder, "sae", parents) as writer:
        train_sae(trainer, batches, checkpoint, parents, report)
        folded = sae.folded(harvest.record["scale"])
        unbound = calibrate_threshold(folded, model, harvest.splits["select"], job.k, training.k_min)
        sae.threshold.copy_(folded.threshold / harvest.record["scale"])
        measured = evaluate(folded, model, harvest.splits["test"], harvest.record["clean_loss"], harvest.record["zero_loss"])
        core_frequency = measured.pop("core_frequency")
        metrics = record | measured | {
            "k": job.k, "d_sae": sae.d_sae, "core_size": sae.n_core, "prefixes": list(sae.prefixes), "unbound": unbound,
            "threshold": float(folded.threshold), "threshold_ema": float(folded.threshold_ema), "steps": trainer.steps,
            "tokens": trainer.steps * training.batch_size, "seed": job.seed, "clipped_steps": trainer.clipped,
            "core_frequency": core_frequency, "core_sparsity": training.core_sparsity,
            "core_bias_init": training.core_bias_init,
        }  # fmt: skip
        save_sae(writer, sae, harvest.record["scale"])
        writer.json("metrics.json", metrics)
        writer.csv("history.csv", trainer.history)
    artifacts.remove(checkpoint)
    return metrics

