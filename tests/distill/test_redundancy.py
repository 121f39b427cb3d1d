"""Near-copies in a core, on planted rows."""

import pytest
import torch
from builders.sae import random

from dmsae_lib.distill.redundancy import pairs_above, redundancy, without_copies


def planted():
    """Six orthogonal rows; the seventh is the first turned by acos(.8), the last the second, longer and
    turned round."""
    rows = torch.eye(12)[:6]
    near = 0.8 * rows[0] + 0.6 * torch.eye(12)[7]
    return torch.cat([rows, near[None], -3 * rows[1:2]])


def test_planted_copies_are_counted():
    rows, f = planted(), random(400, 8, seed=1).relu()
    f[:, 5] = 2 * f[:, 4] + 0.1 * random(400, seed=2).relu()
    found = redundancy(rows, f, torch.ones(8, dtype=torch.float64), 0.99)
    assert found["size"] == 8 and found["cosine"]["pairs"] == {"0.7": 2, "0.9": 1}
    assert found["cosine"]["largest"] == pytest.approx(1) and 0.9 < found["activation"]["largest"] < 1
    assert found["activation"]["pairs"] == {"0.7": 1, "0.9": 1}
    gram = torch.linalg.eigvalsh((rows @ rows.T).double())
    assert found["rank"] == pytest.approx(float(gram.sum() ** 2 / gram.square().sum()), rel=1e-5)
    assert found["without"]["0.7"]["merged"] == 5 and found["without"]["0.9"]["merged"] == 6
    # the copies' eighths are lost: what is left cannot make .99
    assert found["without"]["0.7"]["dropped"] is None


def test_only_what_is_selected_counts():
    scores = torch.tensor([8, 7, 0, 0, 0, 0, 6, 0.1], dtype=torch.float64)
    found = redundancy(planted(), random(400, 8, seed=3).relu(), scores, 0.9)
    assert found["size"] == 3 and found["cosine"]["pairs"] == {"0.7": 1, "0.9": 0}


def test_a_core_without_copies_by_hand():
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    similarity = torch.eye(5)
    similarity[0, 1] = similarity[1, 0] = 0.95
    similarity[1, 2] = similarity[2, 1] = 0.8  # a copy of a copy is none
    assert without_copies(scores, similarity, 0.8, 0.7) == {"merged": 2, "dropped": None}  # 9, 3; 5, 3, 2, 1
    assert without_copies(scores, similarity, 0.6, 0.7) == {"merged": 1, "dropped": 3}  # 9 of 15; 5 + 3 + 2
    assert without_copies(scores, similarity, 0.8, 0.99) == {"merged": 3, "dropped": 3}


def test_one_latent_has_no_pairs():
    assert pairs_above(torch.ones(1, 1)) == {"largest": None, "pairs": {"0.7": 0, "0.9": 0}}
