"""The embedded language model and its n-gram references, each against a plain reimplementation."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from dmsae_lib.embedded import recipe as base_model
from dmsae_lib.embedded.ngram import DISCOUNT, Ngram
from dmsae_lib.embedded.recipe import LETTERS, BaseModelSettings

V = 7
SMALL = BaseModelSettings(
    vocab_size=400, context_size=32, d_model=32, n_layers=2, n_heads=4, d_ff=64, batch_rows=8, tokens=8192
)
TEXTS = [
    f"the {adjective} cat sat on the {noun} and said {number}, \u00fcber \U0001f408!"
    for number in range(30)
    for adjective in ("big", "small", "green")
    for noun in ("mat", "dog", "table")
]


def rows_of(seed: int, rows: int, positions: int = 9) -> np.ndarray:
    source = np.random.default_rng(seed)
    return source.choice(V, (rows, positions), p=source.dirichlet(np.ones(V))).astype(np.int32)


# N-grams


def slow_probability(rows: np.ndarray, gram: tuple[int, ...]) -> float:
    """p(last | those before) by dictionaries, straight from the definition."""
    *history, word = gram
    if not history:
        return (int((rows == word).sum()) + 1) / (rows.size + V)
    n = len(gram)
    counts = Counter(tuple(row[i : i + n]) for row in rows.tolist() for i in range(len(row) - n + 1))
    seen = {g[-1]: c for g, c in counts.items() if list(g[:-1]) == history}
    lower = slow_probability(rows, gram[1:])
    if not seen:
        return lower
    total = sum(seen.values())
    return (max(seen.get(word, 0) - DISCOUNT, 0) + DISCOUNT * len(seen) * lower) / total


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngram_probabilities_equal_those_by_dictionaries(order):
    train, test = rows_of(0, 12), rows_of(1, 5)
    found = Ngram(train, V).probabilities(test, order)
    assert found.shape == (5, 7)
    for row in range(5):
        for at in range(2, 9):
            gram = tuple(test[row, at - order + 1 : at + 1].tolist())
            assert found[row, at - 2] == pytest.approx(slow_probability(train, gram), rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngram_probabilities_sum_to_one_over_the_vocabulary(order):
    """For every history: those seen often, once, and never."""
    ngram = Ngram(rows_of(2, 4), V)
    contexts = np.array([[a, b, w] for a in range(V) for b in range(V) for w in range(V)], dtype=np.int32)
    sums = ngram.probabilities(contexts, order).reshape(V * V, V).sum(1)
    assert np.allclose(sums, 1, atol=1e-12)


def test_ngram_loss_leaves_out_bos_targets():
    train, test = rows_of(0, 12), rows_of(1, 5)
    ngram, bos = Ngram(train, V), 3
    losses = [
        -math.log(slow_probability(train, tuple(test[row, at - 2 : at + 1].tolist())))
        for row in range(5)
        for at in range(2, 9)
        if test[row, at] != bos
    ]
    assert ngram.nats_per_token(test, bos) == pytest.approx(np.mean(losses), rel=1e-12)


# Tokenizer and contexts


@pytest.fixture(scope="module")
def tokenizer():
    return base_model.train_tokenizer(TEXTS, SMALL.vocab_size)


def test_letters_are_single_tokens_and_any_text_comes_back(tokenizer):
    """SAEBench's absorption asks for " A" to " Z" as single tokens."""
    assert len(LETTERS) == 26 and len(tokenizer) <= SMALL.vocab_size
    for letter in LETTERS:
        (token,) = tokenizer(letter, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode([token]) == letter
    for text in (TEXTS[0], "never seen: \u4f60\u597d \t\n {}[]", " Q"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer("the")["input_ids"][0] == tokenizer.bos_token_id == 0


def test_the_embedded_model_has_the_letters_too():
    from dmsae_lib.data.model_folder import load_tokenizer, resolve

    embedded = load_tokenizer(resolve("wheeltext-4x128"))
    assert all(len(embedded(letter, add_special_tokens=False)["input_ids"]) == 1 for letter in LETTERS)


def test_packing_gives_full_contexts_that_start_with_bos(tokenizer):
    rows = base_model.pack(TEXTS, tokenizer, 32)
    assert rows.shape[1] == 32 and (rows[:, 0] == 0).all()
    ids = [t for text in TEXTS for t in tokenizer(text, add_special_tokens=False)["input_ids"]]
    kept = rows[rows != 0].tolist()
    assert kept == ids[: len(kept)] and len(ids) - len(kept) < 32  # only the last, short context is missing


# Training


def test_schedule():
    """Linear up over 2 %, flat, linear down to 0 over the last 40 %."""
    rate = [base_model.learning_rate(step, 1000, 0.02, 0.4) for step in range(1000)]
    assert rate[0] == pytest.approx(0.05) and rate[9] == pytest.approx(0.5)
    assert rate[19:600] == [1.0] * 581
    assert rate[800] == pytest.approx(0.5) and rate[-1] == pytest.approx(1 / 400)
    assert base_model.learning_rate(0, 1, 0.02, 0.4) == 1.0


@pytest.fixture(scope="module")
def trained(tokenizer):
    model, rows = base_model.build(SMALL), base_model.pack(TEXTS, tokenizer, SMALL.context_size)
    untrained = base_model.held_out(model, rows, 0)["nats_per_token"]
    lines = []
    curve = base_model.train(model, rows, SMALL, report=lines.append)
    return model, rows, untrained, curve, lines


def test_training_lowers_the_loss_and_reports_it(trained):
    model, rows, untrained, curve, lines = trained
    steps = SMALL.tokens // (SMALL.batch_rows * SMALL.context_size)
    assert untrained == pytest.approx(math.log(SMALL.vocab_size), rel=0.1)
    assert base_model.held_out(model, rows, 0)["nats_per_token"] < 0.6 * untrained
    assert curve[-1]["step"] == steps and curve[-1]["tokens"] == SMALL.tokens and len(lines) == len(curve)


def test_the_same_seed_trains_the_same_model(tokenizer, trained):
    torch.manual_seed(123)  # of no account
    model = base_model.build(SMALL)
    base_model.train(model, trained[1], SMALL, report=lambda line: None)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained[0].parameters()))


