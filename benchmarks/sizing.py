"""FLOPs, bytes and memory of the parts of a run, in closed form: the language model's passes and the SAE's.

A multiplication and an addition are two FLOPs. Bytes are what passes between memory and processor: each
operand read and each result written once, plus the passes over large matrices that the code makes beside its
products. Time is the roofline's: per operation the longer of FLOPs / rate and bytes / bandwidth, summed.
Tests hold the FLOPs to torch's own counter on the embedded model and on a training step, and parameters,
memory and disk to real modules and files. :mod:`benchmarks.sizing_stages` puts the parts together to stages.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from dmsae_lib.data.model_folder import resolve
from dmsae_lib.sae.entries import SPARSE_BELOW
from dmsae_lib.store.artifacts import UserError

# architectures whose MLPs have three matrices, and their norms per block
GATED = {"llama": 2, "mistral": 2, "qwen2": 2, "qwen3": 2, "gemma": 2, "gemma2": 4}
# Bytes per element beside the operands of the products, counted from gradients.py. Over (B, d_sae): the
# selection; with dense products f, its gradient and their masks; on CUDA a top-k of fixed shape and copies in
# bfloat16. Over (d_in, d_sae): projection, norm, clip, fused Adam over p, g, m, v, and unit norm; on CUDA
# bfloat16 copies.
SELECT_BYTES, DENSE_BYTES, CUDA_BYTES = 7, 44, 76
WEIGHT_BYTES, CUDA_WEIGHT_BYTES = 108, 46
ENCODE_BYTES = 30  # per entry of an inference encoding: bias, ReLU, threshold, and counting what is above it


@dataclass(frozen=True)
class Op:
    """One kind of work; ``forward``: the language model's, whose share of the peak is not the SAE's."""

    name: str
    flops: float = 0.0
    bytes: float = 0.0
    forward: bool = False

    def __mul__(self, n: float) -> "Op":
        return Op(self.name, n * self.flops, n * self.bytes, self.forward)


@dataclass(frozen=True)
class Machine:
    """Rates in FLOP/s and bytes/s as they are reached, not peaks; ``device``: cpu or cuda; sizes in bytes."""

    name: str
    device: str
    forward: float  # products of the language model
    product: float  # products of the SAE
    bandwidth: float
    memory: float
    cache: float  # a table that fits in here is read from memory once, however often its rows are gathered

    def seconds(self, ops: Iterable[Op]) -> float:
        rate = {True: self.forward, False: self.product}
        return sum(max(op.flops / rate[op.forward], op.bytes / self.bandwidth) for op in ops)


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer without biases; MLPs are gated (three matrices), embeddings tied or not."""

    layers: int
    d_model: int
    d_mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    norms: int = 2  # vectors of d_model per block
    tied: bool = True

    @property
    def block(self) -> int:
        """Weights of one block's matrices: queries and output, keys and values, and the MLP's three."""
        return 2 * self.d_model * self.head_dim * (self.heads + self.kv_heads) + 3 * self.d_model * self.d_mlp

    @property
    def parameters(self) -> int:
        # and the final norm
        outside = self.vocabulary * self.d_model * (1 if self.tied else 2) + self.d_model
        return outside + self.layers * (self.block + self.norms * self.d_model)

    def forward(self, positions: float, blocks: int, context: int, element: int, logits: bool = False) -> Op:
        """A pass through ``blocks`` blocks, and to the logits; attention is eager, over every pair."""
        attention = 4 * context * self.heads * self.head_dim
        flops = blocks * (2 * self.block + attention) + logits * 2 * self.d_model * self.vocabulary
        moved = blocks * element * (24 * self.d_model + 6 * self.d_mlp + 8 * self.heads * context)
        moved += logits * self.vocabulary * (2 * element + 24)  # logits, then float32 for the loss
        return Op("language model forward", positions * flops, positions * moved, forward=True)

    def backward(self, positions: float, blocks: int, context: int, element: int) -> Op:
        """Back from the loss through ``blocks`` blocks to the activations; frozen weights get no gradient."""
        op = self.forward(positions, blocks, context, element, logits=True)
        # attention's products have two inputs
        second = 4 * context * self.heads * self.head_dim * blocks * positions
        return Op("language model backward", op.flops + second, op.bytes, forward=True)


# Gemma 2 technical report (arXiv 2408.00118), tables 1 and 2; it counts both gate matrices, 18432, as one.
# The Hub's weights hold 256,000 of the report's 256,128 vocabulary entries.
PUBLIC = {"google/gemma-2-2b": Shape(26, 2304, 9216, 8, 4, 256, 256_000, norms=4)}


