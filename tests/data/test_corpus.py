"""Text to contexts: which texts, which split, and that no token is lost on the way."""

import functools
import itertools
import json
import random
import re
import tracemalloc
from collections import Counter, defaultdict

import numpy as np
import pandas as pd
import pytest
import torch

from dmsae_lib.config.sections import DataConfig
from dmsae_lib.data import corpus
from dmsae_lib.data.contexts import ContextBuilder, Contexts
from dmsae_lib.data.corpus import (
    PROBING_SETS,
    SPLITS,
    documents,
    split_documents,
    split_of,
    text_digest,
    tokenise,
)
from dmsae_lib.store.artifacts import UserError

BOS = 0


def data(source: object, **settings: object) -> DataConfig:
    return DataConfig(
        **{"source": str(source), "train_tokens": 400, "select_tokens": 40, "test_tokens": 40} | settings
    )


def word_ids(text: str) -> list[int]:
    """One token, 3 to 99, per word."""
    return [3 + len(word) % 97 for word in text.split()]


class WordTokenizer:
    """Looks like a tokenizer of transformers as far as the corpus uses one."""

    bos_token_id = BOS

    def __call__(
        self, texts: list[str], add_special_tokens: bool, verbose: bool
    ) -> dict[str, list[list[int]]]:
        assert not add_special_tokens and not verbose  # no warning of long documents
        return {"input_ids": [word_ids(text) for text in texts]}


# The embedded text


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    """Every labelled set of the wheel."""
    return {
        name: pd.read_csv(path, usecols=["prompt", "target"]) for name, path in corpus.wheel_sets().items()
    }


@pytest.fixture(scope="module")
def wheel(tables) -> dict[str, set[str]]:
    return {name: set(table["prompt"].astype(str)) for name, table in tables.items()}


@pytest.fixture(scope="module")
def embedded() -> list[str]:
    return corpus.embedded_texts()


def test_probing_sets_share_no_text_and_hold_two_classes(tables, wheel):
    binary = {name for name, table in tables.items() if table["target"].nunique() == 2}
    assert (len(tables), len(binary)) == (155, 113)  # the wheel is pinned
    assert set(PROBING_SETS) <= binary and len(PROBING_SETS) >= 20
    for one, other in itertools.combinations(PROBING_SETS, 2):
        assert not wheel[one] & wheel[other], (one, other)


@functools.cache
def start(text: str) -> str:
    """What near-duplicates have in common, by other means than the corpus's."""
    letters = re.sub(r"[\W_]+", "", text.casefold())
    return (letters[:256] if len(letters) >= 256 else letters[:64]) or text


def test_nothing_is_learned_from_probing_hate_toxicity_and_spam_sets(wheel, embedded):
    texts = set(embedded)
    left_out = [name for name in wheel if any(word in name for word in ("hate", "toxic", "spam"))]
    assert len(left_out) == 4
    withheld = set().union(*(wheel[name] for name in (*PROBING_SETS, *left_out)))
    starts = set(map(start, withheld))
    used = {name: wheel[name] - withheld for name in wheel if name not in (*PROBING_SETS, *left_out)}
    alike = {text for found in used.values() for text in found if start(text) in starts}
    assert texts == set().union(*used.values()) - alike
    assert 400 < len(alike) < 430  # near-duplicates of withheld texts, and files under the same licence
    for name, found in used.items():
        assert len(found & alike) < 0.15 * len(found), name  # no set goes for its template


def test_embedded_text_is_split_without_repetition(embedded):
    splits = split_documents(embedded)
    sets = {name: set(found) for name, found in splits.items()}
    assert all(len(sets[name]) == len(splits[name]) for name in SPLITS)
    assert sum(map(len, sets.values())) == len(set(embedded)) and set.union(*sets.values()) == set(embedded)
    for name in ("select", "test"):
        assert len(sets[name]) / len(set(embedded)) == pytest.approx(0.03, abs=0.002)


def test_no_embedded_text_is_held_out_whose_near_duplicate_is_learned(embedded):
    splits, own = split_documents(embedded), {text: split_of(text_digest(text)) for text in embedded}
    sides = defaultdict(set)
    for name, found in splits.items():
        for text in found:
            sides[start(text)].add(name)
    assert {len(names) for names in sides.values()} == {1}
    # all that the language model has seen
    assert {text for text in embedded if own[text] == "train"} < set(splits["train"])
    assert max(Counter(map(start, embedded)).values()) < 20  # no template makes one text of many
    for name in ("select", "test"):
        before = sum(len(text) for text in embedded if own[text] == name)
        assert 0.8 < sum(map(len, splits[name])) / before < 0.9


# Splits


