"""sae_bench's ``core`` eval: loss recovered, sparsity and reconstruction on rows of our own tokens.

What sae_bench 0.6.0 computes differently from :mod:`dmsae_lib.distill.evaluation`: its ``explained_variance``
subtracts the wrong mean, and its losses count a BOS as target (never as input).
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.saebench.adapter import Adapter, cache_name, undisturbed
from dmsae_lib.store.artifacts import UserError

BATCH_DEPENDENT = ("mse",)  # sae_bench divides it by the batch's tokens
ZERO_ABLATION = "standard_zero_ablate_hook"  # the hook's name in sae_bench/evals/core/main.py
SHARED_BYTES = 2**29  # per process, of the model's outputs that core evals share


class SharedPasses:
    """The hooked model as core asks for it: what no SAE takes part in is computed once for each batch of
    tokens.

    That is the unchanged model and zero ablation, two of core's three passes. Beyond SHARED_BYTES nothing is
    kept.
    """

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
        if key not in self.kept:
            found = run()
            if (
                sum(output.nbytes for outputs in (*self.kept.values(), found) for output in outputs)
                > SHARED_BYTES
            ):
                return found
            self.kept[key] = found
        return self.kept[key]


def run_core(
    sae: MatryoshkaSAE, model: LanguageModel, tokens: np.ndarray, batch_rows: int = 16
) -> dict[str, Any]:
    """sae_bench's core metrics on ``tokens`` (rows, context), each row starting with BOS, padded with BOS.

    BOS, EOS and padding are neither reconstructed nor counted. Every row is used once for the losses
    (``ce_loss_*``, ``kl_div_*``; zero ablation) and once for the rest (``l0``, ``explained_variance`` ...).
    None where a metric is undefined. The SAE is moved to the model's device.
    """
    import datasets

    if not len(tokens):
        raise UserError("The core eval of sae_bench got no rows of the test split: raise data.test_tokens.")
    with undisturbed():
        from sae_bench.evals.core.main import CoreEvalConfig, run_evals
        from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
        from sae_lens.training.activations_store import ActivationsStore

        _, adapter, _ = load_and_format_sae("dmsae", Adapter(sae, model), model.device)
        store = ActivationsStore.from_sae(
            model.bridge,
            adapter,
            datasets.Dataset.from_dict({"tokens": tokens.tolist()}),
            context_size=tokens.shape[1],
        )
        # no row twice
        batch = max(b for b in range(1, min(batch_rows, len(tokens)) + 1) if len(tokens) % b == 0)
        config = CoreEvalConfig(
            model_name=cache_name(model),
            batch_size_prompts=batch,
            context_size=tokens.shape[1],
            n_eval_reconstruction_batches=len(tokens) // batch,
            n_eval_sparsity_variance_batches=len(tokens) // batch,
            compute_kl=True,
            compute_ce_loss=True,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
            exclude_special_tokens_from_reconstruction=True,
        )
        special = {getattr(model.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")} - {None}
        groups, _ = run_evals(adapter, store, SharedPasses(model), config, ignore_tokens=special)
    found = {
        name: value
        for group, values in groups.items()
        if group != "token_stats"
        for name, value in values.items()
        if name not in BATCH_DEPENDENT
    }
    return {name: value if np.isfinite(value) else None for name, value in found.items()}
