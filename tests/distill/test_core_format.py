"""The core as a format: what a run exports is what others load, bit for bit; what is damaged or does not fit
is refused."""

import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from builders import tiny_core
from builders.models import save_model
from builders.tiny_core import rewrite

from dmsae_lib.config.run import Run
from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.distill.controls import open_arms
from dmsae_lib.distill.core_export import export_core
from dmsae_lib.distill.core_format import load_core
from dmsae_lib.distill.core_record import CoreRecord
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.sae.training import Trainer
from dmsae_lib.store.artifacts import ArtifactError, UserError, load, repository_root, write

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = repository_root(Path(__file__).parent)


@pytest.fixture(scope="module")
def run(tiny_llama, tmp_path_factory) -> Run:
    return tiny_core.build_run(tmp_path_factory.mktemp("a clone"), tiny_llama)


@pytest.fixture
def folder(run, tmp_path) -> Path:
    return export_core(run, tmp_path / "a core")


def one_sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 500
    return text


def test_what_was_exported_is_what_the_run_retrains_with(run, folder):
    core, arms = load_core(folder), open_arms(run)
    assert torch.equal(core.rows, arms.core.rows) and core.latents == arms.core.latents
    assert (
        core.W_enc.shape == (32, len(core))
        and core.W_enc.dtype == torch.float32
        and core.rows.is_contiguous()
    )
    assert (core.scale, core.hook_name, core.d_in) == (tiny_core.SCALE, "blocks.0.hook_resid_post", 32)
    assert core.record["parents"]["core"] == load(run.cycle(tiny_core.CYCLES, "core"), "core").hash
    assert core.record["parents"]["core_before"] == arms.core.parent
    assert core.record["distilled"]["reading"] == "last_two" and 0 < len(core) < 3 * tiny_core.PREFIXES[0]


def test_the_files_can_be_read_without_this_library(run, folder):
    """Columns, scale and both hashes, by the documentation's words alone."""
    text, tensors = (folder / "core.json").read_bytes(), (folder / "core.safetensors").read_bytes()
    record, length = json.loads(text), int.from_bytes(tensors[:8], "little")
    header, data = json.loads(tensors[8 : 8 + length]), tensors[8 + length :]
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == {
        "W_enc": ("F32", [32, record["size"]])
    }
    W_enc = torch.frombuffer(bytearray(data), dtype=torch.float32).view(32, -1)
    assert torch.equal(W_enc.T, open_arms(run).core.rows)
    assert hashlib.sha256(tensors).hexdigest() == record["files"]["core.safetensors"]
    digest = record.pop("hash")
    assert (
        hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        == digest
    )
    assert (
        str(run.root).encode() not in text
        and record["model"]["name"] == "tiny llama"
        and "texts.jsonl" in text.decode()
    )


