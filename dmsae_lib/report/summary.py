"""The summary of a run: every stage's own JSON put together, claims judged, tables written.

``runs/<run>/summary/`` is an artefact with summary.json (:mod:`dmsae_lib.report.shape` says what is in it),
the same rows as CSV, the training histories and core_lineage.json. Figures are drawn from these files alone.
How long it took, where and with which code is in provenance.json beside them.
"""

from collections.abc import Iterable
from pathlib import Path
from statistics import StatisticsError, correlation
from typing import Any

from dmsae_lib.config.run import Run
from dmsae_lib.distill.attribution import jaccard
from dmsae_lib.distill.core import READINGS, read_core, reading_members
from dmsae_lib.report import scores, shape
from dmsae_lib.report.agreement import tolerances
from dmsae_lib.report.claims import judge
from dmsae_lib.report.layout import flat, laid_out, readable, thinned
from dmsae_lib.report.regime import compared_gates, gates
from dmsae_lib.report.results import validate
from dmsae_lib.report.reviewers import answers
from dmsae_lib.report.series import replicates
from dmsae_lib.report.stages import Stages
from dmsae_lib.report.what_is_a_core import RECORD
from dmsae_lib.saebench import EVALS, REPRODUCED
from dmsae_lib.store.artifacts import write

Row = dict[str, Any]
CYCLE_POINTS, RETRAIN_POINTS = 150, 20  # rows kept of each training history


def _l0(metrics: Row) -> Row:
    return {part: metrics["L0"][part] for part in ("core", "free", "total")}


def cycle_rows(stages: Stages, chain: str = "main") -> list[Row]:
    rows, before = [], None
    for t in range(stages.config.distill.cycles + 1):
        sae, attribution, core = (
            one.json(name)
            for one, name in zip(stages.cycle(t, chain), ("metrics.json", "record.json", "core.json"))
        )
        ids = {latent["id"] for latent in core["latents"]}
        stability, placebos = attribution["stability"], attribution["placebos"]
        found = {
            "core_out": core["size"],
            "jaccard": jaccard(before, ids) if before else None,
            "L0": _l0(sae),
            "core_share": sae["L0"]["core"] / stages.config.training.k,
            "ranking_stability": {name: stability[name] for name in ("spearman", "jaccard")},
            "placebos": {
                kind: {key: value for key, value in null.items() if key != "rows"}
                for kind, null in placebos.items()
            },
            "aggregators": {name: entry["size"] for name, entry in attribution["aggregators"].items()},
        }
        rows.append(shape.row(shape.Cycle, found, core, sae, {"core_rows": None}))
        before = ids
    return rows


def retrain_rows(stages: Stages, of_sae: dict[tuple, Row]) -> list[Row]:
    """The retrained SAEs of every chain, with two correlations of the core latents' firing frequencies.

    ``before``: with their own in the cycle that they come from (None for rows that are no latents).
    ``next_k``: with those of the same rows at the next k (at the last k: the one before), in an SAE that
    started elsewhere: how far the rows alone decide what their latents do.
    """
    ks, rows, frequencies = sorted(stages.config.retrain.ks), [], {}
    for chain in stages.config.retrained_chains:
        index = stages.retrain_index(chain).json("index.json")["rows"]
        before = {(row["k"], row["arm"], row["seed"]): row["frequency_before"] for row in index}
        for sae, artifact in stages.retrained(chain):
            metrics = artifact.json("metrics.json")
            values = frequencies[chain, *sae] = (metrics["core_frequency"] or {}).get("values")
            found = {"chain": chain, "L0": _l0(metrics)} | dict(zip(("k", "arm", "seed"), sae))
            found |= {key: metrics[key]["full"] for key in ("fvu", "loss_increase", "loss_recovered")}
            found["saebench"] = of_sae.get((*sae, chain))
            found["frequency_correlation"] = {"before": _correlation(values, before[sae])}
            rows.append(shape.row(shape.Retrained, found, metrics))
    next_k = dict(zip(ks, [*ks[1:], *ks[-2:-1]]))  # none where there is one k
    for row in rows:
        pair = [
            frequencies.get((row["chain"], k, row["arm"], row["seed"]))
            for k in (row["k"], next_k.get(row["k"]))
        ]
        row["frequency_correlation"]["next_k"] = _correlation(*pair)
    return rows


def _correlation(a: list[float] | None, b: list[float] | None) -> float | None:
    """Pearson; None where one is missing or constant."""
    try:
        return correlation(a, b) if a and b else None
    except StatisticsError:
        return None


