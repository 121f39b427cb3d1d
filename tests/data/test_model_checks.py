"""What is checked and refused while a model is loaded: against transformers itself, on tiny models of many
architectures."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
from builders.models import save_model, save_tokenizer

from dmsae_lib.config.sections import ModelConfig
from dmsae_lib.data.language_model import LanguageModel, describe
from dmsae_lib.data.model_loading import no_processes
from dmsae_lib.store.artifacts import UserError

CONTEXT, LAYER = 16, 1
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
WIDTH = {"vocab_size": 320, "hidden_size": 32}
BLOCKS = {"num_hidden_layers": 3, "num_attention_heads": 4}
LARGE = {"initializer_range": 0.2}  # weights so large that a difference is seen
PLAIN = WIDTH | BLOCKS | IDS | LARGE | {"intermediate_size": 64, "max_position_embeddings": 64}
GROUPED = PLAIN | {"num_key_value_heads": 2}
GEMMA = GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
SHORT = LARGE | {"vocab_size": 320, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def started(monkeypatch) -> list:
    """Programs that were started; none really is, whatever a dependency tries."""
    found = []

    def start(arguments, *_):
        found.append(arguments)
        raise PermissionError("not in a test")

    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(subprocess, "_fork_exec", start)
    monkeypatch.setattr(subprocess, "_USE_POSIX_SPAWN", False)
    monkeypatch.setattr(os, "posix_spawn", lambda program, *_: start(program))
    return found


def save(folder: Path, kind: str, **settings: object) -> Path:
    """A random model of transformers' class ``kind``, with a tokenizer."""
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    cls(cls.config_class(**settings)).save_pretrained(folder)
    save_tokenizer(folder, 300)
    return folder


def load(
    folder: Path, hook: str = f"blocks.{LAYER}.hook_resid_post", dtype: str = "float32"
) -> LanguageModel:
    return LanguageModel(ModelConfig(name=str(folder), hook_name=hook, context_size=CONTEXT, dtype=dtype))


def refused(folder: Path, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, **options)
    message = str(caught.value)
    assert message.startswith(f"model.name is {folder}: ") and message.endswith(".") and "\n" not in message
    return message


def some_tokens() -> torch.Tensor:
    return torch.randint(3, 280, (2, CONTEXT), generator=torch.Generator().manual_seed(0))


ALIKE = {
    "LlamaForCausalLM": GROUPED,
    "MistralForCausalLM": GROUPED,
    "Qwen2ForCausalLM": GROUPED,
    "Qwen3ForCausalLM": GROUPED,
    "Gemma2ForCausalLM": GEMMA,
    "Gemma3ForCausalLM": GEMMA,
    "GemmaForCausalLM": GROUPED | {"head_dim": 8},
    "Phi3ForCausalLM": GROUPED,
    "Olmo2ForCausalLM": GROUPED,
    "MixtralForCausalLM": GROUPED | {"num_local_experts": 4},
    "GPTNeoXForCausalLM": PLAIN,
    "GPT2LMHeadModel": SHORT,
    "GPTJForCausalLM": SHORT | {"rotary_dim": 4},
    "BloomForCausalLM": WIDTH | LARGE | {"n_layer": 3, "n_head": 4},
    "FalconForCausalLM": WIDTH | BLOCKS,
    "MambaForCausalLM": WIDTH | {"num_hidden_layers": 3, "state_size": 4},
    "RwkvForCausalLM": WIDTH | {"num_hidden_layers": 3, "attention_hidden_size": 32, "context_length": 64},
}
# the first of their hidden states is the first block's, not the embeddings
WITHOUT_EMBEDDINGS = ("MambaForCausalLM", "RwkvForCausalLM")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ALIKE)
def test_architectures_that_agree_with_transformers_are_taken(tmp_path, kind, dtype, started):
    folder = save(tmp_path / "model", kind, **ALIKE[kind])
    started.clear()  # making the model may look for compilers
    model, tokens = load(folder, dtype=dtype), some_tokens()
    assert describe(model)["architecture"] == kind and not started
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    with torch.no_grad():
        found = plain.eval()(tokens, output_hidden_states=True)
    resid = found.hidden_states[LAYER + (kind not in WITHOUT_EMBEDDINGS)]
    close = {"float32": 1e-4, "bfloat16": 0.1}[dtype]
    assert (model.logits(tokens) - found.logits).norm() < close * found.logits.norm()
    assert (model.lower(tokens) - resid).norm() < close * resid.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["CohereForCausalLM", "Cohere2ForCausalLM"])
