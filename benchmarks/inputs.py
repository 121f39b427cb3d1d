"""What every contestant of a case gets alike: batches of activations and the weights of a settled SAE.

The weights come from a short training run of ours, so that thresholds, firing rates and errors are those of
training under way and not of a random start. They depend on the shape alone and are kept in
runs/bench/inputs.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.cases import Shape
from dmsae_lib.config.sections import DataConfig, ModelConfig, TrainingConfig
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.sae.training import Trainer
from dmsae_lib.store.artifacts import hash_json
from dmsae_lib.store.seeds import generator

TIMED_BATCHES = 8  # the timed steps cycle through these
SETTLE_BATCHES = 32  # and the settling through these as well
RECIPE = 1  # raise when the construction below changes: inputs on disk are then made again
MODEL = ModelConfig(name="wheeltext-4x128", hook_name="blocks.1.hook_resid_post", context_size=128)


@cache
def real_activations(tokens: int) -> Tensor:
    """Residuals of the embedded model on its embedded text, (tokens, 128), shuffled, BOS and outliers left
    out."""
    from dmsae_lib.data.activations import usable_residuals
    from dmsae_lib.data.corpus import tokenise
    from dmsae_lib.data.language_model import LanguageModel

    data = DataConfig(source="embedded", train_tokens=2 * tokens, select_tokens=1, test_tokens=1)
    model = LanguageModel(MODEL)
    rows, found = [], 0
    for x in usable_residuals(model, tokenise(data, model.tokenizer, MODEL.context_size)["train"]):
        rows.append(x)
        found += len(x)
        if found >= 1.2 * tokens:
            break
    x = torch.cat(rows)
    norms = x.norm(dim=1)
    x = x[norms <= data.outlier_norm * norms.median()]
    return x[torch.randperm(len(x), generator=generator(0, "bench", "order"))[:tokens]]


def synthetic_activations(tokens: int, d_in: int) -> Tensor:
    """Activations with the traits of a residual stream, (tokens, d_in).

    Sums of 8 d_in features: unit directions drawn from a Gaussian with standard deviations ~ j**-0.5 along
    axis j, so that the spectrum is anisotropic; feature i is on with probability min(1/2, 6 / i) (30 to 40
    per token), with exponentially distributed, non-negative strength; then a constant offset and noise with
    the same spectrum, each with a tenth of the energy.
    """
    random = generator(0, "bench", "features", d_in)
    axes = torch.arange(1, d_in + 1) ** -0.5
    directions = F.normalize(torch.randn(8 * d_in, d_in, generator=random) * axes, dim=1)
    frequency = (6 / torch.arange(1, 8 * d_in + 1)).clamp(max=0.5)
    offset = F.normalize(torch.randn(d_in, generator=random) * axes, dim=0)
    parts = []
    for start in range(0, tokens, 4096):
        n = min(4096, tokens - start)
        strength = torch.empty(n, 8 * d_in).exponential_(generator=random)
        on = torch.rand(n, 8 * d_in, generator=random) < frequency
        signal = (strength * on) @ directions
        energy = signal.square().sum(1).mean()
        noise = torch.randn(n, d_in, generator=random) * axes
        noise *= (0.1 * energy / axes.square().sum()).sqrt()
        parts.append(signal + noise + offset * (0.1 * energy).sqrt())
    return torch.cat(parts)


def settle(shape: Shape, batches: Tensor, device: str) -> dict[str, Tensor]:
    """Weights after ``shape.settle`` steps of ours, as W_enc (d_sae, d_in), W_dec, b_enc, b_dec and the
    threshold."""
    sae = MatryoshkaSAE(shape.d_in, shape.d_sae, shape.widths[:-1])
    sae.initialise(torch.Generator().manual_seed(0), batches[0].cpu())
    config = TrainingConfig(k=shape.k, batch_size=shape.batch_size, lr=1e-3, decay=0.5, autocast=shape.bf16)
    trainer = Trainer(sae.to(device), config, shape.settle)
    for step in range(shape.settle):
        trainer.train_step(batches[step % len(batches)])
    weights = {
        "W_enc": sae.free_rows,
        "W_dec": sae.W_dec,
        "b_enc": sae.b_enc,
        "b_dec": sae.b_dec,
        "threshold": sae.threshold_ema.float(),
    }
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}


def prepare(shape: Shape, folder: Path, device: str, report: Callable[[str], None] = print) -> Path:
    """The inputs of ``shape`` as a safetensors file in ``folder``: made if missing, else found."""
    path = folder / f"{shape.name}-{hash_json([RECIPE, vars(shape), device])[:8]}.safetensors"
    if path.is_file():
        return path
    report(f"{shape.name}: preparing activations and a settled SAE")
    tokens = SETTLE_BATCHES * shape.batch_size
    x = real_activations(tokens) if shape.real else synthetic_activations(tokens, shape.d_in)
    x = x / x.square().sum(1).mean().sqrt()
    batches = x.view(SETTLE_BATCHES, shape.batch_size, shape.d_in).to(device)
    inputs = {"x": batches[:TIMED_BATCHES].cpu().clone(), **settle(shape, batches, device)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(inputs, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
    return path


def load(path: Path, shape: Shape, dead: float, device: str) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs on ``device`` with a share ``dead`` of the latents silenced, and the indices of those.

    The encoder of a dead latent is scaled down until its strongest activation on the batches is half the
    threshold: it is never selected, while AuxK finds it positive as often as before. The core latents of
    `ours_core` are spared.
    """
    inputs = {name: tensor.to(device, copy=True) for name, tensor in load_file(path).items()}
    order = torch.randperm(shape.d_sae - shape.n_core, generator=generator(0, "bench", "dead"))
    chosen = (order[: int(dead * shape.d_sae)] + shape.n_core).sort().values.to(device)
    if len(chosen):
        rows, bias = inputs["W_enc"][chosen], inputs["b_enc"][chosen]
        strongest = torch.stack([((x - inputs["b_dec"]) @ rows.T + bias).amax(0) for x in inputs["x"]]).amax(
            0
        )
        share = (0.5 * inputs["threshold"] / strongest.clamp_min(1e-6)).clamp(max=1)
        inputs["W_enc"][chosen] = rows * share[:, None]
        inputs["b_enc"][chosen] = bias * share
    return inputs, chosen
