"""SAEBench's RAVEL: can one attribute of an entity (a city's country) be changed and the others left?

Only for models that know the facts: the prompts whose answers the model gets right are found once per model.
sae_bench runs RAVEL on transformers' model itself, so that is loaded beside ours, in float32 (sae_bench:
bfloat16 for Gemma).
"""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.saebench.adapter import SAE, Adapter, cache_name, undisturbed
from dmsae_lib.saebench.hub_data import from_hub
from dmsae_lib.saebench.runner import Bench, NotRun, Row, configured, evaluate, finite, kept

PROMPTS = "adamkarvonen/ravel_prompts"
FILES = ("entity_attributes", "entity_to_split", "prompt_to_split", "attribute_to_prompts")
BATCH_ROWS = 8  # sae_bench's for Gemma-2-2B; it decides how many steps the mask over latents is trained for
# right answers per attribute: each score then rests on about 30 held-out pairs, a standard error of 0.09
FEWEST = 100


class LayerWithTuples:
    """A decoder layer for hooks written for transformers 4, where a layer returned a tuple, not a tensor."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def register_forward_hook(self, hook: Callable[..., Any]) -> Any:
        def adapted(module: nn.Module, inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return hook(module, inputs, output)
            return hook(module, inputs, (output,))[0]

        return self.layer.register_forward_hook(adapted)


@contextlib.contextmanager
def _as_ravel_wants(model: LanguageModel) -> Iterator[Any]:
    """sae_bench's RAVEL loads our tokenizer and a fresh transformers model, which is yielded."""
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


def _find_known_facts(place: Path, model: LanguageModel, plain: Any, config: Any, data: Path | None) -> None:
    """The prompts of each class that the model answers rightly, in ``place``, as run_eval looks for them."""
    from huggingface_hub import snapshot_download
    from sae_bench.evals.ravel.instance import RAVELInstance

    classes = config.entity_attribute_selection
    names = [f"ravel_{entity}_{file}.json" for entity in classes for file in FILES]
    if data is None or not all((data / PROMPTS / name).is_file() for name in names):
        fetch = partial(snapshot_download, PROMPTS, repo_type="dataset", allow_patterns=names)
        source = Path(from_hub("the prompts of", PROMPTS, data, fetch))
    else:
        source = data / PROMPTS
    (base := place / "base").mkdir()
    for name in names:
        shutil.copyfile(source / name, base / name)
    config.artifact_dir = str(place)
    for entity, attributes in classes.items():
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


def _count_known_facts(place: Path, config: Any) -> dict[str, int]:
    """``{entity_attribute: prompts answered rightly}``; NotRun where they are too few or all alike."""
    from sae_bench.evals.ravel.instance import RAVELFilteredDataset, get_instance_name

    known = {}
    for entity, attributes in config.entity_attribute_selection.items():
        name = get_instance_name(entity, config.model_name, None, config.top_n_entities)
        prompts = RAVELFilteredDataset.load(str(place / name))
        for attribute in attributes:
            right = prompts.get_prompts_by_attribute(attribute)
            answers = {prompt.attribute_label for prompt in right}
            known[f"{entity}_{attribute}"] = len(right)
            if len(right) < FEWEST or len(answers) < 2:
                raise NotRun(
                    f"the model knows too few of the facts: it answers {len(right)} questions about "
                    f"{entity}: {attribute} rightly, with {len(answers)} different answers; {FEWEST} and 2 "
                    "are needed"
                )
    return known


def run_ravel(sae: SAE, model: LanguageModel, bench: Bench, seed: int, **options: Any) -> Row:
    """sae_bench's RAVEL scores of an SAE, its settings but for the batch of 8 and ``options``.

    The prompts come from ``<data>/adamkarvonen/ravel_prompts``, else from the Hub. Returns ``{"metrics":
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
    adapter = Adapter(sae, model)
    ours = {"llm_dtype": "float32", "llm_batch_size": BATCH_ROWS}
    config = configured(main.RAVELEvalConfig, adapter, seed, **ours | options)
    decisive = [config.model_name, config.entity_attribute_selection]
    with undisturbed(), tempfile.TemporaryDirectory() as out, _as_ravel_wants(model) as plain:
        find = partial(_find_known_facts, model=model, plain=plain, config=config, data=bench.data)
        place = kept(bench.cache, "ravel", decisive, find)
        config.artifact_dir = str(place)
        known = _count_known_facts(place, config)
        found = evaluate(main, config, adapter, artifacts_path=out)
    by_entity = found["eval_result_unstructured"].values()
    attributes = {name: finite(scores) for by_name in by_entity for name, scores in by_name.items()}
    metrics = finite(found["eval_result_metrics"]["ravel"])
    return {"metrics": metrics, "attributes": attributes, "known_facts": known}
