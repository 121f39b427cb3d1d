"""SAEBench's automated interpretability: a language model explains latents, then tells where they fire.

Any endpoint that speaks OpenAI's chat completions can judge. The key comes from the environment variable
OPENAI_API_KEY and goes to the client alone: sae_bench, which only knows api.openai.com and gpt-4o-mini, never
sees it. The examples are tokens of our own, where sae_bench downloads the Pile.
"""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.saebench.adapter import SAE, Adapter, our_model, undisturbed
from dmsae_lib.saebench.runner import LLM_BATCH_TOKENS, Bench, NotRun, Row, configured, evaluate, finite
from dmsae_lib.store.artifacts import UserError

KEY = "OPENAI_API_KEY"
RETRIES = 5  # of the client, for busy endpoints (429, 5xx) and lost connections: 15 s in all


class Judge:
    """What sae_bench takes for ``openai.OpenAI``: the same requests go to the chosen endpoint and model.

    After a ``failure`` no more is asked, and what sae_bench gets instead of answers is of no use. (It has the
    requests for all latents in a queue by then.)
    """

    def __init__(self, base_url: str, model: str):
        from openai import OpenAI

        self.client = OpenAI(api_key=os.environ[KEY], base_url=base_url, max_retries=RETRIES)
        self.model, self.requests, self.failure = model, 0, ""
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))

    def create(self, **request: Any) -> Any:
        if not self.failure:
            self.requests += 1
            try:
                answer = self.client.chat.completions.create(**request | {"model": self.model})
                if answer.choices[0].message.content is not None:
                    return answer
                self.failure = (
                    f"its judge {self.model} gave no text in {request['max_tokens']} tokens: take a model "
                    "that does not reason first"
                )
            # an endpoint may quote the key in what it says, so nothing of that is passed on
            except Exception as error:
                code = f" ({error.status_code})" if hasattr(error, "status_code") else ""
                self.failure = (
                    f"its judge failed with {type(error).__name__}{code}: check the endpoint, the model "
                    f"{self.model} and the key in {KEY}"
                )
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=""))])


def run_autointerp(sae: SAE, model: LanguageModel, bench: Bench, seed: int) -> Row:
    """sae_bench's autointerp score: the share of 14 examples of which a judge rightly says if a latent fires.

    Rows of the test split that end in padding (BOS) are left out. ``judge_latents`` of the settings (two
    requests each) are drawn from the latents that fire more than 15 times. A judge who always says "none"
    scores 10/14: sae_bench counts each of the 10 random examples as silent, even where the latent fires.

    Returns ``{"metrics": {autointerp_score, autointerp_std_dev (over latents; None for one)}, "judge_model",
    "n_latents" (explained), "n_scored" (whose predictions could be read), "latents": {latent: {explanation,
    score}}}``. Raises NotRun without a key, where the judge fails, or where there is nothing to judge.
    """
    if not (key := os.environ.get(KEY)):
        raise NotRun(f"it needs the key of an OpenAI-compatible endpoint in the environment variable {KEY}")
    from sae_bench.evals.autointerp import main

    suite, adapter = bench.settings.suite, Adapter(sae, model)
    rows = torch.from_numpy(np.asarray(bench.rows, dtype=np.int64))
    rows = rows[rows[:, -1] != model.bos]
    n, context = rows.shape
    sizes = {"llm_context_size": context, "llm_batch_size": max(1, LLM_BATCH_TOKENS // context)}
    sizes |= {"n_latents": suite.judge_latents, "total_tokens": rows.numel()}
    config = configured(main.AutoInterpEvalConfig, adapter, seed, **sizes)
    if context <= 2 * config.buffer or not n:
        raise UserError(
            f"autointerp got {n} full rows of {context} tokens: it needs some of more than "
            f"{2 * config.buffer}; raise data.test_tokens or model.context_size."
        )
    judge = Judge(suite.judge_url, suite.judge)
    with (
        undisturbed(),
        our_model(model),
        patch.object(main, "OpenAI", lambda api_key: judge),
        tempfile.TemporaryDirectory() as scratch,
        ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as own,
    ):
        (artifacts := Path(scratch) / "autointerp").mkdir()
        torch.save(rows, artifacts / f"{config.model_name}_{rows.numel()}_tokens_{context}_ctx.pt")
        # in a thread of its own, because it calls asyncio.run, which a notebook's refuses
        options = {"api_key": "", "artifacts_path": scratch}
        found = own.submit(evaluate, main, config, adapter, **options).result()
    if judge.failure:
        raise NotRun(judge.failure)
    latents, n_explained = found["eval_result_unstructured"], judge.requests // 2
    if not n_explained:
        raise NotRun(f"no latent fires often enough on {rows.numel()} tokens")
    if not latents:
        raise NotRun(f"none of the answers of {suite.judge} about {n_explained} latents could be read")
    shown = {}
    for latent, one in sorted(latents.items()):
        shown[str(latent)] = {"explanation": one["explanation"].replace(key, "..."), "score": one["score"]}
    return {
        "metrics": finite(found["eval_result_metrics"]["autointerp"]),
        "judge_model": suite.judge,
        "n_latents": n_explained,
        "n_scored": len(latents),
        "latents": shown,
    }
