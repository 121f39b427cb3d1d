"""core.json of a core that travels; ``core.schema.json`` beside it is the JSON schema of CoreRecord."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from dmsae_lib.config.sections import CoreSparsity, Reading
from dmsae_lib.distill.core import STRICT, Count, Latent

FORMAT, SCHEMA_VERSION = "dmsae-core", 1

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,200}$")]
Positive = Annotated[int, Field(ge=1)]


class Entry(BaseModel):
    model_config = STRICT


class ModelEntry(Entry):
    """Whose activations. name: a Hub id, an embedded model's name, or the last part of a local folder's path.
    hash: over its configuration, weight and tokenizer files."""

    name: Text
    hash: Hash
    architecture: Text
    n_layers: Positive
    d_model: Positive


class Normaliser(Entry):
    """scale: sqrt(mean ||x||^2) of the training activations, which are divided by it."""

    scale: Annotated[float, Field(gt=0)]


class Distilled(Entry):
    """The reading of "the final core", and the SAEs of its chain. k: average of active latents per token.
    prefixes: cumulative sizes of the groups of free latents, the last one left out."""

    cycle: Count
    chain: Text
    reading: Reading
    d_sae: Positive
    k: Positive
    prefixes: Annotated[list[Positive], Field(min_length=1)]
    tokens_per_cycle: Positive
    core_sparsity: CoreSparsity
    core_bias_init: Text
    core_decoder_init: Text


class Data(Entry):
    """The text it was distilled on: a name, and the hash of its token ids."""

    source: Text
    hash: Hash


class Attribution(Entry):
    """coverage: share of all candidates' score that the selected ones hold together, at least."""

    aggregator: Text
    coverage: Annotated[float, Field(gt=0, lt=1)]
    tokens: Positive
    candidates: Positive


class Parents(Entry):
    """Content hashes. core: the run's artefact, all of C(cycle). core_before: C(cycle - 1), or null."""

    core: Hash
    core_before: Hash | None
    sae: Hash
    attribution: Hash
    harvest: Hash


class CoreRecord(Entry):
    """core.json of a distilled core. latents: in column order. files: hash of core.safetensors. hash: of the
    canonical JSON text of all other entries, the name of the whole by its content."""

    format: Literal["dmsae-core"]
    schema_version: Literal[1]
    made_with: Text
    size: Positive
    model: ModelEntry
    hook_name: Annotated[str, Field(pattern=r"^blocks\.[0-9]+\.hook_resid_post$")]
    normaliser: Normaliser
    distilled: Distilled
    data: Data
    attribution: Attribution
    latents: list[Latent]
    parents: Parents
    files: Annotated[dict[Literal["core.safetensors"], Hash], Field(min_length=1)]
    hash: Hash
