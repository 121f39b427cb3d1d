"""What an SAE is held to depend on, and what is left behind while several are trained."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dmsae_lib.config import load_config
from dmsae_lib.distill import fit
from dmsae_lib.distill.fit import Job, parents_of
from dmsae_lib.store import artifacts

pytestmark = pytest.mark.usefixtures("one_thread")


class Source:
    """Activations without end, and how many of its streams have begun and ended."""

    begun = ended = 0

    def batches(self, size, seed, name, cursor=(0, 0, 0)):
        self.begun += 1
        try:
            while True:
                yield torch.randn(size, 16, generator=torch.Generator().manual_seed(0)), cursor
        finally:
            self.ended += 1


def make_harvest(folder, *overrides):
    run = SimpleNamespace(config=load_config("smoke", overrides), folder=folder)
    model, source = SimpleNamespace(d_model=16, device="cpu"), Source()
    artifact = SimpleNamespace(hash="h")
    return SimpleNamespace(
        run=run, model=model, artifact=artifact, stream=source, source=lambda fresh: source
    )


def make_job(harvest, **more):
    training = harvest.run.config.training
    return Job(harvest.run.folder / "sae", training, seed=0, order="one", order_seed=0, **more)


def trained_by(job, **settings):
    return replace(job, training=job.training.model_copy(update=settings))


def test_an_sae_depends_on_all_that_changes_its_weights_or_numbers(tmp_path):
    harvest = make_harvest(tmp_path)
    job = make_job(harvest, core_hash="c")
    changed = {"seed": 1, "order": "other", "order_seed": 1, "core_hash": "d", "factor": 2, "fresh": True}
    changed |= {"measured_on": "select", "warm_rows": torch.ones(2, 16), "folder": tmp_path / "other"}
    found = [parents_of(replace(job, **{name: value}), harvest) for name, value in changed.items()]
    found += [
        parents_of(trained_by(job, **{n: v}), harvest) for n, v in {"k": 8, "core_sparsity": "x"}.items()
    ]
    found += [parents_of(job, make_harvest(tmp_path, it)) for it in ("threads=2", "sae.d_sae=128")]
    found += [parents_of(job, make_harvest(tmp_path, "data.store=stream")), parents_of(job, harvest)]
    assert len({tuple(sorted(parents.items())) for parents in found}) == len(found)


def test_an_sae_does_not_depend_on_how_it_is_trained_or_on_a_core_that_it_has_not(tmp_path):
    harvest = make_harvest(tmp_path)
    for job in (make_job(harvest), make_job(harvest, core_hash="c")):
        how = {"checkpoint_seconds": 9.0, "together": 1, "prefetch": 3}
        assert parents_of(trained_by(job, **how), harvest) == parents_of(job, harvest)
    without = make_job(harvest)
    other_kind = trained_by(without, core_sparsity="batchtopk", core_decoder_init="encoder")
    assert parents_of(other_kind, harvest) == parents_of(without, harvest)
    streamed = [make_harvest(tmp_path, "data.store=stream", f"data.buffer_rows={n}") for n in (64, 128)]
    assert parents_of(without, streamed[0]) != parents_of(without, streamed[1])
    stored = [make_harvest(tmp_path, f"data.buffer_rows={n}") for n in (64, 128)]
    assert parents_of(without, stored[0]) == parents_of(without, stored[1])


def test_no_stream_is_left_open_while_saes_are_trained(tmp_path, monkeypatch):
    """A stream holds a block of activations, which may be gigabytes on the device."""
    harvest, seen = make_harvest(tmp_path), []
    monkeypatch.setattr(
        fit, "train_saes", lambda *_: seen.append((harvest.stream.begun, harvest.stream.ended))
    )
    fit._fit_together([make_job(harvest)], harvest, print)
    assert seen == [(1, 1)]


def test_rows_that_start_warm_are_in_every_prefix_as_a_core_is(tmp_path):
    harvest, rows = make_harvest(tmp_path), torch.eye(16)[:5]
    cold = fit._trainer(make_job(harvest), harvest, [torch.ones(4, 16)]).sae
    warm = fit._trainer(make_job(harvest, warm_rows=rows), harvest, [torch.ones(4, 16)]).sae
    frozen = fit._trainer(make_job(harvest, core_rows=rows), harvest, [torch.ones(4, 16)]).sae
    assert warm.prefixes[:-1] == tuple(5 + m for m in cold.prefixes[:-1]) and warm.n_core == 0
    assert [frozen.n_core + m for m in frozen.prefixes] == list(warm.prefixes)
    assert torch.equal(warm.free_rows[:5], rows)


@pytest.mark.parametrize("dtype, bf16", [("bfloat16", True), ("float32", False)])
def test_auto_trains_in_the_precision_that_the_harvest_was_made_in(tmp_path, dtype, bf16):
    """Whatever the processor could do that goes on with it; a plain yes or no stands as it is."""
    harvest = make_harvest(tmp_path)
    harvest.model.config = SimpleNamespace(dtype=dtype)
    for autocast, expected in (("auto", bf16), (True, True), (False, False)):
        job = trained_by(make_job(harvest), autocast=autocast)
        assert fit._trainer(job, harvest, [torch.ones(4, 16)]).config.autocast is expected


def test_an_sae_of_an_earlier_release_is_trained_again(tmp_path, monkeypatch):
    """It was made from the same parents, but its metrics have other names."""
    harvest = make_harvest(tmp_path)
    job, trained = make_job(harvest), []

    def write(name: str) -> None:
        with artifacts.write(job.folder, "sae", parents_of(job, harvest)) as writer:
            writer.json("metrics.json", {"L0": {"core": 0.0, name: 3.0, "total": 3.0}})

    def train(jobs, *_) -> None:
        trained.extend(jobs)
        write("free")

    monkeypatch.setattr(fit, "_fit_together", train)
    write("non_core")
    for _ in range(2):
        (found,) = fit.fit([job], harvest)
        assert found.json("metrics.json")["L0"]["free"] == 3 and trained == [job]
