"""A run of three cycles as far as its cores, made of random SAEs: what there is to export without training
anything."""

import hashlib
import json
from pathlib import Path

import torch
from builders.sae import random
from safetensors.torch import save

from dmsae_lib.config import RunConfig
from dmsae_lib.config.run import Run
from dmsae_lib.data.language_model import LanguageModel, describe
from dmsae_lib.distill.core import Candidates, distil, save_core
from dmsae_lib.sae.model import MatryoshkaSAE, save_sae
from dmsae_lib.store.artifacts import load, sealed, write
from dmsae_lib.store.atomic import json_text

D_SAE, PREFIXES, SCALE, CYCLES = 48, (8, 20), 7.25, 2


def build_run(root: Path, model: LanguageModel, **training: str) -> Run:
    """The run ``tiny`` below ``root``, its model named by an absolute path."""
    config = RunConfig.model_validate(
        {
            "name": "tiny",
            "model": model.config.model_dump(),
            "data": {
                "source": str(root / "private" / "texts.jsonl"),
                "train_tokens": 1000,
                "select_tokens": 100,
                "test_tokens": 100,
            },
            "sae": {"d_sae": D_SAE, "prefixes": list(PREFIXES)},
            "training": {"k": 8, "batch_size": 50, "lr": 0.003, **training},
            "distill": {"cycles": CYCLES, "coverage": 0.8},
            "retrain": {"ks": [8], "seeds": [0]},
        }
    )
    run = Run(config, "tiny", root)
    with write(run.folder / "harvest", "harvest") as harvest:
        harvest.json(
            "record.json",
            {
                "scale": SCALE,
                "model": describe(model),
                "data": {"source": config.data.source, "hash": "d" * 64},
            },
        )
    core, before = None, {}
    for t in range(CYCLES + 1):
        before = write_cycle(run, t, model.d_model, core, before)
        core = before.pop("made")
    return run


def write_cycle(run: Run, t: int, d_in: int, core, before: dict) -> dict:
    """SAE, attribution and core of cycle ``t``; returns the core and, for the next cycle, its hash."""
    sae = MatryoshkaSAE(d_in, D_SAE, PREFIXES, None if core is None else core.rows)
    sae.initialise(torch.Generator().manual_seed(t), random(50, d_in))
    with write(
        run.cycle(t, "sae"), "sae", {"harvest": load(run.folder / "harvest", "harvest").hash} | before
    ) as writer:
        save_sae(writer, sae, SCALE)
    n = sae.n_core + PREFIXES[0]
    scores = random(n, seed=10 + t).abs().double()
    frequency = torch.rand(n, generator=torch.Generator().manual_seed(20 + t), dtype=torch.float64)
    with write(
        run.cycle(t, "attribution"), "attribution", {"sae": load(run.cycle(t, "sae"), "sae").hash}
    ) as writer:
        writer.json("record.json", {"cycle": t, "tokens": 100, "candidates": n})
        writer.csv("table.csv", [{"index": i, "frequency": float(frequency[i])} for i in range(n)])
    made = distil(t, sae, scores, frequency, core, run.config.distill.coverage, before.get("core"))
    parents = {name: load(run.cycle(t, name), name).hash for name in ("sae", "attribution")} | before
    with write(run.cycle(t, "core"), "core", parents) as writer:
        save_core(
            writer,
            made,
            Candidates.of(t, sae, frequency),
            run.config.distill.coverage,
            run.config.distill.aggregator,
        )
    return {"core": load(run.cycle(t, "core"), "core").hash, "made": made}


def rewrite(folder: Path, tensors: dict | None = None, **changes) -> None:
    """Change a core as somebody who knows the format could: the hashes fit again."""
    record = json.loads((folder / "core.json").read_text()) | changes
    if tensors is not None:
        (folder / "core.safetensors").write_bytes(save(tensors))
        record["files"] = {
            "core.safetensors": hashlib.sha256((folder / "core.safetensors").read_bytes()).hexdigest()
        }
    record.pop("hash")
    (folder / "core.json").write_text(json_text(sealed(record)))
