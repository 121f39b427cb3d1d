"""SAEBench through the sae_bench package itself, offline, on any model and SAE of ours.

Two of its evals run here: ``core`` (loss recovered, sparsity, reconstruction) and ``sparse_probing_sae_probes``
(k-latent probes on labelled texts). Both take our model as it is: core gets the bridge and our token rows in memory,
and the probing eval finds the model's activations already in its cache, so neither looks for a model on the Hub.

What sae_bench 0.6.0 computes differently from :mod:`dmsae_lib.evaluation`: its ``explained_variance`` subtracts the
wrong mean, and its losses count a BOS as target (never as input).
"""

import contextlib
import io
import random
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dmsae_lib.artifacts import Artifact, UserError, load, write
from dmsae_lib.language_model import LanguageModel
from dmsae_lib.sae import MatryoshkaSAE

METRICS = {"accuracy": "test_accuracy", "auc": "test_auc", "f1": "test_f1"}  # our names: those of sae_bench
REGULARISER = "l1"  # sae_bench's default for the probes on latents
LARGEST_TRAIN, SMALLEST_TEST = 1024, 100  # texts per set: sae_probes/run_baselines.py, generate_sae_activations.py
BATCH_DEPENDENT = ("mse",)  # sae_bench divides it by the batch's tokens


class Adapter(nn.Module):
    """A MatryoshkaSAE, for unnormalised activations, with the attributes that sae_bench asks of an SAE."""

    def __init__(self, sae: MatryoshkaSAE, model: LanguageModel):
        from sae_bench.custom_saes.custom_sae_config import CustomSAEConfig

        super().__init__()
        if sae.d_in != model.d_model:
            raise UserError(f"The SAE reads {sae.d_in} channels but {model.config.name} has {model.d_model} at "
                            f"{model.hook_name}: score it with the model that it was trained on.")
        self.sae = sae.to(model.device)
        self.device, self.dtype = torch.device(model.device), sae.W_dec.dtype
        self.cfg = CustomSAEConfig(
            model_name=_cache_name(model), d_in=sae.d_in, d_sae=sae.d_sae, hook_layer=model.layer,
            hook_name=model.hook_name, context_size=model.config.context_size, architecture="matryoshka_batch_topk",
            dtype=str(self.dtype).removeprefix("torch."), device=str(model.device),
        )  # fmt: skip

    W_enc = property(lambda self: self.sae.W_enc)
    W_dec = property(lambda self: self.sae.W_dec)
    b_enc = property(lambda self: self.sae.b_enc)
    b_dec = property(lambda self: self.sae.b_dec)

    def encode(self, x: Tensor) -> Tensor:
        return self.sae.encode(x.to(self.dtype))

    def decode(self, f: Tensor) -> Tensor:
        return self.sae.decode(f)


def _cache_name(model: LanguageModel) -> str:
    """What decides a model's activations, apart from the hook: a retrained model never meets the old cache."""
    return f"{model.name_by_content}-{model.config.dtype}-context{model.config.context_size}"


