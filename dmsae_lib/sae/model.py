"""The Matryoshka SAE with a frozen core, as a type for each gauge.

:class:`MatryoshkaSAE` reads activations that were divided by one scale, so that mean ||x||^2 = 1: it is what
is trained, distilled and stored. :class:`FoldedSAE` is the same SAE for the model's own activations: what is
measured and exported.

Latents 0:c are the core: their encoder rows are a buffer, so no optimiser, clip norm or weight decay can
reach them. Latents c:d_sae are free. A reconstruction from prefix m uses all of the core and the first m free
latents.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmsae_lib.store.artifacts import Artifact, UserError, Writer

THRESHOLDS = {"threshold", "threshold_ema"}  # float64


class _NestedSAE(nn.Module):
    """Encoder ReLU((x - b_dec) W_enc + b_enc), nested decoders, unit-norm decoder rows.

    At inference the core is a plain ReLU and a free latent counts only above ``threshold`` (with
    ``core_sparsity`` ``batchtopk`` the threshold holds for the core as well).

    Attributes:
        core_rows: (c, d_in) buffer, the frozen encoder rows.
        free_rows: (d_sae - c, d_in) parameter, the encoder rows of the free latents.
        W_dec: (d_sae, d_in); b_enc: (d_sae,); b_dec: (d_in,).
        threshold, threshold_ema: () float64, in units of an activation; the first is the calibrated one. An
            SAE that was trained elsewhere may have one for each latent, (d_sae,).
    """

    core_rows: Tensor
    threshold: Tensor
    threshold_ema: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        prefixes: Sequence[int],
        core_rows: Tensor | None = None,
        core_sparsity: str = "relu",
    ):
        """``prefixes``: increasing cumulative free sizes without the last, d_sae - c, which is implied."""
        super().__init__()
        core_rows = torch.empty(0, d_in) if core_rows is None else core_rows
        n_core = len(core_rows)
        if d_sae - n_core <= (prefixes[-1] if prefixes else 0):
            raise UserError(
                f"sae.d_sae is {d_sae}: a core of {n_core} and the prefixes {list(prefixes)} need more; "
                "raise sae.d_sae, or lower sae.prefixes or distill.coverage."
            )
        self.d_in, self.d_sae, self.n_core, self.core_sparsity = d_in, d_sae, n_core, core_sparsity
        self.prefixes = (*prefixes, d_sae - n_core)
        self.register_buffer("core_rows", core_rows.detach().clone())
        self.free_rows = nn.Parameter(torch.zeros(d_sae - n_core, d_in))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        for name in sorted(THRESHOLDS):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As torch's, for any cast or move; but a rounded threshold would let other latents through."""
        before = {name: getattr(self, name) for name in THRESHOLDS}
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float64:
                setattr(self, name, value.to(moved.device))
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """As torch's; an SAE from elsewhere may have thresholds (d_sae,)."""
        for name in THRESHOLDS & state_dict.keys():
            setattr(self, name, getattr(self, name).new_empty(state_dict[name].shape))
        return super().load_state_dict(state_dict, *args, **options)

    @property
    def W_enc(self) -> Tensor:
        """(d_in, d_sae), core columns first."""
        return torch.cat([self.core_rows, self.free_rows]).T

    def pre_activations(self, x: Tensor, first: int | None = None) -> Tensor:
        """ReLU((x - b_dec) W_enc + b_enc), unselected: (..., d_sae), or of the ``first`` latents."""
        n = self.d_sae if first is None else first
        rows = torch.cat([self.core_rows, self.free_rows[: n - self.n_core]])
        return F.relu((x - self.b_dec) @ rows.T + self.b_enc[:n])

    def select(self, a: Tensor, threshold: Tensor | None = None) -> Tensor:
        """Inference activations from pre-activations ``a`` of all latents or of the first ones, (..., n)."""
        threshold = self.threshold if threshold is None else threshold
        keep = a > (threshold[: a.shape[-1]] if threshold.ndim else threshold).to(a.dtype)
        if self.core_sparsity == "relu":
            keep[..., : self.n_core] = True
        return a * keep

    def encode(self, x: Tensor, first: int | None = None) -> Tensor:
        """(..., d_in) to (..., d_sae), or to the activations of the ``first`` latents alone."""
        return self.select(self.pre_activations(x, first))

    def decode(self, f: Tensor) -> Tensor:
        """(..., d_sae) to (..., d_in): the full reconstruction."""
        return f @ self.W_dec + self.b_dec

    def decode_prefix(self, f: Tensor, j: int) -> Tensor:
        """The reconstruction from the core and the first ``prefixes[j]`` free latents, (..., d_in)."""
        n = self.n_core + self.prefixes[j]
        return f[..., :n] @ self.W_dec[:n] + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class FoldedSAE(_NestedSAE):
    """For the model's own activations: what :meth:`MatryoshkaSAE.folded` gives. It is not trained further."""


