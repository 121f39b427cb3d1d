"""The Trainer: the frozen core, the moving budget, thresholds, checkpoints, and what goes wrong."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from builders.sae import BATCH, CORE, D_IN, D_SAE, K, batch, config, make_sae
from reference import TRAINED, reference_gradients
from torch import Tensor

from dmsae_lib.sae.loop import train_saes
from dmsae_lib.sae.training import Trainer, learning_rate, match_frequency
from dmsae_lib.store.artifacts import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "step, share",
    [(0, 0.2), (1, 0.4), (4, 1.0), (5, 1.0), (50, 1.0), (80, 1.0), (81, 0.95), (90, 0.5), (99, 0.05)],
)
def test_schedule(step, share):
    assert learning_rate(step, 100, config(lr=2.0, warmup=0.05, decay=0.2)) == pytest.approx(2.0 * share)


def test_schedule_without_warm_up_and_decay():
    assert {learning_rate(step, 10, config(lr=2.0, warmup=0, decay=0)) for step in range(10)} == {2.0}


@pytest.mark.parametrize("core_sparsity", ["relu", "batchtopk"])
def test_core_rows_are_out_of_reach(core_sparsity):
    sae = make_sae(core_sparsity=core_sparsity)
    trainer = Trainer(sae, config(lr=0.05, dead_window=2 * BATCH), steps=30)
    before = sae.core_rows.clone()
    start = {name: getattr(sae, name).detach().clone() for name in TRAINED}
    for step in range(30):
        trainer.train_step(batch(step))
    assert torch.equal(sae.core_rows, before)
    assert all(not torch.allclose(getattr(sae, name), start[name]) for name in TRAINED)
    assert not torch.allclose(
        sae.W_dec[:CORE], start["W_dec"][:CORE]
    )  # the core's decoder and bias are trained
    assert not torch.allclose(sae.b_enc[:CORE], start["b_enc"][:CORE])
    assert {name for name, _ in sae.named_parameters()} == set(TRAINED)
    optimised = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in optimised} == {id(getattr(sae, name)) for name in TRAINED}
    storage = sae.core_rows.untyped_storage().data_ptr()
    assert all(p.untyped_storage().data_ptr() != storage for p in optimised)
    assert not sae.core_rows.requires_grad and sae.core_rows.grad is None


def test_total_l0_is_k_where_the_core_leaves_room():
    trainer = Trainer(make_sae(), config(), steps=20)
    for step in range(20):
        stats = trainer.train_step(batch(step))
        assert 0 < stats.l0_core < K - 1
        assert (stats.l0_core + stats.l0_free) * BATCH == pytest.approx(K * BATCH, abs=1e-6)


def test_match_frequency_sets_the_firing_rates():
    sae, x = make_sae(), batch(0, size=4000)
    wanted = torch.tensor([0.0, 0.001, 0.05, 0.3, 0.5, 0.97, 1.0])
    match_frequency(sae, x, wanted)
    rates = (sae.pre_activations(x)[:, :CORE] > 0).float().mean(0)
    assert float((rates - wanted).abs().max()) <= 1.5 / len(x)  # one token more or less
    assert torch.equal(sae.b_enc[CORE:], make_sae().b_enc[CORE:])
    unseen = (sae.pre_activations(batch(1, size=4000))[:, :CORE] > 0).float().mean(0)
    assert float((unseen - wanted).abs().max()) <= 0.03  # three standard errors of a share at 4000 tokens


def train_sae(trainer: Trainer, batches, checkpoint, parents: dict, report) -> None:
    train_saes([trainer], batches, [checkpoint], [parents], report=report)


def source(start: tuple, stop_at: int | None = None) -> Iterator[tuple[Tensor, tuple]]:
    """Endless batches; the cursor's last number says which. ``stop_at`` plays a killed process."""
    index = start[2]
    while True:
        if index == stop_at:
            raise KeyboardInterrupt
        yield batch(index), (index // 7, 0, index + 1)
        index += 1


def new_trainer(steps: int = 40, **changes) -> Trainer:
    """Clipping now and then, and latents that are dead for a while or for good, so that every piece of state
    matters."""
    sae = make_sae()
    with torch.no_grad():
        sae.b_enc[-8:] -= torch.tensor([0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 5.0, 5.0])
    return Trainer(
        sae,
        config(**{"dead_window": 3 * BATCH, "grad_clip": 0.9, "checkpoint_seconds": 1e-9, **changes}),
        steps,
    )


def state_of(trainer: Trainer) -> dict:
    optimizer = trainer.optimizer.state_dict()
    tensors = {**trainer.sae.state_dict(), "since_fired": trainer.since_fired}
    tensors |= {
        f"adam.{i}.{name}": value for i, entry in optimizer["state"].items() for name, value in entry.items()
    }
    plain = {
        name: getattr(trainer, name) for name in ("step", "cursor", "clipped", "last_threshold", "history")
    }
    return plain | {"tensors": tensors, "groups": optimizer["param_groups"]}


def assert_bit_equal(a: Trainer, b: Trainer) -> None:
    one, two = state_of(a), state_of(b)
    assert one["tensors"].keys() == two["tensors"].keys()
    for name, value in one["tensors"].items():
        assert value.dtype == two["tensors"][name].dtype and torch.equal(value, two["tensors"][name]), name
    for name in one.keys() - {"tensors"}:
        assert one[name] == two[name], name


@pytest.fixture(scope="module")
def uninterrupted(one_thread, tmp_path_factory) -> Trainer:
    trainer = new_trainer(checkpoint_seconds=1e9)
    train_sae(trainer, source, tmp_path_factory.mktemp("none") / "checkpoint", {}, report=lambda _: None)
    return trainer


def test_the_run_exercises_its_state(uninterrupted):
    assert (
        0 < uninterrupted.clipped < 40
        and uninterrupted.history[-1]["dead"] > 0
        and uninterrupted.history[-1]["aux"] > 0
    )
    assert (
        uninterrupted.sae.threshold_ema.dtype == torch.float64 and float(uninterrupted.sae.threshold_ema) > 0
    )


def test_training_twice_gives_the_same_bits(uninterrupted, tmp_path):
    again = new_trainer()  # writing checkpoints changes nothing either
    train_sae(again, source, tmp_path / "checkpoint", {}, report=lambda _: None)
    assert_bit_equal(again, uninterrupted)


@pytest.mark.parametrize("stops", [[1], [23], [5, 6, 39]])
def test_resumed_equals_never_stopped(uninterrupted, tmp_path, stops):
    parents, folder, said = {"harvest": "a", "settings": "b"}, tmp_path / "checkpoint", []
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            train_sae(
                new_trainer(),
                lambda start, stop=stop: source(start, stop),
                folder,
                parents,
                report=said.append,
            )
    resumed = new_trainer()
    train_sae(resumed, source, folder, parents, report=said.append)
    assert f"resumed at step {stops[-1]}/40" in said
    assert_bit_equal(resumed, uninterrupted)


def test_work_after_the_last_checkpoint_is_done_again(uninterrupted, tmp_path):
    killed = new_trainer()
    for x, cursor in source((0, 0, 0)):
        killed.train_step(x)
        killed.cursor = cursor
        if killed.step == 17:
            killed.save(tmp_path / "checkpoint", {"harvest": "a"})
        if killed.step == 20:
            break
    resumed = new_trainer(checkpoint_seconds=1e9)
    train_sae(resumed, source, tmp_path / "checkpoint", {"harvest": "a"}, report=lambda _: None)
    assert_bit_equal(resumed, uninterrupted)


def test_a_checkpoint_of_something_else_is_not_resumed(tmp_path):
    folder, parents = tmp_path / "checkpoint", {"harvest": "a", "settings": "b"}
    saved = new_trainer()
    saved.train_step(batch(0))
    saved.save(folder, parents)
    others = [
        ({"harvest": "a", "settings": "c"}, 40),
        ({"harvest": "a"}, 40),
        (parents | {"core": "d"}, 40),
        (parents, 41),
    ]
    for other, steps in others:
        fresh, untouched = new_trainer(steps), new_trainer(steps)
        assert not fresh.resume(folder, other)
        assert_bit_equal(fresh, untouched)
    assert not new_trainer().resume(tmp_path / "nothing", parents)
    again = new_trainer()
    assert again.resume(folder, {"settings": "b", "harvest": "a"})  # in any order
    # the schedule sets it at every step
    again.optimizer.param_groups[0]["lr"] = saved.optimizer.param_groups[0]["lr"]
    assert_bit_equal(again, saved)


def test_a_checkpoint_of_an_earlier_release_is_not_resumed(tmp_path):
    """Its history names the L0 of the free latents otherwise, and one table cannot hold both."""
    trainer = new_trainer()
    trainer.train_step(batch(0))
    trainer.save(tmp_path / "now", {"a": "b"})
    trainer.history = [{"L0_non_core" if n == "L0_free" else n: v for n, v in trainer.history[0].items()}]
    trainer.save(tmp_path / "before", {"a": "b"})
    assert new_trainer().resume(tmp_path / "now", {"a": "b"})
    assert not new_trainer().resume(tmp_path / "before", {"a": "b"})


def test_a_checkpoint_that_no_longer_fits_is_set_aside(uninterrupted, tmp_path):
    """Whole, so that it can be put back with the settings that it was made with; training starts anew."""
    folder, said = tmp_path / ".sae.checkpoint", []
    for settings, stop in (("a", 7), ("b", 9)):
        with pytest.raises(KeyboardInterrupt):
            train_sae(
                new_trainer(),
                lambda start, stop=stop: source(start, stop),
                folder,
                {"settings": settings},
                said.append,
            )
    again = new_trainer(checkpoint_seconds=1e9)
    train_sae(again, source, folder, {"settings": "c"}, said.append)
    assert_bit_equal(again, uninterrupted)
    lines = [line for line in said if "set aside" in line]
    assert len(lines) == 2 and all(
        f"the checkpoint in {folder} was made with other settings or data" in line for line in lines
    )
    (aside,) = tmp_path.iterdir()  # the latest: the disk must not fill with them
    assert aside.name in lines[1] and not any("resumed" in line for line in said)
    back = new_trainer()
    assert back.resume(aside.rename(folder), {"settings": "b"}) and back.step == 9


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_activations_name_the_step(tmp_path, value):
    def poisoned(start):
        for x, cursor in source(start):
            if cursor[2] == 4:
                x[5, 2] = value
            yield x, cursor

    trainer = new_trainer()
    with pytest.raises(
        UserError, match=r"^Step 3: the activations hold NaN or Inf; .*training\.lr .*data\.outlier_norm"
    ):
        train_sae(trainer, poisoned, tmp_path / "checkpoint", {}, report=lambda _: None)
    # the bad batch was not applied
    assert all(bool(torch.isfinite(p).all()) for p in trainer.sae.parameters())
    resumed = new_trainer()
    assert resumed.resume(tmp_path / "checkpoint", {}) and resumed.step == 3


def test_a_diverged_loss_is_told_apart():
    trainer = new_trainer()
    with torch.no_grad():
        trainer.sae.b_dec[0] = float("inf")
    with pytest.raises(UserError, match="Step 0: the loss hold"):
        trainer.train_step(batch(0))


def test_autocast_is_passed_on():
    """bfloat16 products, float32 weights, moments and double threshold; near the exact run after two
    steps."""
    exact, fast = new_trainer(), new_trainer(autocast=True)
    for step in range(2):
        losses = [float(trainer.train_step(batch(step)).loss) for trainer in (exact, fast)]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)
    tensors = state_of(fast)["tensors"]
    assert {name: t.dtype for name, t in tensors.items()} == {
        name: t.dtype for name, t in state_of(exact)["tensors"].items()
    }


