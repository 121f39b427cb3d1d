"""SAEBench's RAVEL: can one attribute of an entity (a city's country) be changed through latents, and the
others left?

Only for models that know the facts: the prompts whose answers the model gets right are found once per model.
sae_bench runs RAVEL on transformers' model itself, so that is loaded beside ours, in float32 (sae_bench:
bfloat16 for Gemma).
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.saebench.adapter import Adapter, NotRun, cache_name, undisturbed, whole_or_nothing
from dmsae_lib.saebench.official import finite, hub_out_of_reach, only_result
from dmsae_lib.store.artifacts import hash_json

PROMPTS = "adamkarvonen/ravel_prompts"
FILES = ("entity_attributes", "entity_to_split", "prompt_to_split", "attribute_to_prompts")
BATCH_ROWS = 8  # sae_bench's for Gemma-2-2B; it decides how many steps the mask over latents is trained for
# right answers per attribute: each score then rests on about 30 held-out pairs, a standard error of 0.09
FEWEST = 100


class LayerWithTuples:
    """A decoder layer for hooks written for transformers 4, where a layer returned a tuple; now it is a bare
    tensor."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def register_forward_hook(self, hook: Callable[..., Any]) -> Any:
        def adapted(module: nn.Module, inputs: Any, output: Any) -> Any:
            return (
                hook(module, inputs, output)
                if isinstance(output, tuple)
                else hook(module, inputs, (output,))[0]
            )

        return self.layer.register_forward_hook(adapted)


@contextlib.contextmanager
def _as_ravel_wants(model: LanguageModel) -> Iterator[Any]:
    """sae_bench's RAVEL loads, under our name, a fresh transformers model, which is yielded, and our
    tokenizer."""
    from sae_bench.evals.ravel import main
    from sae_bench.sae_bench_utils import activation_collection
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(
        model.folder,
        dtype=torch.float32,
        attn_implementation="eager",
        trust_remote_code=model.config.trust_remote_code,
    )
    plain.to(model.device).eval().requires_grad_(False)
    layers = plain.get_submodule(model.bridge.adapter.component_mapping["blocks"].name)
    name = cache_name(model)
    with (
        patch.object(activation_collection, "get_module", lambda _, layer: LayerWithTuples(layers[layer])),
        patch.object(main, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=lambda *_, **__: plain)),
        patch.object(main, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda _: model.tokenizer)),
        patch.dict(main.LLM_NAME_MAP, {name: name}),
    ):
        yield plain


def _fetch_prompts(folder: Path, entities: list[str], data: Path | None) -> None:
    """RAVEL's files for the classes of entities, into ``folder``."""
    names = [f"ravel_{entity}_{file}.json" for entity in entities for file in FILES]
    local = None if data is None else Path(data) / PROMPTS
    if local is not None and all((local / name).is_file() for name in names):
        for name in names:
            shutil.copyfile(local / name, folder / name)
        return
    place = "" if local is None else f" and {local} does not hold them"
    if reason := hub_out_of_reach():
        raise NotRun(f"it needs the prompts of {PROMPTS}, but {reason}{place}")
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(PROMPTS, repo_type="dataset", local_dir=folder, allow_patterns=names)
    except Exception as error:  # the Hub client raises a dozen kinds
        raise NotRun(
            f"it needs the prompts of {PROMPTS}, but the Hub did not give them "
            f"({type(error).__name__}){place}"
        ) from error


def _prepare(model: LanguageModel, plain: Any, config: Any, place: Path, data: Path | None) -> None:
    """The prompts of each class that the model answers rightly, in ``place``, as run_eval looks for them."""
    from sae_bench.evals.ravel.instance import RAVELInstance

    with whole_or_nothing(place) as fresh:
        config.artifact_dir = str(fresh)
        (base := fresh / "base").mkdir()
        _fetch_prompts(base, list(config.entity_attribute_selection), data)
        for entity, attributes in config.entity_attribute_selection.items():
            found = RAVELInstance.create_from_files(
                config=config,
                entity_type=entity,
                tokenizer=model.tokenizer,
                data_dir=config.artifact_dir,
                model=plain,
                model_name=config.model_name,
                attribute_types=attributes,
            )
            found.create_and_save_filtered_dataset(config.artifact_dir, config.top_n_entities)


