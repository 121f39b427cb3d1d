"""What a model must be before anything is computed with it, and what may not happen while it is loaded."""

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dmsae_lib.store.artifacts import UserError

# Relative difference at the worst position that is rounding. Measured over the architectures that agree:
# below 1e-6 in float32 and up to 1.3e-2 in bfloat16, 26 layers deep; those that do not agree differ by 0.4
# and more.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
TEXT = "When it rained, the old man by the river read three books; when it did not, he wrote them."
LENGTH = 16  # tokens looked at
REMEDY = "choose a model of another architecture, such as Llama, Gemma 2, Qwen 2 or GPT-2"
STARTS = {
    "subprocess.Popen",
    "os.system",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "os.exec",
}  # of Python's audit events

_loading = threading.local()


@functools.cache
def _watch() -> None:
    """Once in a process: an audit hook hears every way to start another, and cannot be taken out again."""

    def refuse(event: str, _: tuple) -> None:
        if event in STARTS and getattr(_loading, "now", False):
            # an OSError: callers look for it
            raise PermissionError("no other process may be started while a model is loaded")

    sys.addaudithook(refuse)


@contextlib.contextmanager
def no_processes() -> Iterator[None]:
    """Refuses, with PermissionError, to let this thread start another process inside the block.

    TransformerLens runs pip for whatever a checkpoint's image processor lacks, and goes on without where that
    fails.
    """
    _watch()
    before, _loading.now = getattr(_loading, "now", False), True
    try:
        yield
    finally:
        _loading.now = before


def architectures(config: Any, name: str, remote_code: bool) -> list[str]:
    """What TransformerLens looks up its adapter by: the class that transformers would load, then what
    config.json names, if any.

    ``config``: as transformers read it. Raises UserError, before any weights are read, where there is no
    class or no adapter.
    """
    from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    remote = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM") if remote_code else None
    if not remote and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"model.name is {name}: transformers has no causal language model of its kind, "
            f"{config.model_type}; {REMEDY}."
        )
    loaded = remote.rpartition(".")[2] if remote else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
    config.architectures = [loaded, *(config.architectures or [])]
    try:
        determine_architecture_from_hf_config(config)
    except ValueError as error:
        raise UserError(
            f"model.name is {name}: TransformerLens has no adapter for its architecture, {loaded}; {REMEDY}."
        ) from error
    return config.architectures


def probe(tokenizer: Any, context_size: int) -> Tensor:
    """Token ids (2, positions) int64 of a sentence behind BOS; the second row differs from the first in its
    last token alone."""
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"][: min(LENGTH, context_size) - 1]
    first = [tokenizer.bos_token_id, *(ids or [tokenizer.bos_token_id])]
    other = next((token for token in first if token != first[-1]), first[-1])
    return torch.tensor([first, [*first[:-1], other]])


@torch.no_grad()
def computed(model: torch.nn.Module, tokens: Tensor, layer: int) -> dict[str, Tensor]:
    """What a model of transformers gives on ``tokens``: logits (rows, positions, vocabulary) under "logits",
    and under its path the output of each module that is the ``layer``-th of a list: which of them is the
    block is known once the model is bridged.
    """
    found: dict[str, Tensor] = {}

    def keep(path: str):
        return lambda module, _, output: found.__setitem__(
            path, output[0] if isinstance(output, tuple) else output
        )

    handles = [
        part.register_forward_hook(keep(path))
        for path, part in model.named_modules()
        if path.endswith(f".{layer}")
    ]
    try:
        return {"logits": model(tokens).logits} | found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def check(model: Any, tokens: Tensor, expected: dict[str, Tensor]) -> None:
    """Hold a loaded :class:`~dmsae_lib.data.language_model.LanguageModel` against what transformers made of
    the same weights.

    ``expected``: of :func:`computed`, before the bridge replaced the model's parts. Raises UserError where
    the residual at the hook or the logits (with that residual put in again) differ, are not finite, or change
    with a later token.
    """
    start, tolerance = f"model.name is {model.config.name}:", TOLERANCE[model.config.dtype]
    try:
        block = expected[f"{model.bridge.adapter.component_mapping['blocks'].name}.{model.layer}"]
        logits = model.upper(tokens, resid := model.lower(tokens))
    # a KeyError for a hook or a block that is not there, whatever its parts raise where they do not fit
    except Exception as error:
        raise UserError(
            f"{start} TransformerLens gives no {model.hook_name} of {model.architecture} "
            f"({type(error).__name__}); {REMEDY}."
        ) from error
    for what, ours, theirs in (
        ("residuals at the hook", resid, block),
        ("logits", logits, expected["logits"]),
    ):
        if not theirs.isfinite().all():
            raise UserError(
                f"{start} on a plain sentence, its {what} hold NaN or Inf; set model.dtype to float32, or "
                "get its "
                "weights again."
            )
        if not (apart := _apart(ours, theirs)) <= tolerance:
            raise UserError(
                f"{start} TransformerLens does not compute {model.architecture} as transformers does "
                f"({what}: {apart:.2g} apart, relative to their size); {REMEDY}."
            )
        # 0 was measured: both rows are computed alike
        if not _apart(ours[:1, :-1], ours[1:, :-1]) <= tolerance / 10:
            raise UserError(
                f"{start} {model.architecture} is not causal: a token changes the {what} of those before it; "
                "choose a "
                "model that predicts the next token."
            )


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference at one position, relative to the norm there. Both (rows, positions, any)."""
    ours, theirs = ours.float(), theirs.float()
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-12)).max())
