"""One door to any causal language model, split at a hook: ``lower(tokens) -> resid``, ``upper(tokens, resid)
-> logits``.

``model.name`` is an embedded name, a local Hub-format folder, or a Hub id. TransformerLens loads and hooks
it: TransformerBridge reads the architecture from config.json, so a folder may be called what it likes (the
older loader guesses the family from "llama" or "gemma" in the path).
"""

import hashlib
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmsae_lib.config.fields import EMBEDDED
from dmsae_lib.config.sections import ModelConfig
from dmsae_lib.data.contexts import Contexts
from dmsae_lib.data.model_checks import REMEDY, architectures, check, computed, no_processes, probe
from dmsae_lib.store.artifacts import UserError, sha256_file


def resolve(name: str) -> Path:
    """The folder of an embedded, local or Hub model, whose files are downloaded where the cache has none of
    them.

    Raises UserError where there is no such model, or its folder lacks config.json or safetensors weights.
    """
    folder = EMBEDDED / name if (EMBEDDED / name / "config.json").is_file() else Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"model.name is {name}: there is no such folder; correct the path.")
        if "/" not in name:
            known = ", ".join(sorted(p.parent.name for p in EMBEDDED.glob("*/config.json")))
            raise UserError(
                f"model.name is {name}: give an embedded model ({known}), a folder, or a Hub id (owner/name)."
            )
        folder = _download(name)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model.name is {name}: that folder holds no config.json; give a model in Hub format."
        )
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"model.name is {name}: that folder holds no .safetensors file; put the weights there in that "
            "format."
        )
    return folder


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.py"])
        )
    except Exception as error:  # the Hub client raises a dozen kinds, from DNS to gated repositories
        raise UserError(
            f"model.name is {name}: there is no such folder and the Hub did not give it "
            f"({type(error).__name__}); "
            "check the name, the network, and for a gated model that you are logged in (HF_TOKEN)."
        ) from error


