"""Tiny language models of real architectures, with a tokenizer, saved as Hub-format folders. Weights are
random."""

from pathlib import Path

import torch

BOS, EOS, PAD = 0, 1, 2
TEXT = [
    "the cat sat on the mat and looked at the dog",
    "def main(): return [x for x in range(10)]",
    "a pain in the chest",
]


def save_tokenizer(folder: Path, vocabulary: int = 320) -> None:
    """Byte-level BPE with BOS, EOS and PAD; encoding a text puts BOS first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": list(special.values()), "initial_alphabet": alphabet}
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False, **options)
    tokenizer.train_from_iterator(TEXT, trainer)
    after = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer.post_processor = after
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def save_model(
    folder: Path,
    family: str = "llama",
    seed: int = 0,
    layers: int = 2,
    width: int = 32,
    context: int = 32,
    confidence: float = 1.0,
    **settings: object,
) -> Path:
    """``family``: llama, or gemma2 (grouped queries, soft caps, a sliding window). ``confidence`` scales the
    logits; ``settings`` go into config.json."""
    import transformers

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 320,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    if family == "gemma2":
        extra = {"head_dim": width // 4, "query_pre_attn_scalar": width // 4, "sliding_window": context // 2}
        model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**{**sizes, **extra, **settings}))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **settings}))
    with torch.no_grad():
        model.lm_head.weight.mul_(confidence)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder
