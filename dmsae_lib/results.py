"""What a summary must look like, and how a fresh one compares with the published one.

``summary.schema.json`` (JSON Schema 2020-12) fixes the shape; :func:`validate` adds what a schema cannot say.
"""

import csv
import json
from functools import cache
from pathlib import Path
from typing import Any

from dmsae_lib.artifacts import ArtifactError, UserError, load

Row = dict[str, Any]

# Tolerances of `compare`: (absolute, relative); the larger of the two counts. On the machine and thread count of the
# published run every number repeats exactly; another CPU adds in another order, and training magnifies the last bit
# until two runs differ about as two seeds do. The tolerances are therefore of the size of seed noise, and below the
# effects that the claims speak of.
TOLERANCES: dict[str, tuple[float, float]] = {
    "loss": (0.001, 0.0),  # nats per token of the bare model: the weights are given, only rounding differs
    "size": (3.0, 0.10),  # core latents: the change that claim C1 still calls settled
    "L0_total": (0.0, 0.04),  # both runs calibrated to 2 % of k
    "L0_core": (1.0, 0.10),  # not calibrated: follows from which latents were selected
    "loss_increase": (0.03, 0.0),  # nats: three standard deviations between the seeds of the extended run
    "fvu": (0.01, 0.05),
    "probe": (0.02, 0.0),  # mean accuracy over the sets: a few test texts per set
    "score": (0.01, 0.0),  # SAEBench's core numbers, all shares of 1
    "suite": (0.05, 0.0),  # its other evals: shares of 1 too, over few texts or letters
}


@cache
def schema() -> Row:
    return json.loads(Path(__file__).with_name("summary.schema.json").read_text(encoding="utf-8"))


def validate(summary: Row) -> None:
    """Check a summary against the schema, and that cycles are complete and origins and L0 add up.

    Raises UserError, one sentence with the place in the file.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    if error := best_match(Draft202012Validator(schema()).iter_errors(summary)):
        raise UserError(f"summary.json does not follow its schema at {error.json_path}: {error.message}.")
    last = summary["sizes"]["n_cycles"]
    chains = {"cycles": summary["cycles"]}
    chains |= {f"chains.{name}": chain["cycles"] for name, chain in summary["chains"].items()}
    for place, rows in chains.items():
        if [row["cycle"] for row in rows] != list(range(last + 1)):
            raise UserError(f"summary.json, {place}: there must be one row per cycle, 0 to {last}.")
        for row in rows:
            if sum(row["origins"].values()) != row["core_out"]:
                raise UserError(f"summary.json, {place}: origins do not add up to core_out in cycle {row['cycle']}.")
    keys = [(row["chain"], row["k"], row["core"], row["seed"]) for row in summary["retrain"]]
    if len(set(keys)) < len(keys):
        raise UserError("summary.json, retrain: two rows have the same chain, k, core and seed.")
    for row in [row for rows in [*chains.values(), summary["retrain"]] for row in rows]:
        core, rest, total = (row["L0"][part] for part in ("core", "non_core", "total"))
        if abs(core + rest - total) > 0.01 * max(1.0, total):
            raise UserError(f"summary.json: the L0 total {total} is not the sum of core {core} and non_core {rest}.")


def stage_kind(name: str) -> str:
    """harvest, train, attribute, distill, learning_rate, retrain, saebench ... from the name of a stage or its notebook."""
    words = name.split("_")  # cycle_3_train, chain_x_cycle_3_train, chain_x_retrain
    return words[-1] if "cycle" in words or words[0] == "chain" else name


class Results:
    """A published results folder: summary.json (validated), its sha256, and the files beside it.

    ``made`` says how the stages were made: {commits, versions, hardware, seconds}. Raises UserError where the summary is
    missing, or any file beside it is not as it was published.
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
            raise ArtifactError(error.what, error.remedy if mended else "run `make publish` to write it again") from error
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


def _kind_of_score(name: str) -> str | None:
    if "." in name:
        return "suite"
    return "probe" if name.startswith("probe_") else "score" if name in ("ce_loss_score", "explained_variance_legacy") else None


def optional_evals(summary: Row) -> set[str]:
    """Those of SAEBench's evals that ran beyond what ``make reproduce`` runs."""
    return {name for name, row in summary["evals"].items() if row["scores"]} - {"core", "sparse_probing"}


def _comparable(summary: Row) -> dict[str, tuple[str, float]]:
    """{metric: (kind of tolerance, value)} of every number that a second run should give again."""
    model = summary["language_model"]
    found = {f"language_model.{name}": ("loss", model[name]) for name in ("clean_loss", "zero_loss", "mean_loss")}
    for row in summary["cycles"]:
        place, l0 = f"cycles[{row['cycle']}]", row["L0"]
        found |= {f"{place}.core_out": ("size", row["core_out"]), f"{place}.kept": ("size", row["kept"]),
                  f"{place}.L0.core": ("L0_core", l0["core"]), f"{place}.L0.total": ("L0_total", l0["total"]),
                  f"{place}.fvu": ("fvu", row["fvu"]["full"]),
                  f"{place}.loss_increase": ("loss_increase", row["loss_increase"]["full"])}
    found["final_core.size"] = ("size", summary["final_core"]["size"])
    for row in summary["retrain"]:
        chain = "" if row["chain"] == "main" else f"chain {row['chain']}, "
        place = f"retrain[{chain}k={row['k']}, {row['core']}, seed {row['seed']}]"
        total = "L0_core" if row["unbound"] else "L0_total"  # an unbound SAE has the L0 that its core dictates
        found |= {f"{place}.L0.total": (total, row["L0"]["total"]), f"{place}.fvu": ("fvu", row["fvu"]),
                  f"{place}.loss_increase": ("loss_increase", row["loss_increase"])}
        for name, value in (row["saebench"] or {}).items():
            if value is not None and (kind := _kind_of_score(name)):
                found[f"{place}.{name}"] = (kind, value)
    return found


def compare(fresh: Row, published: Row) -> list[Row]:
    """Rows {metric, published, fresh, difference, tolerance, ok} for every number and every verdict.

    A number that only one side has, and a changed verdict, are not ok; verdicts have no difference and no tolerance.
    What only one side was asked to run (``make saebench``) is left out; no verdict depends on it.
    """
    new, old = _comparable(fresh), _comparable(published)
    unasked = optional_evals(fresh) ^ optional_evals(published)
    rows = []
    for metric in old | new:
        if metric.rpartition("].")[2].partition(".")[0] in unasked:
            continue
        values = [side[metric][1] if metric in side else None for side in (old, new)]
        row = {"metric": metric, "published": values[0], "fresh": values[1], "difference": None, "tolerance": None}
        if None in values:
            rows.append(row | {"ok": values[0] == values[1]})
            continue
        absolute, relative = TOLERANCES[old[metric][0]]
        tolerance, difference = max(absolute, relative * abs(values[0])), values[1] - values[0]
        rows.append(row | {"difference": difference, "tolerance": tolerance, "ok": abs(difference) <= tolerance})
    for name, claim in published["claims"].items():
        verdicts = claim["verdict"], fresh["claims"][name]["verdict"]
        rows.append({"metric": f"claims.{name}", "published": verdicts[0], "fresh": verdicts[1], "difference": None,
                     "tolerance": None, "ok": verdicts[0] == verdicts[1]})
    return rows
