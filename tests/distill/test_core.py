"""The core over hand-made cycles: rows, lineage, readings, round trip; and the control cores."""

import numpy as np
import pytest
import torch

from dmsae_lib.config.sections import NEW_ROWS
from dmsae_lib.distill.core import (
    Core,
    Latent,
    Pool,
    candidate_pool,
    control_core,
    distil,
    final_core,
    geometry,
    placebo_rows,
    read_core,
    reading_members,
    save_core,
)
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.store.artifacts import UserError, load, write

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

    cycle 0: 4 candidates, shares .5 .1 .3 .1       -> 0 and 2 cycle 1: core (c0:0, c0:2) and 4 candidates,
    shares .05 .3 0 .5 .15 0 -> c0:2 again and the new 3; c0:0 drops out cycle 2: core (c0:2, c1:3) and 4
    candidates, shares .1 .4 0 0 .45 .05 -> c1:3 again and the new 4; c0:2 drops out
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
    sizes = [
        len(reading_members(alone, reading))
        for reading in ("all_of_last", "last_two", "every_since_first", "alive_since_0")
    ]
    assert sizes == [2, 0, 0, 2]


# ---------------------------------------------------------------------------------------- controls


def make_pool(n: int = 30) -> Pool:
    return Pool(
        [f"c0:{i}" for i in range(n)],
        random(n, D_IN, seed=7),
        torch.linspace(0.001, 0.6, n, dtype=torch.float64),
    )


def make_core(members: list[int], frequencies: list[float]) -> Core:
    latents = [Latent(f"c0:{m}", 0, m, m, [0], frequency=f) for m, f in zip(members, frequencies)]
    return Core(2, 3.0 * random(len(members), D_IN, seed=8), latents)


CORE = make_core([1, 5, 9, 20, 29], [0.01, 0.1, 0.2, 0.4, 0.6])


def positions(rows: torch.Tensor, pool: Pool) -> list[int]:
    return [int((pool.rows == row).all(1).nonzero()) for row in rows]


def test_the_pool_is_every_cycles_first_prefix(cycles):
    frequencies = [torch.arange(n, dtype=torch.float64) + 100 * cycle for cycle, n in enumerate((4, 6, 6))]
    pool = candidate_pool([(cycle, sae, frequencies[cycle]) for cycle, (sae, _) in enumerate(cycles)])
    assert pool.ids == [
        "c0:0",
        "c0:1",
        "c0:2",
        "c0:3",
        "c1:2",
        "c1:3",
        "c1:4",
        "c1:5",
        "c2:2",
        "c2:3",
        "c2:4",
        "c2:5",
    ]
    assert pool.frequency.tolist() == [0, 1, 2, 3, 102, 103, 104, 105, 202, 203, 204, 205]
    assert torch.equal(pool.rows, torch.cat([sae.free_rows[:PREFIX0] for sae, _ in cycles]))
    for _, core in cycles:  # names and rows agree with the cores'
        for latent, row in zip(core.latents, core.rows):
            assert torch.equal(pool.rows[pool.ids.index(latent.id)], row)


# activations: a mean, and directions of unequal variance
X = random(300, D_IN, seed=11) * torch.logspace(0, -1, D_IN) + 0.5


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_near_copies_are_left_out_of_the_pool(cycles):
    """The earlier of two rows within |cos| > .9 stays, whatever their norms and signs; a row at .89 is no
    copy."""
    (first, _), (second, _) = cycles[0], cycles[1]
    row = first.free_rows[0].detach()
    other = random(D_IN, seed=77)
    other -= other @ row / row.square().sum() * row  # orthogonal
    unit, away = row / row.norm(), other / other.norm()
    with torch.no_grad():
        second.free_rows[0] = -3 * (0.91 * unit + (1 - 0.91**2) ** 0.5 * away)
        second.free_rows[1] = 0.89 * unit - (1 - 0.89**2) ** 0.5 * away
    frequency = torch.arange(6, dtype=torch.float64)
    pool = candidate_pool([(0, first, frequency[:4]), (1, second, frequency)])
    assert pool.copies == 1 and pool.ids == ["c0:0", "c0:1", "c0:2", "c0:3", "c1:3", "c1:4", "c1:5"]
    unit_rows = torch.nn.functional.normalize(pool.rows, dim=1)
    assert float((unit_rows @ unit_rows.T - torch.eye(len(pool.rows))).abs().max()) <= 0.9
    assert pool.frequency.tolist() == [0, 1, 2, 3, 3, 4, 5]


