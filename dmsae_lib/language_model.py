"""One door to any causal language model, split at a hook: ``lower(tokens) -> resid``, ``upper(tokens, resid) -> logits``.

``model.name`` is an embedded name, a local Hub-format folder, or a Hub id. TransformerLens loads and hooks it:
TransformerBridge reads the architecture from config.json, so a folder may be called what it likes (the older loader
guesses the family from "llama" or "gemma" in the path).
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmsae_lib.artifacts import UserError, sha256_file
from dmsae_lib.config import ModelConfig

EMBEDDED = Path(__file__).parent / "embedded"


def resolve(name: str) -> str:
    """The local folder of an embedded or local model, or the Hub id as it stands. Raises UserError if neither."""
    if (EMBEDDED / name / "config.json").is_file():
        return str(EMBEDDED / name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.name is {name}: that folder holds no config.json, so it is not in Hub format.")
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model.name is {name}: there is no such folder.")
    if "/" not in name:
        known = ", ".join(sorted(p.name for p in EMBEDDED.iterdir() if (p / "config.json").is_file()))
        raise UserError(f"model.name is {name}: neither an embedded model ({known}), nor a folder, nor a Hub id (owner/name).")
    return name


def _files(source: str) -> list[Path]:
    """The files that define a model, downloading a Hub model's where they are not in the cache."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
        except Exception as error:  # the Hub client raises a dozen kinds, from DNS to gated repositories
            raise UserError(f"model.name is {source}: the Hub did not give it ({type(error).__name__}): check the name, the "
                            "network, and for a gated model that you are logged in (HF_TOKEN).") from error
    return sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".model"))


def model_hash(name: str) -> str:
    """sha256 over the names and contents of the model's configuration, weight and tokenizer files."""
    digest = hashlib.sha256()
    for path in _files(resolve(name)):
        digest.update(f"{path.name}\0{sha256_file(path)}\0".encode())
    return digest.hexdigest()


def choose_device(device: str) -> str:
    """``auto`` is CUDA where there is one. Raises UserError where CUDA is asked for and missing."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch sees no CUDA device: set device to auto or cpu, or install a CUDA build.")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer; UserError if there is none or it has no BOS token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(name))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model.name is {name}: it has no tokenizer that can be loaded ({type(error).__name__}); "
                        "put tokenizer.json and tokenizer_config.json beside the weights.") from error
    if len(tokenizer) < 3:
        raise UserError(f"model.name is {name}: it has no tokenizer; put tokenizer.json beside the weights.")
    if tokenizer.bos_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"model.name is {name}: its tokenizer has neither a BOS nor an EOS token to start contexts with.")
        tokenizer.bos_token = tokenizer.eos_token  # GPT-2 and NeoX have one token for both
    return tokenizer


class LanguageModel:
    """A frozen causal LM with its tokenizer, split at ``hook_name`` (``blocks.<layer>.hook_resid_post``)."""

    def __init__(self, config: ModelConfig, device: str = "cpu"):
        """Raises UserError for a model, tokenizer, hook or context size that does not fit."""
        from transformer_lens.model_bridge import TransformerBridge

        self.config, self.device, self.hook_name = config, device, config.hook_name
        self.folder_or_id = resolve(config.name)
        self.hash = model_hash(config.name)
        self.tokenizer = load_tokenizer(config.name)
        self.layer = int(config.hook_name.split(".")[1])
        self._check_config()
        try:
            self.bridge = TransformerBridge.boot_transformers(
                self.folder_or_id, device=device, dtype=getattr(torch, config.dtype), tokenizer=self.tokenizer,
                trust_remote_code=config.trust_remote_code,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"model.name is {config.name}: it could not be loaded ({first[:200]}).") from error
        self.bridge.eval().requires_grad_(False)
        self.d_model: int = self.bridge.cfg.d_model
        self.n_layers: int = self.bridge.cfg.n_layers
        self.bos: int = self.tokenizer.bos_token_id

    def _check_config(self) -> None:
        from transformers import AutoConfig

        hub = AutoConfig.from_pretrained(self.folder_or_id, trust_remote_code=self.config.trust_remote_code)
        if self.layer >= hub.num_hidden_layers:
            raise UserError(f"model.hook_name is {self.hook_name}: {self.config.name} has only {hub.num_hidden_layers} "
                            f"layers, so the last hook is blocks.{hub.num_hidden_layers - 1}.hook_resid_post.")
        limit = getattr(hub, "max_position_embeddings", None)
        if limit and self.config.context_size > limit:
            raise UserError(f"model.context_size is {self.config.context_size}: {self.config.name} was made for at most "
                            f"{limit} tokens; lower it.")

    @property
    def name_by_content(self) -> str:
        """A name for caches that a retrained model cannot share."""
        return f"model-{self.hash[:12]}"

    @torch.no_grad()
    def lower(self, tokens: Tensor) -> Tensor:
        """Residual stream at the hook, (rows, positions, d_model) float32; the model stops there."""
        _, cache = self.bridge.run_with_cache(tokens, names_filter=[self.hook_name], stop_at_layer=self.layer + 1)
        return cache[self.hook_name].float()

    def upper(self, tokens: Tensor, resid: Tensor) -> Tensor:
        """Logits (rows, positions, vocabulary) with ``resid`` in place of the residual stream at the hook.

        Differentiable in ``resid``. The layers below run too (their output is replaced): a hook works for every
        architecture, where starting at a layer does not.
        """
        put = [(self.hook_name, lambda old, hook: resid.to(old.dtype))]
        return self.bridge.run_with_hooks(tokens, fwd_hooks=put)

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits (rows, positions, vocabulary) of the unchanged model."""
        return self.bridge(tokens)


def usable_positions(tokens: Tensor, lengths: Tensor, bos: int) -> Tensor:
    """(rows, positions) bool: neither BOS nor padding. Only these are trained on, attributed and scored."""
    inside = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    return inside & (tokens != bos)


def next_token_loss(logits: Tensor, tokens: Tensor, lengths: Tensor, bos: int) -> tuple[Tensor, int]:
    """Cross-entropy in nats, summed over the targets that are neither BOS nor padding, and their number."""
    target = tokens[:, 1:]
    counted = usable_positions(tokens, lengths, bos)[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), target, reduction="none")
    return (losses * counted).sum(), int(counted.sum())


def batches(split: dict[str, np.ndarray], rows: int, device: str):
    """Token batches of one split: (tokens (rows, positions) int64, lengths (rows,) int64)."""
    for start in range(0, len(split["tokens"]), rows):
        tokens = torch.from_numpy(np.array(split["tokens"][start : start + rows])).long().to(device)
        lengths = torch.from_numpy(np.array(split["lengths"][start : start + rows])).long().to(device)
        yield tokens, lengths


def describe(model: LanguageModel) -> dict[str, Any]:
    """What harvest/record.json says of the model."""
    return {"name": model.config.name, "hash": model.hash, "n_layers": model.n_layers, "d_model": model.d_model,
            "hook_name": model.hook_name, "context_size": model.config.context_size,
            "architecture": json.loads((Path(_files(model.folder_or_id)[0]).parent / "config.json").read_text())
            .get("architectures", ["unknown"])[0]}
