"""Prefetching: the same items, never too far ahead, errors in their place, and no thread left behind."""

import itertools
import threading
import time

import pytest
import torch

from dmsae_lib.data.prefetch import prefetched


def alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("ahead", [0, 1, 3, 100])
def test_same_items_in_the_same_order(ahead):
    assert list(prefetched(iter(range(20)), ahead)) == list(range(20))
    assert not alive()


@pytest.mark.parametrize("ahead", [1, 4])
def test_back_pressure(ahead):
    made = []

    def items():
        for i in itertools.count():
            made.append(i)
            yield i

    stream = prefetched(items(), ahead)
    for wanted in range(5):
        assert next(stream) == wanted
        time.sleep(0.02)
        assert len(made) <= wanted + 1 + ahead
    assert alive()
    stream.close()
    assert not alive()


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_comes_where_its_item_would_have(ahead):
    def items():
        yield 1
        yield 2
        raise ValueError("third")

    stream, got = prefetched(items(), ahead), []
    with pytest.raises(ValueError, match="third"):
        for item in stream:
            got.append(item)
    assert got == [1, 2] and not alive()


def test_the_thread_computes_as_the_caller_does():
    """Number of numerical threads and no gradients."""

    def items():
        yield torch.get_num_threads(), torch.is_grad_enabled()

    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert list(prefetched(items(), 1)) == [(threads, False)]
    finally:
        torch.set_num_threads(before)
