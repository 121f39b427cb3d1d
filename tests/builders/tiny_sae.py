"""A run's folder with a harvest's record and one SAE of random weights, as large as the exchange of formats
needs."""

from pathlib import Path

import torch
from builders.sae import make_sae
from torch import Tensor

from dmsae_lib.data.language_model import LanguageModel, describe
from dmsae_lib.sae.model import MatryoshkaSAE, save_sae
from dmsae_lib.store.artifacts import Artifact, load, write

D_SAE, PREFIXES, CORE, K = 96, (12, 40), 6, 9
# size of the core, core_sparsity
KINDS = [(CORE, "relu"), (CORE, "batchtopk"), (0, "relu"), (0, "batchtopk")]


def residuals(model: LanguageModel, rows: int = 32, seed: int = 0) -> Tensor:
    """(n, d_in), BOS left out."""
    tokens = torch.randint(
        3, 300, (rows, model.config.context_size), generator=torch.Generator().manual_seed(seed)
    )
    tokens[:, 0] = model.bos
    return model.lower(tokens)[:, 1:].flatten(0, 1)


def with_threshold(x: Tensor, core: int = CORE, core_sparsity: str = "relu") -> MatryoshkaSAE:
    """Of random weights; the threshold lets about one latent in ten pass on ``x``, which is normalised."""
    sae = make_sae(core, core_sparsity, PREFIXES, D_SAE, x).requires_grad_(False)
    sae.threshold.fill_(float(sae.pre_activations(x).quantile(0.9)))
    sae.threshold_ema.copy_(sae.threshold)
    return sae


def write_run(
    folder: Path,
    model: LanguageModel,
    core: int = CORE,
    core_sparsity: str = "relu",
    sae: MatryoshkaSAE | None = None,
    scale: float | None = None,
) -> Artifact:
    """The artefact of ``sae`` (default: :func:`with_threshold`) inside a run."""
    x = residuals(model)
    scale = scale or float(x.square().sum(1).mean().sqrt())
    sae = sae or with_threshold(x / scale, core, core_sparsity)
    with write(folder / "harvest", "harvest") as writer:
        writer.json("record.json", {"scale": scale, "model": describe(model), "data": {"source": "random"}})
    harvest = load(folder / "harvest", "harvest")
    place = folder / "retrain" / f"k{K}" / "distilled-seed0"
    with write(place, "sae", {"harvest": harvest.hash, "settings": "0" * 64}) as writer:
        save_sae(writer, sae, scale)
        writer.json(
            "metrics.json",
            {"k": K, "L0": {"core": 3.0, "free": 6.0, "total": 9.0}, "arm": "distilled", "seed": 0},
        )
    return load(place, "sae")
