"""The embedded language model: a small Llama trained on the text inside the sae-probes wheel (notebook 00).

It exists so that the whole paper runs on real text with nothing to download. It is saved in Hub format and
loaded through the same door as any other model.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dmsae_lib.data import contexts
from dmsae_lib.data.contexts import ContextBuilder, Contexts

BOS = "<bos>"
LETTERS = [f" {chr(code)}" for code in range(ord("A"), ord("Z") + 1)]


@dataclass(frozen=True)
class BaseModelSettings:
    """Sizes and schedule of the embedded model."""

    vocab_size: int = 4096
    context_size: int = 128
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    d_ff: int = 512
    tokens: int = 30_000_000
    batch_rows: int = 32
    lr_matrix: float = 1e-2  # Muon, update matched to AdamW's RMS
    lr_other: float = 4e-3  # AdamW: embeddings and norms
    warmup: float = 0.02
    decay: float = 0.4
    seed: int = 0


def train_tokenizer(texts: list[str], vocab_size: int) -> Any:
    """Byte-level BPE with BOS in front of every text, and " A".." Z" as single tokens (for absorption).

    The letters get in by frequency: they are appended to the training text often enough to be merged.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS], initial_alphabet=alphabet, show_progress=False
    )
    letters = "".join(LETTERS) * max(1000, len(texts) // 100)
    tokenizer.train_from_iterator([*texts, letters], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS)


def pack(texts: list[str], tokenizer: Any, context_size: int) -> np.ndarray:
    """Full contexts only: (rows, context_size) int32, every document led by BOS."""
    builder = ContextBuilder(context_size, "pack", tokenizer.bos_token_id)
    for start in range(0, len(texts), 1000):
        for ids in tokenizer(texts[start : start + 1000], add_special_tokens=False)["input_ids"]:
            builder.add(ids)
    return builder.contexts().tokens.numpy()


def build(settings: BaseModelSettings) -> Any:
    """A randomly initialised LlamaForCausalLM of these sizes, with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.d_model,
        intermediate_size=settings.d_ff,
        num_hidden_layers=settings.n_layers,
        num_attention_heads=settings.n_heads,
        max_position_embeddings=settings.context_size,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, steps: int, warmup: float, decay: float) -> float:
    """Share of the peak: linear warm-up, constant, linear decay to 0 over the last ``decay`` of the steps."""
    return min(1.0, (step + 1) / max(1, warmup * steps), (steps - step) / max(1, decay * steps))


def _batches(rows: np.ndarray, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches (size, positions) int64, each row once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(len(rows), generator=generator) for _ in itertools.count())
    order = itertools.chain.from_iterable(order.tolist() for order in orders)
    while True:
        yield torch.from_numpy(rows[list(itertools.islice(order, size))]).long()


def train(
    model: Any, rows: np.ndarray, settings: BaseModelSettings, report: Callable[[str], None] = print
) -> list[dict[str, float]]:
    """Next-token training for ``settings.tokens`` tokens; the loss curve (step, tokens, loss in nats)."""
    model.train()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(matrices, lr=settings.lr_matrix, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=settings.lr_other, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    peaks = [settings.lr_matrix, settings.lr_other]
    batches = _batches(rows, settings.batch_rows, settings.seed)
    per_step = settings.batch_rows * settings.context_size
    steps = max(1, settings.tokens // per_step)
    curve: list[dict[str, float]] = []
    running, started = [], time.perf_counter()
    for step in range(steps):
        share = learning_rate(step, steps, settings.warmup, settings.decay)
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * share
        tokens = next(batches).to(model.device)
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            logits = model(tokens).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        running.append(loss.detach())
        if len(running) == 100 or step == steps - 1:
            seen, mean = (step + 1) * per_step, float(torch.stack(running).mean())
            curve.append({"step": step + 1, "tokens": seen, "loss": mean})
            running = []
            rate = seen / (time.perf_counter() - started)
            left = (steps * per_step - seen) / rate / 60
            report(
                f"step {step + 1}/{steps}  loss {mean:.3f} nats  {rate:,.0f} tokens/s  {left:.1f} min left"
            )
    return curve


@torch.no_grad()
def held_out(model: Any, rows: np.ndarray, bos: int, batch_rows: int = 64) -> dict[str, float]:
    """Mean next-token loss in nats over targets that are not BOS, in fp32, and the number of targets."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_rows):
        tokens = torch.from_numpy(rows[start : start + batch_rows]).long().to(model.device)
        logits, target = model(tokens).logits[:, :-1].float(), tokens[:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
        total += float(losses[target != bos].sum(dtype=torch.float64))
        count += int((target != bos).sum())
    return {"nats_per_token": total / count, "targets": count}


def bits_per_byte(nats_per_token: float, rows: np.ndarray, tokenizer: Any) -> float:
    """The same loss per byte of the held-out text, which compares across tokenizers."""
    tokens = torch.from_numpy(rows)
    lengths = torch.full((len(rows),), rows.shape[1], dtype=torch.int32)
    held_out = Contexts(tokens, lengths, tokenizer.bos_token_id)
    return contexts.bits_per_byte(nats_per_token, held_out, tokenizer)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Hub format: config.json, model.safetensors in bfloat16, tokenizer files. It is loaded as float32."""
    model.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
