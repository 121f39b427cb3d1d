"""What is in summary.json: every row with its fields, as pydantic holds a summary against them.

L0 counts active latents per token, losses are in nats per token, fvu and loss_recovered are fractions; rare
is the share of latents that fire on fewer than 1 in 1000 tokens. Commit, hardware, versions and seconds are
in provenance.json beside it. ``Summary.model_json_schema()`` is all this as a JSON Schema.
"""

from collections import ChainMap
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from dmsae_lib.config.sections import Aggregator, Arm, CoreBias, CoreDecoder, CoreSparsity, Reading
from dmsae_lib.report.equal_l0 import SEED

SCHEMA_VERSION: Final = 6
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Interval = Annotated[list[float], Field(min_length=2, max_length=2)] | None  # 95 %
Verdict = Literal["holds", "does not hold", "not decidable"]
Scores = dict[str, float | None] | None  # SAEBench's numbers of one SAE


def every(names: Any, value: Any) -> Any:
    """A dictionary with all of the ``names``, a Literal, and no others."""
    return Annotated[dict[names, value], Field(min_length=len(get_args(names)))]


ActiveLatents = every(Literal["core", "free", "total"], Amount)
ByPrefix = every(Literal["prefix0", "full"], float)
# of frozen encoder rows: participation rank of their Gram matrix, and norms; None without a core
CoreRows = every(Literal["rank", "norm", "norm_min", "norm_max"], Amount) | None


Places = Annotated[str, Field(pattern="^([0-9]+|full)$")]


def has_full(by_place: dict[str, float]) -> dict[str, float]:
    if "full" not in by_place:
        raise ValueError("lacks 'full'")
    return by_place


class Record(BaseModel):
    """All of its fields and no others; and a text is no number."""

    model_config = ConfigDict(extra="forbid", strict=True)


def row(shape: type[Record], *sources: dict[str, Any]) -> dict[str, Any]:
    """All fields of ``shape`` in its order, each from the first of the ``sources`` that has it."""
    found = ChainMap(*sources)
    return {name: found[name] for name in shape.model_fields}


class Inputs(Record):
    config_hash: str
    seed: Count
    threads: Size
    model: every(Literal["name", "hash"], str)
    data: every(Literal["source", "hash"], str)


class Sizes(Record):
    d_in: Size
    d_sae: Size
    k: Size
    # cumulative sizes of cycle 0's prefixes; with a core of c latents the last one is d_sae - c free latents
    prefixes: Annotated[list[Size], Field(min_length=1)]
    n_cycles: Size
    tokens_per_cycle: Size
    batch_size: Size
    coverage: Share
    aggregator: Aggregator
    core_sparsity: CoreSparsity
    core_bias_init: CoreBias
    core_decoder_init: CoreDecoder


class BareModel(Record):
    clean_loss: float
    zero_loss: float  # with the residual at the hook set to zero
    mean_loss: float  # and to the training activations' mean
    scale: Annotated[float, Field(gt=0)]
    # shares of positions left out for the norm of their residual, as BOS is
    outliers: every(Literal["train", "test"], Share)
    # None where the run is older than these
    bits_per_byte: float | None = None  # clean_loss by bytes of the text, which compares across tokenizers
    dtype: Literal["float32", "bfloat16"] | None = None  # in which the model computed
    bfloat16_loss: float | None = None  # of one batch, minus the same in float32; None: computed in float32
    weights: str | None = None  # what was done to them, such as 4 bits; None: as published


class Placebo(Record):
    """A chain of as many frozen rows: those of it that the cycle before selected, and new ones."""

    core_in: Size
    selected: Size
    frequency: Share
    kept: Count  # selected again
    rank: Amount
    L0_core: Amount
    loss_increase: float


class Stability(Record):
    spearman: float | None  # None where a ranking is constant
    jaccard: Share


class Cycle(Record):
    cycle: Count
    core_in: Count
    core_out: Size
    kept: Count
    jaccard: float | None  # of the core and the one before
    origins: Annotated[dict[Annotated[str, Field(pattern="^[0-9]+$")], Count], Field(min_length=1)]
    L0: ActiveLatents
    core_share: Amount  # core L0 / k
    core_rows: CoreRows
    dead: Count
    rare: Share
    fvu: Annotated[dict[Places, Amount], AfterValidator(has_full)]  # by free latents used; full: all of them
    loss_increase: ByPrefix
    loss_recovered: ByPrefix  # against zero ablation
    ranking_stability: Stability
    placebos: dict[str, Placebo]  # by kind
    parent: str | None
    aggregators: dict[str, Count]


Cycles = Annotated[list[Cycle], Field(min_length=2)]


class FurtherChain(Record):
    seed: Count
    core_sparsity: CoreSparsity
    core_bias_init: CoreBias
    core_decoder_init: CoreDecoder
    cycles: Cycles


