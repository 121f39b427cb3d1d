"""The sections of a run's configuration: every setting with its type, its default and what it means.

Every default that the paper does not fix is one of our decisions; ``configs/gemma-2-2b.yaml`` gives the
source of each value.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from dmsae_lib.config.fields import EachOnce, Fraction, Local, Name, OneAtLeast, Positive, Sizes, one_of

# The open lists: what a configuration may name. Each name is bound to its function in the room that has it
# (distill, saebench), which refuses a name that is not here; so nothing of torch is needed to check a file.
AGGREGATORS = ["mean_abs", "abs_mean", "quantile", "frequency"]
ARMS = {  # each arm and its family
    "none": "none",
    "distilled": "distilled",
    "random": "of latents",  # controls made of latents that some cycle trained
    "random_outside": "of latents",
    "most_frequent": "of latents",
    "random_directions": "new rows",  # controls that no training has ever selected
    "data_points": "new rows",
    "pca": "new rows",
    "rotated": "new rows",
    "other_chain": "of another chain",  # the distilled core of a chain that differs in its seed alone
    "warm_start": "unfrozen",  # as many latents as the core has in every prefix, trained like all others
    "cold_start": "unfrozen",
    "longer_repeated": "longer",
    "longer_fresh": "longer",
}
EVALS = ["core", "sparse_probing", "absorption", "tpp", "scr", "meta_structure"]
EVALS += ["core_hub", "sparse_probing_hub", "tpp_hub", "scr_hub", "ravel", "autointerp", "unlearning", "mdl"]


class Family(Sequence[str]):
    """The arms of some families, in the order of ``ARMS``: an arm that is added there is here at once."""

    def __init__(self, *families: str):
        self.families = families

    def _names(self) -> list[str]:
        return [arm for arm, family in ARMS.items() if family in self.families]

    def __getitem__(self, index: Any) -> Any:
        return self._names()[index]

    def __len__(self) -> int:
        return len(self._names())


OF_LATENTS, NEW_ROWS, UNFROZEN, LONGER = map(Family, ("of latents", "new rows", "unfrozen", "longer"))
OTHER_CHAIN = "other_chain"  # no control: that another seed's core does as well would speak for the core
CONTROLS = Family("of latents", "new rows")


Aggregator = Annotated[str, one_of(AGGREGATORS)]
Arm = Annotated[str, one_of(ARMS)]
Placebo = Annotated[str, one_of(NEW_ROWS)]
Beta = Annotated[float, Field(ge=0, lt=1)]
CoreSparsity = Literal["relu", "batchtopk"]
CoreBias = Literal["zero", "match_frequency"]
CoreDecoder = Literal["random", "encoder"]
Reading = Literal["all_of_last", "last_two", "every_since_first", "alive_since_0"]  # of the final core


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    # Settings that came after runs were published: at their default they are not written, so that no run from
    # before is stale or has another hash.
    LATER: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _written(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        usual = {name for name in self.LATER if getattr(self, name) == fields[name].default}
        return {name: value for name, value in written(self).items() if name not in usual}


class ModelConfig(Section):
    name: Local  # an embedded or packaged name, a local Hub-format folder or GGUF file, or a Hub id
    hook_name: str  # the residual stream after a block
    context_size: Annotated[int, Field(ge=8)]
    # auto: bfloat16 where the processor multiplies in it, else float32; records say which it was
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    batch_rows: Positive = 32  # contexts per forward pass
    trust_remote_code: bool = False

    @field_validator("hook_name")
    @classmethod
    def _as_transformer_lens_writes_it(cls, name: str) -> str:
        found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", name, re.ASCII)
        if not found:
            raise ValueError(f"is {name!r}: write it like blocks.12.hook_resid_post; no other place is taken")
        return f"blocks.{int(found[1])}.hook_resid_post"  # 01 is 1


class DataConfig(Section):
    source: Local  # "embedded", a local .txt / .jsonl file or a folder of them, or a Hub data set id
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
    # positions above this multiple of the median norm are left out everywhere, as BOS is
    outlier_norm: float = Field(10.0, gt=1)


class SAEConfig(Section):
    d_sae: Positive  # the core included
    # cumulative sizes of the free latents; the last one, d_sae - core, is implied
    prefixes: Annotated[Sizes, Field(min_length=1)]

    @field_validator("prefixes")
    @classmethod
    def _below_the_width(cls, prefixes: list[int], info: ValidationInfo) -> list[int]:
        if prefixes[-1] >= (d_sae := info.data.get("d_sae", prefixes[-1] + 1)):
            raise ValueError(f"ends at {prefixes[-1]}: it must stay below sae.d_sae = {d_sae}")
        return prefixes


class CoreSettings(Section):
    """What a distillation chain may do differently with its core."""

    core_sparsity: CoreSparsity = "relu"
    core_bias_init: CoreBias = "zero"
    core_decoder_init: CoreDecoder = "random"  # encoder: the core's encoder rows at norm 1

    def core_settings(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in CoreSettings.model_fields}


class TrainingConfig(CoreSettings):
    k: Positive
    batch_size: Positive
    lr: float = Field(gt=0)
    warmup: float = Field(0.05, ge=0, lt=1)  # share of the steps
    decay: float = Field(0.2, ge=0, lt=1)  # share of the steps, at the end
    grad_clip: float = Field(1.0, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    aux_alpha: float = Field(1 / 32, ge=0)
    k_aux: Positive | None = None  # None: d_in / 2
    dead_window: Positive | None = None  # tokens; None: max(2 % of the tokens, 40 batches)
    k_min: int = Field(1, ge=0)
    # bfloat16 matrix products over float32 weights; auto: where the language model computes in bfloat16
    autocast: bool | Literal["auto"] = False
    checkpoint_seconds: float = Field(60.0, gt=0)
    together: Positive = 64  # SAEs trained on one pass over the data at most: bounds the memory
    prefetch: int = Field(0, ge=0)  # batches made ahead; worth it where a GPU trains

    NO_EFFECT: ClassVar = {"checkpoint_seconds", "together", "prefetch"}  # change no weight


class Chain(Section):
    """A distillation chain beside the main one, of another seed or other core settings than ``training``."""

    LATER: ClassVar = frozenset({"seeds", "controls"})
    name: Name
    seed: int = Field(0, ge=0)
    core_sparsity: CoreSparsity | None = None  # None: as in training, like the two that follow
    core_bias_init: CoreBias | None = None
    core_decoder_init: CoreDecoder | None = None
    retrain: EachOnce[Arm] = []  # trained with this chain's own core at every k of retrain.ks
    seeds: OneAtLeast[int] | None = None  # of these; None: retrain.seeds
    controls: EachOnce[Arm] = []  # further arms with its core, at retrain.controls_at alone

    @field_validator("controls")
    @classmethod
    def _beside_the_arms(cls, controls: list[str], info: ValidationInfo) -> list[str]:
        if again := [arm for arm in controls if arm in info.data.get("retrain", [])]:
            raise ValueError(f"names {again[0]}: the chain's list `retrain` has it already, at every k")
        return controls


class DistillConfig(Section):
    LATER: ClassVar = frozenset({"ablation_tokens"})
    cycles: Positive = 7
    coverage: Fraction = 0.9
    aggregator: Aggregator = "mean_abs"
    quantile: Fraction = 0.99
    final_core: Reading = "last_two"
    chains: list[Chain] = []
    # chains of as many frozen rows of this kind beside the core's: the null of C2
    placebos: EachOnce[Placebo] = []
    # trained elsewhere, in place of cycle 0: a folder, or release:sae_id of SAELens
    from_sae: Local | None = None
    # its nested sizes without the last, where its files do not say; []: not nested
    from_prefixes: Sizes | None = None
    # of the select split, on which notebook 10 ablates every candidate: a pass of half the model for each
    ablation_tokens: Positive = 2000

    @field_validator("chains")
    @classmethod
    def _names_differ(cls, chains: list[Chain]) -> list[Chain]:
        names = [chain.name for chain in chains]
        if len({"main", *names}) <= len(names):
            raise ValueError(f"is {names}: names must differ from each other and from 'main'")
        return chains


class RetrainConfig(Section):
    LATER: ClassVar = frozenset({"more_seeds"})
    ks: OneAtLeast[Positive]
    seeds: OneAtLeast[int] = [0, 1, 2]
    arms: OneAtLeast[Arm] = ["none", "distilled"]  # trained at every k with every seed
    # of the main chain's arms at training.k alone, for differences that few seeds cannot show
    more_seeds: EachOnce[int] = []
    controls: dict[Arm, Positive] = {}  # number of seeds (draws) of each control arm
    controls_at: EachOnce[Positive] | None = None  # None: at training.k only
    # trained elsewhere, to compare with: a folder, or release:sae_id of SAELens
    imported: dict[Name, Local] = {}

    @field_validator("controls")
    @classmethod
    def _beside_the_arms(cls, controls: dict[str, int], info: ValidationInfo) -> dict[str, int]:
        arms, seeds = info.data.get("arms", []), info.data.get("seeds")
        for arm, n in controls.items():
            if arm in arms:
                raise ValueError(f"names {arm}: retrain.arms has it already, with every seed")
            if seeds and n > len(seeds):
                raise ValueError(f"asks for {n} seeds of {arm}: retrain.seeds = {seeds} has fewer")
        return controls

    @field_validator("more_seeds")
    @classmethod
    def _beside_the_seeds(cls, more: list[int], info: ValidationInfo) -> list[int]:
        if again := [seed for seed in more if seed in info.data.get("seeds", [])]:
            raise ValueError(f"names {again[0]}: retrain.seeds has it already, at every k")
        return more

    @field_validator("imported")
    @classmethod
    def _under_names_of_their_own(cls, imported: dict[str, str]) -> dict[str, str]:
        for name in imported:
            if name in ARMS:
                raise ValueError(f"names {name}, which is an arm of our own: choose another name")
        return imported


class SuiteConfig(Section):
    """The evals of ``make saebench``, beside the two that ``make reproduce`` runs."""

    # None: all of them; those that cannot run here say why
    evals: EachOnce[Annotated[str, one_of(EVALS)]] | None = None
    arms: EachOnce[Arm] = ["none", "distilled"]
    ks: EachOnce[Positive] | None = None  # None: retrain.ks
    seeds: EachOnce[int] | None = None  # training seeds; None: retrain.seeds, or a chain's own
    # draws of texts, splits and probes: all on the first training seed, the first alone on the others
    eval_seeds: OneAtLeast[Annotated[int, Field(ge=0)]] = [0, 1, 2]
    data: Local | None = None  # a folder with sae_bench's own data sets, looked into before the Hub is asked
    judge: str = "gpt-4o-mini"  # autointerp: the model that explains and judges (sae_bench's own choice)
    judge_url: str = "https://api.openai.com/v1"  # OpenAI-compatible; the key is in OPENAI_API_KEY alone
    judge_latents: Positive = 100  # how many latents it is asked about; sae_bench takes 1000
    # the folder of WMDP's bio-forget-corpus.jsonl, which is handed out on request
    unlearning_corpus: Local | None = None


class SaebenchConfig(Section):
    LATER: ClassVar = frozenset({"chains"})
    # whose SAEs are scored, here and in the suite; the settings that follow select among them
    chains: OneAtLeast[Name] = ["main"]
    arms: EachOnce[Arm] = ["none", "distilled"]  # those scored, seven seconds each on two cores
    probing_sets: EachOnce[str] | None = None  # None: the fixed list of dmsae_lib.data.corpus; [] : none
    # accuracy: sets that a probe on all channels misses are dropped
    dense_at_least: float = Field(0.6, ge=0, le=1)
    probing_ks: OneAtLeast[Positive] = [1, 5]
    core_rows: Positive = 64
    seed: int = 0
    suite: SuiteConfig = SuiteConfig()

    def decisive(self) -> dict[str, Any]:
        """What the core and probing scores of one SAE depend on."""
        return self.model_dump(exclude={"chains", "arms", "suite"})
