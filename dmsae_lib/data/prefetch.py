"""Items made ahead in a background thread, with back-pressure."""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

import torch

Item = TypeVar("Item")


def prefetched(items: Iterator[Item], ahead: int) -> Iterator[Item]:
    """The same items in the same order, at most ``ahead`` of them made before they are asked for; 0: none.

    An exception of ``items`` comes out where its item would have. Closing the result ends the thread, which
    waits for nothing but the item it is at. The thread takes over the caller's number of numerical threads,
    which decides the last bits of what it computes. On a CPU it competes with the training for the cores.
    """
    if ahead == 0:
        yield from items
        return
    made: queue.Queue[tuple[str, Item | BaseException | None]] = queue.Queue(ahead)
    stop, threads = threading.Event(), torch.get_num_threads()

    def put(kind: str, what: Item | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                made.put((kind, what), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        torch.set_num_threads(threads)
        try:
            with torch.no_grad():
                for item in items:
                    if not put("item", item):
                        return
            put("end", None)
        except BaseException as error:  # whatever it is, it belongs to the caller
            put("error", error)

    thread = threading.Thread(target=make, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, what = made.get()
            if kind == "end":
                return
            if kind == "error":
                raise what
            yield what
    finally:
        stop.set()
        thread.join()