def test_the_split_of_a_text_that_begins_like_no_other_depends_on_the_text_alone():
    texts = [f"text {i}" for i in range(1000)]
    shuffled = texts + texts[::3]
    random.Random(0).shuffle(shuffled)
    assert split_documents(texts) == split_documents(shuffled)  # whatever the order, and each text once
    alone = {name: [text for text in texts if split_of(text_digest(text)) == name] for name in SPLITS}
    assert {name: set(found) for name, found in split_documents(texts).items()} == {
        n: set(f) for n, f in alone.items()
    }
    assert split_documents(texts)["train"] != alone["train"]  # the order is that of the hashes: a shuffle
    streamed = list(corpus._streamed_documents(shuffled))
    assert len(streamed) == 1000 and all(split == split_of(text_digest(text)) for split, text in streamed)
    assert [text for _, text in streamed] == list(dict.fromkeys(shuffled))  # in the order of arrival


def near_duplicates() -> list[list[str]]:
    """Groups of texts that differ in case, punctuation, white space or in what comes at the end, shuffled."""
    source, groups = random.Random(0), []
    for _ in range(300):
        sizes = [source.randint(2, 9) for _ in range(source.choice((18, 100)))]
        words = ["".join(source.choices("abcdefghijß", k=size)) for size in sizes]
        text = " ".join(words)
        spelled = [text, text.upper(), f"\n {text.title()}\t", "_" + text.replace(" ", "  ")]
        ended = [", ".join(words) + "!", f"{text} The End", f"{text}; {words[-1]} {source.random()}"]
        group = spelled + ended
        groups.append(source.sample(group, len(group)))
    return groups


def test_texts_that_begin_alike_are_on_one_side():
    groups = near_duplicates()
    # short and long ones, all cut
    assert {min(len(start(text)) for text in group) for group in groups} == {64, 256}
    shuffled = [text for group in groups for text in group]
    random.Random(0).shuffle(shuffled)
    splits, order = split_documents(shuffled), {text: i for i, text in enumerate(shuffled)}
    sorted_side = {text: name for name, found in splits.items() for text in found}
    streamed_side = {text: name for name, text in corpus._streamed_documents(shuffled)}
    assert len(shuffled) == len(sorted_side) == len(streamed_side) == 2100  # none is lost
    for group in groups:
        own = [split_of(text_digest(text)) for text in sorted(group, key=order.get)]
        assert {sorted_side[text] for text in group} == {min(own, key=SPLITS.index)}
        assert {streamed_side[text] for text in group} == {own[0]}
    assert set(streamed_side.values()) == set(SPLITS)
    assert split_documents([text for group in groups for text in group]) == splits  # whatever the order


def test_texts_that_begin_differently_are_not_alike():
    source = random.Random(1)
    letters = "".join(source.choices("abcdefgh", k=400))
    signs, short = ["", "!", "?", "! !", "\n"], ["a", "ab", "a1", "1", "²", "é", "e"]
    cut = [letters[:63], letters[:250], letters]
    changed = [letters[:255] + "z" + letters[256:], letters[:63] + "z" + letters[64:250]]
    different = [*signs, *short, *cut, *changed]
    assert len(set(map(corpus.beginning, different))) == len(different)
    same = letters[:255] + letters[255].upper() + "z" * 1000
    assert corpus.beginning(same) == corpus.beginning(letters)
    assert corpus.beginning(letters[:64]) == corpus.beginning(letters[:250])


def test_a_streamed_text_costs_the_same_memory_whatever_its_length():
    texts = (f"{i} " + "words " * 2000 for i in range(5000))
    tracemalloc.start()
    assert sum(1 for _ in corpus._streamed_documents(texts)) == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5000 * 300  # two digests of 16 bytes, as Python keeps them


def test_lone_surrogates_have_a_hash_too():
    assert text_digest("\ud800") != text_digest("\ud801")


# Contexts


def random_documents(seed: int, shortest: int = 0) -> list[list[int]]:
    source = np.random.default_rng(seed)
    lengths = source.choice([shortest, 1, 2, 5, 6, 7, 8, 9, 13, 14, 15, 16, 40], source.integers(1, 40))
    return [source.integers(1, 1000, length).tolist() for length in lengths]


def built(
    found: list[list[int]], size: int, packing: str
) -> tuple[ContextBuilder, torch.Tensor, torch.Tensor]:
    builder = ContextBuilder(size, packing, BOS)
    for tokens in found:
        builder.add(tokens)
    builder.close_row()
    made = builder.contexts()
    return builder, made.tokens, made.lengths


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("size", [2, 8, 15])
def test_packing_keeps_every_token_once_in_order_with_bos_between_documents(seed, size):
    found = random_documents(seed)
    builder, tokens, lengths = built(found, size, "pack")
    rows = [row[:n].tolist() for row, n in zip(tokens, lengths)]
    assert tokens.dtype == lengths.dtype == torch.int32 and tokens.shape == (len(rows), size)
    assert [t for row in rows for t in row if t != BOS] == [t for document in found for t in document]
    assert all(row[0] == BOS for row in rows)
    assert (lengths[:-1] == size).all() and (lengths > 1).all()  # only the last row may be short
    assert builder.usable == int((tokens != BOS).sum()) == sum(map(len, found))
    # between two documents there is a BOS: cut the stream there and no piece holds tokens of two documents
    owner = iter([number for number, document in enumerate(found) for _ in document])
    for row in rows:
        for is_bos, piece in itertools.groupby(row, lambda t: t == BOS):
            assert is_bos or len({next(owner) for _ in piece}) == 1


