"""Runs one case: starts a worker per contestant, lets them take turns, and sums up."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases import CORED, DENSE, DICTIONARY, OURS, PEERS, Case
from dmsae_lib.store.artifacts import UserError

PEER_PYTHON = Path(".venv-bench/bin/python")
DISTURBED = 1.25  # the floor's median over its fastest above this: the machine was not idle


def interpreter(contestant: str, root: Path) -> str:
    return str(root / PEER_PYTHON) if contestant == DICTIONARY else sys.executable


class Worker:
    """The other end of :mod:`benchmarks.worker`."""

    def __init__(self, contestant: str, case: Case, inputs: Path, device: str, root: Path):
        self.contestant = contestant
        self.process = subprocess.Popen(
            [interpreter(contestant, root), "-m", "benchmarks.worker"],
            cwd=root,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.send(case=asdict(case), contestant=contestant, inputs=str(inputs), device=device)

    def send(self, **order: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # it died: the answer that is missing says why
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            said = self.process.stderr.read().strip().splitlines() or ["no message"]
            raise UserError(f"The benchmark's process of {self.contestant} ended early: {said[-1]}.")
        return json.loads(line)

    def ask(self, **order: Any) -> dict[str, Any]:
        self.send(**order)
        return self.answer()

    def stop(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


@contextlib.contextmanager
def team(case: Case, inputs: Path, device: str, root: Path) -> Iterator[list[Worker]]:
    """The contestants' workers, built and waiting; dictionary_learning is left out where its environment is
    missing."""
    names = [name for name in case.contestants if name != DICTIONARY or (root / PEER_PYTHON).exists()]
    workers: list[Worker] = []
    try:
        for name in names:
            workers.append(Worker(name, case, inputs, device, root))
        for worker in workers:
            worker.answer()
        yield workers
    finally:
        for worker in workers:
            worker.stop()


def run_case(case: Case, inputs: Path, device: str, root: Path) -> dict[str, Any]:
    """Measure ``case``: the record that bench.json holds of it."""
    started = time.perf_counter()
    seconds: dict[str, dict[str, list[float]]] = {}
    with team(case, inputs, device, root) as workers:
        for worker in workers:
            worker.ask(do="turn", untimed=case.warm_up, timed=0)
        for _ in range(case.rounds):
            for worker in workers:
                taken = worker.ask(do="turn", untimed=case.untimed, timed=case.timed)["seconds"]
                for name, values in taken.items():
                    seconds.setdefault(worker.contestant, {}).setdefault(name, []).extend(values)
        summaries = {worker.contestant: worker.ask(do="summary") for worker in workers}
    return record(case, device, seconds, summaries, time.perf_counter() - started)


def record(
    case: Case,
    device: str,
    seconds: dict[str, dict[str, list[float]]],
    summaries: dict[str, dict[str, Any]],
    took: float,
) -> dict[str, Any]:
    """One case in figures; every ratio is one of medians."""
    shape = case.shape
    dense = {name: {"seconds": values, "median": median(values)} for name, values in seconds[DENSE].items()}
    floor = dense["floor"]["median"]
    rows = {}
    for name, summary in summaries.items():
        if name == DENSE:
            continue
        values = seconds[name]["step"]
        middle = median(values)
        rows[name] = {
            "seconds": values,
            "median": middle,
            "tokens_per_second": case.n_saes * shape.batch_size / middle,
            "times_floor": middle / (case.n_saes * floor),
            **summary,
        }
    ours = rows.get(OURS)
    return {
        "name": case.name,
        "kind": case.kind,
        "shape": shape.name,
        "d_in": shape.d_in,
        "d_sae": shape.d_sae,
        "k": shape.k,
        "batch_size": shape.batch_size,
        "prefixes": shape.widths,
        "n_saes": case.n_saes,
        "dead_share": case.dead,
        "n_core_of_ours_core": shape.n_core if CORED in rows else None,
        "device": device,
        "dtype": "bfloat16 autocast" if shape.bf16 else "float32",
        "activations": "residuals of the embedded model" if shape.real else "synthetic, benchmarks/inputs.py",
        "timed_steps": case.rounds * case.timed,
        "took": round(took, 1),
        "disturbed": floor > DISTURBED * min(dense["floor"]["seconds"]),
        "contestants": rows,
        "dense": dense | {"floor_flops": shape.floor_flops},
        "times_faster_than": {
            peer: rows[peer]["median"] / ours["median"] for peer in PEERS if ours and peer in rows
        },
    }
