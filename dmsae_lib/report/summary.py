"""The summary of a run: every stage's own JSON put together, claims judged, tables written.

``runs/<run>/summary/`` is an artefact with summary.json (``summary.schema.json`` says what is in it), the
same rows as CSV, the training histories and core_lineage.json. Figures are drawn from these files alone. How
long it took, where and with which code is in provenance.json beside them.
"""

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from statistics import StatisticsError, correlation
from typing import Any

from dmsae_lib.config.run import Run
from dmsae_lib.distill.core import READINGS, read_core, reading_members
from dmsae_lib.report import scores
from dmsae_lib.report.agreement import tolerances
from dmsae_lib.report.claims import judge, judged_chains
from dmsae_lib.report.layout import flat, laid_out, readable, thinned
from dmsae_lib.report.regime import compared_gates, gates
from dmsae_lib.report.results import stage_kind, validate
from dmsae_lib.report.reviewers import answers
from dmsae_lib.saebench import EVALS, REPRODUCED, Task, reproduced_tasks, suite_tasks
from dmsae_lib.saebench.probing import mean_baselines, suitable
from dmsae_lib.store.artifacts import Artifact, ArtifactError, load, write

Row = dict[str, Any]
SCHEMA_VERSION = 6
CYCLE_POINTS, RETRAIN_POINTS = 150, 20  # rows kept of each training history
L0_PARTS = ("core", "free", "total")


class Stages:
    """The finished artefacts of a run, each opened (and verified) once."""

    def __init__(self, run: Run):
        self.run, self.opened = run, {}

    def get(self, kind: str, folder: Path, parent: Artifact | None = None) -> Artifact:
        """Open one; raises ArtifactError where it is missing, damaged, or made from another ``parent`` than
        today's."""
        if folder not in self.opened:
            self.opened[folder] = (kind, load(folder, kind))
        artifact = self.opened[folder][1]
        if parent and parent.hash not in artifact.parents.values():
            raise ArtifactError(
                f"{folder} was made from another {parent.kind} than the one in {parent.folder}: "
                "run `make reproduce`, which makes it again."
            )
        return artifact

    def harvest(self) -> Artifact:
        return self.get("harvest", self.run.folder / "harvest")

    def cycle(self, cycle: int, chain: str = "main") -> tuple[Artifact, Artifact, Artifact]:
        """SAE, attribution and core of one cycle, each made from the one before."""
        before = self.cycle(cycle - 1, chain)[2] if cycle else self.harvest()
        sae = self.get("sae", self.run.cycle(cycle, "sae", chain), before)
        attribution = self.get("attribution", self.run.cycle(cycle, "attribution", chain), sae)
        return sae, attribution, self.get("core", self.run.cycle(cycle, "core", chain), attribution)

    def retrained(self, chain: str = "main") -> Iterable[tuple[int, str, int, Artifact]]:
        """(k, arm, seed, SAE) of everything trained with a chain's cores."""
        known = set(self.retrain_index(chain).parents.values())
        for k in self.run.config.retrain.ks:
            for arm, seed in self.run.config.retrain_arms(k, chain):
                sae = self.get("sae", self.run.retrained(k, arm, seed, chain), self.harvest())
                if sae.hash not in known:
                    raise ArtifactError(
                        f"{sae.folder} is not among those that {self.run.base(chain)}/retrain/index was made "
                        "from: "
                        "run `make reproduce`, which makes it again."
                    )
                yield k, arm, seed, sae

    def imported(self) -> dict[tuple[int, str, int], Artifact]:
        """The SAEs trained elsewhere by (k, arm, seed)."""
        return {
            sae: self.get("sae", self.run.retrained(*sae), self.harvest()) for sae in self.run.config.imported
        }

    def attributed(self, k: int) -> list[Row]:
        """The SAEs retrained at ``k`` whose prefix 0 was attributed, with their curves of core size against
        coverage."""
        rows = self.retrain_index().json("index.json")["rows"]
        return [row for row in rows if row["k"] == k and "coverage_curve" in row]

    def retrain_index(self, chain: str = "main") -> Artifact:
        """What notebook 05 wrote of the SAEs that it trained with a chain's cores."""
        return self.get("retrain_index", self.run.base(chain) / "retrain" / "index")

    @cached_property
    def scores(self) -> dict[Task, Row]:
        """The results of every SAEBench eval that the configuration asks for and that is there."""
        settings, retrain = self.run.config.saebench, self.run.config.retrain
        saes = {(k, arm, seed): sae for k, arm, seed, sae in self.retrained()} | self.imported()
        tasks = [*reproduced_tasks(settings, saes), *suite_tasks(settings, retrain, saes)]
        found = {task: task.folder(self.run) for task in tasks}
        return {
            task: self.get("scores", folder, saes[task[:3]]).json("scores.json")["result"]
            for task, folder in found.items()
            if folder.exists()
        }

    def probing(self) -> Row | None:
        """Mean accuracies of a dense probe, of the best single channel and of the majority class, over the
        sets that a dense probe can do."""
        folder = self.run.folder / "saebench" / "baselines"
        rows = self.get("probing_baselines", folder).json("probing.json") if folder.exists() else {}
        sets = suitable(rows, self.run.config.saebench.dense_at_least)
        dropped = sorted(rows.keys() - set(sets))
        return mean_baselines(rows, sets) | {"n_sets": len(sets), "dropped": dropped} if sets else None

    def notebooks(self) -> dict[str, list[float]]:
        """Wall clock of each notebook by kind of stage, starting up included; those run by hand are not in
        it."""
        found: dict[str, list[float]] = {}
        for path in sorted((self.run.folder / "notebooks").glob("*.json")):
            found.setdefault(stage_kind(path.stem), []).append(json.loads(path.read_text())["seconds"])
        return {stage: seconds for stage, seconds in found.items() if stage != "summary"}


