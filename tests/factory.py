"""Synthetic runs with known answers, for the tests of the summary, the claims and the figures. No number is a result.

Scores of the baseline are exactly linear in log L0, and every other arm lies a known EFFECT away from it, plus
JITTER times (seed - 1): so paired differences at measured L0, their means and their intervals are known.
"""

import math
import shutil
from pathlib import Path

import torch

from dmsae_lib.artifacts import load, write, write_json
from dmsae_lib.config import Run, RunConfig
from dmsae_lib.saebench import Task
from dmsae_lib.summary import write_summary

SIZES = [28, 52, 71, 85, 96, 105, 110, 112]
CORE_L0 = [0, 12, 23, 32, 38, 43, 46, 49]
ORIGINS = [[28], [27, 25], [26, 24, 21], [25, 23, 22, 15], [25, 22, 22, 14, 13], [24, 22, 22, 14, 12, 11],
           [24, 21, 22, 13, 12, 11, 7], [23, 20, 23, 13, 12, 10, 7, 4]]
M_0 = 32
EFFECT = {"none": 0.0, "distilled": -0.017, "random": -0.023, "frequency_matched": -0.021, "random_directions": -0.025,
          "most_frequent": -0.018, "longer_repeated": 0.002, "longer_fresh": 0.003}
JITTER = 0.001
COVERAGES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
CONTROLS = {"random": 3, "frequency_matched": 1, "random_directions": 1, "most_frequent": 1, "longer_repeated": 1,
            "longer_fresh": 1}


def config(cycles: int = 7, ks=(24, 32, 48, 64, 80, 96), seeds=(0, 1, 2), controls=CONTROLS) -> RunConfig:
    return RunConfig.model_validate({
        "name": "synthetic", "model": {"name": "toy", "hook_name": "blocks.1.hook_resid_post", "context_size": 128},
        "data": {"source": "embedded", "train_tokens": 300_000, "select_tokens": 1000, "test_tokens": 1000,
                 "fresh_factor": cycles + 1},
        "sae": {"d_sae": 1024, "prefixes": [M_0, 96, 224, 480]},
        "training": {"k": 64, "batch_size": 1024, "lr": 1e-3}, "distill": {"cycles": cycles},
        "retrain": {"ks": list(ks), "seeds": list(seeds), "controls": dict(controls)}})


def loss_recovered(arm: str, l0: float, seed: int) -> float:
    return 0.90 + 0.02 * math.log(l0) + 0.0005 * seed + EFFECT[arm] + (JITTER * (seed - 1) if arm != "none" else 0)


def fvu(arm: str, l0: float) -> float:
    return 0.40 - 0.064 * math.log(l0) - 4 * EFFECT[arm]


def probe(arm: str, l0: float, k: int) -> float:
    return 0.62 + 0.02 * math.log(l0) + 0.05 * math.log(k) - 0.5 * EFFECT[arm]


def history(cycle: int) -> list[dict]:
    steps = range(0, 293, 4)
    return [{"step": s, "tokens": s * 1024, "loss": 1.0, "fvu": 0.9 * math.exp(-s / 40) + 0.13 + 0.01 * cycle,
             "aux": 0.1, "L0_core": CORE_L0[cycle] * (1 - math.exp(-s / 20)), "L0_non_core": 64 - CORE_L0[cycle],
             "L0_total": 64, "dead": max(0, 200 - s), "threshold": 0.1, "lr": 1e-3} for s in steps]


def latents(cycle: int) -> list[dict]:
    found = [(origin, n) for origin, count in enumerate(ORIGINS[cycle]) for n in range(count)]
    return [{"id": f"c{origin}:{n}", "first_cycle": origin, "first_index": n, "index": i,
             "selected": list(range(origin, cycle + 1)), "score": 1 / (i + 1), "share": 1 / len(found),
             "frequency": 0.2 + 0.6 * i / len(found)} for i, (origin, n) in enumerate(found)]


