"""BatchTopK with a moving budget, and the threshold that replaces it at inference."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

WARM = 0.9  # candidates are the activations above this share of the last threshold


def non_core_budget(batch_size: int, k: int, n_core_active: int, k_min: int = 1) -> int:
    """How many non-core activations a batch keeps: max(B k_min, B k - positive core activations).

    Method section 2: the core is exempt from BatchTopK, and the budget moves so that the total L0 is k.
    """
    return max(batch_size * k_min, batch_size * k - n_core_active)


def batch_topk(a: Tensor, n: int, last_threshold: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mask of the ``n`` largest positive entries of ``a`` (batch, latents), and the smallest kept value.

    Exact: only entries above ``WARM * last_threshold`` are looked at first, and all of them where those are too few.
    Ties at the smallest kept value go to the lowest flat index. Fewer than ``n`` positive entries: all are kept.
    The smallest kept value is 0 when nothing is kept.
    """
    flat = a.reshape(-1)
    candidates = flat[flat > WARM * last_threshold] if last_threshold > 0 else flat[flat > 0]
    if candidates.numel() <= n and last_threshold > 0:  # equal as well: below, few candidates mean that all are kept
        candidates = flat[flat > 0]
    if n <= 0 or candidates.numel() == 0:
        return torch.zeros_like(a, dtype=torch.bool), a.new_zeros(())
    if candidates.numel() <= n:
        return a > 0, candidates.min()
    smallest = torch.kthvalue(candidates, candidates.numel() - n + 1).values
    mask = a >= smallest
    surplus = int(mask.sum()) - n
    if surplus:
        tied = (flat == smallest).nonzero().squeeze(1)  # ascending flat indices
        mask.view(-1)[tied[len(tied) - surplus :]] = False
    return mask, smallest


def calibrate(chunks: Callable[[], Iterable[Tensor]], n: int, resolution: int = 4096, passes: int = 3) -> float:
    """The threshold above which ``n`` of all the values in ``chunks()`` lie, to about max / resolution**passes.

    A bisection with ``resolution`` ways per pass: each pass counts the values in equal bins and narrows to the bin
    that holds the n-th largest. Nothing is stored, so any number of tokens can be used.

    Args:
        chunks: called once per pass; yields tensors of non-negative activations.
        n: how many activations shall exceed the threshold.
    """
    low, high = 0.0, max((float(chunk.max()) for chunk in chunks() if chunk.numel()), default=0.0)
    if n <= 0 or high == 0.0:
        return high
    above = 0  # values at or above `high`, counted once `high` has moved below the maximum
    for _ in range(passes):
        width = (high - low) / resolution
        if width == 0.0:
            break
        counts = torch.zeros(resolution, dtype=torch.int64)
        for chunk in chunks():
            inside = chunk[(chunk > low) & (chunk <= high)].double()
            bins = ((inside - low) / width).ceil().long().clamp(1, resolution) - 1
            counts += torch.bincount(bins.cpu(), minlength=resolution)
        from_top = above + counts.flip(0).cumsum(0)
        if int(from_top[-1]) < n:
            return low  # fewer positive activations than asked for: keep all
        steps = int((from_top >= n).nonzero()[0])
        above = int(from_top[steps - 1]) if steps else above
        high, low = high - steps * width, high - (steps + 1) * width
        low = max(low, 0.0)
    return low