@torch.no_grad()
def test_held_out_loss_against_a_loop(trained):
    model, rows = trained[0].eval(), trained[1][:5]
    total, targets = 0.0, 0
    for row in rows:
        log_p = torch.log_softmax(model(torch.from_numpy(row[None]).long()).logits[0].double(), -1)
        for at in range(1, len(row)):
            if row[at] != 0:
                total -= float(log_p[at - 1, int(row[at])])
                targets += 1
    for batch_rows in (2, 64):
        found = base_model.held_out(model, rows, 0, batch_rows)
        assert found["targets"] == targets and found["nats_per_token"] == pytest.approx(
            total / targets, rel=1e-5
        )


def test_bits_per_byte_is_the_loss_of_the_text_in_another_unit(tokenizer, trained):
    """One document per context: nats * tokens = bits * bytes * ln 2, the bytes being those of the
    documents."""
    texts = ["the big cat", "\u00fcber \U0001f408 said 7!"]
    rows = np.zeros((2, 32), dtype=np.int32)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    for row, tokens in zip(rows, ids):
        row[1 : 1 + len(tokens)] = tokens
    n_tokens, n_bytes = sum(map(len, ids)), sum(len(text.encode()) for text in texts)
    bits = base_model.bits_per_byte(2.5, rows, tokenizer)
    assert bits * n_bytes * math.log(2) == pytest.approx(2.5 * n_tokens)


def test_the_saved_model_is_the_trained_one_in_bfloat16(tokenizer, tmp_path):
    from dmsae_lib.config.sections import ModelConfig
    from dmsae_lib.data.language_model import LanguageModel

    model = base_model.build(SMALL)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    base_model.save(model, tokenizer, tmp_path / "saved")
    config = ModelConfig(name=str(tmp_path / "saved"), hook_name="blocks.0.hook_resid_post", context_size=32)
    loaded = LanguageModel(config)
    assert loaded.tokenizer("the cat")["input_ids"] == tokenizer("the cat")["input_ids"]
    found = dict(loaded.bridge.original_model.named_parameters())
    embedding = next(p for name, p in found.items() if "embed_tokens" in name)
    assert embedding.dtype == torch.float32
    assert torch.equal(embedding, weights["model.embed_tokens.weight"].bfloat16().float())