def imported_row(name: str, metrics: Row, numbers: Row | None) -> Row:
    found = {"name": name, "L0": metrics["L0"]["total"], "saebench": numbers}
    found |= {key: metrics[key]["full"] for key in ("fvu", "loss_increase", "loss_recovered")}
    return shape.row(shape.Imported, found, metrics["imported"], metrics)


def lineage(stages: Stages) -> Row:
    """core_lineage.json: the last core's latents with their history, and the ids in each cycle's core."""
    last = stages.config.distill.cycles
    cores = [stages.cycle(t)[2].json("core.json") for t in range(last + 1)]
    final = read_core(stages.cycle(last)[2])
    ids = [{"cycle": core["cycle"], "ids": [latent["id"] for latent in core["latents"]]} for core in cores]
    readings = {name: [final.latents[i].id for i in reading_members(final, name)] for name in READINGS}
    found = {"config": stages.config.name, "latents": cores[-1]["latents"]}
    return found | {"readings": readings, "cycles": ids}


def regime(stages: Stages, summary: Row) -> list[Row]:
    """The gates of cycle 0, unless it was trained elsewhere, and those of what is compared."""
    sae, attribution, _ = stages.cycle(0)
    sizes, alike = summary["sizes"], replicates(summary)
    chains = [sizes | {"cycles": summary["cycles"]}, *summary["chains"].values()]
    exempt = [chain["cycles"][0]["core_out"] for chain in chains if chain["core_sparsity"] == "relu"]
    found = compared_gates(sizes["k"], exempt, [row for row in summary["retrain"] if row["chain"] in alike])
    if "history.csv" not in sae.files:
        return found
    metrics, record = sae.json("metrics.json"), attribution.json("record.json")
    return gates(stages.config, sizes["d_in"], metrics, sae.csv("history.csv"), record) + found


def heatmap(stages: Stages) -> list[Row]:
    return [
        {"arm": row["arm"], "k": k, "seed": row["seed"], "coverage": share, "size": size}
        | {"candidates": row["candidates"]}
        for k in stages.config.retrain.ks
        for row in stages.attributed(k)
        for share, size in row["coverage_curve"]
    ]


def reviewed(stages: Stages, summary: Row) -> dict[str, Row]:
    """The answers to the reviewers, with what the summary does not hold."""
    cycles = [stages.cycle(t) for t in range(stages.config.distill.cycles + 1)]
    _, attribution, core = cycles[-1]
    latents = core.json("core.json")["latents"]
    selected, table = {latent["index"] for latent in latents}, attribution.csv("table.csv")
    others = [float(row["frequency"]) for row in table if int(row["index"]) not in selected]
    records = [attributed.json("record.json") for _, attributed, _ in cycles]
    frequencies = [latent["frequency"] for latent in latents]
    return answers(summary, records, frequencies, others, stages.what_is_a_core())


def summarise(run: Run, identity: Iterable[Row] = ()) -> Row:
    """The content of summary.json, validated; ``identity``: what ``identity_rows`` gives.

    Raises ArtifactError where a stage is missing, or was made from other things than lie beside it now.
    """
    return _summarise(Stages(run), identity)


def _bare_model(harvest: Row, outliers: Row) -> Row:
    """``harvest``: its record; those of older runs say less."""
    bfloat16 = (harvest.get("precision") or {}).get("loss_difference")
    more = {name: harvest["model"].get(name) for name in ("dtype", "weights")} | {"bfloat16_loss": bfloat16}
    more |= {"outliers": outliers, "bits_per_byte": harvest.get("bits_per_byte")}
    return shape.row(shape.BareModel, more, harvest)