def model_hash(folder: Path) -> str:
    """sha256 over the names and contents of the model's configuration, weight and tokenizer files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".model")):
        digest.update(f"{path.name}\0{sha256_file(path)}\0".encode())
    return digest.hexdigest()


def choose_device(device: str) -> str:
    """``auto`` is CUDA where there is one. Raises UserError where CUDA is asked for and missing."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device is cuda, but torch sees no CUDA device: set device to auto or cpu, or install a CUDA "
            "build."
        )
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer; UserError if there is none or it has neither BOS nor EOS token."""
    from transformers import AutoTokenizer

    remedy = "put its tokenizer.json and tokenizer_config.json beside the weights"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # missing files, broken JSON and missing packages each raise another kind
        raise UserError(
            f"model.name: {folder} has no tokenizer that can be loaded ({_first_line(error)}); {remedy}."
        ) from error
    if len(tokenizer) < 3:  # without files, transformers makes up an empty one
        raise UserError(f"model.name: {folder} has no tokenizer; {remedy}.")
    if tokenizer.bos_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"model.name: the tokenizer of {folder} has neither a BOS nor an EOS token to start contexts "
                "with; name one in its tokenizer_config.json."
            )
        tokenizer.bos_token = tokenizer.eos_token  # GPT-2 and NeoX have one token for both
    return tokenizer


class LanguageModel:
    """A frozen causal LM with its tokenizer, split at ``hook_name`` (``blocks.<layer>.hook_resid_post``)."""

    def __init__(self, config: ModelConfig, device: str = "cpu"):
        """Raises UserError for a model, tokenizer, hook or context size that does not fit, and for a model
        that is not causal or that TransformerLens computes otherwise than transformers does. Starts no
        process and installs nothing."""
        self.config, self.device, self.hook_name = config, device, config.hook_name
        self.folder = resolve(config.name)
        self.hash = model_hash(self.folder)
        self.layer = int(config.hook_name.split(".")[1])
        with no_processes():
            vocabulary, names = self._check_config()
            self.tokenizer = load_tokenizer(self.folder, config.trust_remote_code)
        if self.tokenizer.vocab_size > vocabulary:
            raise UserError(
                f"model.name is {config.name}: its tokenizer has {self.tokenizer.vocab_size} tokens but its "
                f"model only {vocabulary}; put the tokenizer beside it that the model was trained with."
            )
        tokens = probe(self.tokenizer, config.context_size).to(device)
        self.bridge, self.architecture, expected = self._load(names, tokens)
        self.bridge.eval().requires_grad_(False)
        self.d_model: int = self.bridge.cfg.d_model
        self.n_layers: int = self.bridge.cfg.n_layers
        # hooks hang on the shared modules: a pass of another thread would meet them
        self._one_pass = threading.Lock()
        self.bos: int = self.tokenizer.bos_token_id
        # norm of a residual above which a position is an outlier: the harvest measures it
        self.outlier_limit = math.inf
        check(self, tokens, expected)

    def _check_config(self) -> tuple[int, list[str]]:
        """Hold hook and context size against config.json, before the weights are read; the vocabulary's size,
        and what :func:`~dmsae_lib.data.model_checks.architectures` gives."""
        from transformers import AutoConfig

        name = self.config.name
        try:
            whole = AutoConfig.from_pretrained(self.folder, trust_remote_code=self.config.trust_remote_code)
            hub = whole.get_text_config()
            layers, vocabulary = hub.num_hidden_layers, hub.vocab_size
        # broken JSON, an architecture of another transformers release, no language model
        except Exception as error:
            raise UserError(
                f"model.name is {name}: its config.json is not that of a causal language model that can be "
                f"loaded ({_first_line(error)}); get its files again, or choose another model."
            ) from error
        if self.layer >= layers:
            raise UserError(
                f"model.hook_name is {self.hook_name}: {name} has only {layers} layers; the last hook is "
                f"blocks.{layers - 1}.hook_resid_post."
            )
        limit = getattr(hub, "max_position_embeddings", None)
        if limit and self.config.context_size > limit:
            raise UserError(
                f"model.context_size is {self.config.context_size}: {name} was made for at most {limit} "
                "tokens; "
                "lower it."
            )
        return vocabulary, architectures(whole, name, self.config.trust_remote_code)

    def _load(self, names: list[str], tokens: Tensor) -> tuple[Any, str, dict[str, Tensor]]:
        """The weights by transformers, which says what it did not find; the hooks by TransformerLens.

        Returns the bridge, the class of the model inside and what that computes on ``tokens`` by itself.
        """
        from transformer_lens.model_bridge import TransformerBridge
        from transformers import AutoModelForCausalLM

        name, dtype = self.config.name, getattr(torch, self.config.dtype)
        try:
            with no_processes():
                model, report = AutoModelForCausalLM.from_pretrained(
                    self.folder,
                    dtype=dtype,
                    attn_implementation="eager",
                    use_safetensors=True,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    trust_remote_code=self.config.trust_remote_code,
                )
        except Exception as error:  # safetensors, torch and transformers raise kinds of their own
            raise UserError(
                f"model.name is {name}: it could not be loaded ({_first_line(error)}); if a file is damaged "
                "or "
                "missing, get it again."
            ) from error
        # they are random now
        if wrong := sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]):
            raise UserError(
                f"model.name is {name}: {len(wrong)} of its weights are missing or of another size than "
                f"config.json says, {wrong[0]} for one; get its files again."
            )
        model.config.architectures = names
        try:
            expected = computed(model.to(self.device), tokens, self.layer)
            with no_processes():
                bridge = TransformerBridge.boot_transformers(
                    str(self.folder),
                    hf_model=model,
                    device=self.device,
                    dtype=dtype,
                    tokenizer=self.tokenizer,
                    trust_remote_code=self.config.trust_remote_code,
                )
        except Exception as error:  # whatever an adapter or the model itself raises where they do not fit
            raise UserError(
                f"model.name is {name}: TransformerLens cannot take {type(model).__name__} "
                f"({_first_line(error)}); {REMEDY}."
            ) from error
        return bridge, type(model).__name__, expected

    @property
    def name_by_content(self) -> str:
        """A name for caches that a retrained model cannot share."""
        return f"model-{self.hash[:12]}"

    @torch.no_grad()
    def lower(self, tokens: Tensor) -> Tensor:
        """Residual stream at the hook, (rows, positions, d_model) float32; the model stops there."""
        with self._one_pass:
            _, cache = self.bridge.run_with_cache(
                tokens, names_filter=[self.hook_name], stop_at_layer=self.layer + 1
            )
        return cache[self.hook_name].float()

    def upper(self, tokens: Tensor, resid: Tensor) -> Tensor:
        """Logits (rows, positions, vocabulary) with ``resid`` in place of the residual stream at the hook.

        Differentiable in ``resid``. The layers below run too (their output is replaced): a hook works for
        every architecture, where starting at a layer does not.
        """
        put = [(self.hook_name, lambda old, hook: resid.to(old.dtype))]
        with self._one_pass:
            return self.bridge.run_with_hooks(tokens, fwd_hooks=put)

    def usable(self, contexts: Contexts, resid: Tensor) -> Tensor:
        """(rows, positions) bool: what is trained on, replaced, attributed and scored: usable and no outlier.

        Real models hold a few positions of enormous norm (attention sinks), which would make up most of the
        variance. NaN and Inf are no outliers: whoever meets them says so.
        """
        norm = resid.norm(dim=-1)
        return contexts.usable() & ~((norm > self.outlier_limit) & norm.isfinite())

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits (rows, positions, vocabulary) of the unchanged model."""
        with self._one_pass:
            return self.bridge(tokens)


def next_token_loss(logits: Tensor, contexts: Contexts) -> tuple[Tensor, int]:
    """Cross-entropy in nats, summed over the targets that are neither BOS nor padding, and their number."""
    target, counted = contexts.tokens[:, 1:], contexts.usable()[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), target.flatten(), reduction="none")
    return (losses * counted.flatten()).sum(), int(counted.sum())


def lowered(model: LanguageModel, contexts: Contexts) -> Iterator[tuple[Contexts, Tensor]]:
    """Each batch of ``contexts`` with its residual at the hook, (rows, positions, d_model) float32."""
    for batch in contexts.batches(model.config.batch_rows, model.device):
        yield batch, model.lower(batch.tokens)


def describe(model: LanguageModel) -> dict[str, Any]:
    """What harvest/record.json says of the model."""
    return {
        "name": model.config.model_dump()["name"],
        "hash": model.hash,
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "hook_name": model.hook_name,
        "context_size": model.config.context_size,
        "architecture": model.architecture,
    }
