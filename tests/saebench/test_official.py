"""SAEBench's own data sets: its real code on small local folders of the Hub's form, with what was planted in
them."""

import json
import os
import random

import pytest
import torch
from builders.planted import NOISE, PLANTED, planted_model, reading_sae
from builders.saebench import make_bench, sae_of
from safetensors.torch import load_file

from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.saebench import core
from dmsae_lib.saebench.core import run_core_hub
from dmsae_lib.saebench.hub_data import hub_out_of_reach
from dmsae_lib.saebench.official import run_perturbation_hub, run_sparse_probing_hub
from dmsae_lib.saebench.runner import NotRun

BIOS = "LabHC/bias_in_bios_class_set1"
# profession: its token
JOBS = {0: "A", 1: "B", 2: "C", 6: "D", 9: "E", 11: "A", 13: "B", 21: "A", 22: "A", 25: "E", 26: "D"}
GENDERS = {0: "F", 1: "G"}
SMALL = {"train_set_size": 80, "test_set_size": 40}
SMALL_PROBES = {f"probe_{name}": size for name, size in SMALL.items()}
NEWS = {"dataset_names": ["fancyzhx/ag_news"]} | SMALL_PROBES
PAIRS = {"dataset_names": [BIOS]} | SMALL
SEEING, BLIND = list(range(8)), list(range(12, 20))  # channels


@pytest.fixture(scope="module")
def model(one_thread, tmp_path_factory) -> LanguageModel:
    return planted_model(tmp_path_factory.mktemp("models") / "planted")


