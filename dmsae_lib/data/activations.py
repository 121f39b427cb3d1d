"""Residual activations: stored shards or a stream, the same interface, and the normaliser.

A source yields batches (batch_size, d_in) of usable positions, divided by ``scale`` so that mean ||x||^2 = 1,
with the cursor (epoch, block, offset) from which to go on. Every order is a function of the seed and a name,
so any batch can be made again without replaying the ones before.
"""

import math
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmsae_lib.config.sections import DataConfig
from dmsae_lib.data.contexts import Contexts
from dmsae_lib.data.language_model import LanguageModel, lowered, next_token_loss
from dmsae_lib.store.artifacts import Artifact, UserError, Writer
from dmsae_lib.store.seeds import generator

SHARD_ROWS = 2**18  # a shard file is closed once it holds this many activations
ROUNDING = 1e-6  # of a mean square of float32 numbers: a smaller variance is none
NORM_SAMPLE_ROWS = 64  # contexts from which the median norm is measured

Cursor = tuple[int, int, int]
Batches = Generator[tuple[Tensor, Cursor], None, None]
START: Cursor = (0, 0, 0)


def usable_residuals(model: LanguageModel, contexts: Contexts) -> Iterator[Tensor]:
    """Residuals of the usable positions, (n, d_in) per batch of contexts, in order, unnormalised."""
    for batch, resid in lowered(model, contexts):
        yield resid[model.usable(batch, resid)]


def check_finite(x: Tensor, where: str) -> None:
    """UserError naming ``where`` if ``x`` (n, d_in) holds NaN or Inf: no average survives them."""
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).any(dim=-1).sum())
        raise UserError(
            f"The residuals of {where} hold NaN or Inf at {bad} of {len(x)} positions: look at model.dtype "
            "(a model trained in float32 may overflow in another) and at the model's weights."
        )


def median_norm(model: LanguageModel, contexts: Contexts) -> float:
    """Median ||x|| over the usable positions of the first contexts; the yardstick for outliers."""
    norms = [x.norm(dim=1) for x in usable_residuals(model, contexts[:NORM_SAMPLE_ROWS])]
    return float(torch.cat(norms).median())


class _Shards:
    """Activations on their way to files of SHARD_ROWS rows or a little more."""

    def __init__(self, writer: Writer, dtype: torch.dtype):
        self.writer, self.dtype, self.count = writer, dtype, 0
        self.pending: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        self.pending.append(x.cpu())
        if sum(map(len, self.pending)) >= SHARD_ROWS:
            self.close()

    def close(self) -> None:
        if self.pending:
            x = torch.cat(self.pending).to(self.dtype)
            self.writer.tensors(f"shard_{self.count:04d}.safetensors", {"x": x})
            self.pending, self.count = [], self.count + 1