class FinalCore(Record):
    reading: Reading
    size: Count
    sizes: every(Reading, Count)
    lineage: Literal["core_lineage.json"]


class Retrained(Record):
    chain: str
    k: Size
    arm: Arm
    seed: Count
    core_size: Count
    overlap: Share | None
    core_rows: CoreRows
    L0: ActiveLatents
    unbound: bool  # the core alone reaches k, so total L0 = k cannot be had
    fvu: Amount
    loss_increase: float
    loss_recovered: float  # against zero ablation
    loss_recovered_mean: float  # against mean ablation
    dead: Count
    rare: Share
    tokens: Size
    saebench: Scores
    # of the core rows' firing frequencies: with their own in the cycle that they come from, and with those of
    # the same rows in the SAE at the next k
    frequency_correlation: every(Literal["before", "next_k"], float | None)


class Pair(Record):
    """How alike the cores of two chains are, beside plain SAEs' latents and random rows."""

    a: str
    b: str
    kind: Literal["cores", "plain", "random"]
    size: Size  # matched pairs
    cosine: Amount  # mean |cosine| of matched encoder rows
    cosine_above: Share  # share of the pairs above .7
    activation: float | None  # mean correlation of matched activations on the same tokens
    activation_above: float | None
    span: Amount  # mean squared cosine of the principal angles
    span_chance: Amount


class Imported(Record):
    """An SAE trained elsewhere, measured like ours, at its own threshold."""

    name: str
    where: str  # the folder's name, or release:sae_id of SAELens
    hash: str
    architecture: Literal["standard", "jumprelu", "topk", "gated"]
    d_sae: Size
    widths: list[Size] | None
    L0: Amount
    fvu: Amount
    loss_increase: float
    loss_recovered: float
    dead: Count
    saebench: Scores


class Covered(Record):
    """How many latents reach a share of the attribution."""

    arm: Literal["none", "distilled"]
    k: Size
    seed: Count
    coverage: Share
    size: Count
    candidates: Size


class Probing(Record):
    dense: Share
    best_channel: Share
    majority: Share
    n_sets: Size
    dropped: list[str]  # sets that a dense probe cannot do


class EvalRow(Record):
    needs: str
    doubt: str  # who found the eval unreliable; empty: nobody that we know of
    scores: Count
    not_run: str | None


class OverDraws(Record):
    value: float
    interval: Interval
    n: Annotated[int, Field(ge=2)]


class Difference(Record):
    """SAEs with the distilled core minus the baseline, paired by training seed, at measured L0."""

    core: str | None = None  # the kind of core, by its name in dmsae_lib/report/series.py; None: the main one
    metric: str
    label: str
    better: Literal[-1, 0, 1]  # 1: higher is better, -1: lower, 0: neither
    doubted: bool  # an audit found the eval unreliable
    k: Size
    value: float
    interval: Interval
    n: Size
    varied: str = SEED  # what differs between the n values
    sign: Literal["+", "-", "?"]  # of the interval; ?: it contains 0, or there is none
    evaluation: OverDraws | None  # at equal k over evaluation seeds, for the first training seed


class Tolerance(Record):
    """What a second run may differ by in one kind of number: see dmsae_lib/report/agreement.py."""

    # absolute, and relative to the published value; the larger counts
    tolerance: Annotated[list[Amount], Field(min_length=2, max_length=2)]
    sd: float | None  # between replicates, pooled
    df: Count
    source: str


class Gate(Record):
    gate: str
    value: float
    bound: float | None  # None: reported, not judged
    ok: bool  # value below bound


class Part(Record):
    part: str
    k: int | None
    value: float | None
    interval: Interval
    p: float | None
    n: Count
    bound: float
    side: Literal["above", "below", "within"]
    test: Literal["t", "permutation"]
    verdict: Verdict
    decides: bool


class Claim(Record):
    claim: str
    verdict: Verdict
    value: float | None
    interval: Interval
    n: Count
    varied: str  # what differs between the n values
    detail: str
    parts: list[Part]


class Answer(Record):
    question: str
    answer: str
    numbers: dict | list


class Summary(Record):
    schema_version: Literal[SCHEMA_VERSION]
    config: str
    inputs: Inputs
    sizes: Sizes
    language_model: BareModel
    cycles: Cycles
    chains: dict[str, FurtherChain]
    final_core: FinalCore
    retrain: list[Retrained]
    imported: list[Imported]
    identity: list[Pair]
    evals: dict[str, EvalRow]
    differences: list[Difference]
    heatmap: list[Covered]
    probing_baselines: Probing | None
    tolerances: dict[str, Tolerance]
    regime: list[Gate]  # of cycle 0, unless it was trained elsewhere, and of the SAEs that are compared
    claims: dict[str, Claim]
    reviewers: dict[str, Answer]
