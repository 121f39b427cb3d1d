"""One door to any causal language model, split at a hook: ``lower`` gives residuals, ``upper`` logits."""

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from dmsae_lib.config.sections import ModelConfig
from dmsae_lib.data.contexts import Contexts
from dmsae_lib.data.gguf_folder import weights_as_shipped
from dmsae_lib.data.model_checks import check
from dmsae_lib.data.model_folder import model_hash, resolve
from dmsae_lib.data.model_loading import load_hooked
from dmsae_lib.store.artifacts import UserError


def choose_device(device: str) -> str:
    """``auto`` is CUDA where there is one. Raises UserError where CUDA is asked for and missing."""
    if device == "cuda" and not torch.cuda.is_available():
        what = "device is cuda, but torch sees no CUDA device"
        raise UserError(f"{what}: set device to auto or cpu, or install a CUDA build.")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def choose_dtype(dtype: str, device: str) -> str:
    """``auto`` is bfloat16 where processor (AMX, AVX512-BF16) or GPU multiply in it, else float32."""
    if dtype != "auto":
        return dtype
    if device == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        processor = torch.cpu.get_capabilities()
        able = processor.get("amx_bf16") or processor.get("avx512_bf16")
    return "bfloat16" if able else "float32"


class LanguageModel:
    """A frozen causal LM with its tokenizer, split at ``hook_name`` (``blocks.<layer>.hook_resid_post``)."""

    def __init__(self, config: ModelConfig, device: str = "cpu"):
        """``config.name``: an embedded or packaged model, a Hub-format folder, a GGUF file, or a Hub id.

        The attribute ``config`` says in ``dtype`` what ``auto`` came to.
        Raises UserError for a model, tokenizer, hook or context size that does not fit, and for a model that
        is not causal or that TransformerLens computes otherwise than transformers does.
        """
        config = config.model_copy(update={"dtype": choose_dtype(config.dtype, device)})
        self.config, self.device, self.hook_name = config, device, config.hook_name
        self.layer = int(config.hook_name.split(".")[1])
        self.folder = resolve(config.name)
        self.hash = model_hash(self.folder)
        self.weights = weights_as_shipped(self.folder)
        self.context_size = config.context_size
        self.bridge, self.tokenizer, expected = load_hooked(config, self.folder, self.layer, device)
        self.architecture = expected.architecture
        self.d_model: int = self.bridge.cfg.d_model
        self.n_layers: int = self.bridge.cfg.n_layers
        self.bos: int = self.tokenizer.bos_token_id
        self.outlier_limit = math.inf  # a larger norm makes a residual an outlier: the harvest measures it
        # hooks hang on shared modules: a pass of another thread would meet them
        self._one_pass = threading.Lock()
        self.skips_below = False  # until it is seen to change nothing
        check(self, expected)

    @property
    def name_by_content(self) -> str:
        """A name for caches that a retrained model cannot share."""
        return f"model-{self.hash[:12]}"

    @torch.no_grad()
    def lower(self, tokens: Tensor) -> Tensor:
        """Residual stream at the hook, (rows, positions, d_model) float32; the model stops there."""
        only = {"names_filter": [self.hook_name], "stop_at_layer": self.layer + 1}
        with self._one_pass:
            _, cache = self.bridge.run_with_cache(tokens, **only)
        return cache[self.hook_name].float()

    def upper(self, tokens: Tensor, resid: Tensor) -> Tensor:
        """Logits (rows, positions, vocabulary) with ``resid`` in place of the residual stream at the hook.

        Differentiable in ``resid``. The blocks up to the hook are left out where that was seen to give the
        same logits (``skips_below``); in other architectures they run, and the last one's output is replaced.
        """
        if self.skips_below:
            with self._one_pass, self._in_place_of_blocks(resid):
                return self.bridge(tokens)
        put = [(self.hook_name, lambda old, hook: resid.to(old.dtype))]
        with self._one_pass:
            return self.bridge.run_with_hooks(tokens, fwd_hooks=put)

    @contextlib.contextmanager
    def _in_place_of_blocks(self, resid: Tensor) -> Iterator[None]:
        """Inside, each of the model's blocks up to the hook gives ``resid`` and computes nothing."""
        given = resid.to(getattr(torch, self.config.dtype))
        with contextlib.ExitStack() as patches:
            for block in self.bridge.blocks[: self.layer + 1]:
                module = block.original_component
                patches.enter_context(patch.object(module, "forward", lambda *_, **__: given))
            yield

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits (rows, positions, vocabulary) of the unchanged model."""
        with self._one_pass:
            return self.bridge(tokens)

    def usable(self, contexts: Contexts, resid: Tensor) -> Tensor:
        """(rows, positions) bool: what is trained on, replaced, attributed and scored.

        That is neither BOS nor padding nor an outlier: real models hold a few positions of enormous norm
        (attention sinks), which would make up most of the variance. NaN and Inf are no outliers: whoever
        meets them says so.
        """
        norm = resid.norm(dim=-1)
        return contexts.usable() & ~((norm > self.outlier_limit) & norm.isfinite())


def token_losses(logits: Tensor, contexts: Contexts) -> Tensor:
    """Cross-entropy in nats of every next token, (rows, positions - 1); 0 for BOS and padding."""
    target, counted = contexts.tokens[:, 1:], contexts.usable()[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), target.flatten(), reduction="none")
    return losses.view(target.shape) * counted


def next_token_loss(logits: Tensor, contexts: Contexts) -> tuple[Tensor, int]:
    """Cross-entropy in nats, summed over the targets that are neither BOS nor padding, and their number."""
    return token_losses(logits, contexts).sum(), int(contexts.usable()[:, 1:].sum())


def lowered(model: LanguageModel, contexts: Contexts) -> Iterator[tuple[Contexts, Tensor]]:
    """Each batch of ``contexts`` with its residual at the hook, (rows, positions, d_model) float32."""
    for batch in contexts.batches(model.config.batch_rows, model.device):
        yield batch, model.lower(batch.tokens)


def describe(model: LanguageModel) -> dict[str, Any]:
    """What harvest/record.json says of the model."""
    names = ("hash", "n_layers", "d_model", "hook_name", "context_size", "architecture", "weights")
    named = model.config.model_dump(include={"name", "dtype"})
    return named | {name: getattr(model, name) for name in names}