def harvest(
    writer: Writer,
    model: LanguageModel,
    splits: dict[str, Contexts],
    data: DataConfig,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write tokens, with ``data.store: disk`` the training residuals, and measure what later stages share.

    The scale is sqrt(mean ||x||^2) over the training tokens of one cycle, outliers left out; it is measured
    once and stays the same for every cycle and every k. Sets the model's ``outlier_limit``. Returns the
    record for record.json, without what the notebook adds (model, data, precision, bits_per_byte).
    """
    for name, contexts in splits.items():
        contexts.save(writer, name)
    model.outlier_limit = math.inf
    middle = median_norm(model, splits["train"])
    model.outlier_limit = data.outlier_norm * middle
    shards = _Shards(writer, getattr(torch, model.config.dtype))
    rows_read, total, squares, outliers = 0, 0, 0.0, 0
    summed = torch.zeros(model.d_model, dtype=torch.float64)
    for batch, resid in lowered(model, splits["train"]):
        x = resid[model.usable(batch, resid)]
        outliers += int(batch.usable().sum()) - len(x)
        check_finite(x, f"the train split, contexts {rows_read} to {rows_read + len(batch) - 1}")
        rows_read += len(batch)
        x = x[: data.train_tokens - total]
        total += len(x)
        squares += float(x.square().sum(dtype=torch.float64))
        summed += x.sum(0, dtype=torch.float64).cpu()
        if data.store == "disk":
            shards.add(x)
            if not shards.pending:
                report(f"{total:,} of {data.train_tokens:,} activations")
        if total == data.train_tokens:
            break
    shards.close()
    mean, square = summed / total, squares / total
    if square - float(mean.square().sum()) <= ROUNDING * square:
        what = f"The residuals at {model.hook_name} are the same at every position"
        raise UserError(f"{what}: look at the model's weights, or choose another hook.")
    writer.tensors("mean.safetensors", {"mean": mean.float()})
    losses = reference_losses(model, splits["test"], mean.float().to(model.device))
    if not math.isfinite(sum(losses)):
        found = f"{losses.clean}, with the residual set to zero {losses.zero}"
        what = f"The model's loss on the test split is {found}"
        raise UserError(f"{what}: look at model.dtype and at the model's weights.")
    return {
        "n_tokens": {name: int(contexts.usable_count().sum()) for name, contexts in splits.items()},
        "harvested": total,
        "shards": shards.count,
        "scale": square**0.5,
        "median_norm": middle,
        "outlier_limit": model.outlier_limit,
        "outliers_dropped": outliers,
        **{f"{name}_loss": value for name, value in losses._asdict().items()},
    }


class Losses(NamedTuple):
    """Next-token losses, nats: of the bare model, with the usable residuals set to zero, to their mean."""

    clean: float
    zero: float
    mean: float


@torch.no_grad()
def reference_losses(model: LanguageModel, contexts: Contexts, mean: Tensor) -> Losses:
    """``mean`` (d_in,) is that of the training activations, unnormalised."""
    sums, count = [0.0, 0.0, 0.0], 0
    for batch, resid in lowered(model, contexts):
        usable = model.usable(batch, resid)[..., None]
        loss, n = next_token_loss(model.logits(batch.tokens), batch)
        sums[0], count = sums[0] + float(loss), count + n
        for place, put in ((1, torch.zeros_like(mean)), (2, mean)):
            ablated = model.upper(batch.tokens, torch.where(usable, put.to(resid.dtype), resid))
            sums[place] += float(next_token_loss(ablated, batch)[0])
    return Losses(*(total / count for total in sums))


class StoredActivations:
    """The shards of a harvest artefact: an epoch is one block, drawn from at random without replacement."""

    def __init__(self, artifact: Artifact, scale: float, device: str = "cpu"):
        names = sorted(name for name in artifact.files if name.startswith("shard_"))
        # mapped: pages are read as rows are asked for
        self.shards = [artifact.tensors(name)["x"] for name in names]
        self.ends = torch.tensor([len(shard) for shard in self.shards]).cumsum(0)
        self.scale, self.device = scale, device

    def __len__(self) -> int:
        return int(self.ends[-1])

    def rows(self, index: Tensor) -> Tensor:
        """Normalised activations (len(index), d_in) float32, in the order of ``index`` (int64, CPU)."""
        if len(self.shards) == 1:
            x = self.shards[0].index_select(0, index)
        else:
            x = torch.empty(len(index), self.shards[0].shape[1], dtype=self.shards[0].dtype)
            shard_of = torch.searchsorted(self.ends, index, right=True)
            for number in shard_of.unique().tolist():
                here, shard = (shard_of == number).nonzero().squeeze(1), self.shards[number]
                x[here] = shard.index_select(0, index[here] - (self.ends[number] - len(shard)))
        return (x.float() / self.scale).to(self.device)

    def batches(self, batch_size: int, seed: int, name: str, cursor: Cursor = START) -> Batches:
        """Endless batches; ``name`` and ``seed`` fix the order, the cursor where to start."""
        if len(self) < batch_size:
            raise UserError(
                f"training.batch_size is {batch_size}: the harvest holds {len(self)} activations; lower it, "
                "or raise data.train_tokens or data.outlier_norm."
            )
        epoch, _, offset = cursor
        while True:
            order = torch.randperm(len(self), generator=generator(seed, "order", name, epoch))
            for start in range(offset, len(order) - batch_size + 1, batch_size):
                yield self.rows(order[start : start + batch_size]), (epoch, 0, start + batch_size)
            epoch, offset = epoch + 1, 0


class StreamedActivations:
    """Activations made by the model while they are used: blocks of contexts, shuffled within the block.

    A block's last tokens that do not fill a batch are dropped: fewer than batch_size of about
    buffer_rows * context_size.
    """

    def __init__(self, model: LanguageModel, contexts: Contexts, data: DataConfig, scale: float):
        self.model, self.contexts, self.buffer_rows, self.scale = model, contexts, data.buffer_rows, scale

    def block(self, rows: Tensor) -> Tensor:
        """Normalised activations (n, d_in) of the contexts ``rows``, in order."""
        rows = rows.sort().values
        x = torch.cat(list(usable_residuals(self.model, self.contexts[rows])))
        check_finite(x, f"contexts {rows[0]} to {rows[-1]} of the train split")
        return x / self.scale

    def batches(self, batch_size: int, seed: int, name: str, cursor: Cursor = START) -> Batches:
        """As :meth:`StoredActivations.batches`."""
        epoch, block, offset = cursor
        while True:
            order = torch.randperm(len(self.contexts), generator=generator(seed, "order", name, epoch))
            served = block > 0 or offset > 0
            while block * self.buffer_rows < len(order):
                x = self.block(order[block * self.buffer_rows : (block + 1) * self.buffer_rows])
                served = served or len(x) >= batch_size
                inner = torch.randperm(len(x), generator=generator(seed, "block", name, epoch, block))
                inner = inner.to(x.device)
                for start in range(offset, len(x) - batch_size + 1, batch_size):
                    yield x[inner[start : start + batch_size]], (epoch, block, start + batch_size)
                block, offset = block + 1, 0
            if not served:
                raise UserError(
                    f"data.buffer_rows is {self.buffer_rows}: no block of so many contexts fills one batch "
                    f"of training.batch_size = {batch_size} tokens; raise it."
                )
            epoch, block = epoch + 1, 0
