"""sae_bench's sparse_probing, tpp and scr on the data sets they were made for, by their own ``run_eval``.

Activations and probes that the SAEs share are kept in the cache, in a folder named by the hash of all that
decides them. They are large: 14 GB per set for Gemma-2-2B at sae_bench's sizes.
"""

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import safetensors.torch
import torch

from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.saebench.adapter import SAE, Adapter, our_model, undisturbed
from dmsae_lib.saebench.hub_data import datasets_from
from dmsae_lib.saebench.runner import LLM_BATCH_TOKENS, Bench, Row, configured, evaluate, finite, kept


class ProbesAsTensors:
    """Takes the place of pickle in scr_and_tpp: its probes and their accuracies in the safetensors format."""

    def __init__(self, device: torch.device):
        self.device = device

    def dump(self, found: Row, handle: Any) -> None:
        tensors = {
            json.dumps([name, part]): tensor.contiguous()
            for name, probe in found["llm_probes"].items()
            for part, tensor in probe.state_dict().items()
        }
        for name, value in found["llm_test_accuracies"].items():
            tensors[json.dumps([name])] = torch.tensor(float(value), dtype=torch.float64)
        handle.write(safetensors.torch.save(tensors))

    def load(self, handle: Any) -> Row:
        from sae_bench.evals.sparse_probing.probe_training import Probe

        states: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        accuracies, probes = {}, {}
        for key, tensor in safetensors.torch.load(handle.read()).items():
            name, *part = json.loads(key)
            if part:
                states[name][part[0]] = tensor
            else:
                accuracies[name] = float(tensor)
        for name, state in states.items():
            weight = state["net.weight"]
            probes[name] = Probe(weight.shape[1], weight.dtype).to(self.device)
            probes[name].load_state_dict(state)
        return {"llm_probes": probes, "llm_test_accuracies": accuracies}


@contextlib.contextmanager
def _on_our_model(model: LanguageModel) -> Iterator[None]:
    """:func:`our_model` with activations in the SAE's precision, whatever the model's."""
    from sae_bench.sae_bench_utils import activation_collection

    plain = activation_collection.get_llm_activations

    def in_float32(*given: Any, **options: Any) -> torch.Tensor:
        return plain(*given, **options).float()

    with our_model(model), patch.object(activation_collection, "get_llm_activations", in_float32):
        yield


def _sizes(model: LanguageModel) -> dict[str, int]:
    context = min(128, model.config.context_size)
    return {"context_length": context, "llm_batch_size": max(1, LLM_BATCH_TOKENS // context)}


def _evaluate(main: ModuleType, config: Any, adapter: Adapter, bench: Bench, name: str) -> Row:
    """One SAE's result, with what sae_bench keeps for all SAEs already made: its random numbers come out
    otherwise in the run that makes it. Config (which names the model by content) and data files decide what
    is kept."""
    paths = sorted(bench.data.resolve().rglob("*")) if bench.data else []
    files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths if p.is_file()]

    def run(artifacts: Path) -> Row:
        return evaluate(main, config, adapter, artifacts_path=str(artifacts))

    return run(kept(bench.cache, name, [asdict(config), files], run))


def _by_set(found: Row) -> dict[str, Row]:
    return {
        detail.pop("dataset_name").removesuffix("_results"): finite(detail)
        for detail in found["eval_result_details"]
    }


def run_sparse_probing_hub(sae: SAE, model: LanguageModel, bench: Bench, seed: int, **options: Any) -> Row:
    """sae_bench's original sparse probing: logistic probes on the 1, 2, 5 latents of largest mean difference.

    ``options`` take the place of sae_bench's own (``dataset_names``, ``probe_train_set_size`` ...). Returns
    ``{"metrics": {sae_top_1_test_accuracy, llm_top_1_test_accuracy, ..., sae_test_accuracy (all latents),
    llm_test_accuracy (all channels)}, "sets": {set: the same}}``. Raises NotRun without the data.
    """
    from sae_bench.evals.sparse_probing import main
    from sae_bench.sae_bench_utils import dataset_utils

    adapter = Adapter(sae, model)
    config = configured(main.SparseProbingEvalConfig, adapter, seed, **_sizes(model) | options)
    with undisturbed(), _on_our_model(model), datasets_from(bench.data, dataset_utils):
        found = _evaluate(main, config, adapter, bench, "sparse_probing")
    metrics = found["eval_result_metrics"]
    return {"metrics": finite(metrics["sae"] | metrics["llm"]), "sets": _by_set(found)}


def run_perturbation_hub(
    sae: SAE, model: LanguageModel, bench: Bench, seed: int, scr: bool, **options: Any
) -> Row:
    """sae_bench's spurious correlation removal (``scr``) or targeted probe perturbation, on its own pairs.

    Ablates the n latents of largest effect, for those of sae_bench's n = 2 ... 500 that the SAE has;
    ``options`` as in :func:`run_sparse_probing_hub`. Returns ``{"metrics": {scr_metric_threshold_n or
    tpp_threshold_n_total_metric, ...}, "sets": {set and pair: the same}}``. A threshold's scr_metric is the
    mean over the pairs without a tie, and missing where all are tied. Raises NotRun without the data.
    """
    from sae_bench.evals.scr_and_tpp import dataset_creation, main
    from sae_bench.sae_bench_utils import dataset_utils

    adapter, name = Adapter(sae, model), "scr" if scr else "tpp"
    options = _sizes(model) | options | {"perform_scr": scr}
    config = configured(main.ScrAndTppEvalConfig, adapter, seed, **options)
    config.n_values = [n for n in config.n_values if n <= sae.d_sae]
    with (
        undisturbed(),
        _on_our_model(model),
        datasets_from(bench.data, dataset_utils, dataset_creation),
        patch.object(main, "pickle", ProbesAsTensors(adapter.device)),
    ):
        found = _evaluate(main, config, adapter, bench, name)
    return {"metrics": finite(found["eval_result_metrics"][f"{name}_metrics"]), "sets": _by_set(found)}
