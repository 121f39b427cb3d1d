"""SAEBench's absorption eval, offline: does a latent for "starts with S" stay silent on some S-words, because
a latent of the word itself has taken over its direction?

The model reads ten solved examples and one more word (``... dog has the first letter: D / cat has the first
letter:``). Linear *ground-truth probes* on the residual stream at the word tell its first letter; an SAE's
letter latents are those that a sparse probe picks. Everything is computed by sae_bench's own functions. Not
used is its ``run_eval``, which keeps probes, as pickles, under the model's name (a local model's is its
path), so that they land inside site-packages or in the model's own folder and a retrained model meets the old
ones, and which draws words in another order in every process.

The eval needs a model whose residual stream knows how words are spelt. sae_bench's gate: the probes must
reach F1 > 0.6 on unseen words for 20 letters; it recommends models from 2 B parameters on.
"""

import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.data.workers import Workers
from dmsae_lib.saebench.adapter import SAE, Adapter, cache_name, undisturbed
from dmsae_lib.saebench.runner import Bench, NotRun, Row
from dmsae_lib.store.artifacts import Artifact, load, made, write

NAME = "dmsae"  # of the SAE, where sae_bench asks for one
KIND = "absorption_probes"
EXAMPLES = 10  # solved ones per prompt: run_feature_absortion_experiment in sae_bench/evals/absorption
# of train_and_save_probes in its common.py
PROBE = {"num_classes": 26, "batch_size": 64, "num_epochs": 50, "lr": 1e-2}
STEPS_PER_EPOCH = 20  # at least, of the sparse probes
# sae_bench's names: its columns
METRICS = {
    "full_absorption_score": "full_absorption_rate",
    "absorption_fraction_score": "mean_absorption_fraction",
    "num_split_features": "num_split_feats",
}
DETAIL = (*METRICS.values(), "num_full_absorption", "num_probe_true_positives", "one_latent_f1")
RECORDED = (
    *("max_k_value", "f1_jump_threshold", "min_GT_probe_f1", "min_feats_for_eval"),
    *(f"k_sparse_probe_{name}" for name in ("l1_decay", "num_epochs", "batch_size")),
)


# {(model, hook, text, position): (d_model,)}: every SAE meets the same prompts, in half of its time
_met: dict[tuple[str, str, str, int], Tensor] = {}


class Prompts:
    """``model`` as sae_bench's FeatureAbsorptionCalculator asks it: of texts, no further than the hook, and
    of one position (from the end) alone."""

    def __init__(self, model: LanguageModel, position: int = -1):
        self.model, self.tokenizer, self.position = model, model.tokenizer, position

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def to_tokens(self, text: str) -> Tensor:
        """(1, tokens): BOS and the text."""
        return torch.tensor([[self.model.bos, *self.ids(text)]])

    def run_with_cache(self, texts: list[str], names_filter: list[str]) -> tuple[None, dict[str, Tensor]]:
        """``(None, {hook: (texts, -position, d_model)})``: the residual at the position, at all of them.

        The texts have equally many tokens. What was asked before is remembered."""
        assert names_filter == [self.model.hook_name]
        keys = [(self.model.hash, self.model.hook_name, text, self.position) for text in texts]
        if not _met.keys() >= set(keys):
            _met.update(zip(keys, self._at_position(texts)))
        return None, {
            names_filter[0]: torch.stack([_met[key] for key in keys])[:, None].expand(-1, -self.position, -1)
        }

    def _at_position(self, texts: list[str]) -> Tensor:
        tokens = torch.cat([self.to_tokens(text) for text in texts])
        # cloned: a view keeps the whole batch in memory, gigabytes over the words of a large vocabulary
        return self.model.lower(tokens.to(self.model.device))[:, self.position].clone()

    def residuals(self, texts: list[str]) -> Tensor:
        """(texts, d_model) float32 on the CPU, at the position."""
        rows = self.model.config.batch_rows
        return torch.cat([self._at_position(texts[i : i + rows]).cpu() for i in range(0, len(texts), rows)])


