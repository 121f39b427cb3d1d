"""Bad input: what is wrong -> one sentence that names the setting, the value and the remedy, before any
computing.

The table is checked where the sentence is made; a few rows of it also through the command that a user gives.
Python versions, clone paths and damaged artefacts have tests of their own (test_plan, test_environment,
test_artifacts).
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders.clone import make, make_clone
from builders.models import save_model

from dmsae_lib.command.run_notebook import check_parameters
from dmsae_lib.config import RunConfig, load_config
from dmsae_lib.config.sections import DataConfig, ModelConfig
from dmsae_lib.data.corpus import tokenise
from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.store.artifacts import UserError

ROOT = Path(__file__).parents[2]
CONTEXT = 32


def assert_one_sentence(message: str, *parts: str) -> None:
    assert "\n" not in message and message.endswith(".") and len(message) < 500, message
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"


# The configuration: overrides of configs/smoke.yaml -> what the sentence holds

CONFIG = {
    "a misspelt key": (["training.learning_rat=1"], ["unknown key training.learning_rat"]),
    "a misspelt section": (["trainning.k=1"], ["unknown key trainning", "did you mean training?"]),
    "text for a number": (["training.k=many"], ["training.k is 'many'", "a valid integer"]),
    "a fraction for a whole number": (["training.k=1.5"], ["training.k is 1.5", "a valid integer"]),
    "a negative number": (["training.lr=-1"], ["training.lr is -1", "greater than 0"]),
    "an unknown choice": (
        ["training.core_sparsity=topk"],
        ["training.core_sparsity is 'topk'", "'relu' or 'batchtopk'"],
    ),
    "a coverage above 1": (["distill.coverage=1.2"], ["distill.coverage is 1.2", "less than 1"]),
    "an unknown arm": (
        ["retrain.arms=[none, distiled]"],
        ["retrain.arms.1 is 'distiled'", "one of none, distilled,"],
    ),
    "no value": (["training.k"], ["'training.k' is not of the form section.key=value"]),
    "broken YAML": (["training.k=[1"], ["'training.k=[1'", "not valid YAML"]),
    "a setting below a setting": (["training.k.x=1"], ["k is not a section"]),
    "a required section taken out": (["model=null"], ["model is None", "dictionary"]),
    "prefixes that do not increase": (
        ["sae.prefixes=[16, 16, 48]"],
        ["sae.prefixes is [16, 16, 48]", "increase"],
    ),
    "no prefixes": (["sae.prefixes=[]"], ["sae.prefixes is []"]),
    "a prefix as wide as the SAE": (
        ["sae.prefixes=[16, 256]"],
        ["sae.prefixes ends at 256", "below sae.d_sae = 256"],
    ),
    "k above the width": (["training.k=257"], ["training.k is 257", "sae.d_sae = 256"]),
    "a later k above the width": (["retrain.ks=[32, 300]"], ["retrain.ks is 300", "sae.d_sae = 256"]),
    "less text than one batch": (
        ["data.train_tokens=100"],
        ["data.train_tokens is 100", "training.batch_size = 256"],
    ),
    "a buffer smaller than two batches": (
        ["data.store=stream", "data.buffer_rows=3"],
        ["data.buffer_rows is 3", "256"],
    ),
    "controls at a k that is not trained": (
        ["retrain.controls_at=[40]"],
        ["retrain.controls_at is 40", "retrain.ks"],
    ),
    "more draws than seeds": (["retrain.controls={random: 2}"], ["2 seeds of random", "retrain.seeds = [0]"]),
    "an arm twice": (["retrain.controls={none: 1}"], ["retrain.controls names none", "retrain.arms"]),
    "no seeds": (["retrain.seeds=[]"], ["retrain.seeds is []", "at least 1 item"]),
    "too little text for fresh tokens": (
        ["data.fresh_factor=2"],
        ["data.fresh_factor is 2", "distill.cycles + 1 = 3"],
    ),
    "two chains of one name": (
        ["distill.chains=[{name: a}, {name: a}]"],
        ["distill.chains is ['a', 'a']", "differ"],
    ),
    "prefixes of another SAE that do not increase": (
        ["distill.from_prefixes=[16, 16]"],
        ["from_prefixes is [16, 16]", "increase"],
    ),
    "a key twice": (["retrain.controls={random: 1, random: 1}"], ["the key random is there twice"]),
    "a hook of another kind": (
        ["model.hook_name=blocks.1.hook_mlp_out"],
        ["model.hook_name is 'blocks.1.hook_mlp_out'", "blocks.12.hook_resid_post", "no other place"],
    ),
}


@pytest.mark.parametrize("case", CONFIG)
def test_configuration(case):
    overrides, parts = CONFIG[case]
    with pytest.raises(UserError) as caught:
        load_config("smoke", overrides)
    assert_one_sentence(
        str(caught.value).replace("did you mean training?", "did you mean training?."), *parts
    )


SETS = {
    "retrain.ks": "[32, 16, 32]",
    "retrain.seeds": "[0, 1, 0]",
    "retrain.arms": "[none, distilled, none]",
    "retrain.controls_at": "[32, 32]",
    "distill.placebos": "[pca, pca]",
    "learning_rate_sweep": "[1, 2.0, 1.0]",
    "saebench.arms": "[none, none]",
    "saebench.probing_ks": "[1, 5, 1]",
    "saebench.probing_sets": "[54_cs_tf, 54_cs_tf]",
    "saebench.suite.evals": "[mdl, mdl]",
    "saebench.suite.arms": "[none, none]",
    "saebench.suite.ks": "[32, 32]",
    "saebench.suite.seeds": "[0, 0]",
    "saebench.suite.eval_seeds": "[2, 0, 2]",
}


@pytest.mark.parametrize("setting", SETS)
def test_an_entry_that_is_there_twice(setting):
    """It would be trained, scored or counted twice, or fail after everything was trained."""
    with pytest.raises(UserError) as caught:
        load_config("smoke", [f"{setting}={SETS[setting]}"])
    assert_one_sentence(str(caught.value), f"smoke.yaml: {setting} names", "twice", "name each once")


def test_every_list_of_settings_is_a_set_or_in_order():
    """A list that is added later is one of the sets above, or is named here with what else refuses repeated
    entries."""
    with pytest.raises(UserError, match="distill.chains.0.retrain names none twice"):
        load_config("smoke", ["distill.chains=[{name: a, seed: 1, retrain: [none, none]}]"])
    in_order = {"sae.prefixes", "distill.from_prefixes", "distill.chains"}
    definitions = RunConfig.model_json_schema()["$defs"]

    def lists(section: dict, place: str = "") -> set[str]:
        found = set()
        for name, setting in section["properties"].items():
            for kind in setting.get("anyOf", [setting]):
                if kind.get("type") == "array" and "prefixItems" not in kind:
                    found.add(f"{place}{name}")
                held = definitions.get(kind.get("items", kind).get("$ref", "").split("/")[-1], {})
                found |= lists(held, f"{place}{name}.") if "properties" in held else set()
        return found

    assert lists(RunConfig.model_json_schema()) == set(SETS) | in_order | {"distill.chains.retrain"}


FILES = {
    "missing": (None, ["There is no configuration", "use one of default,"]),
    "empty": ("", ["holds no settings"]),
    "a list": ("- 1", ["holds no settings"]),
    "broken YAML": ("model: {name: [x}", ["is not valid YAML"]),
    "tabs": ("model:\n\tname: x", ["is not valid YAML"]),
    "not text": (b"\xff\xfe\x00", ["is not valid YAML"]),
    "a section twice": ("seed: 0\nmodel: {}\nseed: 1", ["is not valid YAML", "the key seed is there twice"]),
    "without a section": ("seed: 0", ["the key model is missing; add it"]),
}


@pytest.mark.parametrize("case", FILES)
def test_configuration_file(case, tmp_path):
    content, parts = FILES[case]
    if content is not None:
        (tmp_path / "my.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "my.yaml")
    assert_one_sentence(str(caught.value), "my.yaml", *parts)


PARAMETERS = {
    "a misspelt parameter": (
        {"cicle": "1"},
        ["02_train_cycle.ipynb has no parameter 'cicle'", "config, cycle"],
    ),
    "text for a number": ({"cycle": "first"}, ["the parameter cycle is 'first'", "of type int"]),
}


@pytest.mark.parametrize("case", PARAMETERS)
def test_notebook_parameters(case):
    given, parts = PARAMETERS[case]
    with pytest.raises(UserError) as caught:
        check_parameters(given, {"config": "smoke", "cycle": 0}, "02_train_cycle.ipynb")
    assert_one_sentence(str(caught.value), *parts)


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
    from test_corpus import WordTokenizer

    source, content, parts = TEXTS[case]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(source).write_bytes(content)
    data = DataConfig(source=source, train_tokens=300, select_tokens=10, test_tokens=10)
    with pytest.raises(UserError) as caught:
        tokenise(data, WordTokenizer(), 16)
    assert_one_sentence(str(caught.value), *parts)


# The environment: variables that let torch say one number of threads and compute with another

COUNT = """
import os, torch
from dmsae_lib.store.process import prepare
prepare(2)
a = torch.randn(500, 500)
before = len(os.listdir("/proc/self/task"))
for _ in range(20):
    a.exp().sum(0), a @ a, torch.randn(2**20).sum()