def test_too_few_activations(tmp_path):
    with pytest.raises(UserError, match="ended at step 3 of 40: data.train_tokens"):
        train_sae(
            new_trainer(),
            lambda _: ((batch(i), (0, 0, i + 1)) for i in range(3)),
            tmp_path / "c",
            {},
            report=lambda _: None,
        )


@pytest.mark.parametrize("core_bias, warned", [(0.0, False), (5.0, True)])
def test_warning_when_the_core_fills_the_budget(tmp_path, core_bias, warned):
    """With the bias all 7 core latents fire on every token: 78 % of k = 9."""
    trainer, said = new_trainer(steps=5, lr=1e-5), []
    with torch.no_grad():
        trainer.sae.b_enc[:CORE] += core_bias
    train_sae(trainer, source, tmp_path / "checkpoint", {}, report=said.append)
    warnings = [line for line in said if "WARNING" in line]
    assert len(warnings) == int(warned)
    if warned:
        assert "step 1: the core's L0 is 7.0, 78% of k = 9" in warnings[0]
    assert "step 5/5" in said[-1] and all(
        word in said[-1] for word in ("tokens/s", "ETA", "loss", "L0", "dead")
    )


def test_threshold_average_and_dead_counters():
    """threshold_ema by its formula in float64; since_fired counts tokens since each latent's last
    activation."""
    trainer = Trainer(make_sae(), config(), steps=50)
    beta, average, counters = 1 - 10 / 50, None, torch.zeros(D_SAE, dtype=torch.int64)
    for step in range(8):
        x = batch(step)
        f = reference_gradients(trainer.sae, x, K)["f"]
        smallest = float(f[:, CORE:][f[:, CORE:] > 0].min())
        average = smallest if average is None else beta * average + (1 - beta) * smallest
        counters = torch.where((f > 0).any(0), 0, counters + BATCH)
        trainer.train_step(x)
        assert float(trainer.sae.threshold_ema) == pytest.approx(average, rel=1e-6)
        assert torch.equal(trainer.since_fired, counters)
        assert trainer.last_threshold == pytest.approx(smallest, rel=1e-5)
    with torch.no_grad():
        trainer.sae.b_enc.fill_(-100)  # nothing fires, so there is no smallest activation to average
    trainer.train_step(batch(8))
    assert float(trainer.sae.threshold_ema) == pytest.approx(average, rel=1e-6)
    assert trainer.last_threshold == pytest.approx(smallest, rel=1e-5)
    betas = [Trainer(make_sae(), config(), steps).beta for steps in (20_000, 5)]
    assert betas == [0.999, 0.0]


