"""Synthetic runs with known answers, for the tests of the summary, the claims and the figures. No number is a
result.

Scores of the baseline are exactly linear in log L0, and every other arm lies a known EFFECT in nats away from
it, plus JITTER times (seed - 1) and times the chain's place: so paired differences at measured L0, their
means and their intervals are known.
"""

import math
import shutil
from pathlib import Path
from unittest.mock import patch

import torch

from dmsae_lib.config import RunConfig
from dmsae_lib.config.run import Run
from dmsae_lib.config.sections import LONGER, NEW_ROWS, OF_LATENTS, UNFROZEN
from dmsae_lib.report.summary import write_summary
from dmsae_lib.saebench import Task
from dmsae_lib.store.artifacts import load, write, write_json

SIZES = [28, 52, 71, 85, 96, 105, 110, 112]
CORE_L0 = [0, 12, 23, 32, 38, 43, 46, 49]
ORIGINS = [
    [28],
    [27, 25],
    [26, 24, 21],
    [25, 23, 22, 15],
    [25, 22, 22, 14, 13],
    [24, 22, 22, 14, 12, 11],
    [24, 21, 22, 13, 12, 11, 7],
    [23, 20, 23, 13, 12, 10, 7, 4],
]
M_0 = 32
EFFECT = {
    "none": 0.0,
    "distilled": 0.012,
    "random": 0.020,
    "most_frequent": 0.014,
    "random_directions": 0.022,
    "data_points": 0.018,
    "pca": 0.017,
    "rotated": 0.016,
    "random_outside": 0.021,
    "other_chain": 0.013,
    "warm_start": 0.008,
    "cold_start": 0.009,
    "longer_repeated": -0.002,
    "longer_fresh": -0.003,
}
JITTER = 0.001  # of the controls a tenth more than of the distilled core
CLEAN, ZERO, MEAN = 4.5, 8.0, 7.0  # nats per token
COVERAGES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
CONTROLS = {"random": 3} | dict.fromkeys(
    ("random_outside", "most_frequent", *NEW_ROWS, *UNFROZEN, *LONGER), 1
)
ROWS = {"rank": 30.0, "norm": 1.2, "norm_min": 0.5, "norm_max": 2.0}  # of any core
NO_CORE = ("none", *UNFROZEN, *LONGER)


def config(cycles: int = 7, ks=(24, 32, 48, 64, 80, 96), seeds=(0, 1, 2), controls=CONTROLS) -> RunConfig:
    data = {"source": "embedded", "train_tokens": 300_000, "select_tokens": 1000, "test_tokens": 1000}
    sections = {
        "name": "synthetic",
        "model": {"name": "toy", "hook_name": "blocks.1.hook_resid_post", "context_size": 128},
        "data": data | {"fresh_factor": cycles + 1},
        "sae": {"d_sae": 1024, "prefixes": [M_0, 96, 224, 480]},
        "training": {"k": 64, "batch_size": 1024, "lr": 1e-3},
        "distill": {"cycles": cycles, "placebos": ["random_directions"]},
        "retrain": {"ks": list(ks), "seeds": list(seeds), "controls": dict(controls)},
    }
    return RunConfig.model_validate(sections)


def place(run: Run, chain: str) -> int:
    """0 for the main chain, then as they are listed."""
    return ["main", *(one.name for one in run.config.distill.chains)].index(chain)


def loss_increase(arm: str, l0: float, seed: int, place: int = 0) -> float:
    jitter = 0 if arm == "none" else JITTER * (seed - 1 + place) * (1 if arm == "distilled" else 1.1)
    return 0.36 - 0.07 * math.log(l0) + 0.002 * seed + 0.01 * place + EFFECT[arm] + jitter


def loss_recovered(arm: str, l0: float, seed: int, place: int = 0) -> float:
    return 1 - loss_increase(arm, l0, seed, place) / (ZERO - CLEAN)


def fvu(arm: str, l0: float) -> float:
    return 0.40 - 0.064 * math.log(l0) + 4 * EFFECT[arm]