def cycle_row(sae: Row, attribution: Row, core: Row, before: Row | None, k: int) -> Row:
    ids = [{latent["id"] for latent in one["latents"]} for one in (before, core) if one]
    return {
        "cycle": sae["cycle"],
        "core_in": sae["core_in"],
        "core_out": core["size"],
        "kept": core["kept"],
        "jaccard": len(ids[0] & ids[1]) / len(ids[0] | ids[1]) if before else None,
        "origins": core["origins"],
        "L0": {part: sae["L0"][part] for part in L0_PARTS},
        "core_share": sae["L0"]["core"] / k,
        "core_rows": sae.get("core_rows"),
        "dead": sae["dead"],
        "rare": sae["rare"],
        "fvu": sae["fvu"],
        "loss_increase": sae["loss_increase"],
        "loss_recovered": sae["loss_recovered"],
        "ranking_stability": {name: attribution["stability"][name] for name in ("spearman", "jaccard")},
        "placebos": {
            kind: {key: value for key, value in null.items() if key != "rows"}
            for kind, null in attribution["placebos"].items()
        },
        "parent": core["parent"],
        "aggregators": {name: entry["size"] for name, entry in attribution["aggregators"].items()},
    }


def cycle_rows(stages: Stages, chain: str = "main") -> list[Row]:
    config, before, rows = stages.run.config, None, []
    for t in range(config.distill.cycles + 1):
        sae, attribution, core = stages.cycle(t, chain)
        parts = sae.json("metrics.json"), attribution.json("record.json"), core.json("core.json")
        rows.append(cycle_row(*parts, before, config.training.k))
        before = parts[2]
    return rows


def retrain_row(chain: str, k: int, arm: str, seed: int, metrics: Row, numbers: Row | None) -> Row:
    return {
        "chain": chain,
        "k": k,
        "arm": arm,
        "seed": seed,
        "core_size": metrics["core_size"],
        "overlap": metrics["overlap"],
        "core_rows": metrics["core_rows"],
        "L0": {part: metrics["L0"][part] for part in L0_PARTS},
        "unbound": metrics["unbound"],
        "fvu": metrics["fvu"]["full"],
        "loss_increase": metrics["loss_increase"]["full"],
        "loss_recovered": metrics["loss_recovered"]["full"],
        "loss_recovered_mean": metrics["loss_recovered_mean"],
        "dead": metrics["dead"],
        "rare": metrics["rare"],
        "tokens": metrics["tokens"],
        "saebench": numbers,
    }


def retrain_rows(stages: Stages, of_sae: dict[tuple[int, str, int], Row]) -> list[Row]:
    """The retrained SAEs of every chain, with two correlations of the core latents' firing frequencies.

    ``before``: with their own in the cycle that they come from (None for rows that are no latents).
    ``next_k``: with those of the same rows at the next k (at the last k: the one before), in an SAE that
    started elsewhere: how far the rows alone decide what their latents do.
    """
    ks, rows, frequencies = sorted(stages.run.config.retrain.ks), [], {}
    for chain in stages.run.config.retrained_chains:
        rows_of = stages.retrain_index(chain).json("index.json")["rows"]
        before = {(row["k"], row["arm"], row["seed"]): row["frequency_before"] for row in rows_of}
        for k, arm, seed, sae in stages.retrained(chain):
            metrics = sae.json("metrics.json")
            row = retrain_row(
                chain, k, arm, seed, metrics, of_sae.get((k, arm, seed)) if chain == "main" else None
            )
            values = frequencies[chain, k, arm, seed] = (metrics["core_frequency"] or {}).get("values")
            rows.append(
                row | {"frequency_correlation": {"before": _correlation(values, before[k, arm, seed])}}
            )
    for row in rows:
        place = ks.index(row["k"])
        other = ks[place + 1] if place + 1 < len(ks) else ks[place - 1]
        pair = [frequencies.get((row["chain"], k, row["arm"], row["seed"])) for k in (row["k"], other)]
        row["frequency_correlation"]["next_k"] = _correlation(*pair) if len(ks) > 1 else None
    return rows


