"""Products with sparse activations f (B, n): over the active entries alone, or dense, behind one interface.

:class:`SparseEntries` touches only the entries that are not 0, at 2 d_in FLOPs each; :class:`DenseEntries`
uses matrix products over everything; ``SPARSE_BELOW`` says which is faster. Every latent belongs to one
segment of the nested prefixes. Both sum in float32, in different orders, so results differ in the last bits
(tests hold them to 1e-5).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dmsae_lib.sae.select import Kept

# Share of active entries below which touching those alone is faster. CPU: measured by `make bench`
# (results/bench). CUDA: estimated from 700 TFLOP/s of bfloat16 products against 3.5 TB/s of gathered rows;
# not measured.
SPARSE_BELOW = {"cpu": 0.5, "cuda": 0.0025}


def product(left: Tensor, right: Tensor, bf16: bool) -> Tensor:
    """``left @ right`` in float32, on request multiplied in bfloat16: autocast, spelled out."""
    return (left.bfloat16() @ right.bfloat16()).float() if bf16 else left @ right


class SparseEntries:
    """f as a list of entries. Every sum over a token's or a latent's entries is one ``embedding_bag``."""

    def __init__(self, kept: Kept, batch_size: int, bounds: Sequence[int]):
        """``bounds``: the segments' edges, 0 first and the number of latents last."""
        self.kept, self.n_latents, self.n_segments = kept, bounds[-1], len(bounds) - 1
        self.shape = (batch_size, self.n_segments, -1)
        # Counted edge by edge: a tensor of edges would have to be copied to the device in every step.
        segment = sum(((kept.latent >= edge).long() for edge in bounds[1:-1]), torch.zeros_like(kept.latent))
        self.bag = kept.row * self.n_segments + segment  # ascending
        device = self.bag.device
        bags = torch.arange(batch_size * self.n_segments, device=device)
        self.bag_starts = torch.searchsorted(self.bag, bags)
        by_latent, self.order = kept.latent.int().sort(stable=True)
        self.latent_starts = torch.searchsorted(by_latent, torch.arange(self.n_latents, device=device))

    def segments(self, W_dec: Tensor) -> Tensor:
        """What each segment adds to the reconstruction, (B, segments, d_in)."""
        return _sum_rows(W_dec, self.kept.latent, self.bag_starts, self.kept.value).view(self.shape)

    def gradient(self, output_gradients: Tensor, W_dec: Tensor) -> Tensor:
        """The loss's gradient by each active value, from that by the segments (B, segments, d_in)."""
        table, value = output_gradients.reshape(-1, output_gradients.shape[-1]), self.kept.value
        starts, size = F.pad(self.bag_starts, (0, 1), value=len(value)), (len(table), self.n_latents)
        zeros = torch.zeros_like(value)
        pattern = torch.sparse_csr_tensor(starts, self.kept.latent, zeros, size, check_invariants=False)
        return where_active(torch.sparse.sampled_addmm(pattern, table, W_dec.T, beta=0).values(), value)

    def decoder_gradient(self, output_gradients: Tensor) -> Tensor:
        """(n_latents, d_in): per latent the sum of its values times the output gradients of its segment."""
        table = output_gradients.reshape(-1, output_gradients.shape[-1])
        bag, value = self.bag.index_select(0, self.order), self.kept.value.index_select(0, self.order)
        return _sum_rows(table, bag, self.latent_starts, value)

    def encoder_gradient(self, gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of encoder rows (n_latents, d_in) and biases (n_latents,), from what :meth:`gradient` gives."""
        row, ordered = self.kept.row.index_select(0, self.order), gradient.index_select(0, self.order)
        rows = _sum_rows(x, row, self.latent_starts, ordered)
        return rows, torch.zeros_like(rows[:, 0]).index_add_(0, self.kept.latent, gradient)


def _sum_rows(table: Tensor, index: Tensor, starts: Tensor, weight: Tensor) -> Tensor:
    """Per bag the weighted sum of the table's rows; a bag's entries lie between two ``starts``."""
    return F.embedding_bag(index, table, starts, mode="sum", per_sample_weights=weight)


class DenseEntries:
    """The same with f as a matrix and one matrix product per segment."""

    def __init__(self, f: Tensor, bounds: Sequence[int], bf16: bool = False):
        self.f, self.bf16 = f, bf16
        self.parts = [slice(start, stop) for start, stop in zip(bounds, bounds[1:])]

    def segments(self, W_dec: Tensor) -> Tensor:
        return torch.stack([product(self.f[:, part], W_dec[part], self.bf16) for part in self.parts], dim=1)

    def gradient(self, output_gradients: Tensor, W_dec: Tensor) -> Tensor:
        of = zip(output_gradients.unbind(1), self.parts)
        found = torch.cat([product(g, W_dec[part].T, self.bf16) for g, part in of], dim=1)
        return where_active(found, self.f)

    def decoder_gradient(self, output_gradients: Tensor) -> Tensor:
        of = zip(output_gradients.unbind(1), self.parts)
        return torch.cat([product(self.f[:, part].T, g, self.bf16) for g, part in of])

    def encoder_gradient(self, gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return product(gradient.T, x, self.bf16), gradient.sum(0)


def where_active(grad: Tensor, f: Tensor) -> Tensor:
    """``grad`` where ``f`` > 0, else 0: ReLU's own backward, in one pass (a mask takes two)."""
    return torch.ops.aten.threshold_backward(grad, f, 0)


def entries(
    kept: Kept, batch_size: int, bounds: Sequence[int], k: int, bf16: bool = False
) -> SparseEntries | DenseEntries:
    """The faster of the two for ``k`` active entries a token."""
    if k < SPARSE_BELOW[kept.value.device.type] * bounds[-1]:
        return SparseEntries(kept, batch_size, bounds)
    # The list may name a pair twice, once with the value 0 (see step._select): whichever were written last
    # would stay.
    f, at = kept.value.new_zeros(batch_size, bounds[-1]), (kept.row, kept.latent)
    return DenseEntries(f.index_put_(at, kept.value, accumulate=True), bounds, bf16)
