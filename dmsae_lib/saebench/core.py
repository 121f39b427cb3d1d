"""sae_bench's ``core`` eval: loss recovered, sparsity, reconstruction, on our own tokens or its data set.

What sae_bench 0.6.0 computes differently from :mod:`dmsae_lib.distill.evaluation`: its ``explained_variance``
subtracts the wrong mean, and its losses count a BOS as target (never as input).
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.saebench.adapter import SAE, Adapter, cache_name, undisturbed
from dmsae_lib.saebench.hub_data import get_dataset
from dmsae_lib.saebench.runner import Bench, Row, finite
from dmsae_lib.store.artifacts import UserError

BATCH_DEPENDENT = "mse"  # sae_bench divides it by the batch's tokens
ZERO_ABLATION = "standard_zero_ablate_hook"  # the hook's name in sae_bench/evals/core/main.py
SHARED_BYTES = 2**29  # per process, of the model's outputs that core evals share
OPENWEBTEXT = "Skylion007/openwebtext"
# batches of 16 rows for the losses and for the rest, in the command that sae_bench/evals/core/main.py gives
HUB_BATCHES, BATCH_ROWS = (200, 2000), 16


class SharedPasses:
    """The hooked model as core asks for it: what no SAE takes part in, the unchanged model and zero ablation,
    is computed once for each batch of tokens. Beyond SHARED_BYTES nothing is kept."""

    known: WeakKeyDictionary[LanguageModel, dict[Any, Any]] = WeakKeyDictionary()

    def __init__(self, model: LanguageModel):
        self.bridge, self.kept = model.bridge, self.known.setdefault(model, {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bridge, name)

    def __call__(self, tokens: Tensor, **options: Any) -> Any:
        return self._once("unchanged", tokens, options, lambda: self.bridge(tokens, **options))

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: list[Any], **options: Any) -> Any:
        def run() -> Any:
            return self.bridge.run_with_hooks(tokens, fwd_hooks=fwd_hooks, **options)

        names = [getattr(hook, "__name__", "") for _, hook in fwd_hooks]
        return self._once(ZERO_ABLATION, tokens, options, run) if names == [ZERO_ABLATION] else run()

    def _once(self, what: str, tokens: Tensor, options: dict[str, Any], run: Callable[[], Any]) -> Any:
        key = (what, tuple(tokens.shape), tokens.cpu().numpy().tobytes(), repr(sorted(options.items())))
        if key in self.kept:
            return self.kept[key]
        found = run()
        if sum(one.nbytes for outputs in (*self.kept.values(), found) for one in outputs) <= SHARED_BYTES:
            self.kept[key] = found
        return found


def run_core(sae: SAE, model: LanguageModel, bench: Bench, seed: int) -> Row:
    """:func:`core_metrics` on the first rows of the test split."""
    return {"metrics": core_metrics(sae, model, bench.rows[: bench.settings.core_rows])}


def core_metrics(
    sae: SAE, model: LanguageModel, tokens: np.ndarray, batch_rows: int = BATCH_ROWS
) -> dict[str, float | None]:
    """sae_bench's core metrics on ``tokens`` (rows, context), each row starting with BOS, padded with BOS.

    BOS, EOS and padding are neither reconstructed nor counted. Every row is used once for the losses
    (``ce_loss_*``, ``kl_div_*``; zero ablation) and once for the rest (``l0``, ``explained_variance`` ...).
    None where a metric is undefined. The SAE is moved to the model's device.
    """
    from datasets import Dataset

    if not len(tokens):
        raise UserError("The core eval of sae_bench got no rows of the test split: raise data.test_tokens.")
    batch = max(b for b in range(1, min(batch_rows, len(tokens)) + 1) if len(tokens) % b == 0)  # no row twice
    rows = Dataset.from_dict({"tokens": tokens.tolist()})
    n = len(tokens) // batch
    return _metrics(Adapter(sae, model), model, rows, (tokens.shape[1], batch, n, n))


def run_core_hub(sae: SAE, model: LanguageModel, bench: Bench, seed: int) -> Row:
    """sae_bench's core metrics on openwebtext, shuffled by its seed, 42. Raises NotRun without the data."""
    which = {"split": "train", "streaming": True, "trust_remote_code": True}
    texts = get_dataset(OPENWEBTEXT, data=bench.data, **which).shuffle(seed=42, buffer_size=1)
    context = min(128, model.config.context_size)
    sizes = (context, BATCH_ROWS, *HUB_BATCHES)
    return {"metrics": _metrics(Adapter(sae, model), model, texts, sizes, by_latent=True)}


def _metrics(
    adapter: Adapter, model: LanguageModel, rows: Any, sizes: Sequence[int], by_latent: bool = False
) -> dict[str, float | None]:
    """``rows``: tokens or texts; ``sizes``: context, rows of a batch, batches for the losses and the rest."""
    context, batch_rows, n_losses, n_rest = sizes
    with undisturbed():
        from sae_bench.evals.core.main import CoreEvalConfig, calculate_misc_metrics, run_evals
        from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
        from sae_lens.training.activations_store import ActivationsStore

        _, adapter, _ = load_and_format_sae("dmsae", adapter, model.device)
        store = ActivationsStore.from_sae(model.bridge, adapter, rows, context_size=context)
        asked = ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics")
        of_latents = ("featurewise_density_statistics", "featurewise_weight_based_metrics")
        config = CoreEvalConfig(
            model_name=cache_name(model),
            batch_size_prompts=batch_rows,
            context_size=context,
            n_eval_reconstruction_batches=n_losses,
            n_eval_sparsity_variance_batches=n_rest,
            exclude_special_tokens_from_reconstruction=True,
            **{f"compute_{name}": True for name in asked},
            **{f"compute_{name}": by_latent for name in of_latents},
        )
        special = {getattr(model.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")} - {None}
        groups, latents = run_evals(adapter, store, SharedPasses(model), config, ignore_tokens=special)
        if by_latent:
            groups["misc_metrics"] = calculate_misc_metrics(latents)
    del groups["token_stats"]
    found = {name: value for group in groups.values() for name, value in group.items()}
    return {name: value for name, value in finite(found).items() if name != BATCH_DEPENDENT}
