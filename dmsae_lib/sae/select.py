"""BatchTopK with a moving budget, as an exact and fast selection, and the threshold that replaces it."""

from typing import NamedTuple

import torch
from torch import Tensor

WARM = 0.9  # candidates are the activations above this share of the last threshold


class Kept(NamedTuple):
    """What a selection keeps of a (batch, latents) matrix, in row-major order; every other entry is 0."""

    row: Tensor  # (n,) int64
    latent: Tensor  # (n,) int64
    value: Tensor  # (n,) positive; with fixed shapes, 0 in entries that fill the list up
    smallest: Tensor  # () the smallest kept value, 0 where nothing is kept


def free_budget(batch_size: int, k: int, n_core_active: Tensor, k_min: int = 1) -> Tensor:
    """How many free activations a batch keeps: max(B k_min, B k - positive core activations), () int64.

    Method section 2: the core is exempt from BatchTopK, and the budget moves so that the total L0 is k.
    """
    return (batch_size * k - n_core_active).clamp(min=batch_size * k_min)


def batch_topk(a: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Mask of the ``n`` largest positive entries of ``a`` (batch, latents), or of all; the smallest of them.

    The plain definition, by a full sort. Ties go to the lowest flat index. The smallest is 0 when nothing is
    kept.
    """
    value, index = a.flatten().sort(descending=True, stable=True)
    n_kept = min(max(n, 0), int((value > 0).sum()))
    mask = torch.zeros(a.numel(), dtype=torch.bool, device=a.device)
    mask[index[:n_kept]] = True
    return mask.view(a.shape), value[n_kept - 1] if n_kept else a.new_zeros(())


def keep_largest(pre: Tensor, bias: Tensor, n: int, last_threshold: float = 0.0) -> Kept:
    """What :func:`batch_topk` keeps of ReLU(pre + bias): ``pre`` (batch, latents), ``bias`` (latents,).

    Only entries above ``WARM * last_threshold`` are looked at first: a pass of comparisons over the matrix
    and a selection among a few per cent of it. Where those are too few all positive entries are looked at, so
    the result does not depend on ``last_threshold``. Neither the sum with ``bias`` nor the ReLU is ever made
    for the whole matrix.
    """
    cut = WARM * last_threshold
    kept = _largest_above(cut, pre, bias, n)
    if cut > 0:
        # Comparing pre with cut - bias rounds otherwise than pre + bias does: an entry that was left out may
        # exceed the cut by this much, and nothing may be kept that it could have displaced.
        rounding = 4 * torch.finfo(pre.dtype).eps * (cut + float(bias.abs().max()))
        if len(kept.value) < n or float(kept.smallest) <= cut + rounding:
            kept = _largest_above(0.0, pre, bias, n)
    return kept


def _largest_above(cut: float, pre: Tensor, bias: Tensor, n: int) -> Kept:
    """The ``n`` largest entries of pre + bias among those above ``cut`` >= 0, exactly so for a cut of 0."""
    width = pre.shape[1]
    index = (pre > cut - bias).view(-1).nonzero().squeeze(1)
    latent = index % width
    value = pre.view(-1).index_select(0, index) + bias.index_select(0, latent)
    if n <= 0 or not len(value):
        return Kept(index[:0], latent[:0], value[:0], value.new_zeros(()))
    if len(value) <= n:
        return Kept(index // width, latent, value, value.min())
    smallest = torch.kthvalue(value, len(value) - n + 1).values
    keep = value >= smallest
    surplus = int(keep.sum()) - n
    if surplus:
        tied = (value == smallest).nonzero().squeeze(1)  # ascending flat indices
        keep[tied[len(tied) - surplus :]] = False
    which = keep.nonzero().squeeze(1)
    index, latent, value = (part.index_select(0, which) for part in (index, latent, value))
    return Kept(index // width, latent, value, smallest)


def keep_largest_fixed(pre: Tensor, bias: Tensor, n: int | Tensor, n_max: int) -> Kept:
    """:func:`keep_largest` for a GPU: every shape is known before, so nothing waits for the host.

    The list has ``n_max`` entries; those beyond the budget ``n``, or not positive, have the value 0.
    Which of several equal values is kept at the very end of the budget is left to the device.
    """
    top = (pre + bias).relu_().flatten().topk(n_max)
    within = torch.arange(n_max, device=pre.device) < n
    value = top.values * within
    smallest = torch.where(value > 0, value, torch.inf).amin()
    order = top.indices.sort()
    row, latent = order.values // pre.shape[1], order.values % pre.shape[1]
    return Kept(row, latent, value[order.indices], torch.where(smallest.isinf(), 0.0, smallest))


def between_nth(values: Tensor, n: int) -> float:
    """A threshold that ``n`` of the positive ``values`` exceed: midway between the n-th largest and the next.

    0 where there are no more than ``n`` values, the largest value for n = 0 (nothing lies above it).
    """
    if len(values) <= n:
        return 0.0
    following = float(torch.kthvalue(values, len(values) - n).values)
    if n == 0:
        return following
    return (float(torch.kthvalue(values, len(values) - n + 1).values) + following) / 2
