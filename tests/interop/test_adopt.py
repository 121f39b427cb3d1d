"""SAEs trained elsewhere inside a run: as cycle 0, and to compare with."""

from types import SimpleNamespace

import pytest
import torch
from builders.foreign import foreign_sae
from builders.tiny_sae import residuals, write_run

from dmsae_lib.config.sections import DistillConfig
from dmsae_lib.distill import adopt as adopt_module
from dmsae_lib.distill import harvest as harvest_module
from dmsae_lib.distill.adopt import adopt
from dmsae_lib.distill.harvest import Harvest
from dmsae_lib.interop import export_dictionary_learning, export_saelens, load_any, load_foreign
from dmsae_lib.sae.model import load_folded, load_trained
from dmsae_lib.store.artifacts import UserError

SCALE = 5.0
THRESHOLDS = torch.linspace(0.1, 1.5, 24)


@pytest.fixture
def harvest(tiny_llama, random_split):
    run = SimpleNamespace(config=SimpleNamespace(threads=1, distill=DistillConfig(from_prefixes=[6, 12])))
    record = {"scale": SCALE, "clean_loss": 3.0, "zero_loss": 6.0, "mean_loss": 5.0}
    return Harvest(SimpleNamespace(hash="h" * 64), record, tiny_llama, {"test": random_split(24)}, run)


def write_foreign(folder, model, architecture="jumprelu", **settings) -> str:
    """Decoder rows of norm 1; thresholds differ from latent to latent."""
    foreign_sae(model, architecture, THRESHOLDS, **settings).save_model(folder)
    return str(folder)


def test_an_adopted_cycle_0_is_an_sae_of_ours(harvest, tmp_path, monkeypatch):
    model, record = harvest.model, {"cycle": 0, "core_in": 0}
    where = write_foreign(tmp_path / "theirs", model)
    artifact = adopt(tmp_path / "cycle_0" / "sae", where, harvest, record, as_cycle_0=True)
    ours, folded, x = load_trained(artifact), load_folded(artifact), residuals(model)
    theirs = load_any(SimpleNamespace(files={}, folder=tmp_path / "theirs"), model)
    assert ours.threshold.shape == folded.threshold.shape == (24,) and ours.prefixes == (6, 12, 24)
    torch.testing.assert_close(folded.threshold, THRESHOLDS.double(), rtol=1e-6, atol=0)
    f = theirs.encode(x)
    clear = (folded.pre_activations(x) - folded.threshold).abs() > 1e-5
    assert 0.05 < (f > 0).float().mean() < 0.9
    torch.testing.assert_close(folded.encode(x)[clear], f[clear], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(SCALE * ours.encode(x / SCALE)[clear], f[clear], rtol=1e-4, atol=1e-4)
    metrics = artifact.json("metrics.json")
    assert (metrics["cycle"], metrics["prefixes"]) == (0, [6, 12, 24])
    assert list(metrics["fvu"]) == ["6", "12", "full"]
    assert metrics["loss_recovered"]["prefix0"] is not None and metrics["imported"]["hash"] == theirs.hash
    assert "history.csv" not in artifact.files
    monkeypatch.setattr(adopt_module, "evaluate", None)  # it is there: nothing is measured again
    assert adopt(artifact.folder, where, harvest, record, as_cycle_0=True).hash == artifact.hash


def test_what_is_compared_with_stays_as_it_is(harvest, tmp_path):
    where = write_foreign(tmp_path / "theirs", harvest.model, "topk", k=5)
    artifact, x = adopt(tmp_path / "k0" / "a-seed0", where, harvest, {"name": "a"}), residuals(harvest.model)
    kept = load_any(artifact, harvest.model)
    f = kept.encode(x)
    assert kept.architecture == "topk" and (f > 0).sum(1).max() == 5
    metrics = artifact.json("metrics.json")
    assert metrics["name"] == "a" and 4 < metrics["L0"]["total"] <= 5
    assert "prefix0" not in metrics["loss_recovered"]
    with pytest.raises(UserError, match="it can be compared with"):
        adopt(tmp_path / "cycle_0", where, harvest, {}, as_cycle_0=True)
    write_foreign(tmp_path / "theirs", harvest.model, "topk", seed=9, k=5)  # it changed: measured again
    again = adopt(artifact.folder, where, harvest, {"name": "a"})
    assert again.hash != artifact.hash and not torch.equal(load_any(again, harvest.model).encode(x), f)


def test_an_adopted_sae_is_exported_like_ours(harvest, tmp_path):
    model, x = harvest.model, residuals(harvest.model)
    foreign = load_foreign(write_foreign(tmp_path / "theirs", model), model)
    artifact = write_run(tmp_path / "run", model, sae=foreign.source(SCALE, [6, 12]), scale=SCALE)
    for name, export in (("a", export_saelens), ("b", export_dictionary_learning)):
        back = load_foreign(export(artifact, tmp_path / name), model)
        assert back.widths == [6, 12, 24]
        torch.testing.assert_close(back.encode(x), foreign.encode(x), rtol=1e-4, atol=1e-4)


def test_a_sample_never_holds_an_activation_twice(harvest, monkeypatch):
    """Rows that are frozen copies of each other would make a control weaker than it is."""
    x = torch.arange(70.0)[:, None].expand(70, 4)

    def batches(size, *_):
        for epoch in range(9):
            for start in range(0, 70 - size + 1, size):
                yield x[start : start + size], (epoch, 0, start + size)

    monkeypatch.setattr(Harvest, "source", lambda self: SimpleNamespace(batches=batches))
    for size, sample, expected in ((10, 40, 40), (10, 45, 45), (10, 16_384, 70), (40, 16_384, 40)):
        harvest.run.config = SimpleNamespace(training=SimpleNamespace(batch_size=size), seed=0)
        monkeypatch.setattr(harvest_module, "SAMPLE", sample)
        harvest.__dict__.pop("sample", None)
        assert len(harvest.sample) == len(harvest.sample[:, 0].unique()) == expected
