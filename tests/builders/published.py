"""Published results without the runs behind them, so that figures can use nothing else."""

import shutil
from itertools import combinations

from builders import factory

from dmsae_lib.config.sections import CONTROLS, Chain
from dmsae_lib.report.results import Results
from dmsae_lib.report.summary import write_summary
from dmsae_lib.report.what_is_a_core import RECORD
from dmsae_lib.store.artifacts import write_json

REPLICATES = ["main", "seed1", "seed2"]


def several_chains():
    """Two replicates of an equal-L0 main chain, each with its own retraining, and two chains with the paper's
    ReLU core."""
    equal = {"core_sparsity": "batchtopk", "core_decoder_init": "encoder"}
    exempt = {"core_sparsity": "relu", "core_decoder_init": "random"}
    arms = ["none", "distilled", *CONTROLS, "warm_start"]
    chains = [Chain(name=f"seed{n}", seed=n, retrain=arms, **equal) for n in (1, 2)]
    chains += [Chain(name=f"relu{n}", seed=n, retrain=["distilled"], **exempt) for n in (0, 1)]
    config = factory.config(cycles=2, ks=(64, 96), seeds=(0,), controls={})
    changed = {
        "training": equal,
        "distill": {"chains": chains, "placebos": ["random_directions", "data_points"]},
        "retrain": {"arms": arms},
    }
    sections = {name: getattr(config, name).model_copy(update=update) for name, update in changed.items()}
    return config.model_copy(update=sections)


def identity():
    """Three kinds of rows for each pair of replicates."""
    rows = []
    for i, (a, b) in enumerate(combinations(REPLICATES, 2)):
        for kind, cosine in (("cores", 0.5), ("plain", 0.3), ("random", 0.2)):
            activation = None if kind == "random" else 0.5 + 0.03 * i
            row = {"a": a, "b": b, "kind": kind, "size": 70, "cosine": cosine + 0.01 * i, "cosine_above": 0.1}
            row |= {"span": 0.4 + 0.02 * i, "span_chance": 0.3, "activation": activation}
            rows.append(row | {"activation_above": None})
    return rows


def published(root, *arguments, base_model=True, identity=(), asked=None, **keywords):
    run = factory.build_run(root, *arguments, **keywords)
    folder = factory.publish(run, base_model)
    if identity:
        shutil.rmtree(folder)
        shutil.copytree(write_summary(run, identity=identity), folder)
    if base_model:
        seconds = {"work_seconds": 2.0, "start_up_seconds": 3.0, "measured_seconds": 9.0}
        machines = [{"name": "a GPU", "hours": {"train": 20.0}}]
        record = {
            "config": "synthetic",
            "summary": Results(folder).hash,
            "stages": [{"kind": "train", "processes": 8} | seconds],
            "prediction": {"config": "large", "saes": 26, "machines": machines},
        }
        write_json(folder / "sizing.json", record)
    if asked:
        write_json(folder / RECORD, asked)
    shutil.rmtree(root / "runs")
    return folder
