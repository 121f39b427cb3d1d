"""One training step in closed form: the page to read.

:func:`step_gradients` computes the loss and all gradients of a Matryoshka SAE with a frozen core; tests hold it to
autograd. :func:`apply_step` is the Adam step with unit-norm decoder rows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dmsae_lib.sae import MatryoshkaSAE
from dmsae_lib.sparsity import batch_topk, non_core_budget


@dataclass
class StepStats:
    """What one step knows anyway. ``loss`` is the objective; fvu is that of the full reconstruction on the batch."""

    loss: Tensor
    aux: Tensor
    fvu: Tensor
    l0_core: float
    l0_free: float
    smallest_kept: Tensor
    fired: Tensor  # (d_sae,) bool


@torch.no_grad()
def step_gradients(sae: MatryoshkaSAE, x: Tensor, k: int, k_min: int = 1, aux_alpha: float = 1 / 32,
                   k_aux: int = 0, dead: Tensor | None = None, last_threshold: float = 0.0,
                   bf16: bool = False) -> StepStats:
    """Fill ``.grad`` of the SAE's four parameters with the gradient of the objective on the batch ``x`` (B, d_in).

        L = sum_j mean_b ||x - xhat_j||^2  +  aux_alpha * L_aux                                     (method, section 1)

    over the nested reconstructions xhat_j, all of which contain b_dec and the whole core. With e_j = xhat_j - x, a
    latent of segment j sees the suffix sum S_j = e_j + e_(j+1) + ..., so each weight takes part in one matrix product
    forward and one or two backward, as if there were no nesting.

    Args:
        k, k_min: target total L0 and floor of the free latents' L0 (method, section 2).
        dead: indices of the dead free latents, counted from the first free one; AuxK acts on them alone.
        last_threshold: last step's smallest kept activation, to look at few candidates; changes nothing in the result.
        bf16: matrix products in bfloat16; everything else, weights and sums over prefixes included, stays float32.
    """
    batch, c = len(x), sae.n_core
    centred = x - sae.b_dec
    f_core = product(centred, sae.core_rows.T, bf16).add_(sae.b_enc[:c]).relu_()
    a = product(centred, sae.free_rows.T, bf16).add_(sae.b_enc[c:]).relu_()  # (B, d_sae - c), before selection

    if sae.core_sparsity == "relu":
        budget = non_core_budget(batch, k, int(torch.count_nonzero(f_core)), k_min)
        mask, smallest = batch_topk(a, budget, last_threshold)
    else:
        joint, smallest = batch_topk(torch.cat([f_core, a], dim=1), batch * k, last_threshold)
        f_core, mask = f_core * joint[:, :c], joint[:, c:]
    f = a * mask

    # Nested errors, each from the one before: e_j = e_(j-1) + (segment j) W_dec
    bounds = [0, *sae.prefixes]
    errors = [sae.b_dec - x + product(f_core, sae.W_dec[:c], bf16)]
    for j, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        errors.append(errors[j] + product(f[:, start:stop], sae.W_dec[c + start : c + stop], bf16))
    errors = errors[1:]  # there is no core-only term
    loss = sum(e.square().sum(dtype=torch.float64) for e in errors) / batch
    residual = -errors[-1]
    variance = (x - x.mean(0)).square().sum(dtype=torch.float64)
    fvu = errors[-1].square().sum(dtype=torch.float64) / variance

    # Backward, from the outermost segment in
    grad_dec = torch.empty_like(sae.W_dec)
    grad_f = torch.empty_like(f)
    suffix = torch.zeros_like(x)
    for j in reversed(range(len(errors))):
        suffix += errors[j]
        start, stop = bounds[j], bounds[j + 1]
        grad_dec[c + start : c + stop] = product(f[:, start:stop].T, suffix, bf16)
        grad_f[:, start:stop] = product(suffix, sae.W_dec[c + start : c + stop].T, bf16)
    grad_dec[:c] = product(f_core.T, suffix, bf16)
    grad_core = where_active(product(suffix, sae.W_dec[:c].T, bf16), f_core)
    grad_f = where_active(grad_f, f)
    unit = 2 / batch
    grad_dec.mul_(unit), grad_f.mul_(unit), grad_core.mul_(unit)
    grad_b_dec = suffix.sum(0) * unit

    aux = x.new_zeros((), dtype=torch.float64)
    if dead is not None and len(dead) and k_aux > 0:
        aux = _add_aux(sae, a, residual, dead, k_aux, aux_alpha, grad_dec, grad_f)
        loss = loss + aux_alpha * aux

    sae.free_rows.grad = product(grad_f.T, centred, bf16)
    sae.W_dec.grad = grad_dec
    sae.b_enc.grad = torch.cat([grad_core.sum(0), grad_f.sum(0)])
    rows = torch.cat([sae.core_rows, sae.free_rows])
    sae.b_dec.grad = grad_b_dec - sae.b_enc.grad @ rows  # b_dec is subtracted before the encoder, too

    fired = torch.cat([f_core.amax(0), f.amax(0)]) > 0
    active = torch.count_nonzero(f_core), torch.count_nonzero(mask)
    return StepStats(loss, aux, fvu, int(active[0]) / batch, int(active[1]) / batch, smallest, fired)


def product(left: Tensor, right: Tensor, bf16: bool) -> Tensor:
    """``left @ right`` in float32, multiplied in bfloat16 if asked for: autocast over float32 weights, spelled out."""
    return (left.bfloat16() @ right.bfloat16()).float() if bf16 else left @ right


def where_active(grad: Tensor, f: Tensor) -> Tensor:
    """``grad`` where ``f`` > 0, else 0: ReLU's own backward, one pass where a product with a mask takes two."""
    return torch.ops.aten.threshold_backward(grad, f, 0)


def _add_aux(sae: MatryoshkaSAE, a: Tensor, residual: Tensor, dead: Tensor, k_aux: int, alpha: float,
             grad_dec: Tensor, grad_f: Tensor) -> Tensor:
    """AuxK: the ``k_aux`` strongest dead latents of each row reconstruct the detached residual.

    L_aux = mean_b ||r - rhat||^2 / mean_b ||r - mean r||^2, on activations before selection: otherwise dead latents get
    no gradient (dictionary_learning after 13 Jan 2025). Adds its gradients in place and returns L_aux.
    """
    c = sae.n_core
    a_dead = a[:, dead]
    if k_aux < len(dead):
        kept = torch.zeros_like(a_dead, dtype=torch.bool).scatter_(1, a_dead.topk(k_aux, dim=1).indices, True)
        a_dead = a_dead * kept
    error = a_dead @ sae.W_dec[c + dead] - residual
    variance = (residual - residual.mean(0)).square().sum(dtype=torch.float64)
    if variance == 0:
        return variance
    unit = 2 * alpha / float(variance)
    grad_dec[c + dead] += (a_dead.T @ error) * unit
    grad_f[:, dead] += where_active(error @ sae.W_dec[c + dead].T, a_dead) * unit
    return error.square().sum(dtype=torch.float64) / variance


@torch.no_grad()
def apply_step(sae: MatryoshkaSAE, optimizer: torch.optim.Optimizer, grad_clip: float) -> Tensor:
    """One Adam step with unit-norm decoder rows; returns the gradient's norm before clipping.

    The gradient part along each decoder row is removed, since the row is scaled back to norm 1 afterwards.
    """
    grad = sae.W_dec.grad
    grad -= (grad * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
    norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), grad_clip)
    optimizer.step()
    sae.W_dec.copy_(F.normalize(sae.W_dec, dim=1))
    return norm
