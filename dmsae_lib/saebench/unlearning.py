"""SAEBench's unlearning: do clamped latents take away WMDP's biology questions, and nothing else?

Only for instruction-tuned Gemma 2, whose prompts sae_bench knows, with the forget corpus at hand. sae_bench
writes its scores for each intervention as pickles and reads them back: in a folder of this call alone,
removed with it.
"""

import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from dmsae_lib.data.language_model import LanguageModel, describe
from dmsae_lib.data.text_files import file_texts
from dmsae_lib.saebench.adapter import SAE, Adapter, cache_name, our_model, undisturbed
from dmsae_lib.saebench.hub_data import datasets_from
from dmsae_lib.saebench.runner import Bench, NotRun, Row, configured, evaluate, finite, kept

# by number of layers; the names that sae_bench has prompts for
OFFICIAL = {26: "gemma-2-2b-it", 42: "gemma-2-9b-it"}
BATCH_ROWS = 4  # of 1,024 tokens: sae_bench's for both models; no score depends on it


def official_name(model: LanguageModel) -> str | None:
    """The name by which sae_bench knows an instruction-tuned Gemma 2; None for any other model."""
    gemma = describe(model)["architecture"] == "Gemma2ForCausalLM" and model.tokenizer.chat_template
    return OFFICIAL.get(model.n_layers) if gemma else None


def _learn_what_it_knows(place: Path, model: LanguageModel, names: list[str]) -> None:
    """The questions that the model answers rightly in every order of the choices, as sae_bench keeps them."""
    from sae_bench.evals.unlearning.utils import metrics

    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            metrics.save_target_question_ids(model.bridge, 2 * BATCH_ROWS, scratch, name)
            file = name if name == "wmdp-bio" else f"mmlu-{name.replace('_', '-')}"
            known = Path(scratch) / "data/question_ids/all" / f"{file}_correct.csv"
            if not known.read_text(encoding="utf-8").split():
                raise NotRun(f"the model answers no question of {name} rightly in every order of the choices")
        shutil.copytree(Path(scratch) / "data", place, dirs_exist_ok=True)


def run_unlearning(sae: SAE, model: LanguageModel, bench: Bench, seed: int) -> Row:
    """sae_bench's unlearning score: 1 - accuracy on WMDP biology at the best clamp that keeps 99 % elsewhere.

    The questions (cais/wmdp, cais/mmlu) and wikitext come from ``bench.data``, else from the Hub. Returns
    ``{"metrics": {unlearning_score}}``. Raises NotRun where the corpus or another data set is missing, for
    another model than an instruction-tuned Gemma 2, and where it knows none of the questions.
    """
    from sae_bench.evals.unlearning import main
    from sae_bench.evals.unlearning.utils import feature_activation, metrics

    if (name := official_name(model)) is None:
        raise NotRun(
            "it needs gemma-2-2b-it or gemma-2-9b-it: sae_bench has prompts for these instruction-tuned "
            "models alone"
        )
    corpus = bench.settings.suite.unlearning_corpus
    if corpus is None or not Path(corpus).is_file():
        raise NotRun(
            "it needs bio-forget-corpus.jsonl, which is given on request (see "
            "https://huggingface.co/datasets/cais/wmdp-corpora): get it and name its path"
            f"{f'; {corpus} is no file' if corpus else ''}"
        )
    adapter = Adapter(sae, model)
    ours = {"model_name": name, "llm_batch_size": BATCH_ROWS}
    config = configured(main.UnlearningEvalConfig, adapter, seed, **ours)
    names, clamp = config.dataset_names, metrics.anthropic_clamp_resid_SAE_features

    def clamped(resid: Tensor, hook: Any, **options: Any) -> Tensor | None:
        changed = clamp(resid, hook, **options)  # in the SAE's precision; None: nothing to clamp
        return None if changed is None else changed.to(resid.dtype)

    def lines(_: str) -> Any:
        """What sae_bench reads as the lines of the forget corpus."""
        texts = file_texts(Path(corpus), "text", "saebench.suite.unlearning_corpus")
        return (json.dumps({"text": text}) for text in texts)

    with (
        undisturbed(),
        our_model(model),
        datasets_from(bench.data, feature_activation, metrics),
        patch.object(feature_activation, "open", lines, create=True),
        patch.object(metrics, "HookedTransformer", type(model.bridge)),
        patch.object(model.bridge.cfg, "model_name", name),
        patch.object(metrics, "anthropic_clamp_resid_SAE_features", clamped),
        tempfile.TemporaryDirectory() as scratch,
    ):
        learn = partial(_learn_what_it_knows, model=model, names=names)
        place = kept(bench.cache, "unlearning", [cache_name(model), names], learn)
        shutil.copytree(place, Path(scratch) / "unlearning" / name / "data")
        found = evaluate(main, config, adapter, artifacts_path=scratch)
    return {"metrics": finite(found["eval_result_metrics"]["unlearning"])}
