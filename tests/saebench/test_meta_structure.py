"""The meta-structure eval: what is known of decoders with and without common parts, and what it leaves
behind."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders.saebench import state

from dmsae_lib.saebench import meta_structure as saebench_meta

STEPS = 250


def made_of_parts(rows: int = 256, width: int = 64, parts: int = 16) -> torch.Tensor:
    """Rows that are each one of a few orthogonal directions, with a little noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(width, parts, generator=generator)).Q.T
    noise = 0.02 * torch.randn(rows, width, generator=generator)
    return torch.nn.functional.normalize(directions[torch.arange(rows) % parts] + noise, dim=1)


def orthogonal(rows: int = 64) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, rows, generator=torch.Generator().manual_seed(1))).Q


def run(decoder: torch.Tensor, seed: int = 0) -> dict:
    return saebench_meta.run_meta_structure(
        SimpleNamespace(W_dec=torch.nn.Parameter(decoder)), None, None, seed, STEPS
    )


def test_common_parts_are_found_and_what_has_none_is_not_explained():
    common, none = run(made_of_parts())["metrics"], run(orthogonal())["metrics"]
    assert common["decoder_fraction_variance_explained"] > 0.95
    assert common["above_random_rows"] > 0.4
    assert common["above_random_rows"] == pytest.approx(
        common["decoder_fraction_variance_explained"] - common["random_rows_fraction_variance_explained"]
    )
    # 16 latents and the bias reach at most 17 of the 64 dimensions, each of which holds one of the rows' 64
    # squares; about the mean, whose square is 1/64, there are 63.
    assert 0 < none["decoder_fraction_variance_explained"] <= 1 - 47 / 63 + 1e-6
    assert none["above_random_rows"] < 0  # random ones are a little alike


def test_random_rows_are_the_yardstick():
    generator = torch.Generator().manual_seed(5)
    rows = torch.nn.functional.normalize(torch.randn(256, 32, generator=generator), dim=1)
    found = run(rows)
    assert (
        abs(found["metrics"]["above_random_rows"])
        < 0.03
        < found["metrics"]["random_rows_fraction_variance_explained"]
    )
    assert found["settings"] == {
        "width_ratio": 0.25,
        "k": 4,
        "train_steps": STEPS,
        "train_batch_size": 64,
        "learning_rate": 2e-3,
    }


def test_the_seed_alone_decides_and_nothing_is_left_behind(tmp_path, monkeypatch):
    import sae_bench

    monkeypatch.chdir(tmp_path)
    places = Path(sae_bench.__file__).parent, tmp_path
    decoder, before = orthogonal(), state(*places)
    first = run(decoder)
    assert torch.is_grad_enabled() and state(*places) == before
    torch.manual_seed(7)
    assert run(decoder) == first
    assert run(decoder, seed=1)["metrics"] != first["metrics"]
