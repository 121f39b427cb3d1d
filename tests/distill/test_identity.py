"""Matching of latents and spans, against brute force and closed forms."""

from itertools import permutations

import numpy as np
import pytest
import torch
from builders.sae import random
from scipy.linalg import subspace_angles

from dmsae_lib.distill.identity import (
    Found,
    compared,
    correlations,
    matched,
    matching,
    principal_cosines,
    span_overlap,
    turned,
)


def test_the_matching_is_the_best_of_all():
    similarity = random(4, 6, seed=1)
    best = max(
        sum(float(similarity[i, j]) for i, j in enumerate(chosen)) for chosen in permutations(range(6), 4)
    )
    assert float(matched(similarity).sum()) == pytest.approx(best)
    assert len(matched(similarity.T)) == 4  # each latent once, whichever core is larger


def test_the_same_core_in_another_order_and_sign_is_the_same():
    rows, f = random(7, 30, seed=2), random(200, 7, seed=3).relu()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(4))
    found = compared(rows, -2 * rows[order], f, 3 * f[:, order])
    means = [found[name] for name in ("cosine", "cosine_above", "activation", "activation_above", "span")]
    assert found["size"] == 7 and means == pytest.approx([1.0] * 5, abs=1e-5)


def test_a_rotation_in_the_span_keeps_the_span_and_loses_the_latents():
    rows = torch.linalg.qr(random(60, 8, seed=5)).Q.T
    turned = torch.linalg.qr(random(8, 8, seed=6)).Q @ rows
    found = compared(rows, turned)
    assert found["span"] == pytest.approx(1) and found["cosine"] < 0.8 and found["activation"] is None


def test_overlap_of_spans_against_scipys_principal_angles():
    a, b = random(5, 40, seed=7), random(9, 40, seed=8)
    expected = np.mean(np.cos(subspace_angles(a.double().numpy().T, b.double().numpy().T)) ** 2)
    assert span_overlap(a, b) == pytest.approx(expected, rel=1e-6)
    chance = [span_overlap(random(5, 40, seed=s), random(9, 40, seed=1000 + s)) for s in range(200)]
    assert np.mean(chance) == pytest.approx(9 / 40, abs=4 * np.std(chance) / 200**0.5)
    assert compared(a, b)["span_chance"] == 9 / 40


def test_correlations_against_numpy():
    f, g = random(300, 3, seed=9).relu(), random(300, 4, seed=10).relu()
    g[:, 0] += f[:, 1]
    expected = np.corrcoef(f.numpy().T, g.numpy().T)[:3, 3:]
    assert np.allclose(correlations(f, g).numpy(), expected, atol=1e-6)
    assert not correlations(torch.zeros(300, 1), g).any()  # a latent that never fires correlates with nothing


def test_matching_by_activations_finds_the_permutation():
    """Though a fifth of what fires is noise, and the other chain has latents of its own."""
    f, order = random(500, 9, seed=11).relu(), torch.randperm(9, generator=torch.Generator().manual_seed(12))
    g = torch.cat([f[:, order] + 0.2 * random(500, 9, seed=13).relu(), random(500, 4, seed=14).relu()], dim=1)
    rows, columns = matching(correlations(f, g))
    assert order[columns].tolist() == rows.tolist() == list(range(9))


def test_a_turned_core_keeps_its_span_and_how_often_it_fires():
    """Of a real agreement nothing is left but what the subspace gives."""
    x = random(2000, 60, seed=15) + 0.5
    rows = torch.linalg.qr(random(60, 8, seed=16)).Q.T
    core = Found(rows, ((x - x.mean(0)) @ rows.T - 0.5).relu())
    other = turned(core, x, torch.Generator().manual_seed(0))
    assert torch.allclose(principal_cosines(rows, other.rows), torch.ones(8, dtype=torch.float64), atol=1e-4)
    fires = [(one.f > 0).double().mean(0) for one in (core, other)]
    assert torch.allclose(*fires, atol=2e-3)
    found, same = (compared(core.rows, one.rows, core.f, one.f) for one in (other, core))
    assert found["span"] == pytest.approx(1, abs=1e-4) and found["cosine"] < 0.8 < same["cosine"]
    assert found["activation"] < 0.8 < same["activation"]
    assert turned(Found(rows), x, torch.Generator().manual_seed(0)).f is None
