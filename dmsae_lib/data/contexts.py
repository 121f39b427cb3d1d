"""What a language model reads: rows of token ids, cut from documents, and which of their positions count."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmsae_lib.store.artifacts import Artifact, Writer


@dataclass(frozen=True)
class Contexts:
    """``tokens`` (rows, positions), each row led by BOS and padded behind its ``lengths`` (rows,).

    Both are int32, a memory map where they were loaded, and int64 in :meth:`batches`.
    """

    tokens: Tensor
    lengths: Tensor
    bos: int

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | Tensor) -> "Contexts":
        return Contexts(self.tokens[rows], self.lengths[rows], self.bos)

    def usable(self) -> Tensor:
        """(rows, positions) bool: neither BOS nor padding. The next-token loss is counted there."""
        inside = torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]
        return inside & (self.tokens != self.bos)

    def usable_count(self) -> Tensor:
        """Usable positions of every row, (rows,)."""
        return self.usable().sum(1)

    def targets(self) -> Iterator[Tensor]:
        """Of every row the token ids that a model is scored on predicting."""
        for tokens, counted in zip(self.tokens[:, 1:], self.usable()[:, 1:]):
            yield tokens[counted]

    def first(self, tokens: int) -> "Contexts":
        """The leading rows that together hold ``tokens`` usable positions."""
        return self[: int(torch.searchsorted(self.usable_count().cumsum(0), tokens)) + 1]

    def batches(self, rows: int, device: str) -> Iterator["Contexts"]:
        """In order, ``rows`` at a time, int64 on ``device``."""
        for start in range(0, len(self), rows):
            part = self[start : start + rows]
            yield Contexts(part.tokens.long().to(device), part.lengths.long().to(device), self.bos)

    def save(self, writer: Writer, name: str) -> None:
        writer.tensors(f"{name}.safetensors", {"tokens": self.tokens, "lengths": self.lengths})

    @classmethod
    def load(cls, artifact: Artifact, name: str, bos: int) -> "Contexts":
        return cls(**artifact.tensors(f"{name}.safetensors"), bos=bos)


def bits_per_byte(nats_per_token: float, contexts: Contexts, tokenizer: Any) -> float:
    """A next-token loss per byte of the text (UTF-8) that is predicted, which compares across tokenizers."""
    targets = list(contexts.targets())
    n_bytes = sum(len(text.encode("utf-8", "replace")) for text in tokenizer.batch_decode(targets))
    return nats_per_token * sum(map(len, targets)) / n_bytes / math.log(2)


def tokens_hash(splits: dict[str, Contexts]) -> str:
    """sha256 over the token ids of all splits: what text was used, whatever it was read from."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        digest.update(name.encode() + splits[name].tokens.numpy().tobytes())
    return digest.hexdigest()


class ContextBuilder:
    """Cuts a stream of documents into rows of ``context_size`` tokens, each starting with BOS.

    ``pack``: documents follow each other with BOS between; what does not fit in a row goes on in the next.
    ``one_per_row``: each document fills one row at most; its tail is dropped (the recipe of SAEBench's SAEs).
    """

    def __init__(self, context_size: int, packing: str, bos: int):
        self.size, self.packing, self.bos = context_size, packing, bos
        self.rows: list[np.ndarray] = []  # a Python list would take nine times the memory
        self.current = [bos]
        self.usable = 0  # positions in the rows that are closed

    def close_row(self) -> None:
        """Ends the current row, if anything but BOS is in it."""
        if len(self.current) > 1:
            self.rows.append(np.array(self.current, dtype=np.int32))
            self.usable += len(self.current) - self.current.count(self.bos)
        self.current = [self.bos]

    def add(self, tokens: list[int]) -> None:
        """One document's token ids, without BOS."""
        if self.packing == "one_per_row":
            self.current += tokens[: self.size - 1]
            self.close_row()
            return
        stream = [self.bos, *tokens] if len(self.current) > 1 else tokens  # a boundary inside the row
        start = 0
        while start < len(stream):
            stop = start + self.size - len(self.current)
            self.current += stream[start:stop]
            start = stop
            if len(self.current) == self.size:
                self.close_row()

    def contexts(self) -> Contexts:
        """The closed rows, padded with BOS."""
        lengths = torch.tensor([len(row) for row in self.rows], dtype=torch.int32)
        tokens = np.full((len(self.rows), self.size), self.bos, dtype=np.int32)
        for i, row in enumerate(self.rows):
            tokens[i, : len(row)] = row
        return Contexts(torch.from_numpy(tokens), lengths, self.bos)
