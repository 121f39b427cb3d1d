"""The SAEs of a run that are there, trained or not to the end: what notebook 10 sets in competition."""

from collections.abc import Iterable
from typing import Any

import torch

from dmsae_lib.config.run import Run
from dmsae_lib.config.sections import OF_LATENTS, OTHER_CHAIN
from dmsae_lib.distill.ablation import alike
from dmsae_lib.distill.controls import open_arms
from dmsae_lib.store.artifacts import Artifact, load

Row = dict[str, Any]
LATENTS = ("distilled", *OF_LATENTS, OTHER_CHAIN)  # arms whose frozen rows fired in a cycle before


def retrained_rows(run: Run, chains: Iterable[str]) -> tuple[list[Row], list[str], dict[str, Artifact]]:
    """The SAEs at training.k, and those without a core at every k, of chains: rows as in a summary, the names
    of those that are not there, and the artefacts of those that are."""
    rows: list[Row] = []
    missing: list[str] = []
    opened: dict[str, Artifact] = {}
    config = run.config
    for chain in chains:
        arms = open_arms(run, chain)
        wanted = [(k, *which) for k in config.retrain.ks for which in config.retrain_arms(k, chain)]
        for k, arm, seed in [sae for sae in wanted if sae[1] == "none" or sae[0] == config.training.k]:
            place = run.retrained(k, arm, seed, chain)
            name = place.relative_to(run.folder).as_posix()
            if not (place / "manifest.json").is_file():
                missing.append(name)
                continue
            opened[name] = load(place, "sae")
            metrics = opened[name].json("metrics.json")
            row = {"chain": chain, "k": k, "arm": arm, "seed": seed, "saebench": None}
            row |= {key: metrics[key] for key in ("L0", "unbound")}
            row |= {key: metrics[key]["full"] for key in ("fvu", "loss_increase", "loss_recovered")}
            row["frequency"] = None
            if arm in LATENTS:
                before = arms.frozen(arm, seed, torch.empty(0)).frequency  # type: ignore[union-attr]
                now = torch.tensor(metrics["core_frequency"]["values"])
                row["frequency"] = alike(before, now)["pearson"]
            rows.append(row)
    return rows, missing, opened
