"""Language models in GGUF: the conversion on a tiny file made here, and every way in which it is refused."""

import multiprocessing
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from builders.models import TEXT, save_model

from dmsae_lib.config import packaged
from dmsae_lib.config.packaged import PACKAGED, Packaged, lacks
from dmsae_lib.config.sections import ModelConfig
from dmsae_lib.data import gguf_folder
from dmsae_lib.data.gguf_folder import weights_as_shipped
from dmsae_lib.data.language_model import LanguageModel, describe
from dmsae_lib.data.model_folder import load_tokenizer, model_hash, resolve
from dmsae_lib.store.artifacts import UserError, load, sha256_file

SMOLLM2 = "smollm2-135m-instruct"
GIB = 2**30


@pytest.fixture
def clone(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_folder, "repository_root", lambda: tmp_path / "clone")
    return tmp_path / "clone"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(file, the weights in it)."""
    pytest.importorskip(
        "gguf", reason="gguf is not installed: pip install --no-deps -r requirements-gguf.txt"
    )
    from builders.tiny_gguf import save_gguf

    file = tmp_path_factory.mktemp("gguf") / "tiny llama.Q4_1.gguf"
    return file, save_gguf(file)


def test_the_folder_holds_the_dequantised_weights_and_the_tokenizer(one_thread, tiny, clone):
    from transformers import AutoModelForCausalLM

    file, weights = tiny
    folder = resolve(str(file))
    assert folder == clone / "runs" / "models" / f"tiny llama.Q4_1-{sha256_file(file)[:8]}"
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(found.config, "quantization_config")
    state = found.state_dict()
    assert state.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(state[name], value), name
    ours, theirs = load_tokenizer(folder), load_tokenizer(file.with_name("plain"))
    assert ours.bos_token_id == theirs.bos_token_id
    for text in TEXT:
        plain = {"add_special_tokens": False}
        assert ours(text, **plain)["input_ids"] == theirs(text, **plain)["input_ids"]


def test_the_model_says_what_its_weights_are(one_thread, tiny, clone, tiny_llama):
    hook = "blocks.0.hook_resid_post"
    model = LanguageModel(ModelConfig(name=str(tiny[0]), hook_name=hook, context_size=16))
    assert describe(model)["weights"] == "4-bit (Q4_1) as shipped, dequantised"
    assert describe(tiny_llama)["weights"] is None


def test_it_is_made_once_and_again_where_it_was_damaged(tiny, clone, monkeypatch):
    folder = resolve(str(tiny[0]))
    digest, written = model_hash(folder), (folder / "provenance.json").read_bytes()
    assert resolve(str(tiny[0])) == folder and (folder / "provenance.json").read_bytes() == written
    (folder / "model.safetensors").write_bytes(b"cut")
    assert model_hash(resolve(str(tiny[0]))) == digest
    load(folder, "language_model")
    shutil.rmtree(folder)
    assert model_hash(resolve(str(tiny[0]))) == digest  # whenever and wherever it is made
    assert weights_as_shipped(folder) == "4-bit (Q4_1) as shipped, dequantised"


def test_a_failed_conversion_leaves_nothing(tiny, clone, monkeypatch):
    monkeypatch.setattr(gguf_folder, "_convert", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        resolve(str(tiny[0]))
    assert [path.name[-5:] for path in (clone / "runs" / "models").iterdir()] == [".lock"]
    monkeypatch.undo()
    monkeypatch.setattr(gguf_folder, "repository_root", lambda: clone)
    assert (resolve(str(tiny[0])) / "model.safetensors").is_file()


def die_halfway(clone, name):
    def half(file, folder, start):
        (folder / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    gguf_folder.repository_root, gguf_folder._convert = (lambda: clone), half
    resolve(name)


def test_a_killed_conversion_is_begun_again(tiny, clone):
    killed = multiprocessing.get_context("fork").Process(target=die_halfway, args=(clone, str(tiny[0])))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert not [path for path in (clone / "runs" / "models").iterdir() if path.name[0] != "."]
    load(resolve(str(tiny[0])), "language_model")
    assert not list((clone / "runs" / "models").glob(".*.writing"))


def resolve_in(clone, name, results):
    gguf_folder.repository_root = lambda: clone
    results.put(str(resolve(name)))


def test_two_processes_at_once_get_the_same_folder(tiny, clone):
    spawn = multiprocessing.get_context("fork")
    results = spawn.Queue()
    processes = [spawn.Process(target=resolve_in, args=(clone, str(tiny[0]), results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert len({results.get(timeout=120) for _ in processes}) == 1
    for process in processes:
        process.join(10)
    load(resolve(str(tiny[0])), "language_model")


@pytest.mark.parametrize("kept", [0, 3, 200, 0.5, 0.99])
def test_a_damaged_file_is_refused(tiny, clone, tmp_path, kept):
    content = tiny[0].read_bytes()
    file = tmp_path / "cut.gguf"
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match="damaged or no GGUF file.*get the file again"):
        resolve(str(file))
    assert not list((clone / "runs" / "models").glob("cut*"))


def test_another_kind_of_file_is_refused(tiny, clone, tmp_path):
    file = tmp_path / "text.gguf"
    file.write_text("no model " * 1000)
    with pytest.raises(UserError, match="damaged or no GGUF file"):
        resolve(str(file))


def test_what_transformers_cannot_read_is_refused(tiny, clone, tmp_path):
    from builders.tiny_gguf import save_gguf

    save_gguf(tmp_path / "other.gguf", architecture="rwkv7")
    with pytest.raises(UserError, match="transformers cannot read it .*rwkv7.*choose another model"):
        resolve(str(tmp_path / "other.gguf"))
    save_gguf(tmp_path / "nan.gguf", spoil=True)
    with pytest.raises(UserError, match="its weights hold NaN"):
        resolve(str(tmp_path / "nan.gguf"))


def test_too_little_disk_or_memory_is_said_before_the_work(tiny, clone, monkeypatch):
    monkeypatch.setattr(gguf_folder, "_convert", lambda *_: pytest.fail("it began"))
    monkeypatch.setattr(gguf_folder.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(UserError, match="GiB of memory, and 0.00 are free; close"):
        resolve(str(tiny[0]))
    monkeypatch.setattr(gguf_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="GiB of disk, and 0.00 are free; free some"):
        resolve(str(tiny[0]))


def test_without_the_packages_the_command_that_installs_them_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(packaged, "_installed", lambda module: False)
    for name, what in ((SMOLLM2, "93 MB, licence Apache-2.0"), (str(tmp_path / "any.gguf"), "gguf")):
        with pytest.raises(UserError, match=f"{what}.*run `make model CONFIG="):
            resolve(name)
    assert lacks("wheeltext-4x128") is None and lacks("HuggingFaceTB/SmolLM2-135M") is None


def test_a_package_with_another_file_is_refused(clone, tmp_path, monkeypatch):
    (tmp_path / "toy_weights").mkdir()
    (tmp_path / "toy_weights" / "__init__.py").touch()
    (tmp_path / "toy_weights" / "toy.gguf").write_bytes(b"something else")
    monkeypatch.syspath_prepend(tmp_path)
    toy = Packaged("toy_weights", "toy.gguf", "0" * 64, "a toy", "requirements-toy.txt")
    monkeypatch.setitem(PACKAGED, "toy", toy)  # and this is all that one more takes
    monkeypatch.setattr(packaged, "_installed", lambda module: True)
    with pytest.raises(UserError, match="not the file that is known.*run `make model`"):
        resolve("toy")
    (tmp_path / "toy_weights" / "toy.gguf").unlink()
    with pytest.raises(UserError, match="there is no file.*run `make model`"):
        resolve("toy")


def test_a_file_that_is_not_there_is_named(tiny, clone):
    with pytest.raises(UserError, match="no file /nowhere/model.gguf; correct the path"):
        resolve("/nowhere/model.gguf")


def test_a_name_that_is_nowhere_lists_those_that_are():
    with pytest.raises(UserError, match=f"wheeltext-4x128, {SMOLLM2}"):
        resolve("smollm2")


@pytest.mark.slow
@pytest.mark.skipif(lacks(SMOLLM2) is not None, reason=f"{SMOLLM2} is not installed: `make model` does that")
def test_the_packaged_model_knows_its_capitals(one_thread):
    hook = "blocks.8.hook_resid_post"
    model = LanguageModel(ModelConfig(name=SMOLLM2, hook_name=hook, context_size=32, dtype="auto"))
    ids = model.tokenizer("The capital of France is", add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([[model.bos, *ids]])
    assert model.tokenizer.decode(model.logits(tokens)[0, -1].argmax()) == " Paris"
    assert model.skips_below and torch.equal(model.upper(tokens, model.lower(tokens)), model.logits(tokens))


def test_plain_folders_say_nothing_of_their_weights(tmp_path):
    assert weights_as_shipped(save_model(tmp_path / "plain")) is None