def test_defaults_that_depend_on_the_size():
    assert Trainer(make_sae(), config(), steps=10).dead_window == 40 * BATCH  # few steps: 40 batches
    # many: 2 % of the tokens
    assert Trainer(make_sae(), config(), steps=10_000).dead_window == 10_000 * BATCH // 50
    assert Trainer(make_sae(), config(), steps=10).k_aux == D_IN // 2
    custom = Trainer(make_sae(), config(dead_window=5, k_aux=3), steps=10)
    assert (custom.dead_window, custom.k_aux) == (5, 3)


def test_history_columns():
    trainer = Trainer(make_sae(), config(), steps=120)
    for step in range(4):
        stats = trainer.train_step(batch(step))
    assert [row["step"] for row in trainer.history] == [1, 2, 4]
    assert list(trainer.history[0]) == [
        "step",
        "tokens",
        "loss",
        "fvu",
        "aux",
        "L0_core",
        "L0_free",
        "L0_total",
        "dead",
        "threshold",
        "lr",
    ]
    last = trainer.history[-1]
    assert (
        last["tokens"] == 4 * BATCH
        and last["L0_total"] == pytest.approx(K)
        and last["L0_core"] == stats.l0_core
    )
    assert last["lr"] == learning_rate(3, 120, config())


@pytest.mark.parametrize("shape", [(BATCH,), (BATCH, D_IN + 1), (2, BATCH, D_IN)])
def test_activations_of_another_shape_are_refused(shape):
    with pytest.raises(
        UserError, match=rf"have the shape .*{shape[-1]}.*: give batches \(batch_size, {D_IN}\)"
    ):
        Trainer(make_sae(), config(), steps=2).train_step(torch.zeros(shape))


@pytest.mark.parametrize("x", [torch.randn(1, D_IN), torch.ones(BATCH, D_IN)], ids=["one row", "equal rows"])
def test_a_batch_without_variance_has_no_fvu_and_ends_nothing(x, tmp_path):
    trainer = Trainer(make_sae(), config(batch_size=len(x)), steps=4)
    train_sae(
        trainer,
        lambda cursor: ((x, (0, 0, i)) for i in itertools.count()),
        tmp_path / "checkpoint",
        {},
        lambda line: None,
    )
    trainer.save(tmp_path / "checkpoint", {})
    assert trainer.step == 4 and [row["fvu"] for row in trainer.history] == [None] * len(trainer.history)
    again = Trainer(make_sae(), config(batch_size=len(x)), steps=4)
    assert again.resume(tmp_path / "checkpoint", {}) and again.history == trainer.history
