"""Our SAEs and models as sae_bench wants them, and its side effects kept away from the rest of the
process."""

import contextlib
import gc
import io
import os
import random
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.store.artifacts import UserError
from dmsae_lib.store.atomic import SCRATCH


class NotRun(Exception):
    """An eval that cannot be run with this model or without the Hub; the text says why, in one sentence."""


class Adapter(nn.Module):
    """A MatryoshkaSAE, for unnormalised activations, with the attributes that sae_bench asks of an SAE."""

    def __init__(self, sae: MatryoshkaSAE, model: LanguageModel):
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
    """What decides a model's activations, apart from the hook: a retrained model never meets the old
    cache."""
    return f"{model.name_by_content}-{model.config.dtype}-context{model.config.context_size}"


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """One numerical thread, sae_bench's output kept to ourselves, and all process-wide state put back
    afterwards."""
    from threadpoolctl import threadpool_limits

    grad, before = torch.is_grad_enabled(), torch.get_num_threads()
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    # sae_bench collects garbage after every batch: what was there before need not be looked through
    gc.freeze()
    try:
        with (
            threadpool_limits(1),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            torch.set_num_threads(1)
            yield
    finally:
        gc.unfreeze()
        torch.set_grad_enabled(grad)
        torch.set_num_threads(before)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def residuals_by_length(model: LanguageModel, rows: list[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
    """Residuals of token rows of any length: (their numbers, (n, longest, d_model) on the CPU), rows of like
    length together.

    Rows are padded on the right, so that no text sees its padding.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    budget = model.config.batch_rows * model.config.context_size  # tokens per forward pass
    while order:
        longest = len(rows[order[-1]])
        batch, order = order[-(budget // longest) :], order[: -(budget // longest)]
        tokens = torch.tensor([rows[i] + [model.bos] * (longest - len(rows[i])) for i in batch])
        yield batch, model.lower(tokens.to(model.device)).cpu()


@contextlib.contextmanager
def whole_or_nothing(place: Path) -> Iterator[Path]:
    """A new folder that becomes ``place`` when the block ends well; where another worker was first, its
    folder stays."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=place.parent) as scratch:
        (fresh := Path(scratch) / "fresh").mkdir()
        yield fresh
        with contextlib.suppress(OSError):
            os.rename(fresh, place)


@contextlib.contextmanager
def our_model(model: LanguageModel) -> Iterator[None]:
    """Whatever sae_bench loads by name is ``model``: it knows models of the Hub alone, and loads one for each
    eval.

    Some of its functions check by jaxtyping that they get a HookedTransformer; the bridge does as well.
    """
    from jaxtyping import config
    from transformer_lens import HookedTransformer

    theirs, checked = HookedTransformer.__dict__["from_pretrained_no_processing"], config.jaxtyping_disable
    HookedTransformer.from_pretrained_no_processing = classmethod(lambda cls, *names, **options: model.bridge)
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        HookedTransformer.from_pretrained_no_processing = theirs
        config.update("jaxtyping_disable", checked)