def _correlation(a: list[float] | None, b: list[float] | None) -> float | None:
    """Pearson; None where one is missing or constant."""
    try:
        return correlation(a, b) if a and b else None
    except StatisticsError:
        return None


def imported_row(name: str, metrics: Row, numbers: Row | None) -> Row:
    source = metrics["imported"]
    return {
        "name": name,
        **{key: source[key] for key in ("where", "hash", "architecture", "d_sae", "widths")},
        "L0": metrics["L0"]["total"],
        "fvu": metrics["fvu"]["full"],
        "loss_increase": metrics["loss_increase"]["full"],
        "loss_recovered": metrics["loss_recovered"]["full"],
        "dead": metrics["dead"],
        "saebench": numbers,
    }


def lineage(stages: Stages) -> Row:
    """core_lineage.json: every latent of the last core with its history, and which ids each cycle's core
    held."""
    last = stages.run.config.distill.cycles
    cores = [stages.cycle(t)[2].json("core.json") for t in range(last + 1)]
    final = read_core(stages.cycle(last)[2])
    readings = {name: [final.latents[i].id for i in reading_members(final, name)] for name in READINGS}
    return {
        "config": stages.run.config.name,
        "latents": cores[-1]["latents"],
        "readings": readings,
        "cycles": [
            {"cycle": core["cycle"], "ids": [latent["id"] for latent in core["latents"]]} for core in cores
        ],
    }


def _inputs(stages: Stages, harvest: Row) -> Row:
    config = stages.run.config
    return {
        "config_hash": config.hash,
        "seed": config.seed,
        "threads": config.threads,
        "model": {"name": harvest["model"]["name"], "hash": harvest["model"]["hash"]},
        "data": {"source": harvest["data"]["source"], "hash": harvest["data"]["hash"]},
    }


def _made(stages: Stages) -> Row:
    """How the stages were made, for provenance.json: what may differ between two runs that found the same."""
    first = stages.cycle(0)[0].provenance
    commits = {artifact.provenance["commit"] for _, artifact in stages.opened.values()}
    notebooks = stages.notebooks()
    return {
        "commits": sorted(c for c in commits if c),
        "versions": first["versions"],
        "hardware": first["hardware"],
        "seconds": {stage: sum(found) for stage, found in notebooks.items()},
        "processes": {stage: len(found) for stage, found in notebooks.items()},
    }


def regime(stages: Stages, summary: Row) -> list[Row]:
    """The gates of cycle 0, none for an SAE that was trained elsewhere, and those of the SAEs that are
    compared."""
    sae, attribution, _ = stages.cycle(0)
    sizes, chains = (
        summary["sizes"],
        {"main": summary["sizes"] | {"cycles": summary["cycles"]}} | summary["chains"],
    )
    exempt = [chain["cycles"][0]["core_out"] for chain in chains.values() if chain["core_sparsity"] == "relu"]
    judged = judged_chains(summary)
    found = compared_gates(sizes["k"], exempt, [row for row in summary["retrain"] if row["chain"] in judged])
    if "history.csv" not in sae.files:
        return found
    return (
        gates(
            stages.run.config,
            sizes["d_in"],
            sae.json("metrics.json"),
            sae.csv("history.csv"),
            attribution.json("record.json"),
        )
        + found
    )


def summarise(run: Run, identity: list[Row] | tuple[()] = ()) -> Row:
    """The content of summary.json (see the module's docstring), validated; ``identity``:
    identity.identity_rows.

    Raises ArtifactError where a stage is missing or was made from something else than what lies beside it
    now.
    """
    return _summarise(Stages(run), identity)