def shape_of(name: str) -> Shape:
    """The shape of a model by name: from the table of public ones, else from its folder's config.json.

    Raises UserError for an architecture whose products are laid out otherwise.
    """
    if name in PUBLIC:
        return PUBLIC[name]
    from transformers import AutoConfig  # it knows what a config.json leaves at its default

    hub = AutoConfig.from_pretrained(resolve(name)).get_text_config()
    if hub.model_type not in GATED:
        known = ", ".join(GATED)
        raise UserError(
            f"model.name is {name}, a {hub.model_type} model: sizing knows {known}; use one of these."
        )
    heads = hub.num_attention_heads
    return Shape(
        layers=hub.num_hidden_layers,
        d_model=hub.hidden_size,
        d_mlp=hub.intermediate_size,
        heads=heads,
        kv_heads=getattr(hub, "num_key_value_heads", None) or heads,
        head_dim=getattr(hub, "head_dim", None) or hub.hidden_size // heads,
        vocabulary=hub.vocab_size,
        norms=GATED[hub.model_type],
        tied=hub.tie_word_embeddings,
    )


@dataclass(frozen=True)
class SAESize:
    """What a MatryoshkaSAE holds; ``prefixes`` without the last, as in the configuration."""

    d_in: int
    d_sae: int
    core: int
    prefixes: tuple[int, ...]

    @property
    def trained(self) -> int:
        """Parameters: free encoder rows, decoder rows, two biases."""
        return (2 * self.d_sae - self.core) * self.d_in + self.d_sae + self.d_in

    @property
    def file(self) -> int:
        """Bytes of sae.safetensors' tensors: parameters and core rows in float32, thresholds in float64."""
        return 4 * (self.trained + self.core * self.d_in) + 16

    @property
    def checkpoint(self) -> int:
        """And Adam's two moments and four step counters, and a counter of tokens per latent."""
        return self.file + 8 * self.trained + 16 + 8 * self.d_sae

    @property
    def training(self) -> int:
        """Bytes that live from step to step: parameters, gradients and both moments in float32; core rows."""
        return 16 * self.trained + 4 * self.core * self.d_in

    def sparse(self, k: int, device: str) -> bool:
        """Whether a training step multiplies active entries alone (the rule of dmsae_lib.sae.entries)."""
        return k < SPARSE_BELOW[device] * (self.d_sae - self.core)

    def step(self, batch: int, k: int, machine: Machine, dead: int = 0) -> list[Op]:
        """One training step, with ``dead`` free latents under AuxK.

        The encoder is one dense product. Decode, the gradient by the activations and the two weight gradients
        take 2 B k d_in each over the active entries (at most k free ones a token), or 2 B (d_sae - c) d_in
        dense.
        """
        d_in, free, core = self.d_in, self.d_sae - self.core, self.core
        cuda = machine.device == "cuda"
        matrix, weights = batch * self.d_sae, d_in * self.d_sae
        operands = 4 * (batch * d_in + weights + matrix)  # of one dense product
        ops = [
            Op("encoder", 2 * batch * d_in * self.d_sae, operands),
            Op("selection", 0, (SELECT_BYTES + cuda * CUDA_BYTES) * matrix),
            Op("core", 6 * batch * core * d_in, 12 * batch * core),
            Op("weights and Adam", 2 * weights, (WEIGHT_BYTES + cuda * CUDA_WEIGHT_BYTES) * weights),
        ]
        if self.sparse(k, machine.device):
            gathered = 16 * batch * k * d_in if 4 * weights > machine.cache else 4 * weights
            # and two gradients written
            ops.append(Op("active entries", 8 * batch * k * d_in, gathered + 8 * weights))
        else:
            ops.append(Op("dense products", 8 * batch * free * d_in, 4 * operands))
            ops.append(Op("dense masks", 0, DENSE_BYTES * matrix))
        if dead:
            rows = free if cuda else dead  # on CUDA shapes are fixed: all latents, most of them 0
            moved = 4 * operands * rows / self.d_sae + 28 * batch * rows
            ops.append(Op("AuxK", 8 * batch * rows * d_in, moved))
        return ops

    def encode(self, tokens: float, first: int | None = None) -> Op:
        """Inference activations of ``tokens``, of all latents or the ``first``, and the counts of them."""
        latents = self.d_sae if first is None else first
        return Op("SAE encode", 2 * tokens * self.d_in * latents, ENCODE_BYTES * tokens * latents)

    def decode(self, tokens: float) -> Op:
        """Reconstructions of ``tokens`` from every prefix, dense."""
        latents = sum(self.core + prefix for prefix in self.prefixes) + self.d_sae
        return Op("SAE decode", 2 * tokens * self.d_in * latents, 4 * tokens * latents)
