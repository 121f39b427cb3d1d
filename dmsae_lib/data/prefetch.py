"""Items made ahead in a background thread, with back-pressure."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
END = object()


def prefetched(items: Iterator[Item], ahead: int) -> Iterator[Item]:
    """The same items in the same order, at most ``ahead`` of them made before they are asked for; 0: none.

    An exception of ``items`` comes out where its item would have. Closing the result waits for nothing but
    the item that is being made. The thread takes over the caller's number of numerical threads, which decides
    the last bits of what it computes. On a CPU it competes with the training for the cores.
    """
    if ahead == 0:
        yield from items
        return

    @torch.no_grad()
    def make() -> Any:
        return next(items, END)

    thread = ThreadPoolExecutor(1, "prefetch", torch.set_num_threads, (torch.get_num_threads(),))
    try:
        made = deque(thread.submit(make) for _ in range(ahead))
        while (item := made.popleft().result()) is not END:
            made.append(thread.submit(make))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)
