"""A model's folder to a hooked model: transformers loads the weights, TransformerLens sets the hooks.

TransformerBridge reads the architecture from config.json, so a folder may be called what it likes (the older
loader guesses the family from "llama" or "gemma" in the path).
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dmsae_lib.config.sections import ModelConfig
from dmsae_lib.data.model_checks import REMEDY, Expected, computed
from dmsae_lib.data.model_folder import load_tokenizer
from dmsae_lib.store.artifacts import UserError
from dmsae_lib.store.atomic import explain_errors

# Python's audit events
STARTS = {"subprocess.Popen", "os.system", "os.posix_spawn", "os.fork", "os.forkpty", "os.exec"}

_loading = threading.local()


def load_hooked(config: ModelConfig, folder: Path, layer: int, device: str) -> tuple[Any, Any, Expected]:
    """The bridge, the tokenizer, and what transformers makes of the same weights.

    Raises UserError for a tokenizer, hook, context size or architecture that does not fit, before the weights
    are read, and for weights that are damaged or missing. Starts no process and installs nothing.
    """
    from transformer_lens.model_bridge import TransformerBridge

    start = f"model.name is {config.name}:"
    with no_processes():
        names, vocabulary = _check_config(config, folder, layer)
        tokenizer = load_tokenizer(folder, config.trust_remote_code)
        if tokenizer.vocab_size > vocabulary:
            sizes = f"its tokenizer has {tokenizer.vocab_size} tokens but its model only {vocabulary}"
            raise UserError(f"{start} {sizes}; put the tokenizer beside it that it was trained with.")
        model = _load_weights(config, folder, start)
    model.config.architectures = names
    with explain_errors(f"{start} TransformerLens cannot take {type(model).__name__}", REMEDY):
        expected = computed(model.to(device), tokenizer, config.context_size, layer)
        options = {"dtype": getattr(torch, config.dtype), "trust_remote_code": config.trust_remote_code}
        parts: dict[str, Any] = {"hf_model": model, "tokenizer": tokenizer, "device": device}
        with no_processes():
            bridge = TransformerBridge.boot_transformers(str(folder), **parts, **options)
    return bridge.eval().requires_grad_(False), tokenizer, expected


def _load_weights(config: ModelConfig, folder: Path, start: str) -> Any:
    """The model as transformers loads it, all of its weights from the folder."""
    from transformers import AutoModelForCausalLM

    options = {
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": "eager",
        "use_safetensors": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
        "trust_remote_code": config.trust_remote_code,
    }
    with explain_errors(f"{start} it could not be loaded", "if a file is damaged or missing, get it again"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
        model, report = loaded  # a model's own code may give anything
    # transformers gives these random values
    if wrong := sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]):
        what = f"{len(wrong)} of its weights are missing or of another size than config.json says"
        raise UserError(f"{start} {what}, {wrong[0]} for one; get its files again.")
    return model


def _check_config(config: ModelConfig, folder: Path, layer: int) -> tuple[list[str], int]:
    """Hold hook and context size against config.json; the architecture's names, and the vocabulary's size."""
    from transformers import AutoConfig

    start = f"model.name is {config.name}:"
    what = f"{start} its config.json is not that of a causal language model that can be loaded"
    with explain_errors(what, "get its files again, or choose another model"):
        whole = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        text = whole.get_text_config()
        layers, vocabulary = text.num_hidden_layers, text.vocab_size
    if layer >= layers:
        last = f"{config.name} has only {layers} layers; the last hook is blocks.{layers - 1}.hook_resid_post"
        raise UserError(f"model.hook_name is {config.hook_name}: {last}.")
    limit = getattr(text, "max_position_embeddings", None)
    if limit and config.context_size > limit:
        most = f"{config.name} was made for at most {limit} tokens"
        raise UserError(f"model.context_size is {config.context_size}: {most}; lower it.")
    return _architectures(whole, start, config.trust_remote_code), vocabulary


def _architectures(config: Any, start: str, remote_code: bool) -> list[str]:
    """What TransformerLens finds its adapter by: the class transformers would load, then config.json's names.

    ``config``: as transformers read it. Raises UserError where there is no class or no adapter.
    """
    from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    remote = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM") if remote_code else None
    if not remote and type(config) not in known:
        kind = config.model_type
        raise UserError(f"{start} transformers has no causal language model of its kind, {kind}; {REMEDY}.")
    loaded = remote.rpartition(".")[2] if remote else known[type(config)].__name__
    config.architectures = [loaded, *(config.architectures or [])]
    try:
        determine_architecture_from_hf_config(config)
    except ValueError as error:
        what = f"{start} TransformerLens has no adapter for its architecture, {loaded}"
        raise UserError(f"{what}; {REMEDY}.") from error
    return config.architectures


@functools.cache
def _watch() -> None:
    """Once in a process: an audit hook hears every way to start another, and cannot be taken out again."""

    def refuse(event: str, _: tuple[Any, ...]) -> None:
        if event in STARTS and getattr(_loading, "now", False):
            # an OSError: callers look for it
            raise PermissionError("no other process may be started while a model is loaded")

    sys.addaudithook(refuse)


@contextlib.contextmanager
def no_processes() -> Iterator[None]:
    """Refuses, with PermissionError, to let this thread start another process inside the block.

    TransformerLens runs pip for what a checkpoint's image processor lacks, and goes on without where that
    fails.
    """
    _watch()
    before, _loading.now = getattr(_loading, "now", False), True
    try:
        yield
    finally:
        _loading.now = before