def test_what_transformer_lens_computes_otherwise_is_refused(tmp_path, kind, dtype):
    message = refused(save(tmp_path / "model", kind, **GROUPED), dtype=dtype)
    assert f"TransformerLens does not compute {kind} as transformers does (residuals at the hook: " in message


PARTS = {
    "lm_head": "logits",
    "model.layers.1.mlp.down_proj": "residuals at the hook",
    "model.layers.2.mlp.down_proj": "logits",
}


@pytest.mark.parametrize(("part", "what"), PARTS.items())
def test_a_difference_above_rounding_is_found_wherever_it_is(tmp_path, monkeypatch, part, what):
    """Weights that the bridge changes a little: a hundredth is refused, a hundred-thousandth may be
    rounding."""
    from transformer_lens.model_bridge import TransformerBridge

    folder = save(tmp_path / "model", "LlamaForCausalLM", **GROUPED)
    boot, factor = TransformerBridge.boot_transformers, 1.0

    def changing(name, hf_model, **options):
        with torch.no_grad():
            hf_model.get_submodule(part).weight.mul_(factor)
        return boot(name, hf_model=hf_model, **options)

    monkeypatch.setattr(TransformerBridge, "boot_transformers", changing)
    factor = 1.00001
    load(folder)
    factor = 1.03
    assert f"does not compute LlamaForCausalLM as transformers does ({what}: " in refused(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_sees_later_tokens_is_refused(tmp_path, dtype):
    message = refused(save(tmp_path / "bert", "BertForMaskedLM", **PLAIN), dtype=dtype)
    assert (
        "BertLMHeadModel is not causal: a token changes the residuals at the hook of those before it; choose"
        in message
    )
    # the same, made causal
    load(save(tmp_path / "decoder", "BertLMHeadModel", **PLAIN, is_decoder=True), dtype=dtype)


def test_weights_that_are_not_numbers_are_refused(tmp_path):
    folder = save(tmp_path / "model", "LlamaForCausalLM", **GROUPED)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(folder)
    assert (
        "on a plain sentence, its logits hold NaN or Inf; set model.dtype to float32, or get its weights"
        in refused(folder)
    )


T5 = {"vocab_size": 320, "d_model": 32, "d_ff": 64, "num_layers": 3, "num_heads": 4, "d_kv": 8}
UNKNOWN = {
    "RobertaForMaskedLM": (PLAIN, "TransformerLens has no adapter for its architecture, RobertaForCausalLM"),
    "T5ForConditionalGeneration": (T5, "transformers has no causal language model of its kind, t5"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_architecture_that_cannot_be_taken_is_named_before_the_weights_are_read(tmp_path, kind):
    settings, words = UNKNOWN[kind]
    folder = save(tmp_path / "model", kind, **settings)
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert f"{words}; choose" in refused(folder)


def test_an_architecture_whose_parts_do_not_fit_is_named(tmp_path):
    decoder = {"decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_attention_heads": 4}
    encoder = {"encoder_layers": 2, "encoder_ffn_dim": 64, "encoder_attention_heads": 4}
    sizes = decoder | encoder | {"vocab_size": 320, "d_model": 32}
    folder = save(tmp_path / "bart", "BartForCausalLM", **sizes)
    assert "TransformerLens cannot take BartForCausalLM (" in refused(folder)
    folder = save(tmp_path / "gpt", "OpenAIGPTLMHeadModel", **SHORT)
    assert "TransformerLens gives no blocks.1.hook_resid_post of OpenAIGPTLMHeadModel (KeyError" in refused(
        folder
    )


# What config.json may leave out, and how a hook may be written


@pytest.mark.parametrize("named", [None, [], ["LlamaModel"], "missing"])
def test_config_json_need_not_name_the_architecture(tmp_path, named):
    folder, tokens = save_model(tmp_path / "model", layers=3, context=CONTEXT), some_tokens()
    logits, path = load(folder).logits(tokens), folder / "config.json"
    settings = json.loads(path.read_text()) | {"architectures": named}
    if named == "missing":
        del settings["architectures"]
    path.write_text(json.dumps(settings))
    model = load(folder)
    assert torch.equal(model.logits(tokens), logits) and describe(model)["architecture"] == "LlamaForCausalLM"


def test_the_number_of_a_block_may_have_zeros_before_it(tmp_path):
    folder, tokens = save_model(tmp_path / "model", layers=3, context=CONTEXT), some_tokens()
    plain, padded = load(folder), load(folder, hook="blocks.001.hook_resid_post")
    assert padded.config == plain.config and padded.hook_name == "blocks.1.hook_resid_post"
    assert torch.equal(padded.lower(tokens), plain.lower(tokens))


# Nothing beside the model is started, installed or written


@pytest.fixture
def pictures(tmp_path, monkeypatch, started) -> Path:
    """A checkpoint with a vision part, for whose missing image processor TransformerLens runs pip."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    folder = save(
        tmp_path / "pictures",
        "Gemma3ForConditionalGeneration",
        text_config=GEMMA,
        vision_config=VISION | {"image_size": 28, "patch_size": 14},
        image_token_index=319,
        boi_token_index=317,
        eoi_token_index=318,
        mm_tokens_per_image=4,
    )
    started.clear()
    return folder


def test_of_a_checkpoint_with_a_vision_part_the_text_model_is_taken_and_nothing_is_installed(
    pictures, started
):
    model, tokens = load(pictures), some_tokens()
    assert not started
    plain = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        pictures, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        states = plain.eval().model.language_model(input_ids=tokens, output_hidden_states=True)
        logits = plain.lm_head(states.last_hidden_state)
    assert (model.logits(tokens) - logits).abs().max() < 1e-4 and logits.std() > 0.5
    assert (model.lower(tokens) - states.hidden_states[LAYER + 1]).abs().max() < 1e-4


written, watching = [], False


def listen(event: str, details: tuple) -> None:
    """An audit hook: whatever Python opens for writing, makes, moves or deletes."""
    if not watching:
        return
    if event == "open":
        mode, flags = str(details[1] or ""), int(details[2] or 0)
        if set(mode) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR):
            written.append(str(details[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "shutil.rmtree"):
        written.append(str(details[0]))
    elif event == "shutil.copyfile":
        written.append(str(details[-1]))


def test_loading_writes_nothing_but_bytecode(pictures, tmp_path):
    global watching
    sys.addaudithook(listen)
    plain = save_model(tmp_path / "plain", context=CONTEXT)
    written.clear()
    watching = True
    try:
        for folder in (pictures, plain):
            load(folder)
        found = [path for path in written if "__pycache__" not in path and path != os.devnull]
        (tmp_path / "heard").touch()
    finally:
        watching = False
    assert not found and written[-1] == str(tmp_path / "heard")


WAYS = {
    "run": lambda: subprocess.run(["true"]),
    "output": lambda: subprocess.check_output("true", shell=True),
    "system": lambda: os.system("true"),
    "popen": lambda: os.popen("true"),
    "spawn": lambda: os.spawnlp(os.P_WAIT, "true", "true"),
    "posix_spawn": lambda: os.posix_spawnp("true", ["true"], {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_starting_a_process_works_inside(way, started):
    with (
        no_processes(),
        pytest.raises(PermissionError, match="no other process may be started while a model is loaded"),
    ):
        WAYS[way]()
    assert not started


def test_before_after_and_in_other_threads_processes_start(monkeypatch):
    monkeypatch.undo()  # really

    def ended() -> int:
        return subprocess.run(["true"]).returncode

    assert ended() == 0
    codes = []
    with contextlib.suppress(ValueError), no_processes():
        thread = threading.Thread(target=lambda: codes.append(ended()))
        thread.start()
        thread.join()
        raise ValueError
    assert codes == [0] and ended() == 0