def test_exporting_again_gives_the_same_bytes(run, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "core.json").write_text("an older one")
    export_core(run, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_other_cycles_and_readings(run, tmp_path):
    whole = load_core(export_core(run, tmp_path / "whole", reading="all_of_last"))
    veterans = load_core(export_core(run, tmp_path / "veterans", reading="alive_since_0"))
    members = [i for i, latent in enumerate(whole.latents) if latent.selected == [0, 1, 2]]
    assert 0 < len(members) < len(whole) and torch.equal(veterans.W_enc, whole.W_enc[:, members])
    assert (tmp_path / "whole" / "core.safetensors").read_bytes() == (
        run.cycle(2, "core") / "core.safetensors"
    ).read_bytes()
    first = load_core(export_core(run, tmp_path / "first", cycle=0))
    assert (
        first.record["distilled"]["reading"] == "all_of_last"
        and first.record["parents"]["core_before"] is None
    )
    assert {latent.first_cycle for latent in first.latents} == {0}
    with pytest.raises(UserError, match="no latent of the last core fits"):
        export_core(run, tmp_path / "none", cycle=0, reading="last_two")
    with pytest.raises(ArtifactError, match="There is no sae artefact"):
        export_core(run, tmp_path / "none", cycle=3)


def test_a_changed_harvest_is_noticed(run, tmp_path):
    """Its scale would be that of other activations."""
    root = tmp_path / "a clone"
    shutil.copytree(run.root, root)
    other = Run(run.config, "tiny", root)
    with write(other.folder / "harvest", "harvest") as harvest:
        harvest.json(
            "record.json", json.loads((run.folder / "harvest" / "record.json").read_text()) | {"scale": 1.0}
        )
    with pytest.raises(ArtifactError, match="made from another harvest .* run `make reproduce`"):
        export_core(other)
    assert not (other.folder / "core").exists()


def test_other_files_are_not_written_over(run, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    for taken in (tmp_path, run.cycle(2, "core")):
        before = {path: path.read_bytes() for path in taken.iterdir() if path.is_file()}
        with pytest.raises(UserError, match="holds other files than a core's"):
            export_core(run, taken)
        assert {path: path.read_bytes() for path in taken.iterdir() if path.is_file()} == before
    (tmp_path / "clone" / ".git").mkdir(parents=True)
    export_core(run, tmp_path / "clone")
    assert (tmp_path / "clone" / ".git").is_dir() and load_core(tmp_path / "clone")


@pytest.mark.parametrize("name", ["core.json", "core.safetensors"])
def test_a_flipped_byte_is_found_and_its_file_named(folder, name):
    whole = (folder / name).read_bytes()
    for position in {0, 8, len(whole) - 1, *range(0, len(whole), 211)}:
        for bit in (1, 32):
            broken = bytearray(whole)
            broken[position] ^= bit
            (folder / name).write_bytes(broken)
            with pytest.raises(UserError, match=re.escape(name)) as error:
                load_core(folder)
            assert "damaged" in one_sentence(error), position
    (folder / name).write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"damaged .{name}"):
        load_core(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"There is no core in .*{name} is missing"):
        load_core(folder)


def test_a_stage_of_a_run_is_no_portable_core(run):
    with pytest.raises(UserError, match="`make core` writes"):
        load_core(run.cycle(2, "core"))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"schema_version": 2}, "version 2, and this code reads 'dmsae-core' of version 1"),
        ({"format": "sae"}, "holds 'sae'"),
        ({"normaliser": {"scale": 0.0}}, r"at normaliser.scale"),
        ({"normaliser": {"scale": "1"}}, r"at normaliser.scale"),
        ({"hook_name": "blocks.0.hook_mlp_out"}, r"at hook_name"),
        ({"model": {"name": "m", "hash": "1"}}, r"at model"),
        ({"surprise": 1}, "surprise"),
        ({"latents": []}, "must describe each of its"),
    ],
)
def test_another_schema_is_refused(folder, changes, said):
    rewrite(folder, **changes)
    with pytest.raises(UserError, match=said) as error:
        load_core(folder)
    one_sentence(error)


def test_impossible_lineages_are_refused(folder):
    latents = load_core(folder).record["latents"]
    rewrite(folder, latents=[latents[0] | {"first_cycle": 2, "selected": [1, 2]}, *latents[1:]])
    with pytest.raises(
        UserError,
        match=f"latent {latents[0]['id']} must have been selected first in cycle 2 and last in cycle 2",
    ):
        load_core(folder)
    rewrite(folder, latents=[latents[0], latents[0], *latents[2:]])
    with pytest.raises(UserError, match="must describe each of its .* latents once"):
        load_core(folder)


def test_another_tensor_is_refused(folder):
    W_enc = load_core(folder).W_enc
    unending = W_enc.clone()
    unending[3, 1] = math.inf
    for tensors, said in [
        ({"W_enc": W_enc.T.contiguous()}, "must hold W_enc"),
        ({"W_enc": W_enc.half()}, "float16"),
        ({"W_enc": W_enc, "b_enc": torch.zeros(3)}, "b_enc"),
        ({"W": W_enc}, "must hold W_enc"),
        ({"W_enc": unending}, "NaN or Inf"),
    ]:
        rewrite(folder, tensors)
        with pytest.raises(UserError, match=said) as error:
            load_core(folder)
        one_sentence(error)