def test_random_controls_are_drawn_without_replacement():
    pool, draws = make_pool(), []
    for seed in range(200):
        rows, ids, frequency = control_core("random", CORE, pool, X, seeded(seed))
        chosen = positions(rows, pool)
        assert len(set(chosen)) == len(CORE) and ids == [pool.ids[i] for i in chosen]
        assert torch.equal(frequency, pool.frequency[chosen])
        draws.append(frozenset(chosen))
    assert len(set(draws)) > 190  # the seed matters
    assert torch.equal(
        control_core("random", CORE, pool, X, seeded(3))[0],
        control_core("random", CORE, pool, X, seeded(3))[0],
    )
    counts = [sum(i in draw for draw in draws) for i in range(30)]  # each 200 * 5 / 30 = 33 times, sd 5.3
    assert 15 <= min(counts) and max(counts) <= 54


def test_a_pool_of_the_cores_own_size_is_all_of_it():
    rows, *_ = control_core("random", make_core([0, 1, 2, 3, 4], [0.1] * 5), make_pool(5), X, seeded(0))
    assert sorted(positions(rows, make_pool(5))) == [0, 1, 2, 3, 4]


def test_latents_from_outside_the_core():
    """Whatever is within |cos| .9 of a core latent, whatever its sign, is never drawn."""
    pool, core = make_pool(), make_core([0, 1, 2, 3, 4], [0.1] * 5)
    core.rows = torch.cat([-2 * pool.rows[10:13], pool.rows[:2]])
    nearest = [float(torch.cosine_similarity(row[None], core.rows).abs().max()) for row in pool.rows]
    away = {i for i in range(30) if nearest[i] <= 0.9}
    assert away.isdisjoint({0, 1, 10, 11, 12})
    drawn = [
        positions(control_core("random_outside", core, pool, X, seeded(seed)).rows, pool)
        for seed in range(100)
    ]
    assert set().union(*drawn) == away and all(len(set(draw)) == 5 for draw in drawn)


@pytest.mark.parametrize("kind", NEW_ROWS)
def test_a_placebo_chain_keeps_its_survivors(kind):
    """Bit for bit, in front; the new rows are what the kind draws, at the norms of the core's rows, and none
    is there twice."""
    empty = torch.empty(0, D_IN)
    first = placebo_rows(kind, CORE, empty, X, seeded(0))
    assert torch.equal(first, control_core(kind, CORE, None, X, seeded(0)).rows)
    survivors = first[[1, 3]]
    second = placebo_rows(kind, CORE, survivors, X, seeded(1))
    assert second.shape == CORE.rows.shape and torch.equal(second[:2], survivors)
    cosines = torch.nn.functional.normalize(second, dim=1) @ torch.nn.functional.normalize(second, dim=1).T
    assert float((cosines - torch.eye(5)).max()) < 0.9999
    new = control_core(kind, CORE, None, X, seeded(1)).rows
    assert all(bool((new == row).all(1).any()) for row in second[2:])
    # all were selected again: nothing is new
    assert torch.equal(placebo_rows(kind, CORE, first, X, seeded(2)), first)


def test_most_frequent_control():
    rows, ids, _ = control_core("most_frequent", CORE, make_pool(), X, seeded(0))
    assert positions(rows, make_pool()) == [29, 28, 27, 26, 25] and len(ids) == 5