def write_cycle(run: Run, cycle: int, chain: str = "main") -> None:
    core_in = SIZES[cycle - 1] if cycle else 0
    l0 = {"core": float(CORE_L0[cycle]), "non_core": 64.2 - CORE_L0[cycle], "total": 64.2}
    fvus = {"32": 0.5 - 0.01 * cycle, "96": 0.4, "224": 0.3, "480": 0.25, "full": 0.133 + 0.0125 * cycle}
    before = (run.cycle(cycle - 1, "core", chain), "core") if cycle else (run.folder / "harvest", "harvest")
    parent = hash_of(*before)
    parents = {"harvest": hash_of(run.folder / "harvest", "harvest"), before[1]: parent}
    with write(run.cycle(cycle, "sae", chain), "sae", parents) as sae:
        sae.json("metrics.json", {"cycle": cycle, "core_in": core_in, "prefixes": [M_0, 96, 224, 480, 1024 - core_in],
                                  "L0": l0, "dead": 3, "fvu": fvus,
                                  "loss_recovered": {"prefix0": 0.86 + cycle / 100, "full": 0.98}})
        sae.csv("history.csv", history(cycle))
    size, parents = SIZES[cycle], {"sae": hash_of(run.cycle(cycle, "sae", chain), "sae")}
    sizes = {"mean_abs": size, "abs_mean": size // 2, "quantile": size - 3, "frequency": size + 9}
    with write(run.cycle(cycle, "attribution", chain), "attribution", parents) as attribution:
        attribution.json("record.json", {
            "cycle": cycle, "tokens": 1000, "candidates": core_in + M_0, "stability": {"spearman": 0.97, "jaccard": 0.93},
            "aggregators": {name: {"size": n, "jaccard": 0.8, "spearman": 0.9} for name, n in sizes.items()}})
        attribution.csv("table.csv", [{"index": i, "frequency": 0.05} for i in range(core_in + M_0)])
    kept = sum(ORIGINS[cycle][:-1]) if cycle else 0
    parents |= {"attribution": hash_of(run.cycle(cycle, "attribution", chain), "attribution")}
    with write(run.cycle(cycle, "core", chain), "core", parents) as core:
        core.json("core.json", {"cycle": cycle, "size": size, "kept": kept, "parent": parent if cycle else None,
                                "latents": latents(cycle),
                                "origins": {str(o): n for o, n in enumerate(ORIGINS[cycle])}})
        core.tensors("core.safetensors", {"W_enc": torch.ones(128, size)})


def write_retrained(run: Run, k: int, arm: str, seed: int) -> None:
    has_core = not (arm == "none" or arm.startswith("longer"))
    core_l0 = {"random": 44.0, "random_directions": 52.0}.get(arm, 49.0) if has_core else 0.0
    unbound = core_l0 >= k
    total = core_l0 + 1.0 if unbound else k * (1 + 0.005 * (seed - 1))
    metrics = {"core_size": 108 if has_core else 0, "overlap": 0.3 if arm in CONTROLS and has_core else None,
               "L0": {"core": core_l0, "non_core": total - core_l0, "total": total}, "unbound": unbound,
               "fvu": {"full": fvu(arm, total)}, "loss_recovered": {"full": loss_recovered(arm, total, seed)},
               "dead": 500 if unbound else 2, "tokens": 300_000 * (8 if arm.startswith("longer") else 1)}
    harvest = {"harvest": hash_of(run.folder / "harvest", "harvest")}
    with write(run.retrained(k, arm, seed), "sae", harvest) as sae:
        sae.json("metrics.json", metrics)
        sae.csv("history.csv", history(1))
    parents = {"sae": hash_of(run.retrained(k, arm, seed), "sae")}
    top = {f"probe_top{n}": probe(arm, total, n) + 0.004 * (seed - 1) * (arm != "none") for n in (1, 5)}
    core = {"ce_loss_score": loss_recovered(arm, total, seed) - 0.001, "ce_loss_with_sae": 4.6, "explained_variance": 1.004,
            "explained_variance_legacy": 1 - fvu(arm, total), "l0": total}
    for name, metrics in (("core", core), ("sparse_probing", top)):
        write_scores(run, Task(k, arm, seed, name, 0), {"metrics": metrics}, parents)


def write_scores(run: Run, task: Task, result: dict, parents: dict[str, str] | None = None) -> None:
    sae = parents or {"sae": hash_of(run.retrained(*task[:3]), "sae")}
    with write(task.folder(run), "scores", sae) as scores:
        scores.json("scores.json", task._asdict() | {"result": result})


def write_index(run: Run) -> None:
    """retrain/index: the coverage curves of the first seed's SAEs without and with the distilled core."""
    rows = []
    retrain = run.config.retrain
    for at, arm, seed in [(k, *pair) for k in retrain.ks for pair in run.config.retrain_arms(k)]:
        row = {"k": at, "core": arm, "seed": seed}
        if arm in ("none", "distilled") and seed == retrain.seeds[0]:
            candidates = M_0 + (108 if arm == "distilled" else 0)
            curve = [[c, round(candidates * c ** (2 - at / 200))] for c in COVERAGES]
            row |= {"coverage_curve": curve, "candidates": candidates}
        rows.append(row)
    with write(run.folder / "retrain" / "index", "retrain_index") as index:
        index.json("index.json", {"rows": rows})


def hash_of(folder: Path, kind: str) -> str:
    return load(folder, kind).hash


def build_run(root: Path, resolved: RunConfig | None = None, scored: bool = True) -> Run:
    """A whole run folder below ``root`` as the stages would leave it."""
    resolved = resolved or config()
    run = Run(resolved, resolved.name, root)
    with write(run.folder / "harvest", "harvest") as harvest:
        harvest.json("record.json", {"scale": 1.5, "clean_loss": 4.5, "zero_loss": 8.0,
                                     "model": {"name": "toy", "hash": "a" * 64, "d_model": 128, "n_layers": 4,
                                               "architecture": "Toy", "hook_name": resolved.model.hook_name},
                                     "data": {"source": "embedded", "hash": "d" * 64}})
    for chain in ("main", *(chain.name for chain in resolved.distill.chains)):
        for cycle in range(resolved.distill.cycles + 1):
            write_cycle(run, cycle, chain)
    for k in resolved.retrain.ks:
        for arm, seed in resolved.retrain_arms(k):
            write_retrained(run, k, arm, seed)
    write_index(run)
    if scored:
        accuracies = {name: {"accuracy": value} for name, value in (("dense", 0.93), ("best_channel", 0.72))}
        with write(run.folder / "saebench" / "baselines", "probing_baselines") as baselines:
            poor = {name: {"accuracy": 0.55} for name in accuracies}  # dropped: a dense probe cannot do it
            baselines.json("probing.json", {name: row | {"majority": 0.5}
                                            for name, row in (("a", accuracies), ("b", accuracies), ("c", poor))})
    else:
        shutil.rmtree(run.folder / "saebench")
    return run


def publish(run: Run, base_model: bool = True) -> Path:
    """results/<config> of a synthetic run, with the base model's record beside it."""
    folder = run.root / "results" / run.config.name
    shutil.copytree(write_summary(run), folder)
    if base_model:
        write_json(run.root / "results" / "base_model" / "base_model.json",
                   {"nats_per_token": {"model": 3.9, "trigram": 4.9, "unigram": 6.8},
                    "bits_per_byte": {"model": 1.7, "trigram": 2.2, "unigram": 3.0}})
    return folder