def _summarise(stages: Stages, identity: Iterable[Row]) -> Row:
    config, harvest = stages.run.config, stages.harvest().json("record.json")
    cycles, last = cycle_rows(stages), config.distill.cycles
    scored = stages.scores
    of_sae = scores.by_sae(scored)
    retrained = retrain_rows(stages, of_sae)
    asked = EVALS if config.saebench.suite.evals is None else (*REPRODUCED, *config.saebench.suite.evals)
    sizes = {name: len(ids) for name, ids in lineage(stages)["readings"].items()}
    first_sae = stages.cycle(0)[0].json("metrics.json")
    chains = {
        chain.name: {
            "seed": chain.seed,
            **config.for_chain(chain.name).training.core_settings(),
            "cycles": cycle_rows(stages, chain.name),
        }
        for chain in config.distill.chains
    }
    outliers = {
        "train": harvest["outliers_dropped"] / (harvest["harvested"] + harvest["outliers_dropped"]),
        "test": 1 - first_sae["tokens_tested"] / harvest["n_tokens"]["test"],
    }
    summary = readable(
        {
            "schema_version": SCHEMA_VERSION,
            "config": config.name,
            "inputs": _inputs(stages, harvest),
            "sizes": {
                "d_in": harvest["model"]["d_model"],
                "d_sae": config.sae.d_sae,
                "k": config.training.k,
                "prefixes": first_sae["prefixes"],
                "n_cycles": last,
                "tokens_per_cycle": config.data.train_tokens,
                "batch_size": config.training.batch_size,
                "coverage": config.distill.coverage,
                "aggregator": config.distill.aggregator,
                **config.training.core_settings(),
            },
            "language_model": {
                name: harvest[name] for name in ("clean_loss", "zero_loss", "mean_loss", "scale")
            }
            | {"outliers": outliers},
            "cycles": cycles,
            "chains": chains,
            "final_core": {
                "reading": config.distill.final_core,
                "size": sizes[config.distill.final_core],
                "sizes": sizes,
                "lineage": "core_lineage.json",
            },
            "retrain": retrained,
            "imported": [
                imported_row(sae[1], artifact.json("metrics.json"), of_sae.get(sae))
                for sae, artifact in stages.imported().items()
            ],
            "identity": list(identity),
            "evals": scores.eval_rows(scored, asked, outliers["test"]),
            "differences": scores.differences(retrained, scored, outliers["test"]),
            "heatmap": [
                {
                    "arm": row["arm"],
                    "k": k,
                    "seed": row["seed"],
                    "coverage": share,
                    "size": size,
                    "candidates": row["candidates"],
                }
                for k in config.retrain.ks
                for row in stages.attributed(k)
                for share, size in row["coverage_curve"]
            ],
            "probing_baselines": stages.probing(),
        }
    )
    summary["tolerances"] = readable(tolerances(summary))
    summary["regime"] = readable(regime(stages, summary))
    summary["claims"] = readable(judge(summary))
    _, attribution, core = stages.cycle(last)
    latents = core.json("core.json")["latents"]
    selected = {latent["index"] for latent in latents}
    others = [
        float(row["frequency"]) for row in attribution.csv("table.csv") if int(row["index"]) not in selected
    ]
    records = [stages.cycle(t)[1].json("record.json") for t in range(last + 1)]
    summary["reviewers"] = readable(
        answers(summary, records, [latent["frequency"] for latent in latents], others)
    )
    validate(summary)
    return summary


def tables(summary: Row, stages: Stages) -> dict[str, list[Row]]:
    """The CSV files beside summary.json, by name."""
    claims = [{"claim": name} | part for name, claim in summary["claims"].items() for part in claim["parts"]]
    found = {
        "cycles.csv": summary["cycles"],
        "retrain.csv": summary["retrain"],
        "heatmap.csv": summary["heatmap"],
        "claims.csv": claims,
        "imported.csv": summary["imported"],
        "saebench_differences.csv": summary["differences"],
        "identity.csv": summary["identity"],
        "regime.csv": summary["regime"],
    }
    found = {name: [flat(row) for row in rows] for name, rows in found.items()}
    found["saebench_scores.csv"] = readable(scores.score_rows(stages.scores))
    found["history_cycles.csv"] = [
        {"cycle": t} | row
        for t in range(len(summary["cycles"]))
        if "history.csv" in stages.cycle(t)[0].files  # cycle 0 may have been trained elsewhere
        for row in thinned(stages.cycle(t)[0].csv("history.csv"), CYCLE_POINTS)
    ]
    found["history_retrain.csv"] = [
        {"chain": chain, "k": k, "arm": arm, "seed": seed} | row
        for chain in stages.run.config.retrained_chains
        for k, arm, seed, sae in stages.retrained(chain)
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
        path.relative_to(run.folder).as_posix(): artifact.hash
        for path, (_, artifact) in stages.opened.items()
    }
    with write(folder, "summary", parents) as writer:
        writer.circumstances["stages"] = _made(stages)
        texts = {"summary.json": summary, "core_lineage.json": lineage(stages), **(more or {})}
        for name, content in readable(texts).items():
            writer.path(name).write_text(laid_out(content) + "\n", encoding="utf-8")
        for name, rows in tables(summary, stages).items():
            writer.csv(name, rows)
    return folder
