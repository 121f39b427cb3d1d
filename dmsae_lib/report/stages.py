"""The finished artefacts of a run, as the summary reads them: each verified, and made from the one before."""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from dmsae_lib.config.run import Run
from dmsae_lib.report.results import stage_kind
from dmsae_lib.report.what_is_a_core import RECORD
from dmsae_lib.saebench import Task, reproduced_tasks, suite_tasks
from dmsae_lib.saebench.probing import mean_baselines, suitable
from dmsae_lib.store.artifacts import Artifact, ArtifactError, load

Row = dict[str, Any]
SAE = tuple[int, str, int]  # (k, arm, training seed)


class Stages:
    """The finished artefacts of a run, each opened (and verified) once.

    Everything raises ArtifactError where a stage is missing, damaged, or was made from something else than
    what lies beside it now.
    """

    def __init__(self, run: Run):
        self.run, self.config = run, run.config
        self.opened: dict[Path, Artifact] = {}

    def get(self, kind: str, folder: Path, parent: Artifact | None = None) -> Artifact:
        """Open one; ``parent`` must be among those that it was made from."""
        if folder not in self.opened:
            self.opened[folder] = load(folder, kind)
        artifact = self.opened[folder]
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

    def retrain_index(self, chain: str = "main") -> Artifact:
        """What notebook 05 wrote of the SAEs that it trained with a chain's cores."""
        return self.get("retrain_index", self.run.base(chain) / "retrain" / "index")

    def retrained(self, chain: str = "main") -> Iterator[tuple[SAE, Artifact]]:
        """Everything trained with a chain's cores."""
        known = set(self.retrain_index(chain).parents.values())
        for k in self.config.retrain.ks:
            for arm, seed in self.config.retrain_arms(k, chain):
                sae = self.get("sae", self.run.retrained(k, arm, seed, chain), self.harvest())
                if sae.hash not in known:
                    raise ArtifactError(
                        f"{sae.folder} is not among those that {self.run.base(chain)}/retrain/index was made "
                        "from: run `make reproduce`, which makes it again."
                    )
                yield (k, arm, seed), sae

    def imported(self) -> dict[SAE, Artifact]:
        """The SAEs trained elsewhere."""
        return {
            sae: self.get("sae", self.run.retrained(*sae), self.harvest()) for sae in self.config.imported
        }

    def attributed(self, k: int) -> list[Row]:
        """The SAEs retrained at ``k`` that have a curve of core size against coverage."""
        rows = self.retrain_index().json("index.json")["rows"]
        return [row for row in rows if row["k"] == k and "coverage_curve" in row]

    @cached_property
    def scores(self) -> dict[Task, Row]:
        """The results of every SAEBench eval that the configuration asks for and that is there."""
        chains = self.config.saebench.chains
        saes = {(*sae, chain): artifact for chain in chains for sae, artifact in self.retrained(chain)}
        saes |= {(*sae, "main"): artifact for sae, artifact in self.imported().items()}
        tasks = [*reproduced_tasks(self.config), *suite_tasks(self.config)]
        there = {task: task.folder(self.run) for task in tasks if task.folder(self.run).exists()}
        return {
            task: self.get("scores", folder, saes[task.sae]).json("scores.json")["result"]
            for task, folder in there.items()
        }

    def what_is_a_core(self) -> Row | None:
        """What notebook 10 found; None where it did not run."""
        folder = self.run.folder / "what_is_a_core" / "record"
        there = (folder / "manifest.json").is_file()
        return self.get("what_is_a_core", folder, self.harvest()).json(RECORD) if there else None

    def probing(self) -> Row | None:
        """Mean accuracies without an SAE, over the sets that a dense probe can do."""
        folder = self.run.folder / "saebench" / "baselines"
        rows = self.get("probing_baselines", folder).json("probing.json") if folder.exists() else {}
        sets = suitable(rows, self.config.saebench.dense_at_least)
        dropped = sorted(rows.keys() - set(sets))
        return mean_baselines(rows, sets) | {"n_sets": len(sets), "dropped": dropped} if sets else None

    def notebooks(self) -> dict[str, list[float]]:
        """Wall clock of each notebook that make ran, by kind of stage, starting up included."""
        found: dict[str, list[float]] = {}
        for path in sorted((self.run.folder / "notebooks").glob("*.json")):
            found.setdefault(stage_kind(path.stem), []).append(json.loads(path.read_text())["seconds"])
        return {stage: seconds for stage, seconds in found.items() if stage != "summary"}

    def made(self) -> Row:
        """How the stages were made: what may differ between two runs that found the same."""
        first, notebooks = self.cycle(0)[0].provenance, self.notebooks()
        return {
            "commits": sorted({a.provenance["commit"] for a in self.opened.values()} - {None}),
            "versions": first["versions"],
            "hardware": first["hardware"],
            "seconds": {stage: sum(found) for stage, found in notebooks.items()},
            "processes": {stage: len(found) for stage, found in notebooks.items()},
        }
