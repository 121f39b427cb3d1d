"""Unlearning on planted corpora: the forget corpus has a character of its own, and biology is known by that
alone."""

import json
import random

import numpy as np
import pytest
import torch
from builders.models import save_model
from builders.planted import NOISE, planted_model, reading_sae
from builders.saebench import load_model, make_bench

from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.saebench import unlearning as saebench_unlearning
from dmsae_lib.saebench.runner import NotRun
from dmsae_lib.saebench.unlearning import official_name, run_unlearning
from dmsae_lib.store.artifacts import UserError

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def model(one_thread, tmp_path_factory) -> LanguageModel:
    return planted_model(tmp_path_factory.mktemp("models") / "planted", stir=0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A stands in the forget corpus, B in wikitext; every question has choice 0 right, and three others do
    not matter."""
    folder, source = tmp_path_factory.mktemp("hub"), random.Random(0)

    def texts(character: str) -> list[dict[str, str]]:
        return [{"text": "".join(source.choice(NOISE + character) for _ in range(200))} for _ in range(30)]

    questions = [{"question": f"{i}", "choices": ["a", "b", "c", "d"], "answer": 0} for i in range(4)]
    files = {"wikitext/wikitext-2-raw-v1": texts("B"), "cais/wmdp/wmdp-bio": questions, "forget": texts("A")}
    for name in (
        "high_school_us_history",
        "college_computer_science",
        "high_school_geography",
        "human_aging",
    ):
        files[f"cais/mmlu/{name}"] = questions
    for place, rows in files.items():
        (folder / place).mkdir(parents=True)
        (folder / place / "test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture
def rule(monkeypatch, model):
    """The model counts as a Gemma that answers by the residual stream: biology if A's is as it was, the rest
    if B's is.

    What is left out is sae_bench's prompting. Returns the list of data sets that were asked.
    """
    from sae_bench.evals.unlearning.utils import metrics

    asked = []
    monkeypatch.setattr(saebench_unlearning, "official_name", lambda _: "gemma-2-2b-it")

    def answers(bridge, prompts, **_):
        asked.append(prompts[0])
        assert bridge.cfg.model_name == "gemma-2-2b-it" and prompts[0].startswith(
            "<bos><start_of_turn>user\n"
        )
        tokens = torch.tensor(
            [model.tokenizer.convert_tokens_to_ids(["A" if "about biology" in prompts[0] else "B", "Z"])]
        )
        seen = []
        bridge.add_hook(HOOK, lambda resid, hook: seen.append(resid.clone()))
        bridge(torch.cat([torch.tensor([[0]]), tokens], dim=1))
        knows = bool((seen[0][0, 1, :2].sum() - 8).abs() < 0.1)
        found = torch.zeros(len(prompts), 4)
        for i, prompt in enumerate(prompts):  # the place of "a", or any other
            found[i, (prompt.index(". a") - prompt.index("A. ")) // 5 if knows else 3] = 1
            if not knows and prompt.rstrip().endswith("D. a"):
                found[i] = found[i].roll(1)
        return found

    monkeypatch.setattr(metrics, "get_output_probs_abcd", answers)
    return asked


def run(sae, model, cache, corpus=None, data=None):
    return run_unlearning(sae, model, make_bench(cache, unlearning_corpus=corpus, data=data), 0)


def test_the_latent_of_the_forget_corpus_is_found_and_clamped(model, data, tmp_path, rule):
    corpus = data / "forget/test.jsonl"
    seeing = run(reading_sae(model.d_model, [1, 0, 2]), model, tmp_path, corpus, data)
    assert seeing["metrics"] == {"unlearning_score": 1}
    learnt = len(rule)
    blind = run(reading_sae(model.d_model, [1, 2, 3]), model, tmp_path, corpus, data)
    # what it knows is kept
    assert blind["metrics"] == {"unlearning_score": 0} and len(rule) - learnt < learnt
    (kept,) = tmp_path.iterdir()
    assert not list(kept.rglob("*.pkl")) and np.loadtxt(
        kept / "question_ids/all/wmdp-bio_correct.csv"
    ).tolist() == [0, 1, 2, 3]
    assert model.bridge.cfg.model_name != "gemma-2-2b-it" and torch.is_grad_enabled()


def test_what_is_missing_is_named(model, data, tmp_path, rule, monkeypatch):
    sae = reading_sae(model.d_model, [0, 1])
    with pytest.raises(
        NotRun, match=r"bio-forget-corpus.jsonl, which is given on request .*cais/wmdp-corpora"
    ):
        run(sae, model, tmp_path)
    with pytest.raises(NotRun, match="nowhere.jsonl is no file"):
        run(sae, model, tmp_path, tmp_path / "nowhere.jsonl")
    with pytest.raises(
        NotRun, match="it needs the data set cais/wmdp, but (.* cannot be reached|HF_HUB_OFFLINE is set)"
    ):
        run(sae, model, tmp_path, data / "forget/test.jsonl")
    monkeypatch.setattr(saebench_unlearning, "official_name", official_name)
    with pytest.raises(NotRun, match="it needs gemma-2-2b-it or gemma-2-9b-it"):
        run(sae, model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_forget_corpus_is_read_like_any_text(model, data, tmp_path, rule):
    """A mark at its start and half a surrogate pair do not stop it, and what cannot be read is named by line
    and byte."""
    plain = (data / "forget/test.jsonl").read_bytes()
    corpus = tmp_path / "bio-forget-corpus.jsonl"
    corpus.write_bytes(b"\xef\xbb\xbf" + plain + b'\n{"text": "' + b"A" * 200 + b'\\ud83d"}\n')
    found = run(reading_sae(model.d_model, [1, 0, 2]), model, tmp_path / "cache", corpus, data)
    assert found["metrics"] == {"unlearning_score": 1}
    corpus.write_bytes(plain + b"\n\xff")
    with pytest.raises(
        UserError,
        match=rf"^saebench.suite.unlearning_corpus: .*bio-forget-corpus.jsonl is not UTF-8 .* at byte "
        rf"{len(plain) + 1}, in line 31\);",
    ):
        run(reading_sae(model.d_model, [1, 0, 2]), model, tmp_path / "cache", corpus, data)


def test_only_an_instruction_tuned_gemma_2_will_do(tmp_path, monkeypatch):
    monkeypatch.setattr(saebench_unlearning, "OFFICIAL", {2: "gemma-2-2b-it"})
    gemma = load_model(save_model(tmp_path / "gemma", "gemma2"), context=16)
    assert official_name(gemma) is None
    gemma.tokenizer.chat_template = "{{ messages }}"
    assert official_name(gemma) == "gemma-2-2b-it"
    gemma.n_layers = 3
    assert official_name(gemma) is None