def _known_facts(config: Any) -> dict[str, int]:
    """``{entity_attribute: prompts answered rightly}``; NotRun where those of an attribute are too few or all
    alike."""
    from sae_bench.evals.ravel.instance import RAVELFilteredDataset, get_instance_name

    found = {}
    for entity, attributes in config.entity_attribute_selection.items():
        name = get_instance_name(entity, config.model_name, None, config.top_n_entities)
        prompts = RAVELFilteredDataset.load(f"{config.artifact_dir}/{name}")
        base = Path(config.artifact_dir) / "base"
        templates = json.loads(
            (base / f"ravel_{entity}_attribute_to_prompts.json").read_text(encoding="utf-8")
        )
        n_entities = len(
            json.loads((base / f"ravel_{entity}_entity_attributes.json").read_text(encoding="utf-8"))
        )
        for attribute in attributes:
            right = prompts.get_prompts_by_attribute(attribute)
            answers = {prompt.attribute_label for prompt in right}
            found[f"{entity}_{attribute}"] = len(right)
            if len(right) < FEWEST or len(answers) < 2:
                asked = n_entities * len(templates[attribute])
                raise NotRun(
                    f"the model knows too few of the facts: it answers {len(right)} of {asked} questions "
                    f"about {entity}: {attribute} rightly, with {len(answers)} different answers; {FEWEST} "
                    "and 2 are needed"
                )
    return found


def run_ravel(
    sae: MatryoshkaSAE,
    model: LanguageModel,
    cache: Path,
    seed: int,
    data: Path | None = None,
    selection: dict[str, list[str]] | None = None,
) -> dict[str, Any]:
    """sae_bench's RAVEL scores of an SAE, its settings but for the batch of 8.

    ``selection``: attributes by class of entities; None: sae_bench's, cities and Nobel laureates. The prompts
    come from ``<data>/adamkarvonen/ravel_prompts``, else from the Hub. Returns ``{"metrics":
    {disentanglement_score, cause_score, isolation_score}, "attributes": {entity_attribute: scores},
    "known_facts": {entity_attribute: prompts}}``. Raises NotRun without the prompts, or for a model that does
    not know the facts.
    """
    from sae_bench.evals.ravel import main

    if model.tokenizer.encode("a")[0] != model.bos:
        raise NotRun(
            "the model's tokenizer puts no BOS before a text, and sae_bench's RAVEL counts positions as if "
            "it did"
        )
    options = {} if selection is None else {"entity_attribute_selection": selection}
    config = main.RAVELEvalConfig(
        model_name=cache_name(model),
        random_seed=seed,
        llm_dtype="float32",
        llm_batch_size=BATCH_ROWS,
        **options,
    )
    place = Path(cache) / f"ravel-{hash_json([config.model_name, config.entity_attribute_selection])[:16]}"
    adapter = Adapter(sae, model)
    with undisturbed(), tempfile.TemporaryDirectory() as out, _as_ravel_wants(model) as plain:
        if not place.is_dir():
            _prepare(model, plain, config, place, data)
        config.artifact_dir = str(place)
        known = _known_facts(config)
        found = only_result(
            main.run_eval(
                config, [("dmsae", adapter)], str(adapter.device), f"{out}/results", artifacts_path=out
            ),
            "ravel",
        )
    by_entity = found["eval_result_unstructured"].values()
    attributes = {name: finite(scores) for by_name in by_entity for name, scores in by_name.items()}
    return {
        "metrics": finite(found["eval_result_metrics"]["ravel"]),
        "attributes": attributes,
        "known_facts": known,
    }
