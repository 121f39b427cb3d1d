"""The core over hand-made cycles: rows, lineage, readings, round trip; and the control cores."""

import math

import pytest
import torch

from dmsae_lib.artifacts import UserError, load, write
from dmsae_lib.core import (
    Core,
    Latent,
    Pool,
    candidate_pool,
    control_core,
    distil,
    final_core,
    read_core,
    reading_members,
    save_core,
)
from dmsae_lib.sae import MatryoshkaSAE

pytestmark = pytest.mark.usefixtures("one_thread")

D_IN, D_SAE, PREFIX0 = 6, 20, 4


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_sae(seed: int, core: Core | None = None) -> MatryoshkaSAE:
    sae = MatryoshkaSAE(D_IN, D_SAE, (PREFIX0, 9), None if core is None else core.rows)
    sae.free_rows.data.copy_(random(*sae.free_rows.shape, seed=seed))
    return sae


def scores(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def cycles() -> list[tuple[MatryoshkaSAE, Core]]:
    """Three cycles at a coverage of 0.8, the selection worked out by hand beside each.

    cycle 0: 4 candidates, shares .5 .1 .3 .1       -> 0 and 2
    cycle 1: core (c0:0, c0:2) and 4 candidates, shares .05 .3 0 .5 .15 0 -> c0:2 again and the new 3; c0:0 drops out
    cycle 2: core (c0:2, c1:3) and 4 candidates, shares .1 .4 0 0 .45 .05 -> c1:3 again and the new 4; c0:2 drops out
    """
    table = [scores(5, 1, 3, 1), scores(1, 6, 0, 10, 3, 0), scores(2, 8, 0, 0, 9, 1)]
    found: list[tuple[MatryoshkaSAE, Core]] = []
    for cycle, values in enumerate(table):
        previous = found[-1][1] if found else None
        sae = make_sae(10 + cycle, previous)
        frequency = torch.arange(len(values)) / 10 + cycle
        found.append((sae, distil(cycle, sae, values, frequency, previous, 0.8, f"hash{cycle - 1}" if cycle else None)))
    return found


def test_who_is_selected_and_where_from(cycles):
    (_, first), (_, second), (_, third) = cycles
    assert [latent.id for latent in first.latents] == ["c0:0", "c0:2"]
    assert [latent.id for latent in second.latents] == ["c0:2", "c1:3"]
    assert [latent.id for latent in third.latents] == ["c1:3", "c2:4"]
    assert third.latents[0] == Latent("c1:3", first_cycle=1, first_index=3, index=1, selected=[1, 2], score=8.0, share=0.4,
                                      frequency=pytest.approx(2.1))  # fmt: skip
    assert third.latents[1] == Latent("c2:4", 2, 4, 4, [2], 9.0, 0.45, pytest.approx(2.4))
    assert second.latents[0].selected == [0, 1] and second.latents[0].index == 1 and second.latents[0].first_index == 2
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
    core = cycles[2][1]
    with write(tmp_path / "core", "core") as writer:
        save_core(writer, core, 0.8, "mean_abs")
    artifact = load(tmp_path / "core", "core")
    again = read_core(artifact)
    assert torch.equal(again.rows, core.rows) and again.rows.dtype == torch.float32
    assert again.latents == core.latents and (again.cycle, again.parent) == (2, "hash1")
    assert artifact.tensors("core.safetensors")["W_enc"].shape == (D_IN, 2)
    following = MatryoshkaSAE(D_IN, D_SAE, (PREFIX0, 9), again.rows)
    assert torch.equal(following.core_rows, core.rows)


# ---------------------------------------------------------------------------------------- the final core


def core_of(*selected: list[int], cycle: int = 3) -> Core:
    latents = [Latent(f"c{s[0]}:{i}", s[0], i, i, s) for i, s in enumerate(selected)]
    return Core(cycle, random(len(latents), D_IN, seed=5), latents, "parent")


@pytest.mark.parametrize("reading, members", [
    ("all_of_last", [0, 1, 2, 3, 4, 5]),
    ("last_two", [0, 1, 2, 4]),  # selected at 2 and 3
    ("every_since_first", [0, 1, 2]),  # without a gap, and not new
    ("alive_since_0", [0]),
])
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
    sizes = [len(reading_members(alone, reading)) for reading in ("all_of_last", "last_two", "every_since_first", "alive_since_0")]
    assert sizes == [2, 0, 0, 2]


# ---------------------------------------------------------------------------------------- controls


def make_pool(n: int = 30) -> Pool:
    return Pool([f"c0:{i}" for i in range(n)], random(n, D_IN, seed=7), torch.linspace(0.001, 0.6, n, dtype=torch.float64))


def make_core(members: list[int], frequencies: list[float]) -> Core:
    latents = [Latent(f"c0:{m}", 0, m, m, [0], frequency=f) for m, f in zip(members, frequencies)]
    return Core(2, 3.0 * random(len(members), D_IN, seed=8), latents)


CORE = make_core([1, 5, 9, 20, 29], [0.01, 0.1, 0.2, 0.4, 0.6])


def positions(rows: torch.Tensor, pool: Pool) -> list[int]:
    return [int((pool.rows == row).all(1).nonzero()) for row in rows]


def test_the_pool_is_every_cycles_first_prefix(cycles):
    frequencies = [torch.arange(n, dtype=torch.float64) + 100 * cycle for cycle, n in enumerate((4, 6, 6))]
    pool = candidate_pool([(cycle, sae, frequencies[cycle]) for cycle, (sae, _) in enumerate(cycles)])
    assert pool.ids == ["c0:0", "c0:1", "c0:2", "c0:3", "c1:2", "c1:3", "c1:4", "c1:5", "c2:2", "c2:3", "c2:4", "c2:5"]
    assert pool.frequency.tolist() == [0, 1, 2, 3, 102, 103, 104, 105, 202, 203, 204, 205]
    assert torch.equal(pool.rows, torch.cat([sae.free_rows[:PREFIX0] for sae, _ in cycles]))
    for _, core in cycles:  # names and rows agree with the cores'
        for latent, row in zip(core.latents, core.rows):
            assert torch.equal(pool.rows[pool.ids.index(latent.id)], row)


def test_random_controls_are_drawn_without_replacement():
    pool, draws = make_pool(), []
    for seed in range(200):
        rows, overlap = control_core("random", CORE, pool, seed)
        chosen = positions(rows, pool)
        assert len(set(chosen)) == len(CORE)
        assert overlap == len({1, 5, 9, 20, 29} & set(chosen)) / len(CORE)
        draws.append(frozenset(chosen))
    assert len(set(draws)) > 190  # the seed matters
    assert torch.equal(control_core("random", CORE, pool, 3)[0], control_core("random", CORE, pool, 3)[0])
    counts = [sum(i in draw for draw in draws) for i in range(30)]  # each 200 * 5 / 30 = 33 times, sd 5.3
    assert 15 <= min(counts) and max(counts) <= 54


def test_a_pool_of_the_cores_own_size_is_all_of_it():
    pool = make_pool(5)
    rows, overlap = control_core("random", make_core([0, 1, 2, 3, 4], [0.1] * 5), pool, 0)
    assert sorted(positions(rows, pool)) == [0, 1, 2, 3, 4] and overlap == 1.0


def test_most_frequent_control():
    rows, overlap = control_core("most_frequent", CORE, make_pool(), 0)
    assert positions(rows, make_pool()) == [29, 28, 27, 26, 25] and overlap == 0.2
    assert torch.equal(rows, control_core("most_frequent", CORE, make_pool(), 1)[0])


def test_matched_controls_are_the_nearest_in_log_frequency():
    """Greedy in the drawn order: each latent gets the nearest one that is neither taken nor of the core."""
    pool, members = make_pool(), {1, 5, 9, 20, 29}
    for seed in range(20):
        rows, overlap = control_core("frequency_matched", CORE, pool, seed)
        chosen = positions(rows, pool)
        assert overlap == 0.0 and len(set(chosen)) == len(CORE) and not members & set(chosen)
        wanted = {latent.frequency for latent in CORE.latents}
        taken: set[int] = set()
        for position in chosen:  # some core latent that is still without a partner has this as its nearest
            def distance(i, f):
                return abs(math.log(float(pool.frequency[i])) - math.log(f))

            free = [i for i in range(30) if i not in members | taken]
            partners = [f for f in wanted if min(free, key=lambda i, f=f: distance(i, f)) == position]
            assert partners, (seed, position)
            wanted.remove(min(partners, key=lambda f: distance(position, f)))
            taken.add(position)


def test_matched_controls_use_core_members_only_when_nothing_else_is_left():
    pool = make_pool(7)
    core = make_core([0, 1, 2, 3], [float(f) for f in pool.frequency[:4]])
    rows, overlap = control_core("frequency_matched", core, pool, 0)
    chosen = positions(rows, pool)
    assert {4, 5, 6} < set(chosen) and overlap == 0.25


def test_random_directions_have_the_cores_norms():
    rows, overlap = control_core("random_directions", CORE, make_pool(), 0)
    assert overlap is None and rows.shape == CORE.rows.shape
    assert torch.allclose(rows.norm(dim=1), CORE.rows.norm(dim=1), rtol=1e-5)
    other = control_core("random_directions", CORE, make_pool(), 1)[0]
    assert not torch.allclose(rows, other)
    wide = Core(0, torch.ones(400, 64), [Latent(str(i), 0, i, i) for i in range(400)])
    directions = control_core("random_directions", wide, make_pool(), 0)[0] / 8.0
    assert float(directions.mean(0).norm()) < 0.15  # no preferred direction: 1 / sqrt(400) = 0.05 expected


def test_too_small_a_pool_is_refused():
    for kind in ("random", "frequency_matched", "most_frequent"):
        with pytest.raises(UserError, match=rf"control core {kind} needs 5 latents .* hold 4: raise sae.prefixes"):
            control_core(kind, CORE, make_pool(4), 0)
    assert control_core("random_directions", CORE, make_pool(4), 0)[0].shape == (5, D_IN)  # needs no pool
    with pytest.raises(UserError, match="no control core 'lucky'"):
        control_core("lucky", CORE, make_pool(), 0)
