"""The controls: who is drawn, of which pool, in which directions and at which norms."""

import numpy as np
import pytest
import torch
from builders.clone import TOY
from builders.sae import latent, random

from dmsae_lib.command.stages import stages
from dmsae_lib.config import RunConfig, sections
from dmsae_lib.config.run import Run
from dmsae_lib.config.sections import CONTROLS, NEW_ROWS
from dmsae_lib.distill import controls
from dmsae_lib.distill.controls import (
    Arms,
    Pool,
    candidate_pool,
    control,
    control_core,
    geometry,
    open_arms,
    placebo_rows,
)
from dmsae_lib.distill.core import Candidates, Core, save_core
from dmsae_lib.store.artifacts import UserError, write

pytestmark = pytest.mark.usefixtures("one_thread")

D_IN = 6


def make_pool(n: int = 30) -> Pool:
    return Pool(
        [f"c0:{i}" for i in range(n)],
        random(n, D_IN, seed=7),
        torch.linspace(0.001, 0.6, n, dtype=torch.float64),
    )


def make_core(members: list[int], frequencies: list[float]) -> Core:
    latents = [latent(0, m, frequency=f) for m, f in zip(members, frequencies)]
    return Core(2, 3.0 * random(len(members), D_IN, seed=8), latents)


CORE = make_core([1, 5, 9, 20, 29], [0.01, 0.1, 0.2, 0.4, 0.6])


def positions(rows: torch.Tensor, pool: Pool) -> list[int]:
    return [int((pool.rows == row).all(1).nonzero()) for row in rows]


def part(cycle: int, n: int = 4, first: int = 0) -> Candidates:
    """The first prefix of one cycle: ``n`` latents behind a core of ``first``."""
    ids, frequency = [f"c{cycle}:{first + i}" for i in range(n)], torch.arange(n, dtype=torch.float64)
    return Candidates(ids, random(n, 3 * D_IN, seed=40 + cycle), frequency + 100 * cycle)


def test_the_pool_is_every_cycles_first_prefix():
    parts = [part(0), part(1, first=2), part(2, first=2)]
    pool = candidate_pool(parts)
    assert pool.ids == [f"c0:{i}" for i in range(4)] + [f"c{t}:{i}" for t in (1, 2) for i in range(2, 6)]
    assert pool.frequency.tolist() == [0, 1, 2, 3, 100, 101, 102, 103, 200, 201, 202, 203]
    assert torch.equal(pool.rows, torch.cat([one.rows for one in parts])) and pool.copies == 0


# activations: a mean, and directions of unequal variance
X = random(300, D_IN, seed=11) * torch.logspace(0, -1, D_IN) + 0.5


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_near_copies_are_left_out_of_the_pool():
    """The earlier of two rows within |cos| > .9 stays, whatever norms and signs; one at .89 is no copy."""
    first, second = part(0), part(1, first=2)
    row, other = first.rows[0], random(3 * D_IN, seed=77)
    other -= other @ row / row.square().sum() * row  # orthogonal
    unit, away = row / row.norm(), other / other.norm()
    second.rows[0] = -3 * (0.91 * unit + (1 - 0.91**2) ** 0.5 * away)
    second.rows[1] = 0.89 * unit - (1 - 0.89**2) ** 0.5 * away
    pool = candidate_pool([first, second])
    assert pool.copies == 1 and pool.ids == ["c0:0", "c0:1", "c0:2", "c0:3", "c1:3", "c1:4", "c1:5"]
    unit_rows = torch.nn.functional.normalize(pool.rows, dim=1)
    assert float((unit_rows @ unit_rows.T - torch.eye(len(pool.rows))).abs().max()) <= 0.9
    assert pool.frequency.tolist() == [0, 1, 2, 3, 101, 102, 103]


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
    wide = Core(0, torch.ones(400, 64), [latent(0, i) for i in range(400)])
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
    large = Core(0, torch.ones(13, D_IN), [latent(0, i) for i in range(13)])
    with pytest.raises(UserError, match="pca needs 13 rows and can have 12 at most: lower sae.prefixes"):
        control_core("pca", large, None, X, seeded(0))
    with pytest.raises(
        UserError, match="data_points needs 13 rows and can have 9 at most: raise data.train_tokens"
    ):
        control_core("data_points", large, None, X[:9], seeded(0))
    with pytest.raises(UserError, match="no control core 'lucky'"):
        control_core("lucky", CORE, make_pool(), X, seeded(0))