def test_packing_by_hand():
    _, tokens, lengths = built([[1, 2], [3], [4, 5, 6, 7, 8]], 6, "pack")
    assert tokens.tolist() == [[0, 1, 2, 0, 3, 0], [0, 4, 5, 6, 7, 8]] and lengths.tolist() == [6, 6]
    _, tokens, lengths = built([[1, 2], [3, 4]], 5, "pack")
    assert tokens.tolist() == [[0, 1, 2, 0, 3], [0, 4, 0, 0, 0]] and lengths.tolist() == [5, 2]


@pytest.mark.parametrize("seed", range(10))
def test_one_per_row_pads_and_truncates(seed):
    found = random_documents(seed)
    builder, tokens, lengths = built(found, 8, "one_per_row")
    kept = [document[:7] for document in found if document]
    assert tokens.tolist() == [[BOS, *document, *[BOS] * (7 - len(document))] for document in kept]
    assert lengths.tolist() == [1 + len(document) for document in kept]
    assert builder.usable == sum(map(len, kept))


def test_a_document_of_a_million_tokens_takes_no_time():
    builder, tokens, _ = built([list(range(1, 1_000_001))], 128, "pack")
    assert builder.usable == 1_000_000 and len(tokens) == -(-1_000_000 // 127)


# Sources


def test_a_text_file_holds_documents_between_blank_lines_or_end_marks(tmp_path):
    path = tmp_path / "my texts.txt"
    path.write_bytes(b"one\ntwo\r\n\r\nthree\n   \nfour<|endoftext|>five \xc3\xbc\n\n\n<|endoftext|>\n")
    assert [text.strip() for text in documents(data(path))] == ["one\ntwo", "three", "four", "five ü"]


def test_a_jsonl_file_holds_one_document_a_line(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "\n".join(json.dumps({"body": text, "id": 1}) for text in ("one\n\ntwo", "three")) + "\n\n"
    )
    assert list(documents(data(path, text_field="body"))) == ["one\n\ntwo", "three"]


def test_a_folder_is_read_file_by_file(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b" / "c.jsonl").write_text('{"text": "three"}')
    (tmp_path / "README.md").write_text("not a text")
    assert list(documents(data(tmp_path))) == ["one", "two", "three"]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> list[str]:
    """A data set in the Hub's layout, served from a folder by the datasets package itself; returns its
    texts."""
    import datasets

    texts = [f"document {i} " + "word " * (i % 5) for i in range(3000)]
    (tmp_path / "data").mkdir()
    for part in range(2):
        rows = [{"content": text, "meta": {"n": 1}} for text in texts[part * 1500 : (part + 1) * 1500]]
        pd.DataFrame(rows).to_parquet(tmp_path / "data" / f"train-{part:05d}-of-00002.parquet")
    load = datasets.load_dataset

    def from_folder(name, subset, **options):
        assert name == "owner/texts" and options["streaming"]
        return load(str(tmp_path), subset, **options)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    return texts


def test_a_hub_data_set_is_streamed(hub):
    assert list(documents(data("owner/texts", text_field="content"))) == hub


def test_a_hub_data_set_without_the_text_field_says_what_it_has(hub):
    with pytest.raises(
        UserError, match="data.text_field is text: the rows of owner/texts hold content, meta; name"
    ):
        list(documents(data("owner/texts")))


# Text to token ids


def usable(contexts: Contexts) -> int:
    return int((contexts.tokens != BOS).sum())


def test_every_split_gets_its_tokens_and_no_text_of_another(tmp_path):
    texts = [f"{'x' * (i % 90)} and {'y' * (i % 7)} {'z' * (i % 89)}" for i in range(3000)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    found = tokenise(data(tmp_path, fresh_factor=2), WordTokenizer(), 16)
    assert set(found) == set(SPLITS)
    for name, wanted in (("train", 800), ("select", 40), ("test", 40)):
        tokens, lengths = found[name].tokens, found[name].lengths
        assert tokens.shape[1] == 16 and len(tokens) == len(lengths) and usable(found[name]) >= wanted
        expected = itertools.chain.from_iterable(map(word_ids, split_documents(texts)[name]))
        here = tokens[tokens != BOS].tolist()
        assert here == list(itertools.islice(expected, len(here)))


def test_reading_a_stream_stops_when_every_split_has_enough(monkeypatch):
    read = []

    def endless(_):
        for i in itertools.count():
            read.append(i)
            yield f"document {i} has these words"

    monkeypatch.setattr(corpus, "documents", endless)
    found = tokenise(data("owner/endless"), WordTokenizer(), 16)
    assert 400 <= usable(found["train"]) < 400 + 257 * 5
    assert len(read) < 20_000  # select and test get 3 % each and are read in batches of 256
