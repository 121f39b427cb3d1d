"""The configuration of a run: one YAML file, typed and checked before any work is done.

Unknown keys are refused, so a misspelt one cannot silently fall back to its default. Every default that the paper
does not fix is one of our decisions; ``configs/gemma-2-2b.yaml`` gives the source of each value.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dmsae_lib.artifacts import UserError, hash_json, repository_root

Aggregator = Literal["mean_abs", "abs_mean", "quantile", "frequency"]
CONTROLS = ("random", "frequency_matched", "random_directions", "most_frequent")
LONGER = ("longer_repeated", "longer_fresh")
ARMS = ("none", "distilled", *CONTROLS, *LONGER)
Arm = Literal[ARMS]  # type: ignore[valid-type]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
SHOWN = {"model.hook_name": "blocks.12.hook_resid_post"}  # an example says more than a regular expression
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Section):
    name: str  # an embedded name, a local Hub-format folder, or a Hub id
    hook_name: str = Field(pattern=r"^blocks\.\d+\.hook_resid_post$")
    context_size: Annotated[int, Field(ge=8)]
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_rows: Positive = 32  # contexts per forward pass
    trust_remote_code: bool = False


class DataConfig(Section):
    source: str  # "embedded", a local .txt / .jsonl file or a folder of them, or a Hub data set id
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"
    packing: Literal["pack", "one_per_row"] = "pack"
    train_tokens: Positive  # usable tokens (not BOS, not padding) of one distillation cycle
    select_tokens: Positive
    test_tokens: Positive
    fresh_factor: Positive = 1  # train_tokens * fresh_factor are tokenised, for the longer-trained baselines
    store: Literal["disk", "stream"] = "disk"
    buffer_rows: Positive = 512  # contexts in the shuffle buffer when streaming
    outlier_norm: float = Field(10.0, gt=1)  # training tokens above this multiple of the median norm are left out


class SAEConfig(Section):
    d_sae: Positive  # the core included
    prefixes: list[Positive]  # cumulative non-core sizes; the last one, d_sae - core, is implied


class CoreSettings(Section):
    """What a distillation chain may do differently with its core."""

    core_sparsity: Literal["relu", "batchtopk"] = "relu"
    core_bias_init: Literal["zero", "match_frequency"] = "zero"
    core_decoder_init: Literal["random", "encoder"] = "random"  # encoder: the core's encoder rows at norm 1

    def core_settings(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in CoreSettings.model_fields}


class TrainingConfig(CoreSettings):
    k: Positive
    batch_size: Positive
    lr: float = Field(gt=0)
    warmup: float = Field(0.05, ge=0, lt=1)  # share of the steps
    decay: float = Field(0.2, ge=0, lt=1)  # share of the steps, at the end
    grad_clip: float = Field(1.0, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    aux_alpha: float = Field(1 / 32, ge=0)
    k_aux: Positive | None = None  # None: d_in / 2
    dead_window: Positive | None = None  # tokens; None: max(2 % of the tokens, 40 batches)
    k_min: int = Field(1, ge=0)
    autocast: bool = False  # bfloat16 matrix products over float32 weights
    checkpoint_seconds: float = Field(60.0, gt=0)
    together: Positive = 64  # SAEs trained on one pass over the data at most: bounds the memory
    prefetch: int = Field(0, ge=0)  # batches made ahead; worth it where a GPU trains

    NO_EFFECT: ClassVar = {"checkpoint_seconds", "together", "prefetch"}  # change no weight


class Chain(CoreSettings):
    """A further distillation chain beside the main one: its own seed or core settings."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    seed: int = 0


class DistillConfig(Section):
    cycles: Positive = 7
    coverage: Fraction = 0.9
    aggregator: Aggregator = "mean_abs"
    quantile: Fraction = 0.99
    final_core: Literal["all_of_last", "last_two", "every_since_first", "alive_since_0"] = "last_two"
    chains: list[Chain] = []


