"""One training step in closed form: the page to read.

:func:`step_gradients` computes the loss and all gradients of a Matryoshka SAE with a frozen core, working on
active entries where that is faster; ``tests/reference.py`` has the same in plain autograd, and tests hold one
to the other. :func:`apply_step` is the Adam step with unit-norm decoder rows.

With ``fixed_shapes``, which CUDA uses, nothing here waits for the device. That path is tested on a CPU; it
was not run on a GPU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dmsae_lib.sae.entries import entries, product, where_active
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.sae.select import Kept, free_budget, keep_largest, keep_largest_fixed


@dataclass
class StepStats:
    """What one step knows anyway, as tensors without dimensions, so that nobody waits for them unasked."""

    loss: Tensor  # the objective, float64
    aux: Tensor  # L_aux
    fvu: Tensor  # of the full reconstruction on the batch
    l0_core: Tensor
    l0_free: Tensor
    smallest_kept: Tensor
    fired: Tensor  # (d_sae,) bool


@torch.no_grad()
def step_gradients(
    sae: MatryoshkaSAE,
    x: Tensor,
    k: int,
    k_min: int = 1,
    aux_alpha: float = 1 / 32,
    k_aux: int = 0,
    dead: Tensor | None = None,
    last_threshold: float = 0.0,
    bf16: bool = False,
    fixed_shapes: bool = False,
) -> StepStats:
    """Fill ``.grad`` of the SAE's four parameters with the objective's gradient on the batch ``x`` (B, d_in).

        L = sum_j mean_b ||x - xhat_j||^2  +  aux_alpha * L_aux                         (method, section 1)

    over the nested reconstructions xhat_j, all of which contain b_dec and the whole core. With e_j = xhat_j -
    x, a latent of segment j sees the suffix sum S_j = e_j + e_(j+1) + ..., so each weight takes part in one
    product forward and one or two backward, as if there were no nesting. The core fires often and is small:
    its products are dense.

    Args:
        k, k_min: target total L0 and floor of the free latents' L0 (method, section 2).
        dead: (d_sae - c,) bool, the dead free latents; AuxK acts on them alone. None: there are none.
        last_threshold: last step's smallest kept activation, to look at few candidates; changes no result.
        bf16: matrix products in bfloat16; everything else, weights and sums over prefixes too, in float32.
        fixed_shapes: shapes that are known beforehand, at the cost of some work; no result differs.
    """
    batch, c, bounds = len(x), sae.n_core, [0, *sae.prefixes]
    centred = x - sae.b_dec
    f_core, pre, kept = _select(sae, centred, k, k_min, last_threshold, bf16, fixed_shapes)
    free = entries(kept, batch, bounds, k, bf16)

    # Nested errors, each from the one before: e_j = e_(j-1) + (segment j) W_dec
    errors = free.segments(sae.W_dec[c:])  # (B, segments, d_in)
    errors[:, 0] += sae.b_dec - x + product(f_core, sae.W_dec[:c], bf16)  # there is no core-only term
    for j in range(1, len(bounds) - 1):
        errors[:, j] += errors[:, j - 1]
    loss = _sum_of_squares(errors) / batch
    residual = -errors[:, -1]
    fvu = _sum_of_squares(residual) / _sum_of_squares(x - x.mean(0))

    # Backward: errors become their suffix sums, times the 2 / B of the mean square
    for j in reversed(range(len(bounds) - 2)):
        errors[:, j] += errors[:, j + 1]
    suffix = errors.mul_(2 / batch)
    core_suffix = suffix[:, 0]  # the core is in every reconstruction
    grad_core = where_active(product(core_suffix, sae.W_dec[:c].T, bf16), f_core)
    rows, biases = free.encoder_gradient(free.gradient(suffix, sae.W_dec[c:]), centred)
    decoder = free.decoder_gradient(suffix)

    aux = loss.new_zeros(())
    if dead is not None and k_aux > 0:
        which = slice(None) if fixed_shapes else dead.nonzero().squeeze(1)
        a_dead = (pre[:, which] + sae.b_enc[c:][which]).relu_()
        if fixed_shapes:
            a_dead *= dead
        W_dead, any_dead = sae.W_dec[c:][which], dead.any()
        gradient, a_dead, aux = _aux_gradient(a_dead, W_dead, residual, k_aux, aux_alpha, any_dead, bf16)
        grad_dead = where_active(product(gradient, W_dead.T, bf16), a_dead)
        decoder[which] += product(a_dead.T, gradient, bf16)
        rows[which] += product(grad_dead.T, centred, bf16)
        biases[which] += grad_dead.sum(0)
        loss = loss + aux_alpha * aux

    sae.free_rows.grad = rows
    sae.W_dec.grad = torch.cat([product(f_core.T, core_suffix, bf16), decoder]) if c else decoder
    sae.b_enc.grad = torch.cat([grad_core.sum(0), biases])
    # b_dec is added to every reconstruction, and subtracted before the encoder
    sae.b_dec.grad = core_suffix.sum(0) - sae.b_enc.grad[:c] @ sae.core_rows - biases @ sae.free_rows
    l0_core, l0_free = (f.count_nonzero().double() / batch for f in (f_core, kept.value))
    times = torch.zeros(sae.d_sae - c, dtype=torch.int32, device=x.device)
    times.index_add_(0, kept.latent, (kept.value > 0).int())
    fired = torch.cat([f_core.amax(0) > 0, times > 0])
    return StepStats(loss, aux, fvu, l0_core, l0_free, kept.smallest, fired)


def _select(
    sae: MatryoshkaSAE, centred: Tensor, k: int, k_min: int, last_threshold: float, bf16: bool, fixed: bool
) -> tuple[Tensor, Tensor, Kept]:
    """The core's activations (B, c), the free rows' products with ``centred`` (B, d_sae - c), what is kept.

    With ``core_sparsity: relu`` the core is a plain ReLU and the free latents get what it leaves of the
    budget; with ``batchtopk`` all compete in one selection.
    """
    batch, c = len(centred), sae.n_core

    def largest(pre: Tensor, bias: Tensor, n: int | Tensor, n_max: int) -> Kept:
        if fixed:
            return keep_largest_fixed(pre, bias, n, min(n_max, pre.numel()))
        return keep_largest(pre, bias, int(n), last_threshold)

    if sae.core_sparsity == "relu" or not c:
        f_core = product(centred, sae.core_rows.T, bf16).add_(sae.b_enc[:c]).relu_()
        pre = product(centred, sae.free_rows.T, bf16)
        budget = free_budget(batch, k, f_core.count_nonzero(), k_min)
        return f_core, pre, largest(pre, sae.b_enc[c:], budget, batch * max(k, k_min))
    pre = product(centred, torch.cat([sae.core_rows, sae.free_rows]).T, bf16)
    row, latent, value, smallest = largest(pre, sae.b_enc, batch * k, batch * k)
    # In either part, the other one's entries stay in the list with the value 0.
    core_value, core_latent = value * (latent < c), latent.clamp(max=c - 1)
    f_core = value.new_zeros(batch, c).index_put_((row, core_latent), core_value, accumulate=True)
    return f_core, pre[:, c:], Kept(row, (latent - c).clamp(min=0), value - core_value, smallest)


def _aux_gradient(
    a: Tensor, W_dec: Tensor, residual: Tensor, k_aux: int, alpha: float, any_dead: Tensor, bf16: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """AuxK: the ``k_aux`` strongest dead latents of each row reconstruct the detached residual.

    L_aux = mean_b ||r - rhat||^2 / mean_b ||r - mean r||^2, on activations ``a`` (B, dead) before selection:
    otherwise dead latents get no gradient (dictionary_learning after 13 Jan 2025). Returns the gradient of
    alpha L_aux by rhat (B, d_in), the activations that take part (B, dead), and L_aux.
    """
    if k_aux < a.shape[1]:
        top = a.topk(k_aux, dim=1, sorted=False)
        a = torch.zeros_like(a).scatter_(1, top.indices, top.values)
    error = product(a, W_dec, bf16) - residual
    variance = _sum_of_squares(residual - residual.mean(0))
    unit = torch.where((variance > 0) & any_dead, 1 / variance, 0.0)
    return error * (2 * alpha * unit).to(error.dtype), a, _sum_of_squares(error) * unit


def _sum_of_squares(vectors: Tensor) -> Tensor:
    """Over the last dimension in the tensor's own type, over all others in float64."""
    return torch.linalg.vector_norm(vectors, dim=-1).double().square().sum()


@torch.no_grad()
def apply_step(sae: MatryoshkaSAE, optimizer: torch.optim.Optimizer, grad_clip: float) -> Tensor:
    """One Adam step with unit-norm decoder rows; returns the gradient's norm before clipping.

    The gradient part along each decoder row is removed, since the row is scaled back to norm 1 afterwards.
    """
    W_dec, grad, parameters = sae.W_dec, sae.W_dec.grad, list(sae.parameters())
    assert grad is not None, "step_gradients comes before"
    grad.addcmul_(torch.linalg.vecdot(grad, W_dec)[:, None], W_dec, value=-1)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if norm.is_cuda or norm > grad_clip:  # asking would wait for a GPU; multiplying by 1 changes nothing
        torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    optimizer.step()
    W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True).clamp_min_(1e-12))
    return norm
