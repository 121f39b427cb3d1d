"""`make bench`: measure the cases that are asked for, then put all that are measured into bench.json and its
figure.

    python -m benchmarks.run                       every case (on a GPU: the paper's shape)
    python -m benchmarks.run --case S-clean S-dead  these alone; the others stay as they were measured last
    python -m benchmarks.run --case language-model  the model's two halves beside plain transformers
    python -m benchmarks.run --figure              draw the figure again from bench.json
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks import cases, figure, inputs, language_model, measure
from benchmarks.cases import DICTIONARY, OURS, PEERS, Case
from dmsae_lib.store.artifacts import UserError, repository_root, write_json
from dmsae_lib.store.process import prepare
from dmsae_lib.store.provenance import hardware, provenance

SCHEMA = 1
GOALS = {"S": 4.0, "M": 4.0, "L": 5.0}  # times faster than the faster peer, with and without dead latents
FLOOR_GOAL = ("L-clean", 2.5)  # times the floor


def goals(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals that the measured cases bear on: what was asked, what was reached."""
    found = []
    for case in measured:
        rows = case["contestants"]
        peers = [rows[peer] for peer in PEERS if peer in rows]
        if case["kind"] not in ("step", "installed") or case["shape"] not in GOALS or len(peers) < len(PEERS):
            continue
        ratio = min(case["times_faster_than"].values())
        found.append(
            {
                "case": case["name"],
                "goal": "times faster than the faster peer",
                "wanted": GOALS[case["shape"]],
                "reached": ratio,
                "met": ratio >= GOALS[case["shape"]],
            }
        )
        if case["name"] == FLOOR_GOAL[0]:
            ratio = rows[OURS]["times_floor"]
            found.append(
                {
                    "case": case["name"],
                    "goal": "at most this many times the floor",
                    "wanted": FLOOR_GOAL[1],
                    "reached": ratio,
                    "met": ratio <= FLOOR_GOAL[1],
                }
            )
        if all(row["peak_bytes"] is not None for row in (rows[OURS], *peers)):
            ratio = rows[OURS]["peak_bytes"] / min(row["peak_bytes"] for row in peers)
            found.append(
                {
                    "case": case["name"],
                    "goal": "peak memory over the leaner peer's, at most",
                    "wanted": 1.0,
                    "reached": ratio,
                    "met": ratio <= 1.0,
                }
            )
    return found


def collect(work: Path, order: list[Case]) -> list[dict[str, Any]]:
    """The records of all cases measured so far, in the order of the list."""
    paths = [work / f"{case.name}.json" for case in order]
    return [json.loads(path.read_text()) for path in paths if path.is_file()]


def bench(
    order: list[Case], wanted: list[str], device: str, work: Path, out: Path, report=print
) -> dict[str, Any]:
    """Measure the cases ``wanted`` out of ``order``, then write ``out``/bench.json and the figure."""
    root = repository_root()
    prepare(cases.THREADS)
    if not (root / measure.PEER_PYTHON).exists():
        report(f"no {measure.PEER_PYTHON}: {DICTIONARY} is left out; `make bench-environment` sets it up")
    by_name = {case.name: case for case in order}
    if unknown := [name for name in wanted if name not in by_name]:
        raise UserError(f"There is no case {unknown[0]!r}: use one of {', '.join(by_name)}.")
    for name in wanted:
        case = by_name[name]
        path = inputs.prepare(case.shape, work / "inputs", device, report)
        measured = measure.run_case(case, path, device, root)
        write_json(work / f"{name}.json", measured | {"provenance": provenance(root, measured["took"])})
        report(line(measured))
    found = result(collect(work, order))
    write_json(out / "bench.json", found)
    figure.draw(found, out)
    return found


def result(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of bench.json."""
    return {
        "schema": SCHEMA,
        "threads": cases.THREADS,
        "hardware": hardware(),
        "goals": goals(measured),
        "cases": measured,
    }


def line(measured: dict[str, Any]) -> str:
    parts = [
        f"{name} {row['median'] * 1e3:.1f} ms = {row['times_floor']:.1f} x floor"
        for name, row in measured["contestants"].items()
    ]
    warning = "; NOT IDLE: the floor varied, measure again" if measured["disturbed"] else ""
    return f"{measured['name']}: {'; '.join(parts)} ({measured['took']:.0f} s{warning})"


def main(arguments: list[str] | None = None) -> None:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", default=[], help="measure these alone")
    parser.add_argument(
        "--prepare", action="store_true", help="make the activations and weights only, which takes minutes"
    )
    parser.add_argument("--figure", action="store_true", help="draw the figure from bench.json")
    parser.add_argument(
        "--quick", action="store_true", help="toy sizes: tries every path, measures nothing of use"
    )
    parser.add_argument("--out", type=Path, help="folder of bench.json; default results/bench")
    chosen = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() and not chosen.quick else "cpu"
    order = (
        cases.quick_cases() if chosen.quick else cases.cpu_cases() if device == "cpu" else cases.cuda_cases()
    )
    work = repository_root() / "runs" / ("bench-quick" if chosen.quick else "bench")
    out = chosen.out or (work if chosen.quick else repository_root() / "results" / "bench")
    if chosen.figure:
        figure.draw(json.loads((out / "bench.json").read_text()), out)
        return
    if language_model.CASE in chosen.case:
        prepare(cases.THREADS)
        language_model.bench(out, rounds=1 if chosen.quick else 7)
        chosen.case.remove(language_model.CASE)
        if not chosen.case:
            return
    if chosen.prepare:
        prepare(cases.THREADS)
        for shape in dict.fromkeys(case.shape for case in order):
            inputs.prepare(shape, work / "inputs", device)
        return
    if chosen.quick and not chosen.case:
        shutil.rmtree(work, ignore_errors=True)
    bench(order, chosen.case or [case.name for case in order], device, work, out)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
