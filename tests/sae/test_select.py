"""BatchTopK against a full stable sort, the budget's arithmetic, and the threshold between two values."""

import numpy as np
import pytest
import torch

from dmsae_lib.sae.select import (
    WARM,
    Kept,
    batch_topk,
    between_nth,
    free_budget,
    keep_largest,
    keep_largest_fixed,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def full_selection(a: torch.Tensor, n: int) -> torch.Tensor:
    """The n largest positive entries; a stable descending sort puts the lowest flat index first among
    equals."""
    values, index = a.flatten().sort(descending=True, stable=True)
    mask = torch.zeros(a.numel(), dtype=torch.bool)
    mask[index[:n][values[:n] > 0]] = True
    return mask.view_as(a)


def activations(seed: int, rows: int = 13, latents: int = 37) -> torch.Tensor:
    return torch.randn(rows, latents, generator=torch.Generator().manual_seed(seed)).relu()


def as_mask(kept: Kept, like: torch.Tensor) -> torch.Tensor:
    """Where the list's entries lie; they must be in row-major order, and hold the activations themselves."""
    flat = kept.row * like.shape[1] + kept.latent
    assert bool((flat[1:] > flat[:-1]).all())
    mask = torch.zeros_like(like, dtype=torch.bool)
    mask[kept.row, kept.latent] = kept.value > 0
    assert torch.equal(like[kept.row, kept.latent][kept.value > 0], kept.value[kept.value > 0])
    return mask


def check(pre: torch.Tensor, bias: torch.Tensor, n: int, last_threshold: float) -> None:
    """Plain definition, full sort, fast selection and the one with fixed shapes agree."""
    before, a = pre.clone(), (pre + bias).relu()
    expected = full_selection(a, n)
    smallest = float(a[expected].min()) if expected.any() else 0.0
    mask, plain = batch_topk(a, n)
    assert torch.equal(mask, expected) and float(plain) == smallest
    kept = keep_largest(pre, bias, n, last_threshold)
    assert torch.equal(as_mask(kept, a), expected), (n, last_threshold)
    assert float(kept.smallest) == smallest and bool((kept.value > 0).all())
    assert torch.equal(pre, before)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [0, 1, 2, 50, 150, 10_000])
def test_equals_topk_of_the_flattened_batch(seed, n):
    pre = torch.randn(13, 37, generator=torch.Generator().manual_seed(seed))
    bias = 0.3 * torch.randn(37, generator=torch.Generator().manual_seed(100 + seed))
    for last_threshold in (0.0, 0.1, 1.0, 1.6, 2.0, 50.0):
        check(pre, bias, n, last_threshold)
    a = (pre + bias).relu()
    top = torch.topk(a.flatten(), min(n, a.numel()))
    kept = keep_largest(pre, bias, n)
    assert sorted(kept.value.tolist()) == sorted(top.values[top.values > 0].tolist())


@pytest.mark.parametrize("n", [0, 1, 2, 50, 150, 400])
@pytest.mark.parametrize("room", [1, 30])
def test_fixed_shapes_keep_the_same(n, room):
    pre = torch.randn(13, 37, generator=torch.Generator().manual_seed(n))
    bias = 0.3 * torch.randn(37, generator=torch.Generator().manual_seed(7))
    a = (pre + bias).relu()
    kept, fixed = keep_largest(pre, bias, n), keep_largest_fixed(pre, bias, torch.tensor(n), n + room)
    assert len(fixed.value) == len(fixed.row) == n + room
    assert torch.equal(as_mask(fixed, a), as_mask(kept, a)) and float(fixed.smallest) == float(kept.smallest)


