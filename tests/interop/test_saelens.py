"""SAEs to and from SAELens, with SAELens itself on the other side."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_sae import CORE, D_SAE, KINDS, PREFIXES, K, random, residuals, write_run
from torch import Tensor

from dmsae_lib.data.activations import Losses
from dmsae_lib.distill.attribution import attribute
from dmsae_lib.distill.core import distil
from dmsae_lib.distill.evaluation import evaluate
from dmsae_lib.interop import export_saelens, load_any, load_foreign, save_foreign
from dmsae_lib.interop.foreign import Foreign
from dmsae_lib.interop.saelens import build
from dmsae_lib.sae.model import FoldedSAE, MatryoshkaSAE, load_folded, load_trained
from dmsae_lib.saebench.core import run_core
from dmsae_lib.store import artifacts
from dmsae_lib.store.artifacts import UserError

TOLERANCE = 1e-5  # of the scale of the activations, float32
WIDTHS = [CORE + PREFIXES[0], CORE + PREFIXES[1], D_SAE]


def theirs_from(folder):
    from sae_lens import SAE

    return SAE.load_from_disk(folder)


def agree(ours: Tensor, theirs: Tensor, pre: Tensor, threshold: float, scale: float) -> None:
    """Equal, but for latents whose activation lies within rounding of the threshold."""
    clear = (pre - threshold).abs() > TOLERANCE * scale
    assert clear.float().mean() > 0.999 and 0.02 < (ours > 0).float().mean() < 0.5
    torch.testing.assert_close(theirs[clear], ours[clear], rtol=1e-5, atol=TOLERANCE * scale)


def known_to(model) -> dict:
    """The metadata of an SAE that was trained on ``model``."""
    return {
        "model_name": model.config.name,
        "hook_name": model.hook_name,
        "context_size": 16,
        "prepend_bos": True,
    }


def jumprelu(
    model, threshold: Tensor | float = 0.5, metadata: dict | None = None, d_in: int | None = None, **settings
):
    """A sae_lens SAE of random weights; its decoder rows have norms from 0.5 to 2."""
    d_in = d_in or model.d_model
    W_dec = (
        torch.nn.functional.normalize(random(24, d_in, seed=1), dim=1) * torch.linspace(0.5, 2, 24)[:, None]
    )
    weights = {
        "W_enc": random(d_in, 24) / d_in**0.5,
        "W_dec": W_dec,
        "b_enc": random(24, seed=2),
        "b_dec": random(d_in, seed=3),
        "threshold": torch.as_tensor(threshold).expand(24),
    }
    return build("jumprelu", weights, known_to(model) if metadata is None else metadata, **settings)


@pytest.fixture(params=KINDS, ids=lambda kind: f"core{kind[0]}-{kind[1]}")
def exported(request, tiny_llama, tmp_path):
    core, sparsity = request.param
    artifact = write_run(tmp_path / "run", tiny_llama, core, sparsity)
    return SimpleNamespace(
        artifact=artifact,
        ours=load_folded(artifact),
        folder=export_saelens(artifact.folder, tmp_path / "out"),
        scale=artifact.json("sae.json")["scale"],
        core=core,
        sparsity=sparsity,
    )


def test_exported_sae_computes_the_same_in_sae_lens(exported, tiny_llama):
    theirs, ours, x = theirs_from(exported.folder), exported.ours, residuals(tiny_llama, seed=1)
    assert type(theirs).__name__ == "JumpReLUSAE" and exported.scale > 2
    f = ours.encode(x)
    agree(f, theirs.encode(x), ours.pre_activations(x), float(ours.threshold), exported.scale)
    torch.testing.assert_close(theirs.decode(f), ours.decode(f), rtol=1e-5, atol=TOLERANCE * exported.scale)
    below = ours.pre_activations(x)[:, :CORE] < ours.threshold.float()
    assert bool((theirs.encode(x)[:, :CORE] > 0)[below].any()) == (
        exported.core > 0 and exported.sparsity == "relu"
    )


def test_the_normaliser_is_in_biases_and_thresholds_only(exported):
    theirs, trained = theirs_from(exported.folder), load_trained(exported.artifact)
    assert torch.equal(theirs.W_enc, trained.W_enc) and torch.equal(theirs.W_dec, trained.W_dec)
    for name in ("b_enc", "b_dec"):
        assert torch.equal(getattr(theirs, name), getattr(trained, name) * exported.scale)
    free = float((trained.threshold * exported.scale).float())
    exempt = exported.core if exported.sparsity == "relu" else 0
    assert theirs.threshold.tolist() == [0.0] * exempt + [free] * (D_SAE - exempt)


def test_the_folder_says_where_the_sae_comes_from(exported, tiny_llama):
    assert sorted(path.name for path in exported.folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    cfg = json.loads((exported.folder / "cfg.json").read_text())
    said, lineage = cfg["metadata"], cfg["metadata"]["dmsae"]
    assert (cfg["d_in"], cfg["d_sae"], cfg["apply_b_dec_to_input"], cfg["normalize_activations"]) == (
        32,
        D_SAE,
        True,
        "none",
    )
    # of its path, the name
    assert (said["model_name"], said["hook_name"]) == ("tiny llama", "blocks.0.hook_resid_post")
    assert (said["context_size"], said["prepend_bos"]) == (16, True)
    first = [exported.core + m for m in PREFIXES]
    assert said["training_architecture_details"] == {"matryoshka_widths": [*first, D_SAE], "k": K}
    assert (lineage["sae"], lineage["parents"]) == (exported.artifact.hash, exported.artifact.parents)
    assert (lineage["core_size"], lineage["core_sparsity"]) == (exported.core, exported.sparsity)
    assert lineage["prefixes"] == list(PREFIXES)
    assert (lineage["k"], lineage["L0"]["total"], lineage["model_hash"]) == (K, 9.0, tiny_llama.hash)
    assert str(exported.folder.parent) not in json.dumps(cfg)


@pytest.mark.parametrize("sparsity", ["relu", "batchtopk"])
def test_both_decide_alike_at_the_threshold(tiny_llama, tmp_path, sparsity):
    # Identity weights: pre-activations are the input, exactly. float32(0.1) is above the float64 threshold
    # 0.1.
    eye, at = torch.eye(32), np.float32(0.1)
    sae = MatryoshkaSAE(32, 32, (8,), eye[:4], sparsity)
    sae.load_state_dict(sae.state_dict() | {"free_rows": eye[4:], "W_dec": eye})
    sae.threshold.fill_(0.1)
    ours = write_run(tmp_path / "run", tiny_llama, sae=sae, scale=1.0)
    theirs = theirs_from(export_saelens(ours, tmp_path / "out"))
    values = torch.tensor(
        [np.nextafter(at, np.float32(0)), at, np.nextafter(at, np.float32(1)), 1e-30, 0.0, -1.0]
    )
    f = load_folded(ours).encode(values[:, None].expand(-1, 32))
    assert torch.equal(theirs.encode(values[:, None].expand(-1, 32)), f)
    assert (f[:, 10] > 0).tolist() == [False, False, True, False, False, False]
    exempt = sparsity == "relu"
    assert (f[:, 0] > 0).tolist() == [exempt, exempt, True, exempt, False, False]


@pytest.mark.parametrize("core", [CORE, 0])
def test_stock_sae_bench_gives_the_exported_sae_our_numbers(tiny_llama, tmp_path, core):
    import datasets
    from sae_bench.evals.core.main import CoreEvalConfig, run_evals
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
    from sae_lens.training.activations_store import ActivationsStore

    artifact = write_run(tmp_path / "run", tiny_llama, core)
    tokens = torch.randint(3, 300, (8, 16), generator=torch.Generator().manual_seed(5))
    tokens[:, 0] = tiny_llama.bos
    tokens[2, 7] = tiny_llama.bos
    ours = run_core(load_folded(artifact), tiny_llama, tokens.numpy())
    _, theirs, _ = load_and_format_sae(
        "release", theirs_from(export_saelens(artifact, tmp_path / "out")), "cpu"
    )
    rows = datasets.Dataset.from_dict({"tokens": tokens.tolist()})
    store = ActivationsStore.from_sae(tiny_llama.bridge, theirs, rows, context_size=16)
    config = CoreEvalConfig(
        model_name="tiny",
        batch_size_prompts=8,
        context_size=16,
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        exclude_special_tokens_from_reconstruction=True,
    )
    groups, _ = run_evals(theirs, store, tiny_llama.bridge, config, ignore_tokens={0, 1, 2})
    found = {name: value for values in groups.values() for name, value in values.items()}
    compared = [name for name, value in ours.items() if value is not None]
    assert {"ce_loss_score", "kl_div_score", "l0", "explained_variance", "cossim"} <= set(compared) and ours[
        "l0"
    ] > 5
    for name in compared:
        assert found[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-6), name


def test_a_round_trip_gives_the_same_sae(exported, tiny_llama, random_split):
    foreign, ours, trained = (
        load_foreign(exported.folder, tiny_llama),
        exported.ours,
        load_trained(exported.artifact),
    )
    source = foreign.source(exported.scale)
    assert torch.equal(source.W_enc, trained.W_enc) and torch.equal(source.W_dec, trained.W_dec)
    assert source.n_core == 0 and source.prefixes == tuple(exported.core + m for m in trained.prefixes)
    x = residuals(tiny_llama, seed=1) / exported.scale
    for name in ("b_enc", "b_dec"):
        torch.testing.assert_close(getattr(source, name), getattr(trained, name), rtol=3e-7, atol=0)
    exempt = exported.core if exported.sparsity == "relu" else 0
    expected = torch.cat([torch.zeros(exempt), trained.threshold.float().expand(D_SAE - exempt)]).double()
    torch.testing.assert_close(source.threshold.expand(D_SAE), expected, rtol=3e-7, atol=0)
    f = trained.encode(x)
    agree(f, source.encode(x), trained.pre_activations(x), float(trained.threshold), 1.0)
    for j in range(3):
        torch.testing.assert_close(
            source.decode_prefix(f, j), trained.decode_prefix(f, j), rtol=1e-5, atol=1e-5
        )
    split = random_split(40)
    of_theirs, of_ours = (evaluate(sae, tiny_llama, split, Losses(3.0, 6.0, 5.0)) for sae in (foreign, ours))
    assert (
        of_theirs["L0"]["total"] == pytest.approx(of_ours["L0"]["total"], rel=1e-4)
        and of_theirs["L0"]["core"] == 0
    )
    assert of_theirs["dead"] == of_ours["dead"] and of_theirs["core_frequency"] is None
    assert list(of_theirs["fvu"].values()) == pytest.approx(list(of_ours["fvu"].values()), rel=1e-4)
    assert of_theirs["loss_recovered"] == pytest.approx(of_ours["loss_recovered"], rel=1e-4)


@pytest.fixture(scope="module")
def trained_there(tiny_llama, tmp_path_factory):
    """A Matryoshka BatchTopK SAE that SAELens trains on the model's own activations and saves for
    inference."""
    from sae_lens import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
    from sae_lens.saes.sae import SAEMetadata, TrainStepInput

    torch.manual_seed(0)
    cfg = MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=32,
        d_sae=64,
        k=6,
        matryoshka_widths=[10, 30, 64],
        topk_threshold_lr=0.1,
        metadata=SAEMetadata(**known_to(tiny_llama)),
    )
    sae, x = MatryoshkaBatchTopKTrainingSAE(cfg), residuals(tiny_llama, rows=64)
    optimiser = torch.optim.Adam(sae.parameters(), lr=3e-3)
    losses = []
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
    theirs, foreign, x = (
        theirs_from(trained_there),
        load_foreign(trained_there, tiny_llama),
        residuals(tiny_llama, seed=3),
    )
    assert foreign.widths == [10, 30, 64] and foreign.architecture == "jumprelu"
    assert torch.equal(foreign.encode(x), theirs.encode(x)) and torch.equal(foreign(x), theirs(x))
    assert 2 < (foreign.encode(x) > 0).sum(1).float().mean() < 20
    scale = float(x.square().sum(1).mean().sqrt())
    source = foreign.source(scale)
    assert source.prefixes == (10, 30, 64) and source.threshold.ndim == 0
    folded = source.folded(scale)
    agree(theirs.encode(x), folded.encode(x), folded.pre_activations(x), float(folded.threshold), scale)
    torch.testing.assert_close(source(x / scale) * scale, theirs(x), rtol=1e-4, atol=1e-4 * scale)


def test_a_core_is_distilled_from_somebody_elses_sae(trained_there, tiny_llama, random_split):
    x = residuals(tiny_llama, seed=3)
    scale = float(x.square().sum(1).mean().sqrt())
    source = load_foreign(trained_there, tiny_llama).source(scale)
    table = attribute(tiny_llama, source.folded(scale), random_split(40))
    core = distil(0, source, table.scores["mean_abs"], table.scores["frequency"], None, 0.9, None)
    assert 1 <= len(core) < 10 and len(table.scores["mean_abs"]) == 10
    theirs = theirs_from(trained_there)
    for row, latent in zip(core.rows, core.latents):
        assert torch.equal(row, theirs.W_enc[:, latent.index])


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("per_latent", [True, False])
def test_the_gauge_of_an_imported_sae(tiny_llama, tmp_path, subtracts, per_latent):
    thresholds = torch.linspace(0.1, 2, 24) if per_latent else torch.tensor(0.5)
    jumprelu(tiny_llama, thresholds, apply_b_dec_to_input=subtracts).save_model(tmp_path)
    theirs, x = theirs_from(tmp_path), residuals(tiny_llama, seed=3)
    source = load_foreign(tmp_path, tiny_llama).source(7.0, prefixes=[])
    norms = theirs.W_dec.norm(dim=1)
    torch.testing.assert_close(source.W_dec.norm(dim=1), torch.ones(24))
    torch.testing.assert_close(source.W_enc, theirs.W_enc * norms)
    f = theirs.encode(x) * norms
    assert 0.1 < (f > 0).float().mean() < 0.9
    clear = (source.pre_activations(x / 7) - source.threshold).abs() > 1e-6
    torch.testing.assert_close(7 * source.encode(x / 7)[clear], f[clear], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(7 * source.decode(f / 7), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["topk", "gated", "standard"])
def test_other_architectures_can_be_compared_with(tiny_llama, tmp_path, random_split, architecture):
    names = {"topk": ["b_enc"], "gated": ["b_gate", "b_mag", "r_mag"], "standard": ["b_enc"]}[architecture]
    weights = {
        "W_enc": random(32, 24) / 4,
        "W_dec": torch.nn.functional.normalize(random(24, 32, seed=1), dim=1),
        "b_dec": random(32, seed=2),
        **{name: random(24, seed=3 + i) / 3 for i, name in enumerate(names)},
    }
    build(
        architecture, weights, known_to(tiny_llama), **({"k": 5} if architecture == "topk" else {})
    ).save_model(tmp_path)
    foreign, theirs = load_foreign(tmp_path, tiny_llama), theirs_from(tmp_path)
    split = random_split(24)
    found = evaluate(foreign, tiny_llama, split, Losses(3.0, 6.0, 5.0))
    usable = (torch.arange(16) < split.lengths[:, None]) & (split.tokens != 0)
    x = tiny_llama.lower(split.tokens.long())[usable]
    f = theirs.encode(x)
    assert found["L0"]["total"] == pytest.approx(float((f > 0).sum(1).float().mean()), rel=1e-5)
    fvu = float((x - theirs.decode(f)).square().sum() / (x - x.mean(0)).square().sum())
    assert found["fvu"] == {"full": pytest.approx(fvu, rel=1e-4)}
    if architecture == "topk":
        assert found["L0"]["total"] <= 5
    if architecture == "standard":
        assert foreign.source(1.0, [8]).threshold == 0
    else:
        with pytest.raises(UserError, match=f"architecture {architecture}: it can be compared with"):
            foreign.source(1.0, [8])
    assert run_core(foreign, tiny_llama, split.tokens[:4].numpy())["l0"] > 1


def test_an_imported_sae_is_kept_in_an_artefact(trained_there, tiny_llama, tmp_path):
    foreign, x = load_foreign(trained_there, tiny_llama), residuals(tiny_llama)
    with artifacts.write(tmp_path / "sae", "sae", {"source": foreign.hash}) as writer:
        save_foreign(writer, foreign)
    again = load_any(artifacts.load(tmp_path / "sae", "sae"), tiny_llama)
    assert again.hash == foreign.hash and torch.equal(again.encode(x), foreign.encode(x))
    assert again.record == foreign.record | {"where": "sae"}
    assert foreign.record["where"] == "trained" and foreign.record["widths"] == [10, 30, 64]
    ours = write_run(tmp_path / "run", tiny_llama)
    assert isinstance(load_any(ours, tiny_llama), FoldedSAE)
    again.sae.b_enc.data[3] += 1
    assert Foreign(again.sae, "").hash != foreign.hash


@pytest.mark.parametrize(
    "change, says",
    [
        ({"model_name": "gpt2"}, "was trained on gpt2 and the run's model is"),
        (
            {"hook_name": "blocks.1.hook_resid_post"},
            "reads blocks.1.hook_resid_post and the run blocks.0.hook_resid_post",
        ),
        ({"hook_name": "blocks.0.hook_mlp_out"}, "set model.hook_name"),
        ({"hook_name": None}, "add model_name and hook_name"),
        ({"dmsae": {"model_hash": "f" * 64}}, "with other weights"),
    ],
)
def test_an_sae_of_another_model_or_hook_is_refused(tiny_llama, tmp_path, change, says):
    jumprelu(tiny_llama, metadata=known_to(tiny_llama) | change).save_model(tmp_path)
    with pytest.raises(UserError, match=says):
        load_foreign(tmp_path, tiny_llama)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"d_in": 16}, "reads 16 channels but .* has 32"),
        ({"normalize_activations": "layer_norm"}, "normalised by layer_norm"),
        ({"normalize_activations": "expected_average_only_in"}, "fold the normaliser"),
        (
            {"reshape_activations": "hook_z", "metadata": {"hook_name": "blocks.0.attn.hook_z"}},
            "heads of an attention layer",
        ),
    ],
)
def test_an_sae_that_cannot_be_used_is_refused(tiny_llama, tmp_path, change, says):
    jumprelu(tiny_llama, **change).save_model(tmp_path)
    with pytest.raises(UserError, match=says):
        load_foreign(tmp_path, tiny_llama)


def test_what_enters_a_block_left_the_one_before(tiny_llama, tmp_path):
    jumprelu(tiny_llama, metadata=known_to(tiny_llama) | {"hook_name": "blocks.1.hook_resid_pre"}).save_model(
        tmp_path
    )
    assert load_foreign(tmp_path, tiny_llama).d_in == 32


@pytest.mark.parametrize("ours, theirs", [("google/gemma-2-2b", "gemma-2-2b"), ("gpt2", "gpt2-small")])
def test_models_are_known_by_their_aliases(tiny_llama, ours, theirs):
    said = SimpleNamespace(
        config=SimpleNamespace(name=ours), hash="", hook_name=tiny_llama.hook_name, d_model=32
    )
    Foreign(jumprelu(tiny_llama, metadata=known_to(tiny_llama) | {"model_name": theirs}), "sae").check(said)
    with pytest.raises(UserError, match="gemma-2-9b"):
        Foreign(
            jumprelu(tiny_llama, metadata=known_to(tiny_llama) | {"model_name": "gemma-2-9b"}), "sae"
        ).check(said)


def test_the_nesting_must_be_known(tiny_llama, exported):
    with pytest.raises(UserError, match="does not say how its latents are nested"):
        Foreign(jumprelu(tiny_llama), "somewhere").source(1.0)
    assert Foreign(jumprelu(tiny_llama), "somewhere").source(1.0, [8, 16]).prefixes == (8, 16, 24)
    with pytest.raises(UserError, match="was trained with prefixes"):
        load_foreign(exported.folder, tiny_llama).source(1.0, [1, 2])


def test_folders_that_hold_no_sae(tiny_llama, tmp_path):
    jumprelu(tiny_llama).save_model(tmp_path / "sae")
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
        assert (release, sae_id) == ("owner/saes", "layer_0/width_24")
        return jumprelu(tiny_llama)

    monkeypatch.setattr(SAE, "from_pretrained", from_pretrained)
    assert load_foreign("owner/saes:layer_0/width_24", tiny_llama).d_sae == 24

    def offline(release, sae_id):
        raise OSError("the Hub cannot be reached")

    monkeypatch.setattr(SAE, "from_pretrained", offline)
    with pytest.raises(UserError, match="OSError: the Hub cannot be reached"):
        load_foreign("owner/saes:layer_0/width_24", tiny_llama)


def test_an_export_replaces_nothing_but_an_export(tiny_llama, tmp_path):
    artifact = write_run(tmp_path / "run", tiny_llama)
    assert export_saelens(artifact, tmp_path / "out") == export_saelens(artifact, tmp_path / "out")
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds something else"):
        export_saelens(artifact, tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_what_was_trained_elsewhere_is_not_exported(trained_there, tiny_llama, tmp_path):
    with artifacts.write(tmp_path / "sae", "sae") as writer:
        save_foreign(writer, load_foreign(trained_there, tiny_llama))
    with pytest.raises(UserError, match="is kept as a SAELens folder"):
        export_saelens(tmp_path / "sae", tmp_path / "out")


def test_an_export_needs_the_harvest_of_its_run(tiny_llama, tmp_path):
    artifact = write_run(tmp_path / "run", tiny_llama)
    artifact.folder.rename(tmp_path / "alone")
    with pytest.raises(UserError, match="from inside its run"):
        export_saelens(tmp_path / "alone", tmp_path / "out")
    other = write_run(tmp_path / "run", tiny_llama, scale=3.0)  # another harvest
    (tmp_path / "alone").rename(other.folder.with_name("moved"))
    with pytest.raises(UserError, match="from inside its run"):
        export_saelens(other.folder.with_name("moved"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