def spelling_words(model: LanguageModel, template: str) -> tuple[list[str], int]:
    """The words that sae_bench asks about, and where in a prompt, from its end, the last one's only token is.

    That is all of the vocabulary that consists of letters, sorted; tokens that the tokenizer never gives for
    their own text are left out. Raises NotRun where " A" to " Z", the answers, are not one token each.
    """
    from sae_bench.evals.absorption.vocab import LETTERS_UPPER, get_alpha_tokens

    ids = Prompts(model).ids

    def line(word: str, answer: str = "") -> int:
        return len(ids("\n" + template.format(word=word) + answer))

    if wrong := [letter for letter in LETTERS_UPPER if line("a", f" {letter}\n") != line("a", "\n") + 1]:
        raise NotRun(
            f'the tokenizer of {model.config.name} has no single token for the answer " {wrong[0]}" '
            f"({len(wrong)} of the 26 letters), and sae_bench's prompts must be equally long"
        )
    lengths = {word: line(word) for word in sorted(set(get_alpha_tokens(model.tokenizer)))}
    words = [word for word, length in lengths.items() if length == min(lengths.values())]
    return words, len(ids(f"\n{words[0]}")) - lengths[words[0]] - 1


def prepare_absorption(workers: Workers, bench: Bench, seed: int) -> Artifact:
    """The ground-truth probes of a model, made once in the cache and shared by all SAEs.

    Holds ``words.json`` {position, train and test: [[word, letter as 0..25]], probe_f1: {letter: F1 on the
    test words}} and ``probes.safetensors`` {x_train, x_test (words, d_model), weight (26, d_model), bias
    (26,)}. ``seed`` decides the split (4 : 1), the examples in the prompts, and the order of training. Raises
    NotRun where the model's tokenizer or context does not allow the prompts.
    """
    model = workers.model
    place = bench.cache / f"absorption_{cache_name(model)}_{model.hook_name}_seed{seed}"
    if known := made(place, KIND, {"model": model.hash}):
        return known
    with undisturbed():
        import pandas as pd
        from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
        from sae_bench.evals.absorption.probing import create_dataset_probe_training, gen_probe_stats
        from sae_bench.evals.absorption.probing import train_linear_probe_for_task as train_probe
        from sae_bench.evals.absorption.prompting import first_letter_formatter
        from sae_bench.evals.absorption.vocab import LETTERS

        template = AbsorptionEvalConfig().prompt_template
        words, position = spelling_words(model, template)
        prompts = Prompts(model, position)
        random.seed(seed)
        torch.manual_seed(seed)
        options = {"base_template": template, "max_icl_examples": EXAMPLES}
        drawn = create_dataset_probe_training(words, first_letter_formatter(), 1, **options)
        texts = [[prompt.base for prompt, _ in part] for part in drawn]
        longest = max(prompts.to_tokens(text).shape[1] for part in texts for text in part)
        if longest > (limit := model.config.context_size):
            raise NotRun(f"the prompts have {longest} tokens, more than model.context_size, {limit}")
        if missing := [LETTERS[i] for i in sorted(set(range(26)) - {letter for _, letter in drawn[0]})]:
            raise NotRun(
                f"no word of the train split starts with {missing[0]!r} ({len(words)} words, {len(missing)} "
                "letters missing), so that there is no probe for it"
            )
        x_train, x_test = (prompts.residuals(part) for part in texts)
        frames = [pd.DataFrame({"answer_class": [letter for _, letter in part]}) for part in drawn]
        device = torch.device(model.device)
        probe, _ = train_probe(*frames, device, x_train.numpy(), x_test.numpy(), **PROBE)
        target = torch.from_numpy(frames[1]["answer_class"].to_numpy())
        stats = gen_probe_stats(probe, x_test, target, threshold=0.0, device=device)
    train, test = ([[prompt.word, letter] for prompt, letter in part] for part in drawn)
    probe_f1 = {one.letter: one.f1 for one in stats}
    weights = {"weight": probe.weights, "bias": probe.biases}
    with write(place, KIND, {"model": model.hash}) as writer:
        writer.tensors("probes.safetensors", {"x_train": x_train, "x_test": x_test} | weights)
        writer.json("words.json", {"position": position, "train": train, "test": test, "probe_f1": probe_f1})
    return load(place, KIND)