def probe(arm: str, l0: float, k: int) -> float:
    return 0.62 + 0.02 * math.log(l0) + 0.05 * math.log(k) + 1.5 * EFFECT[arm]


def history(cycle: int) -> list[dict]:
    same = {
        "loss": 1.0,
        "aux": 0.1,
        "L0_free": 64 - CORE_L0[cycle],
        "L0_total": 64,
        "threshold": 0.1,
        "lr": 1e-3,
    }
    return [
        {"step": s, "tokens": s * 1024, "fvu": 0.9 * math.exp(-s / 40) + 0.13 + 0.01 * cycle}
        | {"L0_core": CORE_L0[cycle] * (1 - math.exp(-s / 20)), "dead": max(0, 200 - s)}
        | same
        for s in range(0, 293, 4)
    ]


def origins(run: Run, cycle: int, chain: str) -> list[int]:
    """Core latents by cycle of origin; each further chain finds one more new latent in every cycle than the
    one before."""
    *old, new = ORIGINS[cycle]
    return [*old, new + place(run, run.config.trains(chain, cycle))]


def latents(counts: list[int]) -> list[dict]:
    cycle = len(counts) - 1
    found = [(origin, n) for origin, count in enumerate(counts) for n in range(count)]
    return [
        {"id": f"c{origin}:{n}", "first_cycle": origin, "first_index": n, "index": i}
        | {"selected": list(range(origin, cycle + 1)), "score": 1 / (i + 1), "share": 1 / len(found)}
        | {"frequency": 0.2 + 0.6 * i / len(found)}
        for i, (origin, n) in enumerate(found)
    ]