print(torch.get_num_threads(), len(os.listdir("/proc/self/task")) - before)
"""
LOWERING = {"OMP_THREAD_LIMIT": "1", "OMP_DYNAMIC": "TRUE", "OMP_MAX_ACTIVE_LEVELS": "0"}


@pytest.mark.parametrize(
    "name, value",
    [
        *LOWERING.items(),
        ("OMP_THREAD_LIMIT", "+1"),
        ("OMP_THREAD_LIMIT", "2"),
        ("OMP_NUM_THREADS", "1"),
        ("MKL_NUM_THREADS", "1"),
        ("OMP_DYNAMIC", "false"),
    ],
)
def test_torch_computes_with_the_threads_that_are_reported_or_not_at_all(name, value):
    clean = {
        key: text
        for key, text in os.environ.items()
        if key not in (*LOWERING, "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    }
    ended = subprocess.run(
        [sys.executable, "-c", COUNT], cwd=ROOT, env=clean | {name: value}, capture_output=True, text=True
    )
    if ended.returncode:
        assert_one_sentence(
            ended.stderr.splitlines()[-1], f"{name} is {value}", "threads = 2", f"unset {name}"
        )
    assert bool(ended.returncode) == (value in (LOWERING.get(name), "+1"))
    if not ended.returncode and Path("/proc/self/task").is_dir():
        said, started = map(int, ended.stdout.split())
        assert said == 2 and started >= 1  # a second thread computed


def test_a_core_larger_than_the_width():
    with pytest.raises(UserError) as caught:
        MatryoshkaSAE(8, 64, (16, 32), torch.zeros(40, 8))
    assert_one_sentence(str(caught.value), "sae.d_sae is 64", "a core of 40", "raise sae.d_sae")


# Through the command: exit code, one sentence, nothing half-written

COMMANDS = {
    "an unknown parameter": (["-p", "confg", "smoke"], "01_harvest.ipynb has no parameter 'confg'"),
    "a parent that is missing": (["-p", "cycle", "1"], "There is no harvest artefact in"),
    "truncated weights": (
        ["-p", "overrides", '["model.name={model}", "model.context_size=32"]'],
        "model.name is {model}: it could not be loaded",
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_command(case, good_model, tmp_path):
    words, sentence = COMMANDS[case]
    model = tmp_path / "model"
    shutil.copytree(good_model, model)
    truncate("model.safetensors", 0.5)(model)
    notebook = "02_train_cycle" if "cycle" in words else "01_harvest"
    run = f"bad-input-{os.getpid()}"
    words = [word.replace("{model}", str(model)) for word in words]
    command = [
        sys.executable,
        "-m",
        "dmsae_lib.command.run_notebook",
        f"notebooks/{notebook}.ipynb",
        str(tmp_path / "out" / "stage.ipynb"),
        "-p",
        "run",
        run,
        *words,
    ]
    try:
        ended = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
        left = (
            sorted(path.name for path in (ROOT / "runs" / run).rglob("*"))
            if (ROOT / "runs" / run).exists()
            else []
        )
    finally:
        shutil.rmtree(ROOT / "runs" / run, ignore_errors=True)
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.startswith("error: ") and sentence.replace("{model}", str(model)) in ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert left == [] and not (tmp_path / "out" / "stage.ipynb").exists()


def fill(folder: Path) -> None:
    with open(folder / "fill", "wb", buffering=0) as handle, contextlib.suppress(OSError):
        while handle.write(b"x" * 4096):
            pass


def test_a_full_and_a_read_only_disk_through_make(small_disk):
    clone = make_clone(small_disk("8m") / "a clone")
    assert make(clone, "-n", "stages").returncode == 0
    before = {path: path.read_bytes() for path in (clone / "runs").rglob("*") if path.is_file()}
    fill(clone)
    ended = make(clone, "stages", "SET=training.lr=0.5", "RUN=toy2")
    assert ended.returncode != 0 and "Traceback" not in ended.stderr
    assert_one_sentence(
        ended.stderr.splitlines()[0], "Cannot write", "runs/toy2", "the disk is full: free some space"
    )
    subprocess.run(["mount", "-o", "remount,ro", clone.parent], check=True)
    ended = make(clone, "stages", "RUN=toy3")
    assert ended.returncode != 0 and "Traceback" not in ended.stderr
    assert_one_sentence(
        ended.stderr.splitlines()[0], "Cannot write", "runs/toy3", "the file system is read-only"
    )
    subprocess.run(["mount", "-o", "remount,rw", clone.parent], check=True)
    assert before == {path: path.read_bytes() for path in before}
    ended = make(clone, "clean")  # what makes room must work without any
    assert ended.returncode == 0 and not (clone / "runs" / "toy").exists(), ended.stderr
