"""SAEs of random weights as they come from elsewhere: sae_lens objects."""

from typing import Any

import torch
from builders.sae import random

from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.interop.saelens import build

BIASES = {"gated": ("b_gate", "b_mag", "r_mag")}  # of the other architectures b_enc alone


def known_to(model: LanguageModel, **changes: Any) -> dict[str, Any]:
    """The metadata of an SAE that was trained on ``model``."""
    metadata = {"model_name": model.config.name, "hook_name": model.hook_name, "context_size": 16}
    return metadata | {"prepend_bos": True} | changes


def foreign_sae(
    model: LanguageModel,
    architecture: str = "jumprelu",
    threshold: float | torch.Tensor = 0.5,
    norms: float | torch.Tensor = 1.0,
    metadata: dict[str, Any] | None = None,
    seed: int = 0,
    d_in: int = 32,
    **settings: Any,
) -> Any:
    """24 latents; ``norms`` are those of its decoder rows."""
    rows = torch.nn.functional.normalize(random(24, d_in, seed=1), dim=1)
    weights = {"W_enc": random(d_in, 24, seed=seed) / 4, "b_dec": random(d_in, seed=3)}
    weights["W_dec"] = rows * torch.as_tensor(norms).expand(24)[:, None]
    for place, name in enumerate(BIASES.get(architecture, ["b_enc"])):
        weights[name] = random(24, seed=4 + place) / 3
    if architecture == "jumprelu":
        weights["threshold"] = torch.as_tensor(threshold).expand(24)
    return build(architecture, weights, known_to(model) if metadata is None else metadata, **settings)
