"""Stored and streamed activations: what is in them, in which order, and where a cursor goes on.

The model here marks its tokens: every usable position of the text has its own id, which can be read off the
residual.
"""

import math
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dmsae_lib.config.sections import DataConfig
from dmsae_lib.data import activations
from dmsae_lib.data.activations import (
    StoredActivations,
    StreamedActivations,
    harvest,
)
from dmsae_lib.data.contexts import Contexts
from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.store.artifacts import UserError, load, write

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
BOS, JUNK, CONTEXT, ROWS = 0, 4000, 8, 30
LOUD = (17, 60, 61, 140)  # ids whose residual is an outlier


class MarkingModel:
    """Residual (id // 16, id % 16, 8, 0); the loud ids have 4096 in the last channel. All exact in
    bfloat16."""

    bos, device, d_model, outlier_limit = BOS, "cpu", 4, math.inf
    usable = LanguageModel.usable

    def __init__(self, dtype: str = "float32", batch_rows: int = 4, loud: tuple = ()):
        self.config, self.loud = SimpleNamespace(dtype=dtype, batch_rows=batch_rows), loud

    def lower(self, tokens):
        loud = torch.isin(tokens, torch.tensor(self.loud, dtype=tokens.dtype))
        return torch.stack(
            [tokens // 16, tokens % 16, torch.full_like(tokens, 8), loud * 4096], dim=-1
        ).float()

    def upper(self, tokens, resid):
        return resid @ torch.ones(4, JUNK + 1)

    def logits(self, tokens):
        return self.upper(tokens, self.lower(tokens))


def make_split(rows: int = ROWS) -> Contexts:
    """BOS in front and inside, padding by BOS in some rows and by an id of its own in others."""
    tokens, lengths = torch.zeros(rows, CONTEXT, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    new = 0
    for row in range(rows):
        lengths[row] = (CONTEXT, 5, CONTEXT, 3)[row % 4]
        for column in range(CONTEXT):
            if column >= lengths[row]:
                tokens[row, column] = JUNK if row % 8 == 1 else BOS
            elif column and not (row % 3 == 0 and column == 2):
                new += 1
                tokens[row, column] = new
    return Contexts(tokens, lengths, BOS)


def usable_ids(contexts: Contexts) -> list[int]:
    return [int(t) for row, n in zip(contexts.tokens, contexts.lengths) for t in row[:n] if t != BOS]


def ids_of(x: torch.Tensor, scale: float) -> list[int]:
    x = (x * scale).round().long()
    assert bool((x[:, 2] == 8).all())
    return (16 * x[:, 0] + x[:, 1]).tolist()


def settings(train_tokens: int, **changes) -> DataConfig:
    return DataConfig(source="embedded", train_tokens=train_tokens, select_tokens=1, test_tokens=1, **changes)


def harvested(folder, train_tokens: int, model: MarkingModel | None = None, **changes):
    """A harvest artefact of the marked text, and its record."""
    split = make_split()
    with write(folder, "harvest") as writer:
        record = harvest(
            writer,
            model or MarkingModel(),
            {"train": split, "select": make_split(2), "test": make_split(2)},
            settings(train_tokens, **changes),
            report=lambda _: None,
        )
    return load(folder, "harvest"), record


ALL = usable_ids(make_split())


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(activations, "SHARD_ROWS", 30)


@pytest.fixture
def stored(small_shards, tmp_path) -> StoredActivations:
    artifact, record = harvested(tmp_path / "harvest", len(ALL))
    return StoredActivations(artifact, record["scale"])


def streamed(buffer_rows: int = 7, scale: float = 2.0, **model) -> StreamedActivations:
    marking = MarkingModel(**model)
    marking.outlier_limit = 1000.0
    return StreamedActivations(marking, make_split(), settings(1, buffer_rows=buffer_rows), scale)


def take(source, batches: int, batch_size: int = 8, seed: int = 0, name: str = "a", cursor=(0, 0, 0)):
    return list(islice(source.batches(batch_size, seed, name, cursor), batches))


# ---------------------------------------------------------------------------------------- the harvest


def test_the_text_has_what_it_is_meant_to_have():
    split = make_split()
    assert len(ALL) == len(set(ALL)) == 141 and JUNK in split.tokens and (split.tokens[:, 1:] == BOS).any()
    counts = [sum(t != BOS for t in row[:n]) for row, n in zip(split.tokens, split.lengths)]
    assert split.usable_count().tolist() == counts


def test_the_harvest_holds_the_usable_tokens_in_order(stored):
    assert len(stored.shards) > 2 and len(stored) == len(ALL)
    assert ids_of(stored.rows(torch.arange(len(ALL))), stored.scale) == ALL  # neither BOS nor padding
    backwards = torch.arange(len(ALL)).flip(0)
    assert ids_of(stored.rows(backwards), stored.scale) == ALL[::-1]  # the order of the index, across shards


def test_record(tmp_path):
    artifact, record = harvested(tmp_path / "harvest", 100)
    x = MarkingModel().lower(torch.tensor(ALL[:100])).double()
    assert (record["harvested"], record["outliers_dropped"]) == (100, 0)
    assert record["n_tokens"]["train"] == len(ALL)
    assert record["scale"] == pytest.approx(float(x.square().sum(1).mean().sqrt()), rel=1e-6)
    norms = MarkingModel().lower(torch.tensor(ALL)).norm(dim=1)
    assert record["median_norm"] == pytest.approx(float(norms.median()), rel=1e-6)
    assert record["shards"] == len(list(artifact.folder.glob("shard_*.safetensors")))


def test_mean_squared_norm_is_one(stored):
    x = stored.rows(torch.arange(len(stored))).double()
    assert float(x.square().sum(1).mean()) == pytest.approx(1.0, rel=1e-5)


def test_outliers_are_left_out_and_counted(small_shards, tmp_path):
    """Also where the text is just long enough with them: what is left is stored to the last one."""
    artifact, record = harvested(tmp_path / "harvest", len(ALL), MarkingModel(loud=LOUD))
    source = StoredActivations(artifact, record["scale"])
    assert record["harvested"] == len(source) == len(ALL) - len(LOUD)
    assert record["outliers_dropped"] == len(LOUD)
    assert ids_of(source.rows(torch.arange(len(source))), source.scale) == [i for i in ALL if i not in LOUD]
    assert float(source.rows(torch.arange(len(source))).square().sum(1).mean()) == pytest.approx(
        1.0, rel=1e-5
    )


def test_residuals_that_are_all_the_same_are_refused(tmp_path):
    class Constant(MarkingModel):
        hook_name = "blocks.0.hook_resid_post"

        def lower(self, tokens):
            return torch.full((*tokens.shape, 4), 0.1)

    with pytest.raises(UserError, match="blocks.0.hook_resid_post are the same .* look at the model"):
        harvested(tmp_path / "harvest", len(ALL), Constant())


def test_bfloat16_shards(small_shards, tmp_path):
    artifact, record = harvested(tmp_path / "harvest", len(ALL), MarkingModel(dtype="bfloat16"))
    source = StoredActivations(artifact, record["scale"])
    assert {shard.dtype for shard in source.shards} == {torch.bfloat16}
    # two bytes a number, and a header
    assert artifact.path("shard_0000.safetensors").stat().st_size < 2 * 4 * 40 + 200
    x = source.rows(torch.arange(len(ALL)))
    assert x.dtype == torch.float32 and ids_of(x, record["scale"]) == ALL


def test_tokens_are_read_as_they_were_written(tmp_path):
    artifact, _ = harvested(tmp_path / "harvest", 100)
    for name, contexts in (("train", make_split()), ("select", make_split(2))):
        found = Contexts.load(artifact, name, BOS)
        assert found.tokens.dtype == found.lengths.dtype == torch.int32
        assert torch.equal(found.tokens, contexts.tokens) and torch.equal(found.lengths, contexts.lengths)
    assert {path.suffix for path in artifact.folder.iterdir()} == {".safetensors", ".json"}


RESIDENT = r"""
import re, sys, torch
from dmsae_lib.data.activations import StoredActivations
from dmsae_lib.store.artifacts import load

def resident():
    status = open("/proc/self/status").read()
    return sum(int(n) for n in re.findall(r"Rss(?:File|Anon):\s+(\d+)", status))

artifact = load(sys.argv[1], "harvest")
before = resident()
source = StoredActivations(artifact, 1.0)
x = source.rows(torch.arange(0, 6 * 2**15, 2**15))
few = resident()
everything = sum(float(shard.sum()) for shard in source.shards)
print(few - before, resident() - before, float(x.sum()) / len(x), everything)
"""


def test_what_is_not_asked_for_is_not_read(tmp_path):
    """Memory that maps a file counts as resident once it was touched: few of 96 MiB for a few rows."""
    with write(tmp_path / "harvest", "harvest") as writer:
        for shard in range(2):
            writer.tensors(f"shard_{shard:04d}.safetensors", {"x": torch.ones(3 * 2**15, 128)})
    command = [sys.executable, "-c", RESIDENT, tmp_path / "harvest"]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    few, all_of_it, row, everything = map(float, said.stdout.split())
    assert row == 128 and everything == 6 * 2**15 * 128
    assert few < 20_000 < 90_000 < all_of_it  # KiB


@pytest.mark.parametrize("store", ["disk", "stream"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_residual_that_is_no_number_is_named_and_nothing_is_written(store, bad, tmp_path):
    class Broken(MarkingModel):
        def lower(self, tokens):
            return super().lower(tokens).masked_fill((tokens == ALL[50])[..., None], bad)

    row = next(i for i, tokens in enumerate(make_split().tokens) if ALL[50] in tokens)
    first = row // 4 * 4
    with pytest.raises(
        UserError, match=f"of the train split, contexts {first} to {first + 3} hold NaN or Inf at 1 of "
    ):
        harvested(tmp_path / "harvest", len(ALL), Broken(), store=store)
    assert list(tmp_path.iterdir()) == []
    source = StreamedActivations(Broken(), make_split(), settings(1, buffer_rows=7), 2.0)
    with pytest.raises(UserError, match="of the train split hold NaN or Inf at 1 of "):
        take(source, 18)


def test_a_loss_that_is_no_number_is_an_error(tmp_path):
    class Broken(MarkingModel):
        def upper(self, tokens, resid):
            return super().upper(tokens, resid) * float("nan")

    with pytest.raises(UserError, match="loss on the test split is nan.*model.dtype"):
        harvested(tmp_path / "harvest", 100, Broken())


def test_nothing_is_stored_for_streaming(tmp_path):
    artifact, record = harvested(tmp_path / "harvest", 100, store="stream")
    assert not list(artifact.folder.glob("shard_*")) and record["shards"] == 0 and record["harvested"] == 100
    assert record["scale"] == pytest.approx(harvested(tmp_path / "disk", 100)[1]["scale"])


# ---------------------------------------------------------------------------------------- stored: order


@pytest.mark.parametrize("batch_size", [1, 8, 11])
def test_each_token_once_per_epoch(stored, batch_size):
    per_epoch = len(ALL) // batch_size
    found = take(stored, 2 * per_epoch, batch_size)
    for epoch in (0, 1):
        seen = Counter(
            i for x, _ in found[epoch * per_epoch : (epoch + 1) * per_epoch] for i in ids_of(x, stored.scale)
        )
        assert set(seen) <= set(ALL) and set(seen.values()) == {1} and len(seen) == per_epoch * batch_size
    assert [cursor[0] for _, cursor in found] == [0] * per_epoch + [1] * per_epoch
    if batch_size == 1:
        assert [ids_of(x, stored.scale) for x, _ in found[:per_epoch]] != [
            ids_of(x, stored.scale) for x, _ in found[per_epoch:]
        ]


@pytest.mark.parametrize("kind", ["stored", "streamed"])
def test_the_order_depends_on_seed_and_name_alone(kind, request):
    def make():
        return request.getfixturevalue("stored") if kind == "stored" else streamed()

    def batches(**changes):
        torch.manual_seed(len(changes))  # the global random state plays no part
        return torch.cat([x for x, _ in take(make(), 12, **changes)])

    assert torch.equal(batches(), batches()) and torch.equal(batches(seed=0, name="a"), batches())
    assert not torch.equal(batches(seed=1), batches()) and not torch.equal(batches(name="b"), batches())


def test_the_order_does_not_depend_on_the_shards(stored, tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "SHARD_ROWS", 10**6)
    artifact, record = harvested(tmp_path / "one", len(ALL))
    one = StoredActivations(artifact, record["scale"])
    assert len(one.shards) == 1 < len(stored.shards)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(take(stored, 20), take(one, 20)))


@pytest.mark.parametrize("kind", ["stored", "streamed"])
def test_going_on_from_any_cursor_equals_never_stopping(kind, request):
    source = request.getfixturevalue("stored") if kind == "stored" else streamed()
    whole = take(source, 45)  # into the third epoch
    assert whole[-1][1][0] == 2
    for stop in (1, 2, 16, 17, 18, 30, 44):
        again = take(source, 45 - stop, cursor=whole[stop - 1][1])
        assert [cursor for _, cursor in again] == [cursor for _, cursor in whole[stop:]]
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(again, whole[stop:]))


# ---------------------------------------------------------------------------------------- streamed


def test_the_stream_holds_what_is_stored(stored):
    """With batches of one nothing is left over: the same values, each once."""
    source = streamed(scale=stored.scale)
    found = torch.cat([x for x, _ in take(source, len(ALL), batch_size=1)])
    assert sorted(ids_of(found, stored.scale)) == sorted(ALL)
    order = torch.tensor(ids_of(found, stored.scale)).argsort()
    assert torch.equal(found[order], stored.rows(torch.arange(len(ALL))))
    blocks = -(-ROWS // 7)
    seen = []
    for x, cursor in source.batches(6, 0, "a"):
        if cursor[0] > 0:
            break
        seen += ids_of(x, stored.scale)
    assert len(seen) == len(set(seen)) and set(seen) <= set(ALL)
    assert len(ALL) - 5 * blocks <= len(seen) <= len(ALL)  # less than a batch of each block is dropped


def test_the_stream_leaves_outliers_out():
    source = streamed(loud=LOUD)
    found = take(source, len(ALL) - len(LOUD), batch_size=1)
    assert sorted(ids_of(torch.cat([x for x, _ in found]), 2.0)) == sorted(set(ALL) - set(LOUD))


def test_the_stream_does_not_depend_on_the_forward_batches():
    assert all(
        torch.equal(a, b) for (a, _), (b, _) in zip(take(streamed(), 20), take(streamed(batch_rows=1), 20))
    )


def test_too_small_a_buffer_says_so_instead_of_looping():
    with pytest.raises(UserError, match="data.buffer_rows is 2.*training.batch_size = 50"):
        take(streamed(buffer_rows=2), 1, batch_size=50)


def test_too_few_stored_activations_say_so(stored):
    with pytest.raises(UserError, match="training.batch_size is 150: the harvest holds 141 activations"):
        take(stored, 1, batch_size=150)
