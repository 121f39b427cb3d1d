"""Many SAEs on one stream: each as if it were trained alone, bit for bit, also after a kill and with batches
made ahead."""

import pytest
import torch
from builders.sae import BATCH, config, make_sae
from test_training import assert_bit_equal, source

from dmsae_lib.data.prefetch import prefetched
from dmsae_lib.sae.loop import train_saes
from dmsae_lib.sae.training import Trainer
from dmsae_lib.store.artifacts import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

# settings of the SAE, settings of the training, steps: k's, cores and lengths of a sweep
MEMBERS = [
    ({}, {}, 30),
    ({"core": 0}, {"k": 3}, 30),
    ({"core_sparsity": "batchtopk"}, {"k": 12}, 30),
    ({}, {"lr": 1e-2}, 45),
]


def member(i: int, **changes) -> Trainer:
    sae, training, steps = MEMBERS[i]
    made = make_sae(**sae)
    with torch.no_grad():
        made.b_enc[-8:] -= torch.linspace(0.3, 3, 8)  # some latents die
    return Trainer(made, config(**{"dead_window": 3 * BATCH, **training, **changes}), steps, f"sae {i}")


@pytest.fixture(scope="module")
def alone(one_thread, tmp_path_factory) -> list[Trainer]:
    found = [member(i) for i in range(len(MEMBERS))]
    for trainer in found:
        train_saes([trainer], source, [tmp_path_factory.mktemp("alone") / "c"], [{}], report=lambda _: None)
    return found


def paths(folder) -> list:
    return [folder / f"c{i}" for i in range(len(MEMBERS))]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_together_equals_alone(alone, tmp_path, order):
    finished, together = [], [member(i) for i in order]
    parents = [{"settings": str(i)} for i in order]
    train_saes(
        together, source, [paths(tmp_path)[i] for i in order], parents, finished.append, lambda _: None
    )
    assert sorted(finished) == [0, 1, 2, 3] and order[finished[-1]] == 3  # each once, and the longer one last
    for i, trainer in zip(order, together):
        assert_bit_equal(trainer, alone[i])


@pytest.mark.parametrize("ahead", [1, 5])
def test_batches_made_ahead_change_nothing(alone, tmp_path, ahead):
    together = [member(i, prefetch=ahead) for i in range(4)]
    train_saes(
        together,
        lambda start: prefetched(source(start), ahead),
        paths(tmp_path),
        [{}] * 4,
        report=lambda _: None,
    )
    for i, trainer in enumerate(together):
        assert_bit_equal(trainer, alone[i])


@pytest.mark.parametrize("stop, lost", [(1, []), (17, []), (17, [2]), (17, [0, 3]), (31, [2]), (31, [0, 3])])
def test_a_kill_at_any_time_is_made_good(alone, tmp_path, stop, lost):
    """Also where some checkpoints are older than others, or were never written."""
    folders = paths(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        killed = [member(i, checkpoint_seconds=1e-9) for i in range(4)]
        train_saes(killed, lambda start: source(start, stop), folders, [{}] * 4, report=lambda _: None)
    for i in lost:  # killed before these were saved: an older state, or none
        older = member(i)
        for x, cursor in source((0, 0, 0)):
            if older.step >= stop // 2:
                break
            older.train_step(x)
            older.cursor = cursor
        older.save(folders[i], {})
    resumed = [member(i) for i in range(4)]
    finished = []
    train_saes(resumed, source, folders, [{}] * 4, finished.append, lambda _: None)
    assert sorted(finished) == [0, 1, 2, 3]
    # the schedule sets the rate at every step; those that had ended made none
    for i, trainer in enumerate(resumed):
        trainer.optimizer.param_groups[0]["lr"] = alone[i].optimizer.param_groups[0]["lr"]
        assert_bit_equal(trainer, alone[i])


def test_one_bad_member_stops_the_run_and_keeps_every_checkpoint(tmp_path):
    def poisoned(start):
        for x, cursor in source(start):
            yield (x * float("nan") if cursor[2] == 6 else x), cursor

    with pytest.raises(UserError, match="Step 5: the activations hold NaN or Inf"):
        members = [member(i, checkpoint_seconds=1e-9) for i in range(4)]
        train_saes(members, poisoned, paths(tmp_path), [{}] * 4, report=lambda _: None)
    for i, folder in enumerate(paths(tmp_path)):
        again = member(i)
        assert again.resume(folder, {}) and again.step == 5


def test_a_trainer_that_does_not_wait_for_its_device(alone):
    """The steps of a GPU, on a CPU: fixed shapes, dead latents looked at now and then, NaN found later and
    named right."""
    trainer, exact = member(0), member(0)
    trainer.waits = True
    for x, _ in source((0, 0, 0)):
        if trainer.step == 12:
            break
        trainer.train_step(x)
        exact.train_step(x)
    assert exact.history[-1]["dead"] > 0 and trainer.history[-1]["dead"] == exact.history[-1]["dead"]
    for name in ("W_dec", "free_rows", "b_enc"):
        found, wanted, start = (getattr(t.sae, name).detach() for t in (trainer, exact, member(0)))
        assert float((found - wanted).abs().max()) < 1e-2 * float((wanted - start).abs().max()), name
    trainer.train_step(torch.full((BATCH, trainer.sae.d_in), float("inf")))
    trainer.train_step(torch.ones(BATCH, trainer.sae.d_in))
    with pytest.raises(UserError, match="Step 12: the activations hold NaN or Inf"):
        trainer.check_finite()
