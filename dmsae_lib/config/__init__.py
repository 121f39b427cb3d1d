"""The configuration of a run: one YAML file, typed and checked before any work is done.

Unknown keys are refused, so a misspelt one cannot silently fall back to its default.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dmsae_lib.config.sections import (
    ARMS,
    CoreSettings,
    DataConfig,
    DistillConfig,
    EachOnce,
    ModelConfig,
    Positive,
    RetrainConfig,
    SaebenchConfig,
    SAEConfig,
    Section,
    TrainingConfig,
)
from dmsae_lib.config.yaml_file import expect, read_tree, validated
from dmsae_lib.store import artifacts
from dmsae_lib.store.artifacts import UserError, hash_json


class RunConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    threads: Positive = 2  # part of the configuration: sums change in the last bit with the number of threads
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model: ModelConfig
    data: DataConfig
    sae: SAEConfig
    training: TrainingConfig
    distill: DistillConfig
    retrain: RetrainConfig
    saebench: SaebenchConfig = SaebenchConfig()
    # multiples of training.lr tried on cycle 0
    learning_rate_sweep: EachOnce[Annotated[float, Field(gt=0)]] = []

    @model_validator(mode="after")
    def _sizes_fit(self) -> "RunConfig":
        prefixes, d_sae = self.sae.prefixes, self.sae.d_sae
        if not prefixes or any(b <= a for a, b in zip(prefixes, prefixes[1:])):
            raise ValueError(f"sae.prefixes is {prefixes}: the sizes must be given and increase")
        theirs = self.distill.from_prefixes or []
        if any(b <= a for a, b in zip(theirs, theirs[1:])):
            raise ValueError(f"distill.from_prefixes is {theirs}: the sizes must increase")
        if prefixes[-1] >= d_sae:
            raise ValueError(f"sae.prefixes ends at {prefixes[-1]}: it must stay below sae.d_sae = {d_sae}")
        for setting, k in [("training.k", self.training.k), *(("retrain.ks", k) for k in self.retrain.ks)]:
            if k > d_sae:
                raise ValueError(f"{setting} is {k}: it cannot be above the width, sae.d_sae = {d_sae}")
        if self.training.batch_size > self.data.train_tokens:
            raise ValueError(
                f"data.train_tokens is {self.data.train_tokens}: one batch needs "
                f"training.batch_size = {self.training.batch_size}"
            )
        buffer = self.data.buffer_rows * self.model.context_size
        if self.data.store == "stream" and buffer < 2 * self.training.batch_size:
            raise ValueError(
                f"data.buffer_rows is {self.data.buffer_rows}: with model.context_size = "
                f"{self.model.context_size} it must hold two batches of {self.training.batch_size} tokens"
            )
        retrain = self.retrain
        if not retrain.ks or not retrain.seeds or not retrain.arms:
            raise ValueError("retrain.ks, retrain.seeds and retrain.arms need one entry at least")
        if twice := set(retrain.arms) & set(retrain.controls):
            raise ValueError(
                f"retrain.controls names {sorted(twice)}: retrain.arms has it already, with every seed"
            )
        if wrong := set(retrain.imported) & set(ARMS):
            raise ValueError(
                f"retrain.imported names {sorted(wrong)[0]}, which is an arm of our own: choose another name"
            )
        for arm, n in retrain.controls.items():
            if n > len(retrain.seeds):
                raise ValueError(
                    f"retrain.controls asks for {n} seeds of {arm}: retrain.seeds = {retrain.seeds} has fewer"
                )
        if extra := set(self.control_ks) - set(retrain.ks):
            setting = "training.k" if retrain.controls_at is None else "retrain.controls_at"
            raise ValueError(
                f"{setting} is {sorted(extra)[0]}, where retrain.controls are trained: add it to retrain.ks "
                f"= {retrain.ks}"
            )
        longer = {
            *retrain.arms,
            *retrain.controls,
            *(arm for chain in self.distill.chains for arm in chain.retrain),
        }
        if "longer_fresh" in longer and self.data.fresh_factor < self.distill.cycles + 1:
            raise ValueError(
                f"data.fresh_factor is {self.data.fresh_factor}: the arm longer_fresh needs "
                f"distill.cycles + 1 = {self.distill.cycles + 1}"
            )
        names = [chain.name for chain in self.distill.chains]
        if len(set(names)) < len(names) or "main" in names:
            raise ValueError(f"distill.chains is {names}: names must differ from each other and from 'main'")
        settings = [
            (one.seed, *one.training.core_settings().values())
            for one in map(self.for_chain, ["main", *names])
        ]
        if len(set(settings)) < len(settings):
            raise ValueError(
                "distill.chains repeats a chain: two of them, or one and the main chain, have the same seed "
                "and core settings and would count twice"
            )
        return self

    @property
    def control_ks(self) -> list[int]:
        if self.retrain.controls_at is not None:
            return self.retrain.controls_at
        return [self.training.k] if self.retrain.controls else []

    def steps(self, factor: int = 1) -> int:
        """Optimiser steps of one SAE; ``factor`` for the longer-trained baselines."""
        return factor * self.data.train_tokens // self.training.batch_size

    def for_chain(self, chain: str) -> "RunConfig":
        """This configuration with the seed and core settings of the named distillation chain."""
        if chain == "main":
            return self
        found = [c for c in self.distill.chains if c.name == chain]
        if not found:
            raise UserError(
                f"There is no chain {chain!r} in config {self.name}: use one of {', '.join(self.chains)}."
            )
        own = found[0].model_dump(include=set(CoreSettings.model_fields), exclude_none=True)
        training, distill = self.training.model_copy(update=own), self.distill
        if training != self.training:  # not among the chains that C2 is judged by, so it needs no null
            distill = distill.model_copy(update={"placebos": []})
        return self.model_copy(update={"seed": found[0].seed, "training": training, "distill": distill})

    def trains(self, chain: str, cycle: int) -> str:
        """The chain in whose folder a cycle lies: cycle 0 has no core, so chains of one seed share it."""
        if cycle:
            return chain
        seed = self.for_chain(chain).seed
        return next(name for name in self.chains if self.for_chain(name).seed == seed)

    @property
    def chains(self) -> list[str]:
        """The names of all distillation chains, the main one first."""
        return ["main", *(chain.name for chain in self.distill.chains)]

    @property
    def replicates(self) -> list[str]:
        """The main chain, and those that differ from it in their seed alone."""
        return [name for name in self.chains if self.for_chain(name).training == self.training]

    @property
    def retrained_chains(self) -> list[str]:
        """The chains whose cores are retrained, the main one first."""
        return ["main", *(chain.name for chain in self.distill.chains if chain.retrain)]

    def retrain_arms(self, k: int, chain: str = "main") -> list[tuple[str, int]]:
        """(arm, seed) of every SAE trained at ``k`` with the cores of a chain."""
        if chain != "main":
            found = next(c for c in self.distill.chains if c.name == chain)
            return [(arm, seed) for arm in found.retrain for seed in self.retrain.seeds]
        arms = [(arm, seed) for arm in self.retrain.arms for seed in self.retrain.seeds]
        if k in self.control_ks:
            arms += [
                (arm, seed) for arm, n in self.retrain.controls.items() for seed in self.retrain.seeds[:n]
            ]
        return arms

    @property
    def imported(self) -> list[tuple[int, str, int]]:
        """The SAEs trained elsewhere as (k, arm, seed): (0, name, 0), since no k of ours is theirs."""
        return [(0, name, 0) for name in self.retrain.imported]

    @property
    def hash(self) -> str:
        return hash_json(self.model_dump(mode="json"))


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file, named by its path or as ``name`` of configs/<name>.yaml, and apply
    ``section.key=value`` overrides.

    Paths in it are relative to the repository's root, or to its own folder where it lies outside the
    repository. Raises UserError, one sentence, for a missing file, broken YAML, unknown keys and impossible
    values.
    """
    if not isinstance(path, Path):
        expect(str, config=path)
    expect(list, overrides=overrides)
    root = artifacts.repository_root()
    # wherever a notebook runs
    named = [root / "configs" / f"{path}.yaml", Path(path), root / path, root / "configs" / path]
    found = next((place for place in named if place.is_file()), None)
    if found is None:
        names = ", ".join(sorted(p.stem for p in (root / "configs").glob("*.yaml") if p.is_file()))
        raise UserError(f"There is no configuration {path}: use one of {names}, or the path of a YAML file.")
    folder = found.parent.resolve()
    inside = folder.is_relative_to(root)
    return validated(
        RunConfig,
        read_tree(found, overrides),
        found.name,
        {"base": root if inside else folder, "inside": inside},
    )