@contextlib.contextmanager
def _undisturbed(threads: int | None = None) -> Iterator[None]:
    """Keep sae_bench's output to ourselves, and put back the process-wide state that it or we change meanwhile.

    ``threads``: numerical threads per Python thread inside the block.
    """
    from threadpoolctl import threadpool_limits

    grad, before = torch.is_grad_enabled(), torch.get_num_threads()
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        with (threadpool_limits(threads), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()),
              contextlib.redirect_stderr(io.StringIO())):
            warnings.simplefilter("ignore")
            if threads:
                torch.set_num_threads(threads)
            yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_num_threads(before)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def run_core(sae: MatryoshkaSAE, model: LanguageModel, tokens: np.ndarray, batch_rows: int = 16) -> dict[str, Any]:
    """sae_bench's core metrics on ``tokens`` (rows, context), each row starting with BOS, padded with BOS.

    BOS, EOS and padding are neither reconstructed nor counted. Every row is used once for the losses (``ce_loss_*``,
    ``kl_div_*``; zero ablation) and once for the rest (``l0``, ``explained_variance`` ...). None where a metric is
    undefined. The SAE is moved to the model's device.
    """
    import datasets

    if not len(tokens):
        raise UserError("The core eval of sae_bench got no rows of the test split: raise data.test_tokens.")
    with _undisturbed():
        from sae_bench.evals.core.main import CoreEvalConfig, run_evals
        from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
        from sae_lens.training.activations_store import ActivationsStore

        _, adapter, _ = load_and_format_sae("dmsae", Adapter(sae, model), model.device)
        store = ActivationsStore.from_sae(
            model.bridge, adapter, datasets.Dataset.from_dict({"tokens": tokens.tolist()}), context_size=tokens.shape[1]
        )  # fmt: skip
        batch = max(b for b in range(1, min(batch_rows, len(tokens)) + 1) if len(tokens) % b == 0)  # no row twice
        config = CoreEvalConfig(
            model_name=_cache_name(model), batch_size_prompts=batch, context_size=tokens.shape[1],
            n_eval_reconstruction_batches=len(tokens) // batch, n_eval_sparsity_variance_batches=len(tokens) // batch,
            compute_kl=True, compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True,
            compute_variance_metrics=True, exclude_special_tokens_from_reconstruction=True,
        )  # fmt: skip
        special = {getattr(model.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")} - {None}
        groups, _ = run_evals(adapter, store, model.bridge, config, ignore_tokens=special)
    found = {name: value for group, values in groups.items() if group != "token_stats" for name, value in values.items()
             if name not in BATCH_DEPENDENT}  # fmt: skip
    return {name: value if np.isfinite(value) else None for name, value in found.items()}


def prepare_probing(model: LanguageModel, sets: Sequence[str], folder: Path) -> Artifact:
    """The residual at each text's last token, in sae_probes' cache below ``folder``: made once, shared by all SAEs.

    The same numbers as ``sae_probes.generate_model_activations.ensure_dataset_activations`` (BOS first, the start of
    too long texts cut off), but every text is tokenised once and batches are of texts of like length.
    """
    place = Path(folder) / f"model_activations_{_cache_name(model)}"
    names = {name: f"{name}_{model.hook_name}.pt" for name in sets}
    if place.exists() and all((place / name).exists() for name in names.values()):
        return load(place, "probing_activations")
    with _undisturbed():
        from sae_probes.utils_data import get_numbered_binary_tags, read_numbered_dataset_df

    if unknown := sorted(set(sets) - set(get_numbered_binary_tags())):
        raise UserError(f"saebench.probing_sets names {unknown[0]!r}: the sae-probes wheel holds no such set; "
                        "dmsae_lib.corpus.PROBING_SETS are those used by default.")
    with write(place, "probing_activations", {"model": model.hash}) as writer:
        for name in sets:
            activations = _last_token_residuals(model, read_numbered_dataset_df(name)["prompt"].tolist())
            torch.save(activations, writer.path(names[name]))
    return load(place, "probing_activations")


def _last_token_residuals(model: LanguageModel, texts: list[str]) -> Tensor:
    """(texts, d_model) float32 on the CPU: BOS, then at most context_size - 1 tokens from the end of the text."""
    room = model.config.context_size - 1
    rows = [[model.bos, *ids[-room:]] for ids in model.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = torch.empty(len(rows), model.d_model)
    budget = model.config.batch_rows * model.config.context_size  # tokens per forward pass
    while order:
        longest = len(rows[order[-1]])
        batch, order = order[-(budget // longest):], order[: -(budget // longest)]
        last = torch.tensor([len(rows[i]) - 1 for i in batch])
        tokens = torch.tensor([rows[i] + [model.bos] * (longest - len(rows[i])) for i in batch])  # padded on the right:
        found[batch] = model.lower(tokens.to(model.device))[range(len(batch)), last].cpu()  # no text sees its padding
    return found


def run_probing(saes: Mapping[str, MatryoshkaSAE], model: LanguageModel, sets: Sequence[str], ks: Sequence[int],
                folder: Path, seed: int, jobs: int = 1) -> dict[str, dict[str, Any]]:  # fmt: skip
    """sae_bench's sparse probing of each SAE: the k latents of largest mean difference, then a logistic probe.

    Returns ``{name: {"n_sets", "ks", "mean": {k: scores}, "sets": {set: {k: scores}}}}`` with k as text and scores =
    {accuracy, auc, f1 (weighted)} on the held-out texts. Model activations are cached in ``folder``; results never are,
    because sae_probes takes up an old result of the same name. The outcome does not depend on ``jobs`` (threads).
    """
    for name, sae in saes.items():
        if max(ks) > sae.d_sae:
            raise UserError(f"saebench.probing_ks is {list(ks)}: the SAE {name} has {sae.d_sae} latents; lower it.")
    prepare_probing(model, sets, folder)
    adapters = [Adapter(sae, model) for sae in saes.values()]
    with _undisturbed(threads=1):
        found = _in_threads(lambda adapter: _probe(adapter, sets, ks, Path(folder), seed), adapters, jobs)
    return dict(zip(saes, found))


def _in_threads(work: Callable[[Any], Any], items: Iterable[Any], jobs: int) -> list[Any]:
    """Results in the order of ``items``. The l1 solver lets go of the interpreter lock, so threads do help."""
    with ThreadPoolExecutor(jobs, initializer=lambda: torch.set_num_threads(1)) as pool:
        return list(pool.map(work, items))


def _probe(adapter: Adapter, sets: Sequence[str], ks: Sequence[int], folder: Path, seed: int) -> dict[str, Any]:
    from sae_bench.evals.sparse_probing_sae_probes.main import SparseProbingSaeProbesEvalConfig, run_eval

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        config = SparseProbingSaeProbesEvalConfig(
            model_name=adapter.cfg.model_name, random_seed=seed, dataset_names=list(sets), reg_type=REGULARISER,
            ks=list(ks), results_path=f"{scratch}/probes", model_cache_path=str(folder), include_llm_baseline=False,
        )  # fmt: skip
        results = list(run_eval(config, [("dmsae", adapter)], str(adapter.device), f"{scratch}/results").values())
    scores = {detail["dataset_name"]: detail["sae_metrics_by_k"] for result in results
              for detail in result["eval_result_details"]}  # fmt: skip
    if len(results) != 1 or set(scores) != set(sets) or any(set(by_k or ()) != set(ks) for by_k in scores.values()):
        raise RuntimeError(f"sae_bench gave {len(results)} results with {len(scores)} sets for one SAE, {len(sets)} "
                           f"sets and ks = {list(ks)}: it left something out without saying so.")
    by_set = {name: {str(k): _scores(scores[name][k]) for k in ks} for name in sets}
    mean = {str(k): _scores(results[0]["sae_metrics_by_k"][k]) for k in ks}
    return {"n_sets": len(sets), "ks": list(ks), "mean": mean, "sets": by_set}


def _scores(found: dict[str, float]) -> dict[str, float]:
    return {ours: found[theirs] for ours, theirs in METRICS.items()}


def probing_baselines(model: LanguageModel, sets: Sequence[str], folder: Path, seed: int,
                      jobs: int = 1) -> dict[str, Any]:  # fmt: skip
    """What probing reaches without an SAE, on the texts and splits of :func:`run_probing`.

    ``dense``: sae_probes' own baseline, a logistic probe on all channels of the residual stream. ``best_channel``: the
    one-latent probe on the channel with the largest training AUC (a stronger choice than the mean difference by which
    latents are picked). ``majority``: the share of the larger class; the sets are balanced.
    Returns ``{"sets": {set: {n_train, n_test, channel, dense, best_channel, majority}}, "mean": {the last three}}``.
    """
    prepare_probing(model, sets, folder)
    with _undisturbed(threads=1):
        found = dict(zip(sets, _in_threads(lambda name: _baselines(model, name, Path(folder), seed), sets, jobs)))
    mean: dict[str, Any] = {
        kind: {metric: float(np.mean([one[kind][metric] for one in found.values()])) for metric in METRICS}
        for kind in ("dense", "best_channel")
    }
    return {"sets": found, "mean": mean | {"majority": float(np.mean([one["majority"] for one in found.values()]))}}


def _baselines(model: LanguageModel, name: str, folder: Path, seed: int) -> dict[str, Any]:
    from sae_probes.run_baselines import DATASET_SIZES
    from sae_probes.utils_data import get_xy_traintest
    from sae_probes.utils_training import find_best_reg

    n_train = min(DATASET_SIZES[name] - SMALLEST_TEST, LARGEST_TRAIN)
    x, y, x_test, y_test = get_xy_traintest(n_train, name, model.hook_name, _cache_name(model), folder, seed=seed)
    ranks = x.argsort(dim=0).argsort(dim=0).double()
    auc = ranks[y == 1].mean(0) - ranks[y == 0].mean(0)  # proportional to AUC - 1/2
    channel = [int(auc.abs().argmax())]
    dense = find_best_reg(x, y, x_test, y_test, seed=seed).metrics
    single = find_best_reg(x[:, channel], y, x_test[:, channel], y_test, penalty=REGULARISER, seed=seed).metrics
    results: dict[str, Any] = {kind: {"accuracy": found.test_acc, "auc": found.test_auc, "f1": found.test_f1}
                               for kind, found in (("dense", dense), ("best_channel", single))}
    share = float(np.mean(y_test))
    results |= {"n_train": len(y), "n_test": len(y_test), "channel": channel[0], "majority": max(share, 1 - share)}
    return results
