"""SAEBench's meta-structure eval: how much of an SAE's decoder a small SAE, trained on its rows, explains.

A BatchTopK "meta-SAE" with a quarter of the latents rebuilds each decoder row from four of its own on
average. The more it explains, the more the rows share directions: the eval reads a high value as latents that
are made of common parts. In few dimensions any set of rows can be rebuilt well, so the same is computed for
random rows of the same number and norms, and only the difference says something about the SAE.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.saebench.adapter import SAE, undisturbed
from dmsae_lib.saebench.runner import Bench, Row
from dmsae_lib.store.seeds import generator

# sae_bench: 1500 and 5e-4, which is less trained at the end, and takes six times as long
STEPS, LEARNING_RATE = 1000, 2e-3
RECORDED = ("width_ratio", "k", "train_steps", "train_batch_size", "learning_rate")


def run_meta_structure(sae: SAE, model: LanguageModel, bench: Bench, seed: int, steps: int = STEPS) -> Row:
    """sae_bench's ``decoder_fraction_variance_explained`` of an SAE, and of random rows of the same norms.

    ``metrics``: the fraction for the decoder (d_sae, d_in), for the random rows (``random_rows_...``), and
    what the first has more (``above_random_rows``); ``settings``: those of the meta-SAE. Width and k are
    sae_bench's; a batch is a quarter of the rows (its 1024 from d_sae = 4096 on). ``seed`` decides
    initialisation, batches and random rows.
    """
    decoder = sae.W_dec.detach().float()
    noise = torch.randn(decoder.shape, generator=generator(seed, "meta_structure", "random rows"))
    random_rows = F.normalize(noise.to(decoder.device), dim=1) * decoder.norm(dim=1, keepdim=True)
    with undisturbed():
        from sae_bench.evals.meta_structure.eval_config import MetaStructureEvalConfig

        config = MetaStructureEvalConfig(
            random_seed=seed, train_steps=steps, learning_rate=LEARNING_RATE, autocast=False
        )
        config.train_batch_size = max(1, min(config.train_batch_size, len(decoder) // 4))
        ours, random = (_explained(rows, config) for rows in (decoder, random_rows))
    metrics = {
        "decoder_fraction_variance_explained": ours,
        "random_rows_fraction_variance_explained": random,
        "above_random_rows": ours - random,
    }
    return {"metrics": metrics, "settings": {name: getattr(config, name) for name in RECORDED}}


def _explained(rows: Tensor, config: Any) -> float:
    """What a meta-SAE explains of the variance of ``rows``, by sae_bench."""
    from sae_bench.evals.meta_structure.main import run_eval_single_sae

    torch.manual_seed(config.random_seed)  # sae_bench itself leaves the seed of its config unused
    stand_in = SimpleNamespace(W_dec=rows, cfg=SimpleNamespace(to_dict=dict))  # all that it looks at
    stand_in.to = lambda **_: stand_in
    found = run_eval_single_sae("dmsae", "custom_sae", stand_in, config, str(rows.device))
    return found.eval_result_metrics.meta_structure.decoder_fraction_variance_explained
