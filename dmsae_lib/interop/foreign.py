"""An SAE trained elsewhere in the place of one of ours: evaluated, scored, and the source of a core.

It is held as a sae_lens object, whatever library it comes from, and used as that library computes it.
"""

import contextlib
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.store.artifacts import UserError, hash_json

WITH_THRESHOLDS = ("standard", "jumprelu")  # SAELens's architectures that are ReLU with thresholds, as ours
EVALUATED = (*WITH_THRESHOLDS, "topk", "gated")  # those that encode one token at a time
UNIT = 1e-3  # decoder norms this near to 1 are left alone: storage in bfloat16 rounds as much


class Foreign(nn.Module):
    """A sae_lens SAE that can stand where a folded MatryoshkaSAE stands.

    Its features are selected already, so ``select`` changes nothing, whatever threshold it is given; it has
    no frozen core.

    Attributes:
        sae: the sae_lens object; decoder rows have norm 1, which SAELens folds into the encoder where it can.
        widths: cumulative sizes of its nested reconstructions, the last one d_sae; None where nothing says.
        prefixes: ``widths``, or d_sae alone, as of a MatryoshkaSAE without a core.
        hash: sha256 of architecture, settings and weights.
    """

    n_core, core_sparsity, threshold_ema = 0, "relu", None
    W_enc = property(lambda self: self.sae.W_enc)
    W_dec = property(lambda self: self.sae.W_dec)
    b_enc = property(lambda self: self.sae.b_enc)
    b_dec = property(lambda self: self.sae.b_dec)

    def __init__(self, sae: Any, where: str):
        """Raises UserError, which names ``where``, for an SAE that cannot be evaluated token by token."""
        super().__init__()
        cfg = sae.cfg
        self.where, self.architecture, self.metadata = where, cfg.architecture(), cfg.metadata
        if self.architecture not in EVALUATED:
            usable = ", ".join(EVALUATED)
            raise UserError(
                f"{where} is of architecture {self.architecture}: only {usable} can be used here."
            )
        if cfg.normalize_activations != "none":
            raise UserError(
                f"{where} wants activations normalised by {cfg.normalize_activations}: only an SAE for plain "
                "activations can be used here; fold the normaliser into its weights before saving it."
            )
        if cfg.reshape_activations != "none":
            raise UserError(f"{where} reads an attention layer's heads: use an SAE of the residual stream.")
        self.sae, self.d_in, self.d_sae = sae.requires_grad_(False), cfg.d_in, cfg.d_sae
        if (sae.W_dec.norm(dim=1) - 1).abs().max() > UNIT:
            # top-k by unscaled activations is left as it is, as sae_bench leaves it
            with contextlib.suppress(NotImplementedError):
                sae.fold_W_dec_norm()
        widths = (self.metadata.training_architecture_details or {}).get("matryoshka_widths")
        self.widths = list(widths) if widths else None
        self.prefixes = tuple(self.widths or [self.d_sae])
        self.hash = _content_hash(self.architecture, cfg.to_dict(), sae.state_dict())

    @property
    def record(self) -> dict[str, Any]:
        """Where it comes from, as JSON."""
        local = Path(self.where).expanduser()
        return {
            "where": local.name if local.is_dir() else self.where,  # a path means nothing elsewhere
            **{name: getattr(self, name) for name in ("hash", "architecture", "d_sae", "widths")},
            **{name: self.metadata[name] for name in ("model_name", "hook_name")},
            "trained_as": self.metadata.training_architecture,
            "dmsae": self.metadata.dmsae,
        }

    def encode(self, x: Tensor) -> Tensor:
        """(..., d_in) to (..., d_sae)."""
        return self.sae.encode(x)

    def decode(self, f: Tensor) -> Tensor:
        """(..., d_sae) to (..., d_in)."""
        return self.sae.decode(f)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def pre_activations(self, x: Tensor) -> Tensor:
        """The features themselves: what is left out by top-k or gate never was a candidate."""
        return self.encode(x)

    def select(self, a: Tensor, threshold: Tensor | None = None) -> Tensor:
        return a

    def decode_prefix(self, f: Tensor, j: int) -> Tensor:
        """The reconstruction from the first ``prefixes[j]`` latents, (..., d_in)."""
        return self.decode(f * (torch.arange(self.d_sae, device=f.device) < self.prefixes[j]))

    def check(self, model: LanguageModel) -> None:
        """Raises UserError unless it was trained on this model, at this hook."""
        name, hook_name, ours = self.metadata.model_name, self.metadata.hook_name, model.config.name
        if not name or not hook_name:
            wrong = "does not say what it reads: add model_name and hook_name to metadata in its cfg.json"
        elif _plain_name(name) != _plain_name(ours):
            wrong = f"was trained on {name} and the run's model is {ours}: use an SAE of that model"
        elif (self.metadata.dmsae or {}).get("model_hash", model.hash) != model.hash:
            wrong = f"was trained on a {name} with other weights than the run's: use an SAE of this one"
        elif _hook(hook_name) != model.hook_name:
            wrong = f"reads {hook_name} and the run {model.hook_name}: use another or set model.hook_name"
        elif self.d_in != model.d_model:
            wrong = f"reads {self.d_in} channels but {ours} has {model.d_model}: use an SAE of that model"
        else:
            return
        raise UserError(f"{self.where} {wrong}.")

    @torch.no_grad()
    def source(self, scale: float, prefixes: Sequence[int] | None = None) -> MatryoshkaSAE:
        """The same SAE as a MatryoshkaSAE for activations divided by ``scale``, to distil a core from.

        ``prefixes``: its nested sizes without the last, where its own files do not say; [] makes every latent
        a candidate. A core that it was itself trained around counts as part of its first prefix.
        ``threshold`` is one number where all latents share it, else (d_sae,). Raises UserError where it is no
        ReLU with thresholds, or its sizes are unknown.
        """
        if self.architecture not in WITH_THRESHOLDS:
            raise UserError(
                f"{self.where} is of architecture {self.architecture}: it can be compared with, but a core "
                f"is distilled from ReLU with thresholds alone ({', '.join(WITH_THRESHOLDS)})."
            )
        own = self.widths[:-1] if self.widths else prefixes
        if own is None:
            raise UserError(f"{self.where} does not say how its latents are nested: give its prefixes.")
        if prefixes is not None and list(prefixes) != list(own):
            raise UserError(f"{self.where} was trained with prefixes {own}, not {prefixes}: leave them out.")
        theirs, device = self.sae, self.sae.W_dec.device
        ours = MatryoshkaSAE(self.d_in, self.d_sae, own).to(device)
        threshold = theirs.threshold if self.architecture == "jumprelu" else torch.zeros_like(theirs.b_enc)
        if bool((threshold == threshold[0]).all()):
            threshold = threshold[0]
        b_enc = theirs.b_enc
        if not theirs.cfg.apply_b_dec_to_input:  # x W + b = (x - b_dec) W + (b + b_dec W)
            b_enc = (b_enc.double() + theirs.b_dec.double() @ theirs.W_enc.double()).float()
        ours.threshold, ours.threshold_ema = threshold.double(), threshold.double()
        weights = {"free_rows": theirs.W_enc.T, "W_dec": theirs.W_dec, "b_enc": b_enc, "b_dec": theirs.b_dec}
        ours.load_state_dict(ours.state_dict() | weights)
        for tensor in (ours.b_enc, ours.b_dec, ours.threshold, ours.threshold_ema):
            tensor.div_(scale)
        return ours.requires_grad_(False)


def _plain_name(name: str) -> str:
    """A model's name without its owner, in small letters; TransformerLens's aliases are resolved."""
    from transformer_lens.loading_from_pretrained import get_official_model_name

    with contextlib.suppress(ValueError):
        name = get_official_model_name(name)
    return Path(name).name.lower()


def _hook(name: str) -> str:
    """What enters a block is what left the one before."""
    found = re.fullmatch(r"blocks\.([1-9]\d*)\.hook_resid_pre", name)
    return f"blocks.{int(found[1]) - 1}.hook_resid_post" if found else name


def _content_hash(architecture: str, cfg: dict[str, Any], state: dict[str, Tensor]) -> str:
    settings = {key: value for key, value in cfg.items() if key not in ("metadata", "device")}
    digest = hashlib.sha256(hash_json([architecture, settings]).encode())
    for name, value in sorted(state.items()):
        digest.update(f"{name}\0{tuple(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
