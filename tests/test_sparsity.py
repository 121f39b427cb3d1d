"""BatchTopK against a full stable sort, the budget's arithmetic, and the calibration against a sort."""

import numpy as np
import pytest
import torch

from dmsae_lib.sparsity import WARM, batch_topk, calibrate, non_core_budget

pytestmark = pytest.mark.usefixtures("one_thread")


def full_selection(a: torch.Tensor, n: int) -> torch.Tensor:
    """The n largest positive entries; a stable descending sort puts the lowest flat index first among equals."""
    values, index = a.flatten().sort(descending=True, stable=True)
    mask = torch.zeros(a.numel(), dtype=torch.bool)
    mask[index[:n][values[:n] > 0]] = True
    return mask.view_as(a)


def activations(seed: int, rows: int = 13, latents: int = 37) -> torch.Tensor:
    return torch.randn(rows, latents, generator=torch.Generator().manual_seed(seed)).relu()


def check(a: torch.Tensor, n: int, last_threshold: float) -> None:
    before = a.clone()
    mask, smallest = batch_topk(a, n, last_threshold)
    assert torch.equal(a, before)
    assert torch.equal(mask, full_selection(a, n)), (n, last_threshold)
    assert float(smallest) == (float(a[mask].min()) if mask.any() else 0.0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [1, 2, 50, 150, 10_000])
def test_equals_topk_of_the_flattened_batch(seed, n):
    a = activations(seed)
    top = torch.topk(a.flatten(), min(n, a.numel()))
    expected = torch.zeros(a.numel(), dtype=torch.bool)
    expected[top.indices[top.values > 0]] = True
    mask, smallest = batch_topk(a, n)
    assert torch.equal(mask.flatten(), expected)
    assert float(smallest) == float(top.values[top.values > 0].min())


def test_a_warm_threshold_changes_nothing():
    """Every size of it: below all, above all, and just at, below and above each single value."""
    a = activations(5, rows=6, latents=11)
    positive = a[a > 0].sort().values
    edges = [float(v) / WARM * (1 + step) for v in positive for step in (-1e-4, 0.0, 1e-4)]
    for n in (1, 7, len(positive) - 1, len(positive), len(positive) + 1):
        for last_threshold in [1e-9, 0.1, 100.0, *edges]:
            check(a, n, last_threshold)


def test_as_many_candidates_as_wanted_leave_the_weaker_ones_out():
    """Exactly n values above the warm limit, and more below it: only the n are kept."""
    mask, smallest = batch_topk(torch.tensor([[5.0, 4.0, 1.0, 0.5]]), 2, last_threshold=2.0)
    assert mask.tolist() == [[True, True, False, False]] and float(smallest) == 4.0


@pytest.mark.parametrize("seed", range(5))
def test_ties_go_to_the_lowest_flat_index(seed):
    a = torch.randint(0, 5, (9, 14), generator=torch.Generator().manual_seed(seed)).float()
    for n in range(0, int((a > 0).sum()) + 3, 5):
        for last_threshold in (0.0, 0.5, 1.0, 1.2, 2.3, 4.4, 9.0):
            check(a, n, last_threshold)
            mask, _ = batch_topk(a, n, last_threshold)
            assert int(mask.sum()) == min(n, int((a > 0).sum()))


def test_ties_by_hand():
    a = torch.tensor([[2.0, 1.0, 2.0], [1.0, 3.0, 2.0]])
    assert batch_topk(a, 3)[0].tolist() == [[True, False, True], [False, True, False]]


@pytest.mark.parametrize("last_threshold", [0.0, 0.3])
def test_nothing_wanted_or_nothing_there(last_threshold):
    a = activations(1)
    for values, n in ((a, 0), (a, -3), (torch.zeros(4, 5), 7), (torch.zeros(4, 5), 0)):
        mask, smallest = batch_topk(values, n, last_threshold)
        assert mask.dtype == torch.bool and mask.shape == values.shape
        assert not mask.any() and float(smallest) == 0.0
    check(a, a.numel(), last_threshold)  # more wanted than positive: all positive ones


@pytest.mark.parametrize("batch, k, core, k_min, kept", [
    (10, 8, 0, 1, 80),  # no core: plain BatchTopK
    (10, 8, 30, 1, 50),  # the budget moves by exactly the core's activations
    (10, 8, 69, 1, 11), (10, 8, 70, 1, 10), (10, 8, 71, 1, 10), (10, 8, 500, 1, 10),  # the floor, B k_min
    (10, 8, 500, 3, 30), (10, 8, 80, 0, 0), (10, 8, 81, 0, 0), (1, 320, 319, 1, 1),
])  # fmt: skip
def test_budget(batch, k, core, k_min, kept):
    assert non_core_budget(batch, k, core, k_min) == kept


@pytest.mark.parametrize("n", [1, 2, 37, 500, 2499])
@pytest.mark.parametrize("resolution, passes", [(8, 2), (2, 15), (3, 8), (64, 2), (4096, 3)])
def test_calibrated_threshold_is_just_below_the_nth_largest(n, resolution, passes):
    """Bracketed from below to max / resolution**passes, plus what float32 comparisons of the bin edges can move."""
    values = torch.from_numpy(np.random.default_rng(n).gamma(0.7, 2.0, 5000)).float()
    nth, top = float(values.sort(descending=True).values[n - 1]), float(values.max())
    threshold = calibrate(lambda: values.split(617), n, resolution, passes)
    rounding = 2**-23 * top
    assert -rounding <= nth - threshold <= top / resolution**passes + rounding
    if (resolution, passes) == (4096, 3):  # finer than float32: at most the n-th value itself is on the other side
        assert n - 1 <= int((values > threshold).sum()) <= n


def test_calibration_does_not_depend_on_the_chunks():
    values = activations(2, 50, 60)
    positive = values[values > 0]
    whole = calibrate(lambda: [positive], 700)
    assert whole == calibrate(lambda: positive.split(1), 700) == calibrate(lambda: [positive[:0], positive, positive[:0]], 700)
    assert whole == calibrate(lambda: [values], 700)  # zeros never count


def test_calibration_with_ties():
    """Equal values pass a threshold together: it lies below the group that holds the n-th largest."""
    values = torch.tensor([1.0] * 10 + [2.0] * 10 + [3.0] * 10)
    for n, group in ((1, 3.0), (10, 3.0), (11, 2.0), (20, 2.0), (21, 1.0), (30, 1.0)):
        threshold = calibrate(lambda: [values], n, resolution=64, passes=2)
        assert group - 3 / 64**2 - 1e-6 <= threshold < group
        assert int((values > threshold).sum()) == int((values >= group).sum())


def test_calibration_at_the_ends():
    values = activations(3)
    positive = int((values > 0).sum())
    assert calibrate(lambda: [values], positive + 1) == 0.0  # fewer than asked for: all are kept
    assert int((values > calibrate(lambda: [values], positive, 64, 2)).sum()) == positive
    for n in (0, -5):
        assert int((values > calibrate(lambda: [values], n)).sum()) == 0
    assert calibrate(lambda: [torch.zeros(10)], 3) == 0.0
    assert calibrate(lambda: [], 3) == 0.0
