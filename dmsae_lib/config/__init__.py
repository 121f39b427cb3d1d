"""The configuration of a run: one YAML file, typed and checked before any work is done.

Unknown keys are refused, so a misspelt one cannot silently fall back to its default.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dmsae_lib.config.fields import EachOnce, Positive
from dmsae_lib.config.sections import (
    OTHER_CHAIN,
    Chain,
    CoreSettings,
    DataConfig,
    DistillConfig,
    ModelConfig,
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
    def _sections_fit(self) -> "RunConfig":
        """What concerns more than one section; each section checks itself."""
        model, data, training, d_sae = self.model, self.data, self.training, self.sae.d_sae
        for setting, ks in (("training.k", [training.k]), ("retrain.ks", self.retrain.ks)):
            if max(ks) > d_sae:
                raise ValueError(f"{setting} is {max(ks)}: it cannot be above the width, sae.d_sae = {d_sae}")
        if (k_min := training.k_min) > (k := min(training.k, *self.retrain.ks)):
            raise ValueError(f"training.k_min is {k_min}: training.k or a k of retrain.ks is lower, {k}")
        batch = f"training.batch_size = {training.batch_size}"
        if training.batch_size > data.train_tokens:
            raise ValueError(f"data.train_tokens is {data.train_tokens}: one batch needs {batch}")
        if data.store == "stream" and data.buffer_rows * model.context_size < 2 * training.batch_size:
            has = f"data.buffer_rows is {data.buffer_rows}, with model.context_size = {model.context_size}"
            raise ValueError(f"{has}: it must hold two batches, {batch}")
        if self.retrain.more_seeds and training.k not in self.retrain.ks:
            known = f"retrain.ks = {self.retrain.ks}"
            raise ValueError(f"training.k is {training.k}, where retrain.more_seeds are: add it to {known}")
        if extra := [k for k in self.control_ks if k not in self.retrain.ks]:
            setting = "training.k" if self.retrain.controls_at is None else "retrain.controls_at"
            known = f"retrain.ks = {self.retrain.ks}"
            raise ValueError(
                f"{setting} is {extra[0]}, where retrain.controls are trained: add it to {known}"
            )
        needed = self.distill.cycles + 1
        if any("longer_fresh" in self.arms(chain) for chain in self.chains) and data.fresh_factor < needed:
            needs = f"the arm longer_fresh needs distill.cycles + 1 = {needed}"
            raise ValueError(f"data.fresh_factor is {data.fresh_factor}: {needs}")
        return self

    @model_validator(mode="after")
    def _other_chains_there(self) -> "RunConfig":
        for chain in self.chains:
            if OTHER_CHAIN in self.arms(chain) and not self.other_chains(chain):
                raise ValueError(
                    f"the arm {OTHER_CHAIN} of the chain {chain} needs another chain that differs from it in "
                    "its seed alone: add one to distill.chains, or drop the arm"
                )
        return self

    @model_validator(mode="after")
    def _chains_differ(self) -> "RunConfig":
        chains = map(self.for_chain, self.chains)
        settings = [(chain.seed, *chain.training.core_settings().values()) for chain in chains]
        if len(set(settings)) < len(settings):
            raise ValueError(
                "distill.chains repeats a chain: two of them, or one and the main chain, have the same seed "
                "and core settings and would count twice"
            )
        return self

    @model_validator(mode="after")
    def _scores_what_is_trained(self) -> "RunConfig":
        bench, suite, known = self.saebench, self.saebench.suite, self.retrained_chains
        if odd := [chain for chain in bench.chains if chain not in known]:
            raise ValueError(
                f"saebench.chains names {odd[0]}, which is no chain that is retrained: use {', '.join(known)}"
            )
        arms = dict.fromkeys(arm for _, arm, _, _ in self.scorable)
        ks = suite.ks or self.retrain.ks
        seeds = dict.fromkeys(s for k, arm, s, _ in self.scorable if k in ks and arm in suite.arms)
        settings: list[tuple[str, Sequence, Collection]] = [
            ("saebench.arms", bench.arms, arms),
            ("saebench.suite.arms", suite.arms, arms),
            ("saebench.suite.ks", ks, self.retrain.ks),
            ("saebench.suite.seeds", suite.seeds or [], seeds),
        ]
        for setting, asked, trained in settings:
            # some are left out without a word: a default, or another setting, may ask for more than there is
            if asked and not set(asked).intersection(trained):
                has = ", ".join(map(str, trained)) or "none at all"
                raise ValueError(
                    f"{setting} is {asked}, but no SAE of saebench.chains = {bench.chains} has one of these: "
                    f"they have {has}"
                )
        return self

    @property
    def control_ks(self) -> list[int]:
        if self.retrain.controls_at is not None:
            return self.retrain.controls_at
        asked = self.retrain.controls or any(chain.controls for chain in self.distill.chains)
        return [self.training.k] if asked else []

    def steps(self, factor: int = 1) -> int:
        """Optimiser steps of one SAE; ``factor`` for the longer-trained baselines."""
        return factor * self.data.train_tokens // self.training.batch_size

    def _chain(self, name: str) -> Chain:
        for chain in self.distill.chains:
            if chain.name == name:
                return chain
        known = ", ".join(self.chains)
        raise UserError(f"There is no chain {name!r} in config {self.name}: use one of {known}.")

    def for_chain(self, chain: str) -> "RunConfig":
        """This configuration with the seed and core settings of the named distillation chain."""
        if chain == "main":
            return self
        found = self._chain(chain)
        own = found.model_dump(include=set(CoreSettings.model_fields), exclude_none=True)
        training, distill = self.training.model_copy(update=own), self.distill
        if training != self.training:  # not among the chains that C2 is judged by, so it needs no null
            distill = distill.model_copy(update={"placebos": []})
        return self.model_copy(update={"seed": found.seed, "training": training, "distill": distill})

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
        return ["main", *self.other_chains()]

    @property
    def retrained_chains(self) -> list[str]:
        """The chains whose cores are retrained, the main one first."""
        return ["main", *(chain.name for chain in self.distill.chains if chain.retrain or chain.controls)]

    @property
    def exemplars(self) -> list[str]:
        """The main chain, then of each kind of core the first other chain whose core is retrained."""
        first: dict[tuple[str, ...], str] = {}
        for chain in self.retrained_chains[1:]:
            first.setdefault(tuple(self.for_chain(chain).training.core_settings().values()), chain)
        return ["main", *first.values()]

    def other_chains(self, chain: str = "main") -> list[str]:
        """Those that differ from a chain in their seed alone."""
        own = self.for_chain(chain).training
        return [name for name in self.chains if name != chain and self.for_chain(name).training == own]

    def arms(self, chain: str = "main") -> list[str]:
        """Those that are trained with the cores of a chain, at whatever k."""
        if chain == "main":
            return [*self.retrain.arms, *self.retrain.controls]
        found = self._chain(chain)
        return [*found.retrain, *found.controls]

    def seeds(self, chain: str = "main") -> list[int]:
        """Those that SAEs with a chain's cores are trained with at every k."""
        own = None if chain == "main" else self._chain(chain).seeds
        return own or self.retrain.seeds

    def retrain_arms(self, k: int, chain: str = "main") -> list[tuple[str, int]]:
        """(arm, seed) of every SAE trained at ``k`` with the cores of a chain."""
        own, seeds = self.retrain, self.seeds(chain)
        arms, draws = own.arms, own.controls
        if chain != "main":
            found = self._chain(chain)
            arms, draws = found.retrain, dict.fromkeys(found.controls, len(seeds))
        draws = draws if k in self.control_ks else {}
        more = own.more_seeds if chain == "main" and k == self.training.k else []
        return [(arm, seed) for arm in arms for seed in [*seeds, *more]] + [
            (arm, seed) for arm, n in draws.items() for seed in seeds[:n]
        ]

    @property
    def scorable(self) -> list[tuple[int, str, int, str]]:
        """(k, arm, seed, chain) of every SAE among which SAEBench's settings select."""
        chains, ks = self.saebench.chains, self.retrain.ks
        return [(k, *which, chain) for chain in chains for k in ks for which in self.retrain_arms(k, chain)]

    @property
    def imported(self) -> list[tuple[int, str, int]]:
        """The SAEs trained elsewhere as (k, arm, seed): (0, name, 0), since no k of ours is theirs."""
        return [(0, name, 0) for name in self.retrain.imported]

    @property
    def hash(self) -> str:
        return hash_json(self.model_dump(mode="json"))


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file, by its path or as the ``name`` of configs/<name>.yaml, and apply the overrides.

    Paths in it are relative to the repository's root, or to its own folder where it lies outside. Raises
    UserError, one sentence, for a missing file, broken YAML, unknown keys and impossible values.
    """
    if not isinstance(path, Path):
        expect(str, config=path)
    expect(list, overrides=overrides)
    root = artifacts.repository_root()
    named = [root / "configs" / f"{path}.yaml", Path(path), root / path, root / "configs" / path]
    found = next((place for place in named if place.is_file()), None)
    if found is None:
        names = ", ".join(sorted(p.stem for p in (root / "configs").glob("*.yaml") if p.is_file()))
        raise UserError(f"There is no configuration {path}: use one of {names}, or the path of a YAML file.")
    folder = found.parent.resolve()
    inside = folder.is_relative_to(root)
    context = {"base": root if inside else folder, "inside": inside}
    return validated(RunConfig, read_tree(found, overrides), found.name, context)
