"""What every SAE of a run shares: the model, the tokens of each split, the scale, the reference losses."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dmsae_lib.config.run import Run
from dmsae_lib.data.activations import Losses, StoredActivations, StreamedActivations, reference_losses
from dmsae_lib.data.contexts import Contexts
from dmsae_lib.data.corpus import SPLITS
from dmsae_lib.data.language_model import LanguageModel, choose_device
from dmsae_lib.distill.evaluation import Lowered, calibration_residuals, lower_all
from dmsae_lib.store import artifacts
from dmsae_lib.store.artifacts import Artifact, ArtifactError

SAMPLE = 2**14  # activations that controls are made of


@dataclass
class Harvest:
    """An opened harvest: see :func:`open_harvest`."""

    artifact: Artifact
    record: dict[str, Any]
    model: LanguageModel
    splits: dict[str, Contexts]
    run: Run

    @property
    def scale(self) -> float:
        """What activations are divided by: sqrt(mean ||x||^2)."""
        return self.record["scale"]

    @cached_property
    def calibration(self) -> list[Tensor]:
        """The activations on which every SAE's threshold is set."""
        return calibration_residuals(self.model, self.splits["select"])

    @cached_property
    def tested(self) -> Lowered | None:
        """The model's lower half on the test split, or None where that is too large to keep."""
        return lower_all(self.model, self.splits["test"])

    def losses(self, split: str) -> Losses:
        """The model's losses on `test`, which every result is set against, or on another split."""
        if split == "test":
            return Losses(*(self.record[f"{name}_loss"] for name in Losses._fields))
        mean = self.artifact.tensors("mean.safetensors")["mean"].to(self.model.device)
        return reference_losses(self.model, self.splits[split], mean)

    @cached_property
    def sample(self) -> Tensor:
        """Normalised activations (SAMPLE or fewer, d_in) on the CPU, whatever is trained."""
        found: list[Tensor] = []
        config = self.run.config
        for x, (epoch, _, _) in self.source().batches(config.training.batch_size, config.seed, "sample"):
            if epoch and found:  # all there are; a second time they would be copies
                return torch.cat(found)
            found.append(x.cpu())
            if sum(map(len, found)) >= SAMPLE:
                return torch.cat(found)[:SAMPLE]
        raise AssertionError("batches are endless")

    def source(self, fresh: bool = False) -> StoredActivations | StreamedActivations:
        """Training activations of one cycle, stored or streamed; ``fresh``: the stream of all tokens."""
        data, contexts = self.run.config.data, self.splits["train"]
        if data.store == "disk" and not fresh:
            return StoredActivations(self.artifact, self.scale, self.model.device)
        return StreamedActivations(
            self.model, contexts if fresh else contexts.first(data.train_tokens), data, self.scale
        )


def open_harvest(run: Run) -> Harvest:
    """Load and verify the harvest of ``run`` and the model it was made with; UserError if they do not fit."""
    artifact = artifacts.load(run.folder / "harvest", "harvest", "stages STAGE=harvest")
    record, config = artifact.json("record.json"), run.config
    # what `auto` came to where the harvest was made, on whatever machine the run goes on
    dtype = record["model"]["dtype"] if config.model.dtype == "auto" else config.model.dtype
    chosen = config.model.model_copy(update={"dtype": dtype})
    model = LanguageModel(chosen, choose_device(config.device))
    if (record["model"]["hash"], record["model"]["hook_name"]) != (model.hash, model.hook_name):
        raise ArtifactError(
            f"The harvest in {artifact.folder} was made with another model or hook than {config.model.name} "
            f"at {model.hook_name}: delete it and run make again."
        )
    model.outlier_limit = record["outlier_limit"]
    splits = {name: Contexts.load(artifact, name, model.bos) for name in SPLITS}
    return Harvest(artifact, record, model, splits, run)
