"""SAEs to and from SAELens, with SAELens itself on the other side."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders.foreign import foreign_sae, known_to
from builders.tiny_sae import CORE, D_SAE, KINDS, PREFIXES, K, residuals, write_run
from torch import Tensor
from torch.testing import assert_close

from dmsae_lib.data.activations import Losses
from dmsae_lib.distill.attribution import attribute
from dmsae_lib.distill.core import distil
from dmsae_lib.distill.evaluation import evaluate
from dmsae_lib.interop import export_saelens, load_any, load_foreign, save_foreign
from dmsae_lib.interop.foreign import Foreign
from dmsae_lib.sae.model import FoldedSAE, MatryoshkaSAE, load_folded, load_trained
from dmsae_lib.saebench.core import core_metrics
from dmsae_lib.store import artifacts
from dmsae_lib.store.artifacts import UserError

TOLERANCE = 1e-5  # of the scale of the activations, float32
LOSSES = Losses(3.0, 6.0, 5.0)
NORMS = torch.linspace(0.5, 2, 24)


def theirs_from(folder):
    from sae_lens import SAE

    return SAE.load_from_disk(folder)


def agree(ours: Tensor, theirs: Tensor, pre: Tensor, threshold: float, scale: float) -> None:
    """Equal, but for latents whose activation lies within rounding of the threshold."""
    clear = (pre - threshold).abs() > TOLERANCE * scale
    assert clear.float().mean() > 0.999 and 0.02 < (ours > 0).float().mean() < 0.5
    assert_close(theirs[clear], ours[clear], rtol=1e-5, atol=TOLERANCE * scale)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"core{kind[0]}-{kind[1]}")
def exported(request, tiny_llama, tmp_path_factory):
    core, sparsity = request.param
    folder = tmp_path_factory.mktemp("exported")
    artifact = write_run(folder / "run", tiny_llama, core, sparsity)
    return SimpleNamespace(
        artifact=artifact,
        trained=load_trained(artifact),
        ours=load_folded(artifact),
        folder=export_saelens(artifact.folder, folder / "out"),
        scale=artifact.json("sae.json")["scale"],
        core=core,
        sparsity=sparsity,
        exempt=core if sparsity == "relu" else 0,
    )


def test_exported_sae_computes_the_same_in_sae_lens(exported, tiny_llama):
    theirs, ours, x = theirs_from(exported.folder), exported.ours, residuals(tiny_llama, seed=1)
    assert type(theirs).__name__ == "JumpReLUSAE" and exported.scale > 2
    f, pre = ours.encode(x), ours.pre_activations(x)
    agree(f, theirs.encode(x), pre, float(ours.threshold), exported.scale)
    assert_close(theirs.decode(f), ours.decode(f), rtol=1e-5, atol=TOLERANCE * exported.scale)
    below = pre[:, :CORE] < ours.threshold.float()
    assert bool((theirs.encode(x)[:, :CORE] > 0)[below].any()) == bool(exported.exempt)


def test_the_normaliser_is_in_biases_and_thresholds_only(exported):
    theirs, trained = theirs_from(exported.folder), exported.trained
    assert torch.equal(theirs.W_enc, trained.W_enc) and torch.equal(theirs.W_dec, trained.W_dec)
    for name in ("b_enc", "b_dec"):
        assert torch.equal(getattr(theirs, name), getattr(trained, name) * exported.scale)
    free = float((trained.threshold * exported.scale).float())
    assert theirs.threshold.tolist() == [0.0] * exported.exempt + [free] * (D_SAE - exported.exempt)


def test_the_folder_says_where_the_sae_comes_from(exported, tiny_llama):
    assert {path.name for path in exported.folder.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    cfg = json.loads((exported.folder / "cfg.json").read_text())
    said = cfg["metadata"]
    expected = {"d_in": 32, "d_sae": D_SAE, "apply_b_dec_to_input": True, "normalize_activations": "none"}
    assert expected.items() <= cfg.items()
    widths = [*(exported.core + m for m in PREFIXES), D_SAE]
    expected = {"model_name": "tiny llama", "hook_name": "blocks.0.hook_resid_post"}  # of its path, the name
    expected |= {"context_size": 16, "prepend_bos": True}
    expected["training_architecture_details"] = {"matryoshka_widths": widths, "k": K}
    assert {name: said[name] for name in expected} == expected
    expected = {"sae": exported.artifact.hash, "parents": exported.artifact.parents, "k": K}
    expected |= {"core_size": exported.core, "core_sparsity": exported.sparsity, "prefixes": list(PREFIXES)}
    expected |= {"model_hash": tiny_llama.hash, "arm": "distilled", "seed": 0}
    assert {name: said["dmsae"][name] for name in expected} == expected
    assert said["dmsae"]["L0"]["total"] == 9.0 and str(exported.folder.parent) not in json.dumps(cfg)


@pytest.mark.parametrize("sparsity", ["relu", "batchtopk"])
def test_both_decide_alike_at_the_threshold(tiny_llama, tmp_path, sparsity):
    """With identity weights pre-activations are the input, exactly; float32(0.1) is above the float64 0.1."""
    eye, at = torch.eye(32), np.float32(0.1)
    sae = MatryoshkaSAE(32, 32, (8,), eye[:4], sparsity)
    sae.load_state_dict(sae.state_dict() | {"free_rows": eye[4:], "W_dec": eye})
    sae.threshold.fill_(0.1)
    ours = write_run(tmp_path / "run", tiny_llama, sae=sae, scale=1.0)
    theirs = theirs_from(export_saelens(ours, tmp_path / "out"))
    below, above = (np.nextafter(at, np.float32(to)) for to in (0, 1))
    x = torch.tensor([below, at, above, 1e-30, 0.0, -1.0])[:, None].expand(-1, 32)
    f = load_folded(ours).encode(x)
    assert torch.equal(theirs.encode(x), f)
    assert (f[:, 10] > 0).tolist() == [False, False, True, False, False, False]
    exempt = sparsity == "relu"
    assert (f[:, 0] > 0).tolist() == [exempt, exempt, True, exempt, False, False]


@pytest.mark.parametrize("core", [CORE, 0])
@pytest.mark.filterwarnings("ignore::UserWarning:sae_lens.*")
def test_stock_sae_bench_gives_the_exported_sae_our_numbers(tiny_llama, tmp_path, core):
    import datasets
    from sae_bench.evals.core.main import CoreEvalConfig, run_evals
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
    from sae_lens.training.activations_store import ActivationsStore

    artifact = write_run(tmp_path / "run", tiny_llama, core)
    tokens = torch.randint(3, 300, (8, 16), generator=torch.Generator().manual_seed(5))
    tokens[:, 0] = tokens[2, 7] = tiny_llama.bos
    ours = core_metrics(load_folded(artifact), tiny_llama, tokens.numpy())
    exported = theirs_from(export_saelens(artifact, tmp_path / "out"))
    _, theirs, _ = load_and_format_sae("release", exported, "cpu")
    rows = datasets.Dataset.from_dict({"tokens": tokens.tolist()})
    store = ActivationsStore.from_sae(tiny_llama.bridge, theirs, rows, context_size=16)
    sizes = {"batch_size_prompts": 8, "context_size": 16}
    sizes |= {"n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 1}
    metrics = ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics")
    wanted = {f"compute_{name}": True for name in metrics}
    wanted["exclude_special_tokens_from_reconstruction"] = True
    config = CoreEvalConfig(model_name="tiny", **sizes, **wanted)
    groups, _ = run_evals(theirs, store, tiny_llama.bridge, config, ignore_tokens={0, 1, 2})
    found = {name: value for values in groups.values() for name, value in values.items()}
    compared = {name: value for name, value in ours.items() if value is not None}
    assert {"ce_loss_score", "kl_div_score", "l0", "explained_variance", "cossim"} <= compared.keys()
    assert compared["l0"] > 5
    assert {name: found[name] for name in compared} == pytest.approx(compared, rel=1e-4, abs=1e-6)


def test_a_round_trip_gives_the_same_sae(exported, tiny_llama, random_split):
    foreign, ours, trained = load_foreign(exported.folder, tiny_llama), exported.ours, exported.trained
    source = foreign.source(exported.scale)
    assert torch.equal(source.W_enc, trained.W_enc) and torch.equal(source.W_dec, trained.W_dec)
    assert source.n_core == 0 and source.prefixes == tuple(exported.core + m for m in trained.prefixes)
    x = residuals(tiny_llama, seed=1) / exported.scale
    for name in ("b_enc", "b_dec"):
        assert_close(getattr(source, name), getattr(trained, name), rtol=3e-7, atol=0)
    free = trained.threshold.float().expand(D_SAE - exported.exempt)
    expected = torch.cat([torch.zeros(exported.exempt), free]).double()
    assert_close(source.threshold.expand(D_SAE), expected, rtol=3e-7, atol=0)
    f = trained.encode(x)
    agree(f, source.encode(x), trained.pre_activations(x), float(trained.threshold), 1.0)
    for j in range(3):
        assert_close(source.decode_prefix(f, j), trained.decode_prefix(f, j), rtol=1e-5, atol=1e-5)
    of_theirs, of_ours = (evaluate(sae, tiny_llama, random_split(40), LOSSES) for sae in (foreign, ours))
    assert of_theirs["L0"]["total"] == pytest.approx(of_ours["L0"]["total"], rel=1e-4)
    assert of_theirs["L0"]["core"] == 0 and of_theirs["core_frequency"] is None
    assert of_theirs["dead"] == of_ours["dead"]
    assert list(of_theirs["fvu"].values()) == pytest.approx(list(of_ours["fvu"].values()), rel=1e-4)
    assert of_theirs["loss_recovered"] == pytest.approx(of_ours["loss_recovered"], rel=1e-4)


@pytest.fixture(scope="module")
def trained_there(tiny_llama, tmp_path_factory):
    """A Matryoshka BatchTopK SAE that SAELens trains on the model's activations and saves for inference."""
    from sae_lens import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
    from sae_lens.saes.sae import SAEMetadata, TrainStepInput

    torch.manual_seed(0)
    sizes = {"d_in": 32, "d_sae": 64, "k": 6, "matryoshka_widths": [10, 30, 64], "topk_threshold_lr": 0.1}
    metadata = SAEMetadata(**known_to(tiny_llama))
    sae = MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(**sizes, metadata=metadata))
    x, optimiser, losses = residuals(tiny_llama, rows=64), torch.optim.Adam(sae.parameters(), lr=3e-3), []
    for step in range(150):
        out = sae.training_forward_pass(TrainStepInput(x, {}, None, step, False))
        losses.append(out.losses["mse_loss"].item())
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]
    folder = tmp_path_factory.mktemp("saelens") / "trained"
    sae.save_inference_model(folder)
    return folder


