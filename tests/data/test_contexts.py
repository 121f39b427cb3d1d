"""Contexts: which positions count, leading rows, batches, the hash of the text."""

import math
from types import SimpleNamespace

import pytest
import torch

from dmsae_lib.data.contexts import Contexts, bits_per_byte, tokens_hash

BOS = 0


def random_contexts(seed: int, rows: int = 7) -> Contexts:
    """Ids of 0 (BOS) to 5, BOS inside too, lengths of 1 to 12."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 6, (rows, 12), generator=random, dtype=torch.int32)
    tokens[:, 0] = BOS
    return Contexts(tokens, torch.randint(1, 13, (rows,), generator=random, dtype=torch.int32), BOS)


@pytest.mark.parametrize("seed", range(3))
def test_usable_positions_are_neither_bos_nor_padding(seed):
    contexts = random_contexts(seed)
    usable, counts = contexts.usable(), contexts.usable_count().tolist()
    for row, (tokens, length) in enumerate(zip(contexts.tokens.tolist(), contexts.lengths.tolist())):
        expected = [at < length and token != BOS for at, token in enumerate(tokens)]
        assert usable[row].tolist() == expected and counts[row] == sum(expected)


def test_the_first_rows_hold_just_the_tokens_asked_for():
    contexts = random_contexts(0, rows=30)
    counts = contexts.usable_count().tolist()
    for wanted in (1, 50, sum(counts)):
        rows = len(contexts.first(wanted))
        assert sum(counts[:rows]) >= wanted > sum(counts[: rows - 1])
        assert torch.equal(contexts.first(wanted).tokens, contexts.tokens[:rows])


def test_batches_cover_the_rows_in_order():
    contexts = random_contexts(0)
    found = list(contexts.batches(3, "cpu"))
    assert [len(batch) for batch in found] == [3, 3, 1]
    assert {(batch.tokens.dtype, batch.lengths.dtype) for batch in found} == {(torch.int64, torch.int64)}
    assert torch.equal(torch.cat([batch.tokens for batch in found]), contexts.tokens.long())
    assert torch.equal(torch.cat([batch.lengths for batch in found]), contexts.lengths.long())


def test_the_hash_of_the_text_is_that_of_its_tokens():
    changed = random_contexts(0)
    changed.tokens[3, 1] += 1
    one, same, other = ({"train": each} for each in (random_contexts(0), random_contexts(0), changed))
    assert tokens_hash(one) == tokens_hash(same) != tokens_hash(other)
    assert tokens_hash(one) != tokens_hash({"test": random_contexts(0)})


def test_bits_per_byte_count_the_bytes_of_what_is_predicted():
    """Neither BOS nor padding nor a row's first position; a character may have several bytes."""
    texts = {BOS: "never", 1: "a", 2: "bc", 3: "\u00e9", 4: "\U0001f600", 5: " "}
    contexts = random_contexts(1)
    tokenizer = SimpleNamespace(
        batch_decode=lambda rows: ["".join(texts[int(token)] for token in row) for row in rows]
    )
    targets = [
        int(contexts.tokens[row, at])
        for row in range(len(contexts))
        for at in range(1, int(contexts.lengths[row]))
        if int(contexts.tokens[row, at]) != BOS
    ]
    n_bytes = sum({1: 1, 2: 2, 3: 2, 4: 4, 5: 1}[token] for token in targets)
    expected = 2.5 * len(targets) / math.log(2) / n_bytes
    assert bits_per_byte(2.5, contexts, tokenizer) == pytest.approx(expected)
