"""Histograms, tenths and the contexts chosen from them, against brute force."""

from collections import Counter

import numpy as np
import pytest
import torch

from dmsae_lib.atlas.activity import BINS, PER_TENTH, activity, by_token, chosen, histogram, tenths
from dmsae_lib.data.contexts import Contexts


def activations(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, 3.0, n).astype(np.float32)


def test_every_activation_is_in_the_bin_that_holds_it():
    active = activations(500)
    width = active.max() / BINS
    counted = Counter(min(int(value / width), BINS - 1) for value in active.astype(float))
    assert histogram(active) == [counted[i] for i in range(BINS)]
    assert histogram(active[:0]) == [0] * BINS


@pytest.mark.parametrize("n", [0, 1, 7, 10, 11, 99, 1000])
def test_an_activation_is_in_the_tenth_of_its_rank(n):
    active = activations(n)
    found = tenths(active)
    assert sorted(place for places in found for place in places) == list(range(n))
    for tenth, places in enumerate(found):
        for place in places:
            below = sum(other < active[place] for other in active)
            assert 10 * below // n == tenth
        assert list(active[places]) == sorted(active[places])
    sizes = [len(places) for places in found]
    assert max(sizes) - min(sizes) <= 1


def test_equal_activations_go_to_tenths_in_the_order_of_their_places():
    assert [places.tolist() for places in tenths(np.ones(20, np.float32))] == [
        [2 * i, 2 * i + 1] for i in range(10)
    ]


def test_contexts_are_of_every_tenth_with_its_strongest_and_none_twice():
    active, rows = activations(400), np.repeat(np.arange(80), 5)
    found = chosen(active, rows)
    assert int(active.argmax()) == found[-1][0]
    for places, mine in zip(tenths(active), found):
        assert len(mine) == PER_TENTH and set(mine) <= set(places.tolist())
        assert active[mine[0]] >= active[mine[1]]
    taken = [rows[place] for mine in found for place in mine]
    assert len(set(taken)) == len(taken)
    # a single context cannot but be taken again, its places not
    alone = [place for mine in chosen(active, np.zeros(400, int)) for place in mine]
    assert len(set(alone)) == len(alone) == 10 * PER_TENTH


def test_means_by_token_count_its_silent_occurrences():
    ids = np.array([7] * 5 + [3] * 6 + [9] * 4 + [1] * 8)
    values = np.array([4.0, 0, 0, 0, 1] + [0.5] * 6 + [9.0] * 4 + [0.0] * 8)
    assert by_token(values, ids) == [(7, 1.0, 5), (3, 0.5, 6)]  # 9 is too rare, 1 never fires


def test_a_card_shows_the_activations_where_they_are(random_split):
    split = random_split(30)
    split = Contexts(split.tokens.long(), split.lengths.long(), split.bos)
    usable = split.usable()
    f = torch.rand(usable.shape, generator=torch.Generator().manual_seed(1)) * 10
    f[f < 6] = 0
    card = activity(f, usable, split)
    inside = f[usable]
    assert card["active"] == int((inside > 0).sum()) and card["tokens"] == int(usable.sum())
    assert card["frequency"] == pytest.approx(float((inside > 0).float().mean()), rel=5e-3)
    assert card["max"] == pytest.approx(float(inside.max()), rel=5e-3)
    assert sum(card["histogram"]) == card["active"] and len(card["contexts"]) == 10 * PER_TENTH
    assert [one["tenth"] for one in card["contexts"]] == sorted(
        (one["tenth"] for one in card["contexts"]), reverse=True
    )
    for one in card["contexts"]:
        row, start, stop = one["row"], one["start"], one["start"] + len(one["values"])
        assert start <= one["at"] < stop <= int(split.lengths[row])
        assert split.bos not in split.tokens[row, start:stop].tolist()  # one document
        assert torch.allclose(torch.tensor(one["values"]), f[row, start:stop], rtol=5e-3)
        low, high = card["tenths"][one["tenth"] - 1]
        assert low <= one["values"][one["at"] - start] <= high


def test_a_latent_that_never_fires_has_an_empty_card(random_split):
    split = random_split(4)
    card = activity(torch.zeros(split.tokens.shape), split.usable(), split)
    assert (card["active"], card["max"], card["contexts"], card["by_token"]) == (0, 0.0, [], [])
    assert card["tenths"] == [None] * 10 and sum(card["histogram"]) == 0
