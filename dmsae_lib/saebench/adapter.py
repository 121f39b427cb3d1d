"""Our SAEs and models as sae_bench wants them; its side effects are kept from the rest of the process."""

import contextlib
import gc
import io
import random
import warnings
from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.interop import Foreign
from dmsae_lib.sae.model import FoldedSAE
from dmsae_lib.store.artifacts import UserError

SAE = FoldedSAE | Foreign


class Adapter(nn.Module):
    """An SAE with the attributes that sae_bench asks for."""

    def __init__(self, sae: SAE, model: LanguageModel):
        from sae_bench.custom_saes.custom_sae_config import CustomSAEConfig

        super().__init__()
        if sae.d_in != model.d_model:
            raise UserError(
                f"The SAE reads {sae.d_in} channels but {model.config.name} has {model.d_model} at "
                f"{model.hook_name}: score it with the model that it was trained on."
            )
        self.sae = sae.to(model.device)
        self.device, self.dtype = torch.device(model.device), sae.W_dec.dtype
        self.cfg = CustomSAEConfig(
            model_name=cache_name(model),
            d_in=sae.d_in,
            d_sae=sae.d_sae,
            hook_layer=model.layer,
            hook_name=model.hook_name,
            context_size=model.config.context_size,
            architecture="matryoshka_batch_topk",
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(model.device),
        )

    W_enc = property(lambda self: self.sae.W_enc)
    W_dec = property(lambda self: self.sae.W_dec)
    b_enc = property(lambda self: self.sae.b_enc)
    b_dec = property(lambda self: self.sae.b_dec)

    def encode(self, x: Tensor) -> Tensor:
        return self.sae.encode(x.to(self.dtype))

    def decode(self, f: Tensor) -> Tensor:
        return self.sae.decode(f)


def cache_name(model: LanguageModel) -> str:
    """What decides a model's activations, apart from the hook: a retrained one never meets the old cache."""
    return f"{model.name_by_content}-{model.config.dtype}-context{model.config.context_size}"


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """One numerical thread, sae_bench's output swallowed, all process-wide state put back afterwards."""
    from threadpoolctl import threadpool_limits

    threads, numpy_state, python_state = torch.get_num_threads(), np.random.get_state(), random.getstate()
    gc.freeze()  # sae_bench collects garbage after every batch: it need not look at what was there before
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.set_grad_enabled(torch.is_grad_enabled()),  # whatever is set inside
            threadpool_limits(1),
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            torch.set_num_threads(1)
            yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@contextlib.contextmanager
def our_model(model: LanguageModel) -> Iterator[None]:
    """Whatever sae_bench loads by name is ``model``: it knows models of the Hub alone, and loads one an eval.

    Some of its functions check by jaxtyping that they get a HookedTransformer; the bridge does as well.
    """
    from jaxtyping import config
    from transformer_lens import HookedTransformer

    with (
        patch.object(HookedTransformer, "from_pretrained_no_processing", lambda *_, **__: model.bridge),
        patch.object(config, "jaxtyping_disable", True),
    ):
        yield


def residuals_by_length(model: LanguageModel, rows: list[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
    """Residuals of token rows of any length: (their numbers, (n, longest, d_model) on the CPU), rows of like
    length together. Rows are padded on the right, so that no text sees its padding."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    budget = model.config.batch_rows * model.config.context_size  # tokens per forward pass
    while order:
        longest = len(rows[order[-1]])
        batch, order = order[-(budget // longest) :], order[: -(budget // longest)]
        tokens = torch.tensor([rows[i] + [model.bos] * (longest - len(rows[i])) for i in batch])
        yield batch, model.lower(tokens.to(model.device)).cpu()