def write_cycle(run: Run, cycle: int, chain: str = "main") -> None:
    counts, offset = origins(run, cycle, chain), place(run, chain)
    core_in, size, kept = sum(origins(run, cycle - 1, chain)) if cycle else 0, sum(counts), sum(counts[:-1])
    before = (run.cycle(cycle - 1, "core", chain), "core") if cycle else (run.folder / "harvest", "harvest")
    parent = hash_of(*before)
    metrics = {
        "cycle": cycle,
        "core_in": core_in,
        "prefixes": [M_0, 96, 224, 480, 1024 - core_in],
        "L0": {"core": float(CORE_L0[cycle]), "free": 64.2 - CORE_L0[cycle], "total": 64.2},
        "dead": 3,
        "rare": 0.05,
        "fvu": {"32": 0.5 - 0.01 * cycle, "96": 0.4, "224": 0.3, "480": 0.25, "full": 0.133 + 0.0125 * cycle},
        "core_rows": ROWS if cycle else None,
        "tokens_tested": 1000,
        "loss_increase": {"prefix0": 0.49 - 0.035 * cycle, "full": 0.07},
        "loss_recovered": {"prefix0": 0.86 + cycle / 100, "full": 0.98},
    }
    parents = {"harvest": hash_of(run.folder / "harvest", "harvest"), before[1]: parent}
    with write(run.cycle(cycle, "sae", chain), "sae", parents) as sae:
        sae.json("metrics.json", metrics)
        sae.csv("history.csv", history(cycle))
    parents = {"sae": hash_of(run.cycle(cycle, "sae", chain), "sae")}
    sizes = {"mean_abs": size, "abs_mean": size // 2, "quantile": size - 3, "frequency": size + 9}
    chosen = {"core_in": core_in, "selected": size, "frequency": 0.2}
    null = chosen | {"kept": 2 + offset, "rows": list(range(2 + offset)), "rank": 20.0, "L0_core": 3.0}
    kinds = run.config.for_chain(chain).distill.placebos if cycle else ()
    record = {
        "cycle": cycle,
        "tokens": 1000,
        "candidates": core_in + M_0,
        "stability": {"spearman": 0.97, "jaccard": 0.93},
        "aggregators": {name: {"size": n, "jaccard": 0.8, "spearman": 0.9} for name, n in sizes.items()},
        "core": chosen | {"kept": kept},
        "placebos": {kind: null | {"loss_increase": 0.09} for kind in kinds},
    }
    with write(run.cycle(cycle, "attribution", chain), "attribution", parents) as attribution:
        attribution.json("record.json", record)
        attribution.csv("table.csv", [{"index": i, "frequency": 0.05} for i in range(core_in + M_0)])
    parents |= {"attribution": hash_of(run.cycle(cycle, "attribution", chain), "attribution")}
    made = {"cycle": cycle, "size": size, "kept": kept, "parent": parent if cycle else None}
    made |= {"latents": latents(counts), "origins": {str(o): n for o, n in enumerate(counts)}}
    with write(run.cycle(cycle, "core", chain), "core", parents) as core:
        core.json("core.json", made)
        core.tensors("core.safetensors", {"W_enc": torch.ones(128, size)})


def core_frequency(arm: str, k: int, offset: int) -> list[float]:
    """Firing frequencies of 108 latents: the distilled ones' correlate above .9 with those at another k, the
    others' hardly."""
    stable, turning = (1.0, 0.1 + 0.02 * offset) if arm == "distilled" else (0.01 * (offset + 1), 0.3)
    return [0.5 + 0.1 * (stable * math.sin(i) + turning * math.sin(i * k)) for i in range(108)]


def write_retrained(run: Run, k: int, arm: str, seed: int, chain: str = "main") -> None:
    has_core, offset = arm not in NO_CORE, place(run, chain)
    core_l0 = {"random": 44.0, "random_directions": 52.0}.get(arm, 49.0) - 0.5 * offset if has_core else 0.0
    if run.config.for_chain(chain).training.core_sparsity == "batchtopk" and arm != "distilled":
        core_l0 /= 10  # in open competition the controls win little
    unbound = core_l0 >= k
    total = core_l0 + 1.0 if unbound else k * (1 + 0.005 * (seed - 1))
    increase, frequency = loss_increase(arm, total, seed, offset), core_frequency(arm, k, offset)
    metrics = {
        "core_size": 108 if has_core else 0,
        "overlap": 0.3 if arm in CONTROLS and has_core else None,
        "L0": {"core": core_l0, "free": total - core_l0, "total": total},
        "unbound": unbound,
        "fvu": {"full": fvu(arm, total)},
        "loss_increase": {"full": increase, "prefix0": 5 * increase},
        "loss_recovered": {"full": loss_recovered(arm, total, seed, offset)},
        "loss_recovered_mean": 1 - increase / (MEAN - CLEAN),
        "dead": 500 if unbound else 2,
        "rare": 0.05,
        "core_rows": ROWS if has_core else None,
        "core_frequency": {"mean": 0.5, "max": max(frequency), "values": frequency} if has_core else None,
        "tokens": 300_000 * (run.config.distill.cycles + 1 if arm.startswith("longer") else 1),
    }
    harvest = {"harvest": hash_of(run.folder / "harvest", "harvest")}
    with write(run.retrained(k, arm, seed, chain), "sae", harvest) as sae:
        sae.json("metrics.json", metrics)
        sae.csv("history.csv", history(1))
    if chain not in run.config.saebench.chains:
        return
    parents = {"sae": hash_of(run.retrained(k, arm, seed, chain), "sae")}
    top = {f"probe_top{n}": probe(arm, total, n) + 0.004 * (seed - 1) * (arm != "none") for n in (1, 5)}
    core = {
        "ce_loss_score": loss_recovered(arm, total, seed, offset) - 0.001,
        "ce_loss_with_sae": 4.6,
        "explained_variance": 1.004,
        "explained_variance_legacy": 1 - fvu(arm, total),
        "l0": total,
    }
    for name, metrics in (("core", core), ("sparse_probing", top)):
        write_scores(run, Task(k, arm, seed, name, 0, chain), {"metrics": metrics}, parents)


def write_scores(run: Run, task: Task, result: dict, parents: dict[str, str] | None = None) -> None:
    sae = parents or {"sae": hash_of(run.retrained(*task.sae), "sae")}
    with write(task.folder(run), "scores", sae) as scores:
        scores.json("scores.json", task._asdict() | {"result": result})


def write_index(run: Run, chain: str) -> None:
    """retrain/index: how often core latents fired before, and the main chain's curves of the first seed's
    SAEs without and with the distilled core."""
    rows = []
    retrain = run.config.retrain
    for at, arm, seed in [(k, *pair) for k in retrain.ks for pair in run.config.retrain_arms(k, chain)]:
        before = core_frequency(arm, 0, place(run, chain)) if arm in ("distilled", *OF_LATENTS) else None
        row = {"k": at, "arm": arm, "seed": seed, "frequency_before": before}
        if chain == "main" and arm in ("none", "distilled") and seed == retrain.seeds[0]:
            candidates = M_0 + (108 if arm == "distilled" else 0)
            curve = [[c, round(candidates * c ** (2 - at / 200))] for c in COVERAGES]
            row |= {"coverage_curve": curve, "candidates": candidates}
        rows.append(row)
    saes = {
        f"k{k}/{arm}-seed{seed}": hash_of(run.retrained(k, arm, seed, chain), "sae")
        for k in retrain.ks
        for arm, seed in run.config.retrain_arms(k, chain)
    }
    with write(run.base(chain) / "retrain" / "index", "retrain_index", saes) as index:
        index.json("index.json", {"rows": rows})


def hash_of(folder: Path, kind: str) -> str:
    return load(folder, kind).hash


# a synthetic run need not outlive a power cut: forcing each file to the disk took half the time
@patch("dmsae_lib.store.atomic.flush", lambda *paths: None)
def build_run(root: Path, resolved: RunConfig | None = None, scored: bool = True) -> Run:
    """A whole run folder below ``root`` as the stages would leave it."""
    resolved = resolved or config()
    run = Run(resolved, resolved.name, root)
    model = {"name": "toy", "hash": "a" * 64, "d_model": 128, "n_layers": 4, "architecture": "Toy"}
    record = {"scale": 1.5, "clean_loss": CLEAN, "zero_loss": ZERO, "mean_loss": MEAN}
    record |= {"outliers_dropped": 3, "harvested": 297, "n_tokens": {"test": 1000}}
    record |= {"model": model | {"hook_name": resolved.model.hook_name}}
    with write(run.folder / "harvest", "harvest") as harvest:
        harvest.json("record.json", record | {"data": {"source": "embedded", "hash": "d" * 64}})
    for chain in resolved.chains:
        for cycle in range(resolved.distill.cycles + 1):
            if resolved.trains(chain, cycle) == chain:
                write_cycle(run, cycle, chain)
    for chain in resolved.retrained_chains:
        for k in resolved.retrain.ks:
            for arm, seed in resolved.retrain_arms(k, chain):
                write_retrained(run, k, arm, seed, chain)
        write_index(run, chain)
    if scored:
        good = {name: {"accuracy": value} for name, value in (("dense", 0.93), ("best_channel", 0.72))}
        poor = {name: {"accuracy": 0.55} for name in good}  # dropped: a dense probe cannot do it
        sets = {name: row | {"majority": 0.5} for name, row in (("a", good), ("b", good), ("c", poor))}
        with write(run.folder / "saebench" / "baselines", "probing_baselines") as baselines:
            baselines.json("probing.json", sets)
    else:
        shutil.rmtree(run.folder / "saebench")
    return run


def publish(run: Run, base_model: bool = True) -> Path:
    """results/<config> of a synthetic run, with the base model's record beside it."""
    folder = run.root / "results" / run.config.name
    shutil.copytree(write_summary(run), folder)
    if base_model:
        nats, bits = (
            {"model": 3.9, "trigram": 4.9, "unigram": 6.8},
            {"model": 1.7, "trigram": 2.2, "unigram": 3.0},
        )
        record = {"nats_per_token": nats, "bits_per_byte": bits}
        write_json(run.root / "results" / "base_model" / "base_model.json", record)
    return folder