class RetrainConfig(Section):
    ks: list[Positive]
    seeds: list[int] = [0, 1, 2]
    arms: list[Arm] = ["none", "distilled"]  # trained at every k with every seed
    controls: dict[Arm, Positive] = {}  # number of seeds (draws) of each control arm
    controls_at: list[Positive] | None = None  # None: at training.k only


class SaebenchConfig(Section):
    arms: list[Arm] = ["none", "distilled"]  # those scored, seven seconds each on two cores
    probing_sets: list[str] | None = None  # None: the fixed list of dmsae_lib.corpus; [] : none
    probing_ks: list[Positive] = Field([1, 5], min_length=1)
    core_rows: Positive = 64
    seed: int = 0

    def decisive(self) -> dict[str, Any]:
        """What the scores of one SAE depend on."""
        return self.model_dump(exclude={"arms"})


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
    learning_rate_sweep: list[Annotated[float, Field(gt=0)]] = []  # multiples of training.lr tried on cycle 0

    @model_validator(mode="after")
    def _sizes_fit(self) -> "RunConfig":
        prefixes, d_sae = self.sae.prefixes, self.sae.d_sae
        if not prefixes or any(b <= a for a, b in zip(prefixes, prefixes[1:])):
            raise ValueError(f"sae.prefixes is {prefixes}: the sizes must be given and increase")
        if prefixes[-1] >= d_sae:
            raise ValueError(f"sae.prefixes ends at {prefixes[-1]}: it must stay below sae.d_sae = {d_sae}")
        for setting, k in [("training.k", self.training.k), *(("retrain.ks", k) for k in self.retrain.ks)]:
            if k > d_sae:
                raise ValueError(f"{setting} is {k}: it cannot be above the width, sae.d_sae = {d_sae}")
        if self.training.batch_size > self.data.train_tokens:
            raise ValueError(f"data.train_tokens is {self.data.train_tokens}: one batch needs "
                             f"training.batch_size = {self.training.batch_size}")
        buffer = self.data.buffer_rows * self.model.context_size
        if self.data.store == "stream" and buffer < 2 * self.training.batch_size:
            raise ValueError(f"data.buffer_rows is {self.data.buffer_rows}: with model.context_size = "
                             f"{self.model.context_size} it must hold two batches of {self.training.batch_size} tokens")
        retrain = self.retrain
        if not retrain.ks or not retrain.seeds or not retrain.arms:
            raise ValueError("retrain.ks, retrain.seeds and retrain.arms need one entry at least")
        if twice := set(retrain.arms) & set(retrain.controls):
            raise ValueError(f"retrain.controls names {sorted(twice)}: retrain.arms has it already, with every seed")
        for arm, n in retrain.controls.items():
            if n > len(retrain.seeds):
                raise ValueError(f"retrain.controls asks for {n} seeds of {arm}: retrain.seeds = {retrain.seeds} has fewer")
        if extra := set(self.control_ks) - set(retrain.ks):
            setting = "training.k" if retrain.controls_at is None else "retrain.controls_at"
            raise ValueError(f"{setting} is {sorted(extra)[0]}, where retrain.controls are trained: add it to retrain.ks = "
                             f"{retrain.ks}")
        if "longer_fresh" in (*retrain.arms, *retrain.controls) and self.data.fresh_factor < self.distill.cycles + 1:
            raise ValueError(f"data.fresh_factor is {self.data.fresh_factor}: the arm longer_fresh needs "
                             f"distill.cycles + 1 = {self.distill.cycles + 1}")
        names = [chain.name for chain in self.distill.chains]
        if len(set(names)) < len(names) or "main" in names:
            raise ValueError(f"distill.chains is {names}: names must differ from each other and from 'main'")
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
            known = ", ".join(["main", *(c.name for c in self.distill.chains)])
            raise UserError(f"There is no chain {chain!r} in config {self.name}: use one of {known}.")
        training = self.training.model_copy(update=found[0].core_settings())
        return self.model_copy(update={"seed": found[0].seed, "training": training})

    def retrain_arms(self, k: int) -> list[tuple[str, int]]:
        """(arm, seed) of every SAE trained at ``k``."""
        arms = [(arm, seed) for arm in self.retrain.arms for seed in self.retrain.seeds]
        if k in self.control_ks:
            arms += [(arm, seed) for arm, n in self.retrain.controls.items() for seed in self.retrain.seeds[:n]]
        return arms

    @property
    def hash(self) -> str:
        return hash_json(self.model_dump(mode="json"))


