"""A tiny Llama as a GGUF file, written by the gguf package the way llama.cpp does; and what is in it."""

from pathlib import Path

import numpy as np
import torch
from builders.models import BOS, EOS, PAD, save_model

HEADS, KV_HEADS, WIDTH, LAYERS = 4, 2, 64, 2
NAMES = {  # of a block, in transformers
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def rotated(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix in llama.cpp's order: what is turned together is adjacent."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def save_gguf(
    file: Path, seed: int = 0, architecture: str = "llama", spoil: bool = False
) -> dict[str, torch.Tensor]:
    """Writes ``file``, matrices in Q4_1 and norms in F32, and beside it the folder ``plain``: tokenizer and
    weights before. Returns the weights that a reader must find, by transformers' names.

    ``spoil``: one weight is NaN.
    """
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_model(file.with_name("plain"), seed=seed, layers=LAYERS, width=WIDTH)
    weights = {
        name: value.numpy()
        for name, value in AutoModelForCausalLM.from_pretrained(folder).state_dict().items()
    }
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    names |= {
        f"blk.{n}.{theirs}": f"model.layers.{n}.{ours}"
        for n in range(LAYERS)
        for theirs, ours in NAMES.items()
    }
    writer, found = gguf.GGUFWriter(file, architecture), {}
    writer.add_context_length(32)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(320)
    _add_tokenizer(writer, AutoTokenizer.from_pretrained(folder))
    for theirs, ours in names.items():
        weight = weights[f"{ours}.weight"]
        if spoil and theirs == "output_norm":
            weight[0] = np.nan
        if weight.ndim == 1:
            writer.add_tensor(f"{theirs}.weight", weight)
            found[f"{ours}.weight"] = torch.from_numpy(weight)
            continue
        kind = gguf.GGMLQuantizationType.Q4_1
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(theirs.rpartition(".")[2])
        stored = gguf.quantize(rotated(weight, heads) if heads else weight, kind)
        writer.add_tensor(f"{theirs}.weight", stored, raw_dtype=kind)
        # blocks of 32 lie within a row, so the order of the rows is of no account
        found[f"{ours}.weight"] = torch.from_numpy(gguf.dequantize(gguf.quantize(weight, kind), kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def _add_tokenizer(writer, tokenizer) -> None:
    import json

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    tokens += [f"<unused {n}>" for n in range(320 - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if n in (BOS, EOS, PAD) else 1 for n in range(len(tokens))])
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    )
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(PAD)
