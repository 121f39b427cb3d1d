"""SAEBench's unlearning: do clamped latents take away what a model knows of WMDP's biology questions, and
nothing else?

Only for instruction-tuned Gemma 2, whose prompts sae_bench knows, with the forget corpus at hand. sae_bench
writes its scores for each intervention as pickles and reads them back: in a folder of this call alone,
removed with it.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from dmsae_lib.data.language_model import LanguageModel, describe
from dmsae_lib.data.text_files import file_texts
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.saebench.adapter import Adapter, NotRun, cache_name, our_model, undisturbed, whole_or_nothing
from dmsae_lib.saebench.official import datasets_from, finite, only_result
from dmsae_lib.store.artifacts import hash_json

CORPUS = "bio-forget-corpus.jsonl"
# by number of layers; the names that sae_bench has prompts for
OFFICIAL = {26: "gemma-2-2b-it", 42: "gemma-2-9b-it"}
BATCH_ROWS = 4  # of 1,024 tokens: sae_bench's for both models; no score depends on it


def official_name(model: LanguageModel) -> str | None:
    """The name by which sae_bench knows an instruction-tuned Gemma 2; None for any other model."""
    gemma = describe(model)["architecture"] == "Gemma2ForCausalLM" and model.tokenizer.chat_template
    return OFFICIAL.get(model.n_layers) if gemma else None


def _learn_what_it_knows(model: LanguageModel, config: Any, place: Path) -> None:
    """The questions that the model answers rightly in every order of the choices, in ``place``, as sae_bench
    keeps them."""
    from sae_bench.evals.unlearning.utils import metrics

    with whole_or_nothing(place) as fresh, tempfile.TemporaryDirectory() as scratch:
        for name in config.dataset_names:
            metrics.save_target_question_ids(model.bridge, 2 * BATCH_ROWS, scratch, name)
            file = name if name == "wmdp-bio" else f"mmlu-{name.replace('_', '-')}"
            known = Path(scratch) / "data/question_ids/all" / f"{file}_correct.csv"
            if not known.read_text(encoding="utf-8").split():
                raise NotRun(f"the model answers no question of {name} rightly in every order of the choices")
        shutil.copytree(Path(scratch) / "data", fresh, dirs_exist_ok=True)


def _lines(corpus: Path) -> Iterator[str]:
    """What sae_bench reads as the lines of the forget corpus."""
    for text in file_texts(Path(corpus), "text", "saebench.suite.unlearning_corpus"):
        yield json.dumps({"text": text})


def run_unlearning(
    sae: MatryoshkaSAE,
    model: LanguageModel,
    cache: Path,
    seed: int,
    corpus: Path | None = None,
    data: Path | None = None,
) -> dict[str, Any]:
    """sae_bench's unlearning score: 1 - accuracy on WMDP biology, at the best clamp that keeps 99 % of the
    side questions.

    ``corpus``: the path of bio-forget-corpus.jsonl. The questions (cais/wmdp, cais/mmlu) and wikitext come
    from ``data``, else from the Hub. Returns ``{"metrics": {unlearning_score}}``. Raises NotRun where the
    corpus or another data set is missing, for another model than an instruction-tuned Gemma 2, and where it
    knows none of the questions.
    """
    from sae_bench.evals.unlearning import main
    from sae_bench.evals.unlearning.utils import feature_activation, metrics

    if (name := official_name(model)) is None:
        raise NotRun(
            "it needs gemma-2-2b-it or gemma-2-9b-it: sae_bench has prompts for these instruction-tuned "
            "models alone"
        )
    if corpus is None or not Path(corpus).is_file():
        raise NotRun(
            f"it needs {CORPUS}, which is given on request (see "
            "https://huggingface.co/datasets/cais/wmdp-corpora): get it and name its "
            f"path{'' if corpus is None else f'; {corpus} is no file'}"
        )
    adapter = Adapter(sae, model)
    config = main.UnlearningEvalConfig(
        random_seed=seed, model_name=name, llm_batch_size=BATCH_ROWS, llm_dtype=adapter.cfg.dtype
    )
    place = Path(cache) / f"unlearning-{hash_json([cache_name(model), config.dataset_names])[:16]}"
    clamp = metrics.anthropic_clamp_resid_SAE_features

    def clamped(resid: Tensor, hook: Any, **options: Any) -> Tensor | None:
        changed = clamp(resid, hook, **options)  # in the SAE's precision; None: nothing to clamp
        return None if changed is None else changed.to(resid.dtype)

    with (
        undisturbed(),
        our_model(model),
        datasets_from(data, feature_activation, metrics),
        patch.object(feature_activation, "open", lambda _: _lines(corpus), create=True),
        patch.object(metrics, "HookedTransformer", type(model.bridge)),
        patch.object(model.bridge.cfg, "model_name", name),
        patch.object(metrics, "anthropic_clamp_resid_SAE_features", clamped),
        tempfile.TemporaryDirectory() as scratch,
    ):
        if not place.is_dir():
            _learn_what_it_knows(model, config, place)
        shutil.copytree(place, Path(scratch) / "unlearning" / name / "data")
        found = only_result(
            main.run_eval(
                config,
                [("dmsae", adapter)],
                str(adapter.device),
                f"{scratch}/results",
                artifacts_path=scratch,
            ),
            "unlearning",
        )
    return {"metrics": finite(found["eval_result_metrics"]["unlearning"])}
