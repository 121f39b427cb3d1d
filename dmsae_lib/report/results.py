"""Published summaries: where they lie, and whether one is whole and adds up."""

import csv
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dmsae_lib.report.claims import CLAIMS
from dmsae_lib.report.reviewers import QUESTIONS
from dmsae_lib.report.shape import Summary
from dmsae_lib.store.artifacts import ArtifactError, UserError, load

Row = dict[str, Any]


def validate(summary: Row) -> None:
    """Check a summary's shape, and that its names are known, its cycles complete and its sums right.

    Raises UserError, one sentence with the place in the file.
    """
    try:
        Summary.model_validate(summary)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"summary.json does not follow its schema at {place}: {first['msg']}.") from error
    for place, names in (("claims", CLAIMS), ("reviewers", QUESTIONS)):
        if odd := summary[place].keys() - names.keys():  # what it lacks was added after it was made
            raise UserError(f"summary.json, {place}: {', '.join(sorted(odd))} is none of {', '.join(names)}.")
    last = summary["sizes"]["n_cycles"]
    chains = {"cycles": summary["cycles"]}
    chains |= {f"chains.{name}": chain["cycles"] for name, chain in summary["chains"].items()}
    for place, rows in chains.items():
        if [row["cycle"] for row in rows] != list(range(last + 1)):
            raise UserError(f"summary.json, {place}: there must be one row per cycle, 0 to {last}.")
        for row in rows:
            if sum(row["origins"].values()) != row["core_out"]:
                where = f"in cycle {row['cycle']}"
                raise UserError(f"summary.json, {place}: origins do not add up to core_out {where}.")
    keys = [(row["chain"], row["k"], row["arm"], row["seed"]) for row in summary["retrain"]]
    if len(set(keys)) < len(keys):
        raise UserError("summary.json, retrain: two rows have the same chain, k, arm and seed.")
    for row in [row for rows in [*chains.values(), summary["retrain"]] for row in rows]:
        core, free, total = (row["L0"][part] for part in ("core", "free", "total"))
        if abs(core + free - total) > 0.01 * max(1.0, total):
            raise UserError(
                f"summary.json: the L0 total {total} is not the sum of core {core} and free {free}."
            )


def stage_kind(name: str) -> str:
    """harvest, train, attribute, distill, retrain, saebench ... from the name of a stage."""
    words = name.split("_")  # cycle_3_train, chain_x_cycle_3_train, chain_x_retrain
    return words[-1] if "cycle" in words or words[0] == "chain" else name


class Results:
    """A published results folder: summary.json (validated), its sha256, and the files beside it.

    ``made`` says how the stages were made: {commits, versions, hardware, seconds}. Raises UserError where the
    summary is missing, or any file beside it is not as it was published.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        path = self.folder / "summary.json"
        if not path.is_file():
            raise UserError(f"There is no {path}: run `make reproduce`, then `make publish`.")
        try:
            published = load(self.folder, "summary")
        except ArtifactError as error:
            mended = "make mend" in error.remedy  # it lies in a run's folder
            raise ArtifactError(
                error.what, error.remedy if mended else "run `make publish` to write it again"
            ) from error
        self.hash = published.files["summary.json"]
        self.summary: Row = published.json("summary.json")
        validate(self.summary)
        self.made: Row = published.provenance["stages"]

    def table(self, name: str) -> list[dict[str, str]]:
        """The rows of a CSV file beside the summary; raises UserError where it is missing."""
        path = self.folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing beside summary.json: run `make publish` to write it again.")
        with open(path, newline="", encoding="utf-8") as handle:
            return list(csv.DictReader(handle))
