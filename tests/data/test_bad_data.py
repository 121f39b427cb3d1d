"""Bad models and bad text: one sentence with the setting, the value and the remedy, before any computing."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders.models import save_model
from builders.sentences import assert_one_sentence
from test_corpus import WordTokenizer

from dmsae_lib.config.sections import DataConfig, ModelConfig
from dmsae_lib.data.corpus import tokenise
from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.store.artifacts import UserError

CONTEXT = 32


# The model: what is done to the folder of a good one (or which settings differ) -> what the sentence holds


def truncate(name: str, keep: float) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * keep))


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def edit_json(name: str, **changed: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changed))

    return edit


def drop_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def smaller_vocabulary(folder: Path) -> None:
    shutil.rmtree(folder)
    save_model(folder, context=CONTEXT, vocab_size=280)


MODEL: dict[str, tuple[Callable[[Path], object] | dict, list[str]]] = {
    "a hook that does not exist": (
        {"hook_name": "blocks.2.hook_resid_post"},
        [
            "model.hook_name is blocks.2.hook_resid_post",
            "has only 2 layers",
            "the last hook is blocks.1.hook_resid_post",
        ],
    ),
    "a context longer than the model's": (
        {"context_size": 64},
        ["model.context_size is 64", "at most 32", "lower it"],
    ),
    "no such folder": ({"name": "./nowhere"}, ["model.name is ./nowhere", "no such folder"]),
    "no such embedded model": (
        {"name": "wheeltext"},
        ["model.name is wheeltext", "wheeltext-4x128", "Hub id"],
    ),
    "a Hub id, offline": (
        {"name": "nobody-knows/such-a-model"},
        ["model.name is nobody-knows/such-a-model", "the Hub did not give it", "check the name, the network"],
    ),
    "without config.json": (remove("config.json"), ["model.name is", "holds no config.json", "Hub format"]),
    "a truncated config.json": (
        truncate("config.json", 0.5),
        ["model.name is", "config.json", "get its files again"],
    ),
    "a model of another kind": (
        edit_json("config.json", model_type="no_such_kind"),
        ["model.name is", "config.json", "choose"],
    ),
    "without weights": (
        remove("model.safetensors"),
        ["model.name is", "holds no .safetensors file", "put the weights there"],
    ),
    "with pickled weights alone": (pickled_weights, ["model.name is", "holds no .safetensors file"]),
    "truncated weights": (
        truncate("model.safetensors", 0.5),
        ["model.name is", "could not be loaded", "get it again"],
    ),
    "truncated to nothing": (
        truncate("model.safetensors", 0),
        ["model.name is", "could not be loaded", "get it again"],
    ),
    "weights of other sizes": (
        edit_json("config.json", intermediate_size=48),
        ["6 of its weights are missing or of another size"],
    ),
    "a weight missing": (
        drop_a_weight,
        ["1 of its weights", "model.layers.1.mlp.up_proj.weight", "get its files again"],
    ),
    "without a tokenizer": (
        remove("tokenizer.json", "tokenizer_config.json"),
        ["model.name", "tokenizer.json", "put"],
    ),
    "a truncated tokenizer": (
        truncate("tokenizer.json", 0.5),
        ["model.name", "tokenizer", "put its tokenizer.json"],
    ),
    "another model's tokenizer": (
        smaller_vocabulary,
        ["its tokenizer has", "its model only 280", "trained with"],
    ),
    "a tokenizer without BOS and EOS": (
        edit_json("tokenizer_config.json", bos_token=None, eos_token=None),
        ["neither a BOS nor an EOS token", "tokenizer_config.json"],
    ),
}


@pytest.fixture(scope="module")
def good_model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("good") / "model", context=CONTEXT)


def settings_of(folder: Path) -> dict[str, object]:
    return {"name": str(folder), "hook_name": "blocks.0.hook_resid_post", "context_size": CONTEXT}


def test_the_good_model_loads(good_model):
    assert LanguageModel(ModelConfig(**settings_of(good_model))).n_layers == 2


@pytest.mark.parametrize("case", MODEL)
def test_model(case, good_model, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done, parts = MODEL[case]
    folder = tmp_path / "model"
    shutil.copytree(good_model, folder)
    settings = settings_of(folder)
    settings |= done if isinstance(done, dict) else (done(folder) or {})
    started = time.perf_counter()
    with pytest.raises(UserError) as caught:
        LanguageModel(ModelConfig(**settings))
    assert_one_sentence(str(caught.value), *parts)
    assert time.perf_counter() - started < 20 and "Traceback" not in capfd.readouterr().err


# The text: files -> what the sentence holds

TEXTS: dict[str, tuple[str, bytes | None, list[str]]] = {
    "missing": ("./my.txt", None, ["data.source is ./my.txt", "no such file or folder"]),
    "missing, below a folder": (
        "texts/my.jsonl",
        None,
        ["data.source is texts/my.jsonl", "no such file or folder"],
    ),
    "a Hub data set, offline": (
        "nobody-knows/such-texts",
        None,
        ["data.source is nobody-knows/such-texts", "data set that can be read", "check the name"],
    ),
    "an empty file": ("my.txt", b"", ["data.train_tokens asks for 300", "my.txt holds 0", "give more text"]),
    "too short for one batch": (
        "my.txt",
        b"a few words\n\nand some more",
        ["data.train_tokens asks for 300", "lower it"],
    ),
    "one document, so one split": (
        "my.txt",
        b"word " * 5000,
        ["holds 0", "documents go to the splits by their hash"],
    ),
    "an empty folder": (".", None, ["data.source is .", "holds no .txt or .jsonl file"]),
    "a file of another kind": ("my.csv", b"text\nx", ["my.csv", "no .txt or .jsonl file"]),
    "not UTF-8": ("my.txt", b"caf\xe9", ["my.txt is not UTF-8 text", "at byte 3, in line 1", "convert it"]),
    "jsonl, not UTF-8": (
        "my.jsonl",
        b'{"text": "caf\xe9"}',
        ["my.jsonl is not UTF-8 text", "at byte 13, in line 1", "convert it"],
    ),
    "jsonl, a bad byte deep inside": (
        "my.jsonl",
        b'{"text": "x"}\n' * 100_000 + b'{"text": "caf\xe9"}\n',
        ["my.jsonl is not UTF-8 text", "at byte 1400013, in line 100001"],
    ),
    "jsonl nested too deeply": (
        "my.jsonl",
        b'{"text": ' + b"[" * 200_000,
        ["line 1 of my.jsonl", "JSON object"],
    ),
    "jsonl with a bad line": (
        "my.jsonl",
        b'{"text": "x"}\n\n{"text": "y"\n',
        ["line 3 of my.jsonl", "mend the line"],
    ),
    "jsonl without the field": (
        "my.jsonl",
        b'{"body": "x"}\n',
        ["line 1 of my.jsonl", "'text'", "data.text_field"],
    ),
    "jsonl with a number for text": ("my.jsonl", b'{"text": 5}\n', ["line 1 of my.jsonl", "'text'"]),
    "jsonl with lists": ("my.jsonl", b"[1]\n", ["line 1 of my.jsonl", "JSON object"]),
}


@pytest.mark.parametrize("case", TEXTS)
def test_text(case, tmp_path, monkeypatch):
    source, content, parts = TEXTS[case]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(source).write_bytes(content)
    data = DataConfig(source=source, train_tokens=300, select_tokens=10, test_tokens=10)
    with pytest.raises(UserError) as caught:
        tokenise(data, WordTokenizer(), 16)
    assert_one_sentence(str(caught.value), *parts)