def test_an_sae_that_sae_lens_trained_computes_what_it_computes_there(trained_there, tiny_llama):
    theirs, foreign = theirs_from(trained_there), load_foreign(trained_there, tiny_llama)
    x = residuals(tiny_llama, seed=3)
    assert foreign.widths == [10, 30, 64] and foreign.architecture == "jumprelu"
    assert torch.equal(foreign.encode(x), theirs.encode(x)) and torch.equal(foreign(x), theirs(x))
    assert 2 < (foreign.encode(x) > 0).sum(1).float().mean() < 20
    scale = float(x.square().sum(1).mean().sqrt())
    source = foreign.source(scale)
    assert source.prefixes == (10, 30, 64) and source.threshold.ndim == 0
    folded = source.folded(scale)
    agree(theirs.encode(x), folded.encode(x), folded.pre_activations(x), float(folded.threshold), scale)
    assert_close(source(x / scale) * scale, theirs(x), rtol=1e-4, atol=1e-4 * scale)


def test_a_core_is_distilled_from_somebody_elses_sae(trained_there, tiny_llama, random_split):
    scale = float(residuals(tiny_llama, seed=3).square().sum(1).mean().sqrt())
    source = load_foreign(trained_there, tiny_llama).source(scale)
    table = attribute(tiny_llama, source.folded(scale), random_split(40))
    core = distil(0, source, table.scores["mean_abs"], table.scores["frequency"], None, 0.9, None)
    assert 1 <= len(core) < 10 and len(table.scores["mean_abs"]) == 10
    theirs = theirs_from(trained_there)
    for row, latent in zip(core.rows, core.latents):
        assert torch.equal(row, theirs.W_enc[:, latent.index])


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("threshold", [torch.linspace(0.1, 2, 24), 0.5], ids=["per latent", "one"])
def test_the_gauge_of_an_imported_sae(tiny_llama, tmp_path, subtracts, threshold):
    sae = foreign_sae(tiny_llama, threshold=threshold, norms=NORMS, apply_b_dec_to_input=subtracts)
    sae.save_model(tmp_path)
    theirs, x = theirs_from(tmp_path), residuals(tiny_llama, seed=3)
    source = load_foreign(tmp_path, tiny_llama).source(7.0, prefixes=[])
    assert_close(source.W_dec.norm(dim=1), torch.ones(24))
    assert_close(source.W_enc, theirs.W_enc * NORMS)
    f = theirs.encode(x) * NORMS
    assert 0.1 < (f > 0).float().mean() < 0.9
    clear = (source.pre_activations(x / 7) - source.threshold).abs() > 1e-6
    assert_close(7 * source.encode(x / 7)[clear], f[clear], rtol=1e-4, atol=1e-4)
    assert_close(7 * source.decode(f / 7), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture, settings", [("topk", {"k": 5}), ("gated", {}), ("standard", {})])
def test_other_architectures_can_be_compared_with(tiny_llama, tmp_path, random_split, architecture, settings):
    foreign_sae(tiny_llama, architecture, **settings).save_model(tmp_path)
    foreign, theirs = load_foreign(tmp_path, tiny_llama), theirs_from(tmp_path).requires_grad_(False)
    split = random_split(24)
    found = evaluate(foreign, tiny_llama, split, LOSSES)
    usable = (torch.arange(16) < split.lengths[:, None]) & (split.tokens != 0)
    x = tiny_llama.lower(split.tokens.long())[usable]
    f = theirs.encode(x)
    assert found["L0"]["total"] == pytest.approx(float((f > 0).sum(1).float().mean()), rel=1e-5)
    fvu = float((x - theirs.decode(f)).square().sum() / (x - x.mean(0)).square().sum())
    assert found["fvu"] == {"full": pytest.approx(fvu, rel=1e-4)}
    assert architecture != "topk" or found["L0"]["total"] <= 5
    if architecture == "standard":
        assert foreign.source(1.0, [8]).threshold == 0
    else:
        with pytest.raises(UserError, match=f"architecture {architecture}: it can be compared with"):
            foreign.source(1.0, [8])
    assert core_metrics(foreign, tiny_llama, split.tokens[:4].numpy())["l0"] > 1


def test_an_imported_sae_is_kept_in_an_artefact(trained_there, tiny_llama, tmp_path):
    foreign, x = load_foreign(trained_there, tiny_llama), residuals(tiny_llama)
    with artifacts.write(tmp_path / "sae", "sae", {"source": foreign.hash}) as writer:
        save_foreign(writer, foreign)
    again = load_any(artifacts.load(tmp_path / "sae", "sae"), tiny_llama)
    assert again.hash == foreign.hash and torch.equal(again.encode(x), foreign.encode(x))
    assert again.record == foreign.record | {"where": "sae"}
    assert foreign.record["where"] == "trained" and foreign.record["widths"] == [10, 30, 64]
    with pytest.raises(UserError, match="is kept as a SAELens folder"):
        export_saelens(tmp_path / "sae", tmp_path / "out")
    assert isinstance(load_any(write_run(tmp_path / "run", tiny_llama), tiny_llama), FoldedSAE)
    again.sae.b_enc.data[3] += 1
    assert Foreign(again.sae, "").hash != foreign.hash


WRONG_METADATA = [
    ({"model_name": "gpt2"}, "was trained on gpt2"),
    ({"hook_name": "blocks.1.hook_resid_post"}, "reads blocks.1.* the run blocks.0.hook_resid_post"),
    ({"hook_name": "blocks.0.hook_mlp_out"}, "set model.hook_name"),
    ({"hook_name": None}, "add model_name and hook_name"),
    ({"dmsae": {"model_hash": "f" * 64}}, "with other weights"),
]
UNUSABLE = [
    ({"d_in": 16}, "reads 16 channels but .* has 32"),
    ({"normalize_activations": "layer_norm"}, "normalised by layer_norm.* fold the normaliser"),
    ({"normalize_activations": "expected_average_only_in"}, "fold the normaliser"),
    (
        {"reshape_activations": "hook_z", "metadata": {"hook_name": "blocks.0.attn.hook_z"}},
        "attention layer.s heads",
    ),
]


@pytest.mark.parametrize(
    "change, says", [({"metadata": more}, says) for more, says in WRONG_METADATA] + UNUSABLE
)
def test_an_sae_of_another_model_or_kind_is_refused(tiny_llama, tmp_path, change, says):
    metadata = known_to(tiny_llama, **change.get("metadata", {}))
    foreign_sae(tiny_llama, **change | {"metadata": metadata}).save_model(tmp_path)
    with pytest.raises(UserError, match=says):
        load_foreign(tmp_path, tiny_llama)


def test_what_enters_a_block_left_the_one_before(tiny_llama):
    metadata = known_to(tiny_llama, hook_name="blocks.1.hook_resid_pre")
    Foreign(foreign_sae(tiny_llama, metadata=metadata), "sae").check(tiny_llama)


@pytest.mark.parametrize("ours, theirs", [("google/gemma-2-2b", "gemma-2-2b"), ("gpt2", "gpt2-small")])
def test_models_are_known_by_their_aliases(tiny_llama, ours, theirs):
    named = SimpleNamespace(name=ours)
    said = SimpleNamespace(config=named, hash="", hook_name=tiny_llama.hook_name, d_model=32)
    Foreign(foreign_sae(tiny_llama, metadata=known_to(tiny_llama, model_name=theirs)), "sae").check(said)
    other = Foreign(foreign_sae(tiny_llama, metadata=known_to(tiny_llama, model_name="gemma-2-9b")), "sae")
    with pytest.raises(UserError, match="gemma-2-9b"):
        other.check(said)


def test_the_nesting_must_be_known(tiny_llama, trained_there):
    unsaid = Foreign(foreign_sae(tiny_llama), "somewhere")
    with pytest.raises(UserError, match="does not say how its latents are nested"):
        unsaid.source(1.0)
    assert unsaid.source(1.0, [8, 16]).prefixes == (8, 16, 24)
    with pytest.raises(UserError, match="was trained with prefixes"):
        load_foreign(trained_there, tiny_llama).source(1.0, [1, 2])


def test_folders_that_hold_no_sae(tiny_llama, tmp_path):
    foreign_sae(tiny_llama).save_model(tmp_path / "sae")
    cfg = tmp_path / "sae" / "cfg.json"
    good = cfg.read_text()
    another, wider = good.replace('"jumprelu"', '"transcoder"'), good.replace('"d_sae": 24', '"d_sae": 25')
    for text, says in [(another, "transcoder"), (wider, "size mismatch"), ("{", "JSONDecodeError")]:
        cfg.write_text(text)
        with pytest.raises(UserError, match=says):
            load_foreign(tmp_path / "sae", tiny_llama)
    cfg.unlink()
    for where in (tmp_path / "sae", tmp_path / "nowhere", "nowhere"):
        with pytest.raises(UserError, match="is no SAE that SAELens can load"):
            load_foreign(where, tiny_llama)


def test_a_release_comes_through_sae_lens(tiny_llama, monkeypatch):
    from sae_lens import SAE

    def from_pretrained(release, sae_id):
        if release == "offline":
            raise OSError("the Hub cannot be reached")
        assert (release, sae_id) == ("owner/saes", "layer_0/width_24")
        return foreign_sae(tiny_llama)

    monkeypatch.setattr(SAE, "from_pretrained", from_pretrained)
    assert load_foreign("owner/saes:layer_0/width_24", tiny_llama).d_sae == 24
    with pytest.raises(UserError, match="OSError: the Hub cannot be reached"):
        load_foreign("offline:layer_0/width_24", tiny_llama)


def test_an_export_replaces_nothing_but_an_export(tiny_llama, tmp_path):
    artifact = write_run(tmp_path / "run", tiny_llama)
    assert export_saelens(artifact, tmp_path / "out") == export_saelens(artifact, tmp_path / "out")
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds something else"):
        export_saelens(artifact, tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_an_export_needs_the_harvest_of_its_run(tiny_llama, tmp_path):
    alone = write_run(tmp_path / "run", tiny_llama).folder.rename(tmp_path / "alone")
    with pytest.raises(UserError, match="from inside its run"):
        export_saelens(alone, tmp_path / "out")
    other = write_run(tmp_path / "run", tiny_llama, scale=3.0)  # another harvest
    moved = alone.rename(other.folder.with_name("moved"))
    with pytest.raises(UserError, match="from inside its run"):
        export_saelens(moved, tmp_path / "out")
    assert not (tmp_path / "out").exists()