def text(source: random.Random, *characters: str) -> str:
    letters = [source.choice(NOISE) for _ in range(16)]
    for place, character in zip(source.sample(range(16), len(characters)), characters):
        letters[place] = character
    return "".join(letters)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small data sets in folders that are called as on the Hub; each class has a character of its own."""
    folder, source = tmp_path_factory.mktemp("hub"), random.Random(0)

    def put(name: str, rows: list[dict]) -> None:
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    for split, each in (("train", 45), ("test", 25)):
        bios = [
            {"hard_text": text(source, job, gender), "profession": profession, "gender": number}
            for profession, job in JOBS.items()
            for number, gender in GENDERS.items()
            for _ in range(each)
        ]
        put(f"LabHC/bias_in_bios/{split}", bios)
        news = [{"text": text(source, "ABCD"[i % 4]), "label": i % 4} for i in range(240)]
        put(f"fancyzhx/ag_news/{split}", news)
        reviews = [
            {"text": text(source, "ABCDE"[i], "FG"[stars > 1]), "category": category, "rating": stars}
            for i, category in enumerate((1, 2, 3, 5, 6))
            for stars in (1.0, 5.0)
            for _ in range(25)
        ]
        put(f"canrager/amazon_reviews_mcauley_1and5/{split}", reviews)
    for character, pair in zip(PLANTED, ("en-fr", "fr-it", "de-en", "es-fr", "nl-pt")):
        rows = [{"translation": {pair[:2]: text(source, character)}} for _ in range(70)]
        put(f"Helsinki-NLP/europarl/{pair}/train", rows)
    code = [
        {"language": language, "code": "#" * 150 + text(source, character) + "." * 400}
        for _ in range(70)
        for character, language in zip(PLANTED, ("C", "Python", "HTML", "Java", "PHP"))
    ]
    put("codeparrot/github-code/train", code)
    put("Skylion007/openwebtext/train", [{"text": text(source, "ABC"[i % 3])} for i in range(400)])
    return folder


@pytest.fixture(autouse=True)
def few_batches(monkeypatch):
    monkeypatch.setattr(core, "HUB_BATCHES", (4, 8))
    monkeypatch.setattr(core, "BATCH_ROWS", 4)


@pytest.fixture
def quick_probes(monkeypatch):
    """sae_bench's probes for tpp and scr learn 30 times as fast: 80 texts are 5 steps an epoch, where it has
    250."""
    from sae_bench.evals.sparse_probing import probe_training

    plain = probe_training.train_probe_on_activations

    def quick(*given, lr=1e-3, **options):
        return plain(*given, lr=30 * lr, **options)

    monkeypatch.setattr(probe_training, "train_probe_on_activations", quick)


def test_probing_finds_the_planted_latents_in_every_data_set(model, data, tmp_path):
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig

    names = [
        name
        for name in SparseProbingEvalConfig().dataset_names
        if "class_set2" not in name and "class_set3" not in name
    ]
    bench, options = make_bench(tmp_path, data=data), {"dataset_names": names} | SMALL_PROBES
    seeing = run_sparse_probing_hub(reading_sae(model.d_model, SEEING), model, bench, 0, **options)
    assert list(seeing["sets"]) == names and len(names) == 6
    for values in (seeing["metrics"], *seeing["sets"].values()):
        assert values["sae_top_1_test_accuracy"] == values["llm_top_1_test_accuracy"] == 1
    blind = run_sparse_probing_hub(reading_sae(model.d_model, BLIND), model, bench, 0, **options)
    # 27 probes of 40 texts: standard error 0.015
    assert abs(blind["metrics"]["sae_top_1_test_accuracy"] - 0.5) < 0.1
    assert blind["metrics"]["llm_test_accuracy"] == seeing["metrics"]["llm_test_accuracy"] > 0.9


def test_shared_work_is_done_once_for_each_model_and_text(model, data, tmp_path, monkeypatch):
    passes = []
    plain = model.bridge.run_with_hooks
    monkeypatch.setattr(
        model.bridge, "run_with_hooks", lambda *given, **options: passes.append(1) or plain(*given, **options)
    )
    bench, sae = make_bench(tmp_path, data=data), reading_sae(model.d_model, SEEING)
    first = run_sparse_probing_hub(sae, model, bench, 0, **NEWS)
    made = len(passes)
    (kept,) = tmp_path.iterdir()  # nothing is left of the scratch folder
    assert made and run_sparse_probing_hub(sae, model, bench, 0, **NEWS) == first and len(passes) == made
    run_sparse_probing_hub(sae, model, bench, 1, **NEWS)
    assert len(passes) == 2 * made and len(list(tmp_path.iterdir())) == 2
    news = data / "fancyzhx/ag_news/train.jsonl"
    before = news.stat().st_mtime_ns
    os.utime(news, ns=(before, before + 1))
    run_sparse_probing_hub(sae, model, bench, 0, **NEWS)
    assert len(passes) == 3 * made
    assert torch.is_grad_enabled() and kept.is_dir()


def test_tpp_and_scr_find_the_planted_latents(model, data, tmp_path, quick_probes):
    bench = make_bench(tmp_path, data=data)
    seeing, blind = reading_sae(model.d_model, SEEING), reading_sae(model.d_model, BLIND)
    tpp = {
        name: run_perturbation_hub(sae, model, bench, 0, scr=False, **PAIRS)["metrics"]
        for name, sae in (("seeing", seeing), ("blind", blind), ("again", seeing))
    }
    assert set(tpp["seeing"]) == {
        f"tpp_threshold_{n}_{kind}"
        for n in (2, 5)
        for kind in ("total_metric", "intended_diff_only", "unintended_diff_only")
    }
    # from the kept probes
    assert tpp["seeing"]["tpp_threshold_2_total_metric"] > 0.15 and tpp["again"] == tpp["seeing"]
    assert abs(tpp["blind"]["tpp_threshold_2_total_metric"]) < 0.05
    scr = {
        name: run_perturbation_hub(sae, model, bench, 0, scr=True, **PAIRS)
        for name, sae in (("seeing", seeing), ("blind", blind))
    }
    assert len(scr["seeing"]["sets"]) == 4  # pairs of professions
    for direction in ("scr_dir1_threshold_2", "scr_dir2_threshold_2"):
        assert scr["seeing"]["metrics"][direction] > 0.5 > 0.1 > abs(scr["blind"]["metrics"][direction])
    from sae_bench.evals.scr_and_tpp import main

    assert main.pickle.__name__ == "pickle" and main.torch.is_grad_enabled()
    for path in tmp_path.rglob("*.pkl"):
        assert load_file(path)  # safetensors, whatever its name says


def test_a_model_in_half_precision(data, tmp_path, quick_probes):
    model = planted_model(tmp_path / "planted", dtype="bfloat16")
    sae, bench = reading_sae(model.d_model, SEEING), make_bench(tmp_path / "cache", data=data)
    assert run_sparse_probing_hub(sae, model, bench, 0, **NEWS)["metrics"]["sae_top_1_test_accuracy"] == 1
    assert (
        run_perturbation_hub(sae, model, bench, 0, scr=False, **PAIRS)["metrics"][
            "tpp_threshold_2_total_metric"
        ]
        > 0.15
    )
    assert run_core_hub(sae, model, bench, 0)["metrics"]["l0"] > 0


def test_core_on_texts_from_a_folder(model, data, tmp_path):
    bench = make_bench(tmp_path, data=data)
    # Every text of 16 characters holds one of A, B, C, which the SAE reads, and nothing else that it does.
    found = run_core_hub(reading_sae(model.d_model, SEEING), model, bench, 0)["metrics"]
    assert found["l0"] == pytest.approx(1 / 16, rel=0.15) and found["ce_loss_score"] is not None
    exact = torch.cat([torch.eye(model.d_model), -torch.eye(model.d_model)])
    assert run_core_hub(sae_of(exact), model, bench, 0)["metrics"]["ce_loss_score"] == pytest.approx(
        1, abs=1e-4
    )


@pytest.mark.parametrize("offline", [True, False])
def test_without_the_hub_the_reason_is_one_sentence_at_once(model, tmp_path, monkeypatch, offline):
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it waited"))
    sae, why = (
        reading_sae(model.d_model, SEEING),
        "HF_HUB_OFFLINE is set" if offline else "huggingface.co cannot be reached",
    )
    assert why in hub_out_of_reach()
    bench, nowhere = make_bench(tmp_path), make_bench(tmp_path, data=tmp_path / "nowhere")
    for eval_name, run in {
        "bias_in_bios": lambda: run_sparse_probing_hub(sae, model, bench, 0),
        "LabHC/bias_in_bios, .* no .*nowhere/LabHC": lambda: run_perturbation_hub(
            sae, model, nowhere, 0, scr=True
        ),
        "openwebtext": lambda: run_core_hub(sae, model, bench, 0),
    }.items():
        with pytest.raises(NotRun, match=rf"^it needs the data set .*{eval_name}[^\n]*$") as found:
            run()
        assert why in str(found.value)
    assert not list(tmp_path.iterdir()) and torch.is_grad_enabled()


def test_a_missing_result_is_an_error(model, data, tmp_path, monkeypatch):
    from sae_bench.evals.sparse_probing import main

    sae = reading_sae(model.d_model, SEEING)
    monkeypatch.setattr(main, "run_eval", lambda *_, **__: {})
    with pytest.raises(RuntimeError, match="0 results for one SAE"):
        run_sparse_probing_hub(sae, model, make_bench(tmp_path, data=data), 0, **NEWS)
