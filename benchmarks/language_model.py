"""`make bench CASE=language-model`: the two halves of a language model beside plain transformers.

Ours is what every stage calls: ``lower`` up to the hook, ``upper`` from it to the logits, with the hooks of
TransformerLens and transformers' eager attention. Plain is the same weights in transformers alone, with the
attention it chooses, cut into two models at the same block. They take turns on the same tokens.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from dmsae_lib.config.packaged import lacks
from dmsae_lib.config.sections import ModelConfig
from dmsae_lib.data.language_model import LanguageModel, choose_dtype
from dmsae_lib.store.artifacts import write_json
from dmsae_lib.store.provenance import hardware

CASE = "language-model"
MODELS = {
    "wheeltext-4x128": (1, 32),
    "smollm2-135m-instruct": (8, 16),
}  # block of the hook, contexts per pass
CONTEXT = 128
WANTED = 0.8  # of plain transformers' throughput


class Plain:
    """A Llama of transformers as two: blocks 0 to ``layer``, and the others with the unembedding."""

    def __init__(self, folder: Path, layer: int, dtype: str):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        blocks = self.model.model.layers
        self.below, self.above = nn.ModuleList(blocks[: layer + 1]), nn.ModuleList(blocks[layer + 1 :])

    def lower(self, tokens: Tensor) -> Tensor:
        self.model.model.layers = self.below
        return self.model.model(tokens, use_cache=False).last_hidden_state

    def upper(self, resid: Tensor) -> Tensor:
        self.model.model.layers = self.above
        return self.model(inputs_embeds=resid, use_cache=False).logits


def in_turn(work: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, after one call that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, call in work.items():
            start = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


@torch.no_grad()
def compare(name: str, dtype: str, rounds: int) -> dict[str, Any]:
    """Tokens per second of both halves: medians, and ours over plain."""
    layer, rows = MODELS[name]
    hook = f"blocks.{layer}.hook_resid_post"
    ours = LanguageModel(ModelConfig(name=name, hook_name=hook, context_size=CONTEXT, dtype=dtype))
    plain = Plain(ours.folder, layer, dtype)
    tokens = torch.randint(3, ours.tokenizer.vocab_size, (rows, CONTEXT), generator=torch.Generator())
    resid = ours.lower(tokens)
    given = resid.to(getattr(torch, dtype))
    seconds = in_turn(
        {
            "lower": lambda: ours.lower(tokens),
            "plain lower": lambda: plain.lower(tokens),
            "upper": lambda: ours.upper(tokens, resid),
            "plain upper": lambda: plain.upper(given),
        },
        rounds,
    )
    speed = {half: tokens.numel() / median(taken) for half, taken in seconds.items()}
    ratios = {half: speed[half] / speed[f"plain {half}"] for half in ("lower", "upper")}
    found = {"model": name, "weights": ours.weights, "hook_name": hook, "dtype": dtype, "seconds": seconds}
    found |= {"rows": rows, "context_size": CONTEXT, "from_the_hook": ours.skips_below}
    met = {half: ratio >= WANTED for half, ratio in ratios.items()}
    return found | {"tokens_per_second": speed, "of_plain": ratios, "wanted": WANTED, "met": met}


def bench(out: Path, rounds: int = 7, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure what is installed in every precision of this machine; writes ``out``/language_model.json."""
    dtypes = dict.fromkeys(["float32", choose_dtype("auto", "cpu")])
    rows = []
    for name in MODELS:
        if missing := lacks(name):
            report(f"{name} is left out: it needs {missing[0]}; `make model CONFIG=...` installs it")
            continue
        for dtype in dtypes:
            rows.append(row := compare(name, dtype, rounds))
            speed, ratio = row["tokens_per_second"], row["of_plain"]
            halves = [f"{half} {speed[half]:,.0f} tokens/s, {ratio[half]:.2f} of plain" for half in ratio]
            report(f"{name} {dtype}: {'; '.join(halves)}")
    found = {"schema": 1, "threads": torch.get_num_threads(), "hardware": hardware(), "models": rows}
    write_json(out / "language_model.json", found)
    return found