def test_a_warm_threshold_changes_nothing():
    """Every size of it: below all, above all, and just at, below and above each single value, with and
    without biases."""
    pre = torch.randn(6, 11, generator=torch.Generator().manual_seed(5))
    for scale in (0.0, 0.5, 1000.0):
        bias = scale * torch.randn(11, generator=torch.Generator().manual_seed(6))
        positive = (pre + bias).relu()
        positive = positive[positive > 0].sort().values
        edges = [float(v) / WARM * (1 + step) for v in positive for step in (-1e-4, -1e-7, 0.0, 1e-7, 1e-4)]
        for n in (1, 7, len(positive) - 1, len(positive), len(positive) + 1):
            for last_threshold in [1e-9, 0.1, 100.0, *edges]:
                check(pre, bias, n, last_threshold)


def test_as_many_candidates_as_wanted_leave_the_weaker_ones_out():
    """Exactly n values above the warm limit, and more below it: only the n are kept."""
    kept = keep_largest(torch.tensor([[5.0, 4.0, 1.0, 0.5]]), torch.zeros(4), 2, last_threshold=2.0)
    assert kept.latent.tolist() == [0, 1] and float(kept.smallest) == 4.0


@pytest.mark.parametrize("seed", range(5))
def test_ties_go_to_the_lowest_flat_index(seed):
    a = torch.randint(-2, 5, (9, 14), generator=torch.Generator().manual_seed(seed)).float()
    bias = torch.randint(-1, 2, (14,), generator=torch.Generator().manual_seed(seed)).float()
    for n in range(0, int((a + bias > 0).sum()) + 3, 5):
        for last_threshold in (0.0, 0.5, 1.0, 1.2, 2.3, 4.4, 9.0):
            check(a, bias, n, last_threshold)


def test_ties_by_hand():
    a = torch.tensor([[2.0, 1.0, 2.0], [1.0, 3.0, 2.0]])
    assert batch_topk(a, 3)[0].tolist() == [[True, False, True], [False, True, False]]
    kept = keep_largest(a, torch.zeros(3), 3)
    assert (kept.row.tolist(), kept.latent.tolist()) == ([0, 0, 1], [0, 2, 1])


@pytest.mark.parametrize("last_threshold", [0.0, 0.3])
def test_nothing_there(last_threshold):
    for n in (0, 7):
        kept = keep_largest(torch.zeros(4, 5), torch.zeros(5), n, last_threshold)
        assert [len(part) for part in kept[:3]] == [0, 0, 0] and float(kept.smallest) == 0.0
        check(torch.zeros(4, 5), torch.zeros(5), n, last_threshold)
    assert not bool(keep_largest_fixed(torch.zeros(4, 5), torch.zeros(5), torch.tensor(3), 7).value.any())


@pytest.mark.parametrize(
    "batch, k, core, k_min, kept",
    [
        (10, 8, 0, 1, 80),  # no core: plain BatchTopK
        (10, 8, 30, 1, 50),  # the budget moves by exactly the core's activations
        (10, 8, 69, 1, 11),
        (10, 8, 70, 1, 10),
        (10, 8, 71, 1, 10),
        (10, 8, 500, 1, 10),  # the floor, B k_min
        (10, 8, 500, 3, 30),
        (10, 8, 80, 0, 0),
        (10, 8, 81, 0, 0),
        (1, 320, 319, 1, 1),
    ],
)
def test_budget(batch, k, core, k_min, kept):
    assert int(free_budget(batch, k, torch.tensor(core), k_min)) == kept


@pytest.mark.parametrize("n", [0, 1, 2, 37, 500, 4999])
def test_the_threshold_lets_exactly_n_values_pass(n):
    values = torch.from_numpy(np.random.default_rng(n).gamma(0.7, 2.0, 5000)).float()
    ordered = values.sort(descending=True).values.double()
    threshold = between_nth(values, n)
    assert int((values > threshold).sum()) == n
    if n:
        assert threshold == float(ordered[n - 1] + ordered[n]) / 2


def test_the_threshold_at_the_ends():
    values = activations(3)[activations(3) > 0]
    for n in (len(values), len(values) + 1):
        assert between_nth(values, n) == 0.0  # all are kept
    assert between_nth(values, 0) == float(values.max())
    assert between_nth(values[:0], 0) == between_nth(values[:0], 3) == 0.0