class MatryoshkaSAE(_NestedSAE):
    """For normalised activations: what is trained."""

    @torch.no_grad()
    def initialise(
        self,
        random: torch.Generator,
        first_batch: Tensor,
        core_decoder: str = "random",
        warm_rows: Tensor | None = None,
    ) -> None:
        """Random unit decoder rows, free encoder rows equal to them, b_enc 0, b_dec the batch's median.

        ``random`` is this SAE's own: two SAEs that draw from one stream start with the same free latents and
        end with them too, so that a core is found again because it was never lost. ``core_decoder: encoder``
        starts the core's decoder rows at its encoder rows, scaled to norm 1: under one BatchTopK for all,
        random ones never catch up with the free latents. ``warm_rows`` (n, d_in) are the encoder rows, not
        frozen, at which the first n free latents start; their decoder rows start as a core's do.
        """
        core = self.core_rows if warm_rows is None else warm_rows
        free = torch.randn(self.d_sae - len(core), self.d_in, generator=random)
        decoder = torch.randn(len(core), self.d_in, generator=random) if core_decoder == "random" else core
        self.W_dec.copy_(F.normalize(torch.cat([decoder, free]), dim=1))
        self.free_rows.copy_(self.W_dec[self.n_core :])
        if warm_rows is not None:
            self.free_rows[: len(warm_rows)] = warm_rows
        self.b_enc.zero_()
        self.b_dec.copy_(geometric_median(first_batch))

    @torch.no_grad()
    def folded(self, scale: float) -> FoldedSAE:
        """The same SAE for the model's own x = ``scale`` z: it gives scale f(z) and scale xhat(z).

        The scale goes into biases and thresholds only; rows stay, so a core row means the same everywhere.
        """
        folded = FoldedSAE(self.d_in, self.d_sae, self.prefixes[:-1], self.core_rows, self.core_sparsity)
        folded.to(self.W_dec.device).load_state_dict(self.state_dict())
        for tensor in (folded.b_enc, folded.b_dec, folded.threshold, folded.threshold_ema):
            tensor.mul_(scale)
        return folded.requires_grad_(False)


def geometric_median(x: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the smallest sum of distances to the rows of ``x`` (Weiszfeld's iteration), (d_in,)."""
    x = x.double()
    point = x.mean(0)
    for _ in range(iterations):
        weight = 1 / (x - point).norm(dim=1).clamp_min(1e-12)
        moved = (weight[:, None] * x).sum(0) / weight.sum()
        if (moved - point).norm() <= tolerance * moved.norm():
            return moved.float()
        point = moved
    return point.float()


def save_sae(writer: Writer, sae: MatryoshkaSAE, scale: float) -> None:
    """Weights, thresholds and what is needed to build the module again, into an artefact being written."""
    sizes = {"d_in": sae.d_in, "d_sae": sae.d_sae, "n_core": sae.n_core, "scale": scale}
    writer.tensors("sae.safetensors", dict(sae.state_dict()))
    writer.json("sae.json", sizes | {"prefixes": sae.prefixes[:-1], "core_sparsity": sae.core_sparsity})


def load_trained(artifact: Artifact) -> MatryoshkaSAE:
    """The SAE of an artefact as it was trained: for normalised activations."""
    sizes, state = artifact.json("sae.json"), artifact.tensors("sae.safetensors")
    core = state["core_rows"]
    sae = MatryoshkaSAE(sizes["d_in"], sizes["d_sae"], sizes["prefixes"], core, sizes["core_sparsity"])
    sae.load_state_dict(state)
    return sae


def load_folded(artifact: Artifact) -> FoldedSAE:
    """The SAE of an artefact for the model's own activations."""
    return load_trained(artifact).folded(artifact.json("sae.json")["scale"])
