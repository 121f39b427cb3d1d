"""SAEBench's evals on the data sets that they were made for: sparse_probing, tpp, scr and core, by their own
``run_eval``.

A data set comes from a local folder that holds it under its Hub name
(``<data>/LabHC/bias_in_bios/train.jsonl``, or what ``hf download --repo-type dataset`` wrote), or else from
the Hub. ``HF_HUB_OFFLINE=1`` stands for what is in the Hub's cache. sae_bench asks the Hub for two of them,
github-code and openwebtext, with ``trust_remote_code``: their own loading scripts run on this machine.

Activations and probes that the SAEs share are kept below ``cache``, in a folder named by the hash of all that
decides them. They are large: 14 GB per set for Gemma-2-2B at sae_bench's sizes.
"""

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import safetensors.torch
import torch

from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.saebench.adapter import Adapter, NotRun, cache_name, our_model, undisturbed, whole_or_nothing
from dmsae_lib.store.artifacts import hash_json

PATIENCE = 3  # seconds for the one request that tells whether the Hub can be reached
OPENWEBTEXT = "Skylion007/openwebtext"
LLM_BATCH_TOKENS = (
    2**12
)  # sae_bench's 32 rows of 128 for Gemma-2-2B (activation_collection.py); no score depends on it


@dataclass(frozen=True)
class Texts:
    """Which texts sparse_probing, tpp and scr use. The defaults are sae_bench's."""

    data: Path | None = None  # a local folder to look for the data sets in first
    sets: Sequence[str] | None = None  # None: those of the eval's configuration in sae_bench
    train_size: int = 4000  # of a probe, both classes together
    test_size: int = 1000


def hub_out_of_reach() -> str | None:
    """Why the Hub cannot be reached, in words; None where it can. One request and no retry."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        answer = get_session().head(constants.ENDPOINT, timeout=PATIENCE, follow_redirects=True)
    except Exception as error:  # the client's kinds change from release to release
        return f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})"
    return f"{constants.ENDPOINT} answers {answer.status_code}" if answer.status_code >= 400 else None


def get_dataset(name: str, *which: str, data: Path | None = None, **options: Any) -> Any:
    """``datasets.load_dataset(name, *which, **options)``, from ``<data>/<name>[/<which>]`` where that folder
    is there.

    Raises NotRun where neither the folder nor the Hub (offline: its cache) gives it.
    """
    from datasets import load_dataset

    if data is not None and (folder := Path(data) / name).is_dir():
        if which and (folder / which[0]).is_dir():
            folder, which = folder / which[0], ()
        return load_dataset(
            str(folder), *which, **{key: options[key] for key in ("split", "streaming") if key in options}
        )
    reason, place = hub_out_of_reach(), "" if data is None else f" and there is no {Path(data) / name}"
    if reason and "OFFLINE" not in reason:  # offline, what is in the cache is found without a request
        raise NotRun(f"it needs the data set {name}, but {reason}{place}")
    try:
        return load_dataset(name, *which, **options)
    except Exception as error:  # gated, renamed, not in the cache: each raises kinds of its own
        why = (
            reason
            or f"the Hub did not give it ({type(error).__name__}: {str(error).partition(chr(10))[0][:200].rstrip('.')})"
        )
        raise NotRun(f"it needs the data set {name}, but {why}{place}") from error


@contextlib.contextmanager
def datasets_from(data: Path | None, *modules: ModuleType) -> Iterator[None]:
    """Each module's ``load_dataset`` is :func:`get_dataset`."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(patch.object(module, "load_dataset", partial(get_dataset, data=data)))
        yield