@pytest.mark.parametrize("kind", NEW_ROWS)
def test_new_rows_have_the_cores_norms_and_are_no_latents(kind):
    rows, ids, frequency = control_core(kind, CORE, None, X, seeded(0))
    assert ids is None and frequency is None and rows.shape == CORE.rows.shape
    assert torch.allclose(rows.norm(dim=1), CORE.rows.norm(dim=1), rtol=1e-5)
    other = control_core(kind, CORE, None, X, seeded(1))[0]
    assert torch.allclose(rows, other) == (kind == "pca")  # principal components are not drawn


def test_random_directions_prefer_none():
    wide = Core(0, torch.ones(400, 64), [Latent(str(i), 0, i, i) for i in range(400)])
    directions = control_core("random_directions", wide, None, X, seeded(0))[0] / 8.0
    assert float(directions.mean(0).norm()) < 0.15  # 1 / sqrt(400) = 0.05 expected


def test_data_points_are_centred_activations():
    rows, *_ = control_core("data_points", CORE, None, X, seeded(0))
    cosine = (
        torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(X - X.mean(0), dim=1).T
    )
    best = cosine.max(dim=1)
    assert torch.allclose(best.values, torch.ones(5), atol=1e-5) and len(set(best.indices.tolist())) == 5


def test_principal_directions_come_in_both_signs():
    """Against numpy's SVD of the centred activations."""
    rows, *_ = control_core("pca", CORE, None, X, seeded(0))
    unit = torch.nn.functional.normalize(rows, dim=1).numpy()
    leading = np.linalg.svd((X - X.mean(0)).double().numpy(), full_matrices=False)[2][:3]
    assert np.allclose(np.abs((unit[[0, 2, 4]] * leading).sum(1)), 1, atol=1e-4)
    assert np.allclose(unit[0], -unit[1], atol=1e-6) and np.allclose(unit[2], -unit[3], atol=1e-6)


def test_a_rotated_core_keeps_its_span_norms_and_cosines():
    rows, *_ = control_core("rotated", CORE, None, X, seeded(0))
    assert torch.allclose(rows @ rows.T, CORE.rows @ CORE.rows.T, atol=1e-3)
    projector = torch.linalg.pinv(CORE.rows) @ CORE.rows
    assert torch.allclose(rows @ projector, rows, atol=1e-4)
    assert float(torch.cosine_similarity(rows, CORE.rows).abs().max()) < 0.95  # other directions in it


def test_geometry_by_hand():
    assert geometry(3 * torch.eye(4))["rank"] == pytest.approx(4) and geometry(torch.ones(4, 7))[
        "rank"
    ] == pytest.approx(1)
    found = geometry(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))  # eigenvalues 9 and 1: 100 / 82
    assert found == pytest.approx({"rank": 100 / 82, "norm": 2.0, "norm_min": 1.0, "norm_max": 3.0})


def test_too_small_a_pool_is_refused():
    for kind in ("random", "random_outside", "most_frequent"):
        with pytest.raises(
            UserError, match=rf"control core {kind} needs 5 latents .* hold 4 that differ: raise sae.prefixes"
        ):
            control_core(kind, CORE, make_pool(4), X, seeded(0))
    large = Core(0, torch.ones(13, D_IN), [Latent(str(i), 0, i, i) for i in range(13)])
    with pytest.raises(UserError, match="pca needs 13 rows and can have 12 at most: lower sae.prefixes"):
        control_core("pca", large, None, X, seeded(0))
    with pytest.raises(
        UserError, match="data_points needs 13 rows and can have 9 at most: raise data.train_tokens"
    ):
        control_core("data_points", large, None, X[:9], seeded(0))
    with pytest.raises(UserError, match="no control core 'lucky'"):
        control_core("lucky", CORE, make_pool(), X, seeded(0))