def test_what_it_was_made_for_is_accepted(folder, tiny_llama, tmp_path):
    """A model is known by the content of its files, whatever its folder is called; a Hub id by its name."""
    elsewhere = shutil.copytree(tiny_llama.folder, tmp_path / "under another name")
    for model in (tiny_llama, str(elsewhere), None):
        assert load_core(folder, model, "blocks.0.hook_resid_post").hash == load_core(folder).hash
    rewrite(folder, model=load_core(folder).record["model"] | {"name": "owner/model"})
    assert load_core(folder, "owner/model")


def test_another_model_or_hook_is_refused(folder, tiny_llama, tmp_path):
    other = str(save_model(tmp_path / "tiny llama", seed=1, context=16))
    opened = LanguageModel(tiny_llama.config.model_copy(update={"name": other}))
    for model in (opened, other, "wheeltext-4x128", "owner/tiny-llama"):
        with pytest.raises(
            UserError, match="was made for tiny llama .* is another model: use that one"
        ) as error:
            load_core(folder, model)
        one_sentence(error)
    deeper = LanguageModel(tiny_llama.config.model_copy(update={"hook_name": "blocks.1.hook_resid_post"}))
    for arguments in (
        (deeper,),
        (None, "blocks.1.hook_resid_post"),
        (tiny_llama, "blocks.1.hook_resid_post"),
    ):
        with pytest.raises(
            UserError, match="made for activations at blocks.0.hook_resid_post, not at blocks.1"
        ) as error:
            load_core(folder, *arguments)
        one_sentence(error)


def test_what_is_neither_a_folder_nor_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="'core' is neither a folder nor a Hub id: give owner/name, or a path such as ./core"
    ):
        load_core("core")
    with pytest.raises(UserError, match="There is no core in core"):
        load_core("./core")


@pytest.mark.parametrize("sparsity", ["relu", "batchtopk"])
def test_training_with_it_gives_the_sae_that_the_run_would_train(run, folder, sparsity):
    """Bit for bit, against the run's own core; and the loaded rows do not move."""
    settings = run.config.training.model_copy(update={"core_sparsity": sparsity})
    x = tiny_core.random(20, 50, 32, seed=3) / math.sqrt(32)
    found = []
    for rows in (open_arms(run).core.rows, load_core(folder).rows):
        sae = MatryoshkaSAE(32, tiny_core.D_SAE, tiny_core.PREFIXES, rows, sparsity)
        sae.initialise(torch.Generator().manual_seed(0), x[0])
        trainer = Trainer(sae, settings, steps=len(x))
        for batch in x:
            trainer.train_step(batch)
        found.append(sae)
    ours, theirs = (sae.state_dict() for sae in found)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    core = load_core(folder)
    assert torch.equal(found[1].W_enc[:, : len(core)], core.W_enc)
    assert not torch.equal(
        found[1].W_dec, MatryoshkaSAE(32, tiny_core.D_SAE, tiny_core.PREFIXES, core.rows).W_dec
    )


def test_the_schema_beside_the_code_is_the_codes():
    """For those who check a core without this library. Made by CoreRecord.model_json_schema()."""
    from jsonschema import Draft202012Validator

    schema = json.loads((ROOT / "dmsae_lib" / "distill" / "core.schema.json").read_text(encoding="utf-8"))
    assert schema == CoreRecord.model_json_schema()
    Draft202012Validator.check_schema(schema)


def test_the_readmes_lines_work_as_they_stand(monkeypatch):
    """Its block that loads a core, in a clone's own folder: the core stays, the SAE around it learns."""
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    (code,) = [block for block in blocks if "load_core(" in block]
    if not (ROOT / "results" / "default" / "core").is_dir():
        pytest.skip("results/default is not published in this tree")
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    published, mine, history = (
        load_core(ROOT / "results" / "default" / "core"),
        names["mine"],
        names["trainer"].history,
    )
    assert torch.equal(mine.W_enc[:, : len(published)], published.W_enc)
    # the scale is that of these activations
    assert math.isclose(float(names["x"].square().sum(1).mean()), 1.0, rel_tol=0.2)
    assert history[-1]["fvu"] < 0.5 * history[0]["fvu"] and history[-1]["L0_core"] > 1
    assert math.isclose(float((mine.encode(names["x"]) > 0).sum(1).float().mean()), 16, rel_tol=0.2)