def run_absorption(sae: SAE, model: LanguageModel, bench: Bench, seed: int) -> Row:
    """sae_bench's absorption scores of an SAE.

    ``metrics``: means over the letters whose ground-truth probe passes (F1 > 0.6) of
    ``mean_full_absorption_score``, the share of the words that the probe recognises where all letter latents
    are silent and one other latent stands for the letter; ``mean_absorption_fraction_score``, the share of
    the letter's direction that up to three other latents carry; ``mean_num_split_features``, how many latents
    a letter has. Beside them ``letters`` {letter: its scores}, ``n_letters``, ``probe_f1`` and ``settings``.
    Where fewer than 20 letters pass: ``{"metrics": {}, "not_run": why, "probe_f1"}``.

    What differs from sae_bench's defaults: the sparse probes take at least 20 steps an epoch (its batches of
    4096 words would give the few thousand words of a small vocabulary one), their latents are computed once,
    prompts run in batches of ``model.batch_rows``, all words are single tokens, float32 throughout, and
    everything random is seeded. Raises NotRun as :func:`prepare_absorption` does, and for an SAE of fewer
    than 10 latents.
    """
    known = prepare_absorption(Workers(model), bench, seed)
    words = known.json("words.json")
    probe_f1 = words["probe_f1"]
    with undisturbed():
        from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig

        config = AbsorptionEvalConfig(random_seed=seed)
        passed = [letter for letter, f1 in probe_f1.items() if f1 > config.min_GT_probe_f1]
        if len(passed) < config.min_feats_for_eval:
            mean, name, hook = np.mean(list(probe_f1.values())), model.config.name, model.hook_name
            why = (
                f"the ground-truth probes reach F1 > {config.min_GT_probe_f1} on {len(passed)} of 26 letters "
                f"(mean F1 {mean:.2f}) and sae_bench wants {config.min_feats_for_eval}: the residual stream "
                f"of {name} at {hook} does not tell how words are spelt"
            )
            return {"metrics": {}, "not_run": why, "probe_f1": probe_f1}
        if sae.d_sae < (k := config.max_k_value):
            raise NotRun(
                f"the SAE has {sae.d_sae} latents, and sae_bench's probes pick up to {k} for a letter"
            )
        an_epoch = max(1, len(words["train"]) // STEPS_PER_EPOCH)
        config.k_sparse_probe_batch_size = min(config.k_sparse_probe_batch_size, an_epoch)
        table = _by_letter(Adapter(sae, model), model, known, config)
    table, letters = table.loc[passed], {}
    for letter, row in table.iterrows():
        letters[letter] = {name: float(row[name]) for name in DETAIL}
        letters[letter]["letter_latents"] = [int(i) for i in row["split_feats"]]
    return {
        "metrics": {f"mean_{name}": float(table[column].mean()) for name, column in METRICS.items()},
        "n_letters": len(passed),
        "letters": letters,
        "probe_f1": probe_f1,
        "settings": {name: getattr(config, name) for name in RECORDED},
    }


def _by_letter(adapter: Adapter, model: LanguageModel, known: Artifact, config: Any) -> Any:
    """sae_bench's table: a row per letter with words that the probe recognises, and ``one_latent_f1``."""
    from sae_bench.evals.absorption import feature_absorption as absorption
    from sae_bench.evals.absorption import k_sparse_probing as sparse
    from sae_bench.evals.absorption.main import _aggregate_results_df
    from sae_bench.evals.absorption.probing import LinearProbe

    words, tensors = known.json("words.json"), known.tensors("probes.safetensors")
    k, layer = config.max_k_value, model.layer
    train, test = ([(word, letter) for word, letter in words[part]] for part in ("train", "test"))
    probe = LinearProbe(model.d_model, num_outputs=26)
    probe.load_state_dict({"fc.weight": tensors["weight"], "fc.bias": tensors["bias"]})
    torch.manual_seed(config.random_seed)
    probes = sparse.train_k_sparse_probes(
        adapter,
        train,
        tensors["x_train"],
        range(1, k + 1),
        config.k_sparse_probe_l1_decay,
        config.k_sparse_probe_batch_size,
        config.k_sparse_probe_num_epochs,
        precalc_sae_acts=True,
    )
    raw = sparse.eval_probe_and_sae_k_sparse_raw_scores(adapter, probe, probes, test, tensors["x_test"])
    f1 = sparse.build_metrics_df(raw, sparse.sae_k_sparse_metadata(adapter, probe, probes, NAME, layer), k)
    sparse.add_feature_splits_to_metrics_df(f1, k, config.f1_jump_threshold)
    with tempfile.TemporaryDirectory() as scratch:
        raw.to_parquet(Path(scratch) / sparse.get_sparse_probing_raw_results_filename(NAME, layer))
        stats = absorption.get_stats_and_likely_false_negative_tokens(f1, NAME, layer, Path(scratch))
    calculator = absorption.FeatureAbsorptionCalculator(
        model=Prompts(model, words["position"]),
        icl_word_list=sorted(word for word, _ in train + test),
        max_icl_examples=EXAMPLES,
        base_template=config.prompt_template,
        word_token_pos=words["position"],
        batch_size=model.config.batch_rows,
    )
    random.seed(config.random_seed)  # every SAE meets the same prompts
    found = absorption.calculate_projection_and_cos_sims(calculator, adapter, probe, layer, stats)
    one_latent = f1.set_index("letter")["f1_sparse_sae_1"].rename("one_latent_f1")
    return _aggregate_results_df(found).set_index("letter").join(one_latent)