def test_every_control_that_may_be_named_has_its_function():
    assert list(controls.FUNCTIONS) == list(CONTROLS)


def test_a_control_of_ones_own(monkeypatch):
    """One line in ARMS and one function; a name that is not in ARMS is refused."""
    monkeypatch.setattr(controls, "FUNCTIONS", dict(controls.FUNCTIONS))
    with pytest.raises(ValueError, match="toy is no control in config.sections.ARMS"):
        control("toy")
    monkeypatch.setitem(sections.ARMS, "toy", "new rows")
    monkeypatch.setitem(sections.ARMS, "rarest", "of latents")

    @control("toy")
    def unit_vectors(rows, x, random):
        return torch.eye(D_IN)[: len(rows)]

    @control("rarest")
    def rarest(core, pool, random):
        return torch.argsort(pool.frequency)

    rows, ids, _ = control_core("toy", CORE, None, X, seeded(0))
    assert ids is None and torch.equal(rows, torch.diag(CORE.rows.norm(dim=1)) @ torch.eye(D_IN)[:5])
    assert torch.equal(placebo_rows("toy", CORE, rows[:2], X, seeded(0)), rows)
    assert control_core("rarest", CORE, make_pool(), X, seeded(0)).ids == [f"c0:{i}" for i in range(5)]


def test_an_arm_that_nothing_is_made_of_is_no_distilled_one_under_another_name(monkeypatch):
    arms = Arms(CORE, make_pool(), 0, "main")
    assert arms.frozen("none", 0, X) is None
    assert all(torch.equal(arms.frozen(arm, 0, X).rows, CORE.rows) for arm in ("distilled", "warm_start"))
    monkeypatch.setitem(sections.ARMS, "toy_free", "unfrozen")
    with pytest.raises(UserError, match="the arm toy_free.*Arms.frozen"):
        arms.frozen("toy_free", 0, X)


def write_cores(run: Run, chain: str, first: int) -> list[Core]:
    """Cores of both cycles of a chain, as large as ``first`` says, all of the last one's selected before."""
    made = []
    for t in range(2):
        latents = [latent(0, i, list(range(t + 1)), frequency=0.1 * i) for i in range(first)]
        made.append(Core(t, random(first, D_IN, seed=50 + 10 * first + t), latents))
        with write(run.cycle(t, "core", chain), "core") as writer:
            save_core(writer, made[-1], part(t), 0.9, "mean_abs")
    return made


def test_another_seeds_core_is_that_chains_core_whole(tmp_path):
    """Bit for bit and as large as it is there, the main chain's in its turn too; a chain of another kind
    lends none, and without the arm none is opened."""
    chains = [{"name": f"seed{n}", "seed": n, "retrain": ["other_chain"]} for n in (1, 2)]
    chains.append({"name": "exempt", "core_sparsity": "batchtopk"})
    tree = TOY | {"name": "toy", "distill": {"cycles": 1, "chains": chains}}
    config = RunConfig.model_validate(tree | {"retrain": TOY["retrain"] | {"controls": {"other_chain": 1}}})
    run = Run(config, "toy", tmp_path)
    last = {chain: write_cores(run, chain, n)[-1] for n, chain in enumerate(("main", "seed1", "seed2"), 3)}
    for chain, others in (("main", ("seed1", "seed2")), ("seed1", ("main", "seed2"))):
        arms = open_arms(run, chain)
        for seed in range(4):
            given, other = arms.frozen("other_chain", seed, X), last[others[seed % 2]]
            assert torch.equal(given.rows, other.rows) and given.ids is None
            assert torch.equal(given.frequency, other.frequency)
        assert torch.equal(arms.frozen("distilled", 0, X).rows, last[chain].rows)
    without = Run(RunConfig.model_validate(tree), "toy", tmp_path)
    with pytest.raises(UserError, match="other_chain needs another chain's core"):
        open_arms(without).frozen("other_chain", 0, X)
    parents = {stage.name: stage.parents for stage in stages(config)}
    for name, core in (("retrain", "chain_seed2/cycle_1/core"), ("chain_seed1_retrain", "cycle_1/core")):
        assert core in parents[name] and "chain_exempt/cycle_1/core" not in parents[name]