def run_kept(
    main: ModuleType, config: Any, adapter: Adapter, cache: Path, eval_name: str, data: Path | None
) -> dict[str, Any]:
    """The result of ``main.run_eval`` for one SAE, with what sae_bench keeps for all SAEs already made.

    It is made in a folder that moves into ``cache`` when it is whole, and then used: sae_bench's random
    numbers come out otherwise in the run that makes it. The name is the hash of ``config`` (which names the
    model by content) and files.
    """
    files = (
        []
        if data is None
        else [
            (str(path), path.stat().st_size, path.stat().st_mtime_ns)
            for path in sorted(Path(data).resolve().rglob("*"))
            if path.is_file()
        ]
    )
    place = Path(cache) / f"{eval_name}-{hash_json([asdict(config), files])[:16]}"

    def run(artifacts: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as out:
            return main.run_eval(
                config, [("dmsae", adapter)], str(adapter.device), out, artifacts_path=str(artifacts)
            )

    if not place.is_dir():
        with whole_or_nothing(place) as fresh:
            run(fresh)
    return only_result(run(place), eval_name)


class ProbesAsTensors:
    """Takes the place of pickle in scr_and_tpp: its probes in the safetensors format, keys and all."""

    @staticmethod
    def dump(found: dict[str, Any], handle: Any) -> None:
        tensors = {
            json.dumps(["weight", name, part, str(tensor.device)]): tensor.contiguous()
            for name, probe in found["llm_probes"].items()
            for part, tensor in probe.state_dict().items()
        }
        tensors |= {
            json.dumps(["accuracy", name]): torch.tensor(float(value), dtype=torch.float64)
            for name, value in found["llm_test_accuracies"].items()
        }
        handle.write(safetensors.torch.save(tensors))

    @staticmethod
    def load(handle: Any) -> dict[str, Any]:
        from sae_bench.evals.sparse_probing.probe_training import Probe

        states: dict[str, dict[str, torch.Tensor]] = {}
        accuracies = {}
        for key, tensor in safetensors.torch.load(handle.read()).items():
            kind, name, *place = json.loads(key)
            if kind == "accuracy":
                accuracies[name] = float(tensor)
            else:
                part, device = place
                states.setdefault(name, {})[part] = tensor.to(device)
        probes = {}
        for name, state in states.items():
            weight = state["net.weight"]
            probes[name] = Probe(weight.shape[1], weight.dtype).to(weight.device)
            probes[name].load_state_dict(state)
        return {"llm_probes": probes, "llm_test_accuracies": accuracies}


@contextlib.contextmanager
def _with_float_activations(model: LanguageModel) -> Iterator[None]:
    """:func:`our_model` with activations in the SAE's precision, whatever the model's."""
    from sae_bench.sae_bench_utils import activation_collection

    plain = activation_collection.get_llm_activations
    with (
        our_model(model),
        patch.object(
            activation_collection,
            "get_llm_activations",
            lambda *given, **options: plain(*given, **options).float(),
        ),
    ):
        yield


def _settings(model: LanguageModel, adapter: Adapter, seed: int, texts: Texts) -> dict[str, Any]:
    """What the configurations of sparse_probing and of scr_and_tpp have in common."""
    context = min(128, model.config.context_size)
    shared = {
        "random_seed": seed,
        "model_name": cache_name(model),
        "llm_dtype": adapter.cfg.dtype,
        "context_length": context,
        "llm_batch_size": max(1, LLM_BATCH_TOKENS // context),
    }
    return shared if texts.sets is None else shared | {"dataset_names": list(texts.sets)}


def only_result(results: dict[str, Any], eval_name: str) -> dict[str, Any]:
    """The one entry of what a ``run_eval`` of sae_bench returned for one SAE; RuntimeError for more or
    fewer."""
    if len(results) != 1:
        raise RuntimeError(f"sae_bench's {eval_name} gave {len(results)} results for one SAE.")
    return next(iter(results.values()))


def finite(found: dict[str, Any]) -> dict[str, float | None]:
    """The numbers, None for NaN and infinity; entries that are None, settings that were not asked for, are
    left out."""
    return {
        name: float(value) if math.isfinite(value) else None
        for name, value in found.items()
        if value is not None
    }


def _by_set(found: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    return {
        detail.pop("dataset_name").removesuffix("_results"): finite(detail)
        for detail in found["eval_result_details"]
    }


def run_sparse_probing_hub(
    sae: MatryoshkaSAE, model: LanguageModel, cache: Path, seed: int, texts: Texts = Texts()
) -> dict[str, Any]:
    """sae_bench's original sparse probing: logistic probes on the k latents of largest mean difference, k =
    1, 2, 5.

    Returns ``{"metrics": {sae_top_1_test_accuracy, llm_top_1_test_accuracy, ..., sae_test_accuracy (all
    latents), llm_test_accuracy (all channels)}, "sets": {set: the same}}``. Raises NotRun without the data.
    """
    from sae_bench.evals.sparse_probing import main
    from sae_bench.sae_bench_utils import dataset_utils

    adapter = Adapter(sae, model)
    config = main.SparseProbingEvalConfig(
        **_settings(model, adapter, seed, texts),
        probe_train_set_size=texts.train_size,
        probe_test_set_size=texts.test_size,
    )

    with undisturbed(), _with_float_activations(model), datasets_from(texts.data, dataset_utils):
        found = run_kept(main, config, adapter, cache, "sparse_probing", texts.data)
    return {
        "metrics": finite(found["eval_result_metrics"]["sae"] | found["eval_result_metrics"]["llm"]),
        "sets": _by_set(found),
    }


def run_scr_and_tpp_hub(
    sae: MatryoshkaSAE, model: LanguageModel, scr: bool, cache: Path, seed: int, texts: Texts = Texts()
) -> dict[str, Any]:
    """sae_bench's spurious correlation removal (``scr``) or targeted probe perturbation, on its own class
    pairs.

    Ablates the n latents of largest effect, for those of sae_bench's n = 2 ... 500 that the SAE has. Returns
    ``{"metrics": {scr_metric_threshold_n or tpp_threshold_n_total_metric, ...}, "sets": {set and pair: the
    same}}``. A threshold's scr_metric is the mean over the pairs without a tie, and missing where all are
    tied. Raises NotRun without the data.
    """
    from sae_bench.evals.scr_and_tpp import dataset_creation, main
    from sae_bench.sae_bench_utils import dataset_utils

    adapter, name = Adapter(sae, model), "scr" if scr else "tpp"
    config = main.ScrAndTppEvalConfig(
        **_settings(model, adapter, seed, texts),
        perform_scr=scr,
        train_set_size=texts.train_size,
        test_set_size=texts.test_size,
    )
    config.n_values = [n for n in config.n_values if n <= sae.d_sae]

    with (
        undisturbed(),
        _with_float_activations(model),
        datasets_from(texts.data, dataset_utils, dataset_creation),
        patch.object(main, "pickle", ProbesAsTensors),
    ):
        found = run_kept(main, config, adapter, cache, name, texts.data)
    return {"metrics": finite(found["eval_result_metrics"][f"{name}_metrics"]), "sets": _by_set(found)}


def run_core_hub(
    sae: MatryoshkaSAE,
    model: LanguageModel,
    data: Path | None = None,
    reconstruction_batches: int = 200,
    variance_batches: int = 2000,
    batch_rows: int = 16,
) -> dict[str, Any]:
    """sae_bench's core metrics on openwebtext, special tokens neither reconstructed nor counted.

    As many rows as in the command that sae_bench/evals/core/main.py gives, 3,200 for the losses and 32,000
    for the rest. Returns ``{"metrics": {ce_loss_score, l0, explained_variance, ...}}``, None where one is
    undefined. sae_bench shuffles the texts by a seed of its own, 42. Raises NotRun without the data.
    """
    from sae_bench.evals.core import main
    from sae_lens.training import activations_store

    adapter = Adapter(sae, model)
    # multiple_evals would try four times, and then say nothing but an empty list
    get_dataset(OPENWEBTEXT, data=data, split="train", streaming=True, trust_remote_code=True)
    with (
        undisturbed(),
        our_model(model),
        datasets_from(data, activations_store),
        tempfile.TemporaryDirectory() as out,
        patch.object(main.logger, "error") as said,
    ):
        results = main.multiple_evals(
            [("dmsae", adapter)],
            reconstruction_batches,
            variance_batches,
            eval_batch_size_prompts=batch_rows,
            exclude_special_tokens_from_reconstruction=True,
            dataset=OPENWEBTEXT,
            device=str(adapter.device),
            # it fails without
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
            context_size=min(128, model.config.context_size),
            output_folder=out,
            dtype=adapter.cfg.dtype,
        )
    if len(results) != 1:
        raise RuntimeError(f"sae_bench's core gave {len(results)} results for one SAE: {said.call_args}")
    groups = {group: values for group, values in results[0]["metrics"].items() if group != "token_stats"}
    return {"metrics": finite({name: value for values in groups.values() for name, value in values.items()})}