def _known_keys(model: type[BaseModel], location: tuple) -> list[str]:
    for part in location:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        for kind in (annotation, *get_args(annotation)):  # a section, or a list of them
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                model = kind
    return list(model.model_fields)


def _one_sentence(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _known_keys(RunConfig, first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known there: {', '.join(known)}."
        return f"{where}: unknown key {key}; {hint}"
    if first["type"] == "missing":
        return f"{where}: the key {key} is missing; add it."
    if first["type"] == "value_error":
        return f"{where}: {first['ctx']['error']}."
    expected = f"{first['msg'][0].lower()}{first['msg'][1:]}"
    if first["type"] == "string_pattern_mismatch":
        expected = f"it must look like {SHOWN.get(key, 'a-name')}"
    return f"{where}: {key} is {first['input']!r}, but {expected}."


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"Override {override!r} is not of the form section.key=value.")
    *path, last = key.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise UserError(f"Override {override!r}: {part} is not a section of the configuration.")
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"Override {override!r}: the value is not valid YAML; put it in quotes.") from error


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read ``configs/<name>.yaml`` (a bare name works too) and apply ``section.key=value`` overrides.

    Raises UserError, one sentence, for a missing file, broken YAML, unknown keys and impossible values.
    """
    path = Path(path)
    if not path.suffix and NAME.fullmatch(str(path)):
        path = repository_root() / "configs" / f"{path}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in (repository_root() / "configs").glob("*.yaml")))
        raise UserError(f"There is no configuration {path}: use one of {names}, or the path of a YAML file.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no settings: it must be a YAML mapping.")
    tree.setdefault("name", path.stem)
    for override in overrides:
        _apply(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(_one_sentence(error, str(path.name))) from error


class Run:
    """Where one run computes: ``runs/<name>/`` below the repository root, and the paths of its stages."""

    def __init__(self, config: RunConfig, name: str, root: Path):
        self.config, self.name, self.root = config, name, root
        self.folder = root / "runs" / name

    def cycle(self, cycle: int, part: str, chain: str = "main") -> Path:
        """The folder of ``sae``, ``attribution`` or ``core`` of one cycle."""
        base = self.folder if chain == "main" else self.folder / f"chain_{chain}"
        return base / f"cycle_{cycle}" / part

    def retrained(self, k: int, arm: str, seed: int) -> Path:
        return self.folder / "retrain" / f"k{k}" / f"{arm}-seed{seed}"

    def scores(self, k: int, arm: str, seed: int) -> Path:
        return self.folder / "saebench" / f"k{k}" / f"{arm}-seed{seed}"


def open_run(config: str, run: str = "", overrides: list[str] | tuple[str, ...] = ()) -> Run:
    """The run that a notebook or make target works in.

    Without overrides that is ``runs/<config>``; with overrides ``runs/<config>--<hash8>``, so that a rerun with
    other parameters never overwrites the plain one; ``run`` names it freely.
    """
    resolved = load_config(config, overrides)
    if run and not NAME.fullmatch(run):
        raise UserError(f"The run name {run!r} cannot be a folder name: use letters, digits, '.', '_' and '-'.")
    plain = not overrides or resolved == load_config(config)
    return Run(resolved, run or (resolved.name if plain else f"{resolved.name}--{resolved.hash[:8]}"), repository_root())
