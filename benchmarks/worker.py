"""One contestant in a process of its own, which steps when it is its turn and otherwise blocks on a pipe.

Reads a line of JSON per order on stdin and answers each with one on stdout. A process each gives every
contestant its own environment, allocator and peak memory; between turns none of them runs.
"""

import contextlib
import ctypes
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, contestants, inputs
from benchmarks.cases import Case, Shape
from dmsae_lib.store import process as runtime


def resident(field: str) -> int | None:
    """``VmRSS`` or ``VmHWM`` of this process in bytes; None where there is no /proc."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return 1024 * int(line.split()[1])
    return None


class Memory:
    """Peak memory since it was made: resident bytes of the process, or on a GPU allocated bytes of torch."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        with contextlib.suppress(OSError, AttributeError):
            # else memory freed before counts as there and is used again unseen
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.before = resident("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here (proc(5))
        except OSError:
            self.before = None

    def peak(self) -> int | None:
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.before
        return None if self.before is None else resident("VmHWM") - self.before


class Worker:
    def __init__(self, name: str, case: Case, path: Path, device: str):
        if name in (cases.OURS, cases.CORED, cases.SPARSE, cases.MATRICES):
            # what every notebook of ours calls, deterministic kernels included
            runtime.prepare(cases.THREADS)
        else:
            if case.kind != "installed":
                # as prepare does: faster for the peers as well, at the price of memory
                runtime.keep_freed_memory()
            torch.set_num_threads(cases.THREADS)
        self.inputs, dead = inputs.load(path, case.shape, case.dead, device)
        self.device, self.taken = device, 0
        torch.mm(
            self.inputs["x"][0], self.inputs["x"][0].T
        )  # the libraries' own start-up is no contestant's memory
        if name == cases.DENSE:
            self.work = contestants.dense_work(case, self.inputs)
            self.contestant = None
        else:
            self.import_libraries(name)
            self.memory = Memory(device)
            self.contestant = contestants.build(name, case, self.inputs, dead, device)
            self.first_loss = None

    @staticmethod
    def import_libraries(name: str) -> None:
        """Before memory is counted."""
        if name == cases.SAELENS:
            import sae_lens.training.sae_trainer  # noqa: F401
        elif name == cases.DICTIONARY:
            import dictionary_learning.trainers.matryoshka_batch_top_k  # noqa: F401
        else:
            import dmsae_lib.sae.training  # noqa: F401

    def clock(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def turn(self, untimed: int, timed: int) -> dict[str, Any]:
        """Seconds of ``timed`` steps after ``untimed`` ones, by the name of what was done."""
        work = self.work if self.contestant is None else {"step": self.contestant.step}
        seconds = {}
        for name, step in work.items():
            seconds[name] = []
            for number in range(untimed + timed):
                x = self.inputs["x"][self.taken % len(self.inputs["x"])]
                self.taken += 1
                start = self.clock()
                result = step(x)
                stop = self.clock()
                if number >= untimed:
                    seconds[name].append(stop - start)
                if self.contestant is not None and self.first_loss is None:
                    self.first_loss = self.contestant.loss(result)
                result = None
        return {"seconds": seconds}

    def summary(self) -> dict[str, Any]:
        if self.contestant is None:
            return {}
        return {
            "first_loss": self.first_loss,
            "dead": self.contestant.dead(),
            "peak_bytes": self.memory.peak(),
            "torch": torch.__version__,
        }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    order = json.loads(sys.stdin.readline())
    case = Case(**{**order["case"], "shape": Shape(**order["case"]["shape"])})
    worker = Worker(order["contestant"], case, Path(order["inputs"]), order["device"])
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        answer = (
            worker.summary() if order["do"] == "summary" else worker.turn(order["untimed"], order["timed"])
        )
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