def _summarise(stages: Stages, identity: Iterable[Row]) -> Row:
    config, harvest = stages.config, stages.harvest().json("record.json")
    first = stages.cycle(0)[0].json("metrics.json")
    chains = {
        chain.name: {"seed": chain.seed}
        | config.for_chain(chain.name).training.core_settings()
        | {"cycles": cycle_rows(stages, chain.name)}
        for chain in config.distill.chains
    }
    of_sae, asked = scores.by_sae(stages.scores), config.saebench.suite.evals
    retrained = retrain_rows(stages, of_sae)
    members = {name: len(ids) for name, ids in lineage(stages)["readings"].items()}
    reading, dropped = config.distill.final_core, harvest["outliers_dropped"]
    final = {"reading": reading, "size": members[reading], "sizes": members, "lineage": "core_lineage.json"}
    outliers = {
        "train": dropped / (harvest["harvested"] + dropped),
        "test": 1 - first["tokens_tested"] / harvest["n_tokens"]["test"],
    }
    inputs = {"config_hash": config.hash, "seed": config.seed, "threads": config.threads}
    inputs["model"] = {name: harvest["model"][name] for name in ("name", "hash")}
    inputs["data"] = {name: harvest["data"][name] for name in ("source", "hash")}
    sizes = {"d_in": harvest["model"]["d_model"], "d_sae": config.sae.d_sae, "k": config.training.k}
    sizes |= {"prefixes": first["prefixes"], "n_cycles": config.distill.cycles}
    sizes |= {"tokens_per_cycle": config.data.train_tokens, "batch_size": config.training.batch_size}
    sizes |= {name: getattr(config.distill, name) for name in ("coverage", "aggregator")}
    asked = EVALS if asked is None else [*REPRODUCED, *asked]
    summary: Row = {
        "schema_version": shape.SCHEMA_VERSION,
        "config": config.name,
        "inputs": inputs,
        "sizes": sizes | config.training.core_settings(),
        "language_model": _bare_model(harvest, outliers),
        "cycles": cycle_rows(stages),
        "chains": chains,
        "final_core": final,
        "retrain": retrained,
        "imported": [
            imported_row(sae[1], artifact.json("metrics.json"), of_sae.get((*sae, "main")))
            for sae, artifact in stages.imported().items()
        ],
        "identity": list(identity),
        "evals": scores.eval_rows(stages.scores, asked, outliers["test"]),
        "differences": [],  # below, from what is here
        "heatmap": heatmap(stages),
        "probing_baselines": stages.probing(),
    }
    summary["differences"] = scores.differences(summary, stages.scores)
    summary = readable(summary)
    summary["tolerances"] = readable(tolerances(summary))
    summary["regime"] = readable(regime(stages, summary))
    summary["claims"] = readable(judge(summary))
    summary["reviewers"] = readable(reviewed(stages, summary))
    validate(summary)
    return summary


def tables(summary: Row, stages: Stages) -> dict[str, list[Row]]:
    """The CSV files beside summary.json, by name; every row of one has the same columns."""
    tables = {
        "cycles.csv": summary["cycles"],
        "retrain.csv": summary["retrain"],
        "heatmap.csv": summary["heatmap"],
        "claims.csv": [
            {"claim": name} | part for name, claim in summary["claims"].items() for part in claim["parts"]
        ],
        "imported.csv": summary["imported"],
        "saebench_differences.csv": summary["differences"],
        "identity.csv": summary["identity"],
        "regime.csv": summary["regime"],
    }
    found = {name: [flat(row) for row in rows] for name, rows in tables.items()}
    found["saebench_scores.csv"] = readable(scores.score_rows(stages.scores))
    saes = {t: stages.cycle(t)[0] for t in range(len(summary["cycles"]))}
    found["history_cycles.csv"] = [
        {"cycle": t} | row
        for t, sae in saes.items()
        if "history.csv" in sae.files  # cycle 0 may have been trained elsewhere
        for row in thinned(sae.csv("history.csv"), CYCLE_POINTS)
    ]
    found["history_retrain.csv"] = [
        {"chain": chain, "k": k, "arm": arm, "seed": seed} | row
        for chain in stages.config.retrained_chains
        for (k, arm, seed), sae in stages.retrained(chain)
        for row in thinned(sae.csv("history.csv"), RETRAIN_POINTS)
    ]
    return {
        name: [dict.fromkeys(key for row in rows for key in row) | row for row in rows]
        for name, rows in found.items()
        if rows
    }


def write_summary(run: Run, more: dict[str, Any] | None = None, identity: Iterable[Row] = ()) -> Path:
    """Make the artefact ``runs/<run>/summary`` and return its folder; ``more``: further JSON files by name;
    ``identity``: see :func:`summarise`."""
    stages = Stages(run)
    summary = _summarise(stages, identity)
    folder = run.folder / "summary"
    parents = {
        path.relative_to(run.folder).as_posix(): artifact.hash for path, artifact in stages.opened.items()
    }
    with write(folder, "summary", parents) as writer:
        writer.circumstances["stages"] = stages.made()
        texts = {"summary.json": summary, "core_lineage.json": lineage(stages), **(more or {})}
        if asked := stages.what_is_a_core():
            texts[RECORD] = asked
        for name, content in readable(texts).items():
            writer.path(name).write_text(laid_out(content) + "\n", encoding="utf-8")
        for name, rows in tables(summary, stages).items():
            writer.csv(name, rows)
    return folder
