"""Calls on a language model, spread over processes of one numerical thread each.

What comes out does not depend on how many processes there are, as long as a call that is made in this one
keeps to one thread, too. Workers only compute; whatever is written, the caller writes.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from dmsae_lib.config.sections import ModelConfig
from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.store.artifacts import UserError
from dmsae_lib.store.process import prepare

Key = TypeVar("Key")
Work = Callable[[LanguageModel, Any], Any]
_model: LanguageModel  # of a worker


class Workers:
    """``n`` processes that hold ``model``, started at the first call; if n is 1 or on a GPU, this one."""

    def __init__(self, model: LanguageModel, n: int = 1):
        self.model, self.n = model, n if model.device == "cpu" else 1
        self._pool: ProcessPoolExecutor | None = None

    def run(self, work: Work, items: Mapping[Key, Any]) -> Iterator[tuple[Key, Any]]:
        """``(key, work(model, item))`` of all items, each as soon as it is there; one exception ends it.

        ``work``: a module's function, or a ``functools.partial`` of one. UserError where a worker was killed.
        """
        if self.n == 1:
            yield from ((key, work(self.model, item)) for key, item in items.items())
            return
        if not self._pool:  # spawned, not forked: a notebook's process has threads, and so has torch
            start = (self.model.config, self.model.device)
            self._pool = ProcessPoolExecutor(self.n, get_context("spawn"), _start, start)
        futures = {self._pool.submit(_call, work, item): key for key, item in items.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"One of {self.n} worker processes was killed, most likely for want of memory: lower "
                "threads, which is their number, and run the same command again."
            ) from error
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """End the processes; a later call starts new ones."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _start(config: ModelConfig, device: str) -> None:
    global _model
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(threads=1)
    _model = LanguageModel(config, device)


def _end_with_parent() -> None:
    """A parent that was killed asks nobody to stop: its workers would wait for work for ever."""
    if parent := parent_process():
        parent.join()
        os._exit(1)


def _call(work: Work, item: Any) -> Any:
    return work(_model, item)
