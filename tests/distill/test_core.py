"""The core over hand-made cycles: rows, lineage, readings, round trip."""

from types import SimpleNamespace

import pytest
import torch
from builders.sae import latent, random

from dmsae_lib.distill.core import (
    READINGS,
    Candidates,
    Core,
    Latent,
    distil,
    final_core,
    read_candidates,
    read_core,
    reading_members,
    save_core,
)
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.store.artifacts import ArtifactError, UserError, load, write

pytestmark = pytest.mark.usefixtures("one_thread")

D_IN, D_SAE, PREFIX0 = 6, 20, 4


def make_sae(seed: int, core: Core | None = None) -> MatryoshkaSAE:
    sae = MatryoshkaSAE(D_IN, D_SAE, (PREFIX0, 9), None if core is None else core.rows)
    sae.free_rows.data.copy_(random(*sae.free_rows.shape, seed=seed))
    return sae


def scores(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def cycles() -> list[tuple[MatryoshkaSAE, Core]]:
    """Three cycles at a coverage of 0.8, the selection worked out by hand beside each.

    cycle 0: 4 candidates, shares .5 .1 .3 .1 -> 0 and 2
    cycle 1: core (c0:0, c0:2) and 4, shares .05 .3 0 .5 .15 0 -> c0:2 again and the new 3; c0:0
    drops out cycle 2: core (c0:2, c1:3) and 4 candidates, shares .1 .4 0 0 .45 .05 -> c1:3 again and the new
    4; c0:2 drops out
    """
    table = [scores(5, 1, 3, 1), scores(1, 6, 0, 10, 3, 0), scores(2, 8, 0, 0, 9, 1)]
    found: list[tuple[MatryoshkaSAE, Core]] = []
    for cycle, values in enumerate(table):
        previous = found[-1][1] if found else None
        sae = make_sae(10 + cycle, previous)
        frequency = torch.arange(len(values)) / 10 + cycle
        found.append(
            (sae, distil(cycle, sae, values, frequency, previous, 0.8, f"hash{cycle - 1}" if cycle else None))
        )
    return found


def test_who_is_selected_and_where_from(cycles):
    (_, first), (_, second), (_, third) = cycles
    assert [latent.id for latent in first.latents] == ["c0:0", "c0:2"]
    assert [latent.id for latent in second.latents] == ["c0:2", "c1:3"]
    assert [latent.id for latent in third.latents] == ["c1:3", "c2:4"]
    assert third.latents[0] == Latent(
        "c1:3",
        first_cycle=1,
        first_index=3,
        index=1,
        selected=[1, 2],
        score=8.0,
        share=0.4,
        frequency=pytest.approx(2.1),
    )
    assert third.latents[1] == Latent("c2:4", 2, 4, 4, [2], 9.0, 0.45, pytest.approx(2.4))
    assert (
        second.latents[0].selected == [0, 1]
        and second.latents[0].index == 1
        and second.latents[0].first_index == 2
    )
    assert first.latents[1].selected == [0]  # the earlier core's record is left as it was
    assert [core.parent for _, core in cycles] == [None, "hash0", "hash1"]


def test_rows_are_bit_identical(cycles):
    """A core latent's row is the trained one of its first cycle, through every later cycle."""
    (sae0, first), (sae1, second), (sae2, third) = cycles
    assert torch.equal(first.rows, sae0.free_rows[[0, 2]])
    assert torch.equal(second.rows, torch.stack([sae0.free_rows[2], sae1.free_rows[3 - 2]]))
    assert torch.equal(third.rows, torch.stack([sae1.free_rows[3 - 2], sae2.free_rows[4 - 2]]))
    assert torch.equal(sae2.core_rows, second.rows)
    before = third.rows.clone()
    sae2.free_rows.data += 1  # the core is a copy
    assert torch.equal(third.rows, before)


def test_description(cycles):
    record = cycles[1][1].describe(0.8, "mean_abs")
    assert (record["cycle"], record["size"], record["kept"], record["origins"]) == (1, 2, 1, {"0": 1, "1": 1})
    assert (record["parent"], record["coverage"], record["aggregator"]) == ("hash0", 0.8, "mean_abs")
    assert cycles[0][1].describe(0.8, "mean_abs")["kept"] == 0


def test_no_contribution_at_all_is_refused():
    with pytest.raises(UserError, match="Cycle 3: no candidate contributes"):
        distil(3, make_sae(0), scores(0, 0, 0, 0), scores(1, 1, 1, 1), None, 0.9, None)


def test_save_and_load(cycles, tmp_path):
    (sae, core), frequency = cycles[2], torch.arange(6, dtype=torch.float64) / 7
    with write(tmp_path / "core", "core") as writer:
        save_core(writer, core, Candidates.of(2, sae, frequency), 0.8, "mean_abs")
    artifact = load(tmp_path / "core", "core")
    again = read_core(artifact)
    assert torch.equal(again.rows, core.rows) and again.rows.dtype == torch.float32
    assert again.latents == core.latents and (again.cycle, again.parent) == (2, "hash1")
    assert artifact.tensors("core.safetensors")["W_enc"].shape == (D_IN, 2)
    candidates = read_candidates(artifact)
    assert candidates.ids == ["c2:2", "c2:3", "c2:4", "c2:5"]
    assert torch.equal(candidates.rows, sae.free_rows[:PREFIX0]) and torch.equal(
        candidates.frequency, frequency[2:]
    )
    with pytest.raises(
        ArtifactError, match="holds a core without the candidates .*: delete it and run make again"
    ):
        read_candidates(SimpleNamespace(files={"core.json": ""}, folder="cycle_2/core"))
    following = MatryoshkaSAE(D_IN, D_SAE, (PREFIX0, 9), again.rows)
    assert torch.equal(following.core_rows, core.rows)


# --- the final core


def core_of(*selected: list[int], cycle: int = 3) -> Core:
    latents = [latent(s[0], i, s) for i, s in enumerate(selected)]
    return Core(cycle, random(len(latents), D_IN, seed=5), latents, "parent")


@pytest.mark.parametrize(
    "reading, members",
    [
        ("all_of_last", [0, 1, 2, 3, 4, 5]),
        ("last_two", [0, 1, 2, 4]),  # selected at 2 and 3
        ("every_since_first", [0, 1, 2]),  # without a gap, and not new
        ("alive_since_0", [0]),
    ],
)
def test_readings(reading, members):
    last = core_of([0, 1, 2, 3], [1, 2, 3], [2, 3], [3], [0, 2, 3], [0, 1, 3])
    assert reading_members(last, reading) == members
    final = final_core(last, reading)
    assert torch.equal(final.rows, last.rows[members]) and final.latents == [last.latents[i] for i in members]
    assert (final.cycle, final.parent) == (3, "parent")


def test_an_empty_reading_is_refused():
    with pytest.raises(UserError, match="distill.final_core is last_two: .* use all_of_last"):
        final_core(core_of([3], [3]), "last_two")


def test_readings_after_the_first_cycle_alone():
    alone = core_of([0], [0], cycle=0)
    assert {name: len(reading_members(alone, name)) for name in READINGS} == {
        "all_of_last": 2,
        "last_two": 0,
        "every_since_first": 0,
        "alive_since_0": 2,
    }


@pytest.mark.parametrize("d_sae, prefixes", [(20, (4, 9)), (12, ())])
def test_candidates_are_the_first_prefix(d_sae, prefixes):
    sae = MatryoshkaSAE(D_IN, d_sae, prefixes, random(3, D_IN))
    found = Candidates.of(5, sae, torch.arange(d_sae, dtype=torch.float64))
    n = sae.prefixes[0]
    assert found.ids == [f"c5:{3 + i}" for i in range(n)] and torch.equal(found.rows, sae.free_rows[:n])
    assert found.frequency.tolist() == list(range(3, 3 + n))
