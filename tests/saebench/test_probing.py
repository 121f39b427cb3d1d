"""SAEBench's sparse probing: planted latents, the model's own activations, and texts that occur once."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.models import save_model
from builders.saebench import load_model, make_bench, sae_of, state

from dmsae_lib.data.corpus import PROBING_SETS, wheel_sets
from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.data.workers import Workers
from dmsae_lib.sae.model import FoldedSAE
from dmsae_lib.saebench import probing
from dmsae_lib.saebench.adapter import cache_name
from dmsae_lib.saebench.runner import Bench
from dmsae_lib.store.artifacts import UserError, write

SETS = ["145_disease_class_digestive system diseases", "105_click_bait"]  # 868 and 1556 texts
SHORT = "114_nyc_borough_Manhattan"  # 1810 texts, some of them longer than a context
CONTEXT = 32
pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request, tmp_path_factory) -> LanguageModel:
    return load_model(save_model(tmp_path_factory.mktemp("models") / "tiny", request.param), layer=1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> LanguageModel:
    return load_model(save_model(tmp_path_factory.mktemp("models") / "tiny"))


def bench(cache: Path, sets: list[str] = SETS, ks: tuple[int, ...] = (1, 5)) -> Bench:
    return make_bench(cache, sets=sets, probing_ks=list(ks))


@pytest.fixture
def planted(monkeypatch, llama) -> torch.Tensor:
    """Activations that hold the label on one direction and on channel 3, noise elsewhere. Returns the
    direction."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(llama.d_model, generator=generator)
    direction[3] = 0
    direction /= direction.norm()
    tables = {name: probing.unique_rows(name) for name in SETS}
    labels = {
        tuple(rows["prompt"]): torch.tensor((rows["target"] == rows["target"].max()).to_numpy())
        for rows in tables.values()
    }

    def residuals(model, texts):
        y = labels[tuple(texts)][:, None].float()
        x = torch.randn(len(texts), model.d_model, generator=generator)
        x[:, 3] = x[:, 3] + 4 * y[:, 0]
        return (
            x
            - (x @ direction)[:, None] * direction
            + (8 * y + torch.rand(y.shape, generator=generator)) * direction
        )

    monkeypatch.setattr(probing, "_last_token_residuals", residuals)
    return direction


def probe_sae(d: int, direction: torch.Tensor | None, seed: int = 0) -> FoldedSAE:
    """Ten latents: noise that knows nothing of the label, and the planted direction if it is given."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(10, d, generator=generator)
    if direction is not None:
        rows[6] = direction
    return sae_of(rows, torch.nn.functional.normalize(rows, dim=1))


def blind(sae: FoldedSAE, direction: torch.Tensor) -> FoldedSAE:
    """The same SAE reading nothing along the direction and channel 3."""
    rows = sae.free_rows.clone()
    rows[:, 3] = 0
    sae.free_rows.copy_(rows - (rows @ direction)[:, None] * direction)
    return sae


def test_probing_finds_a_planted_latent_and_nothing_where_there_is_nothing(llama, tmp_path, planted):
    seeing, blinded = probe_sae(llama.d_model, planted), blind(probe_sae(llama.d_model, None), planted)
    found = {
        "planted": probing.run_probing(seeing, llama, bench(tmp_path), seed=0),
        "blind": probing.run_probing(blinded, llama, bench(tmp_path), seed=0),
    }
    for scores in found.values():
        assert list(scores["sets"]) == SETS
        assert scores["metrics"] == {f"probe_top{k}": scores["mean"][k]["accuracy"] for k in ("1", "5")}
        for k in ("1", "5"):
            for metric in ("accuracy", "auc", "f1"):
                average = np.mean([scores["sets"][name][k][metric] for name in SETS])
                assert scores["mean"][k][metric] == pytest.approx(average)
    assert found["planted"]["mean"]["1"]["accuracy"] > 0.99
    # 531 test texts: standard error 0.025
    assert abs(found["blind"]["sets"][SETS[1]]["1"]["auc"] - 0.5) < 0.06
    other = probing.run_probing(blinded, llama, bench(tmp_path), seed=1)
    assert other != found["blind"]  # an old result of the same name is not taken up


def test_baselines(llama, tmp_path, planted):
    from sae_probes import run_baseline_evals

    found = probing.probing_baselines(Workers(llama), bench(tmp_path))
    bait = found[SETS[1]]
    assert (bait["n_train"], bait["n_test"], bait["channel"]) == (1024, 531, 3)
    assert bait["dense"]["accuracy"] > 0.99 > bait["best_channel"]["accuracy"] > 0.9
    assert bait["majority"] == pytest.approx(0.5, abs=0.001)
    mean, dense = probing.mean_baselines(found, SETS), found[SETS[0]]["dense"]["accuracy"]
    assert mean["dense"] == pytest.approx(np.mean([found[name]["dense"]["accuracy"] for name in SETS]))
    assert probing.suitable(found, 0.9) == tuple(SETS)
    found[SETS[0]]["dense"]["accuracy"] = 0.89
    assert probing.suitable(found, 0.9) == (SETS[1],)
    found[SETS[0]]["dense"]["accuracy"] = 0.9
    assert probing.suitable(found, 0.9) == tuple(SETS)
    with probing._each_text_once(SETS[:1]):
        run_baseline_evals(
            model_name=probing.probing_cache(llama),
            hook_name=llama.hook_name,
            setting="normal",
            method="logreg",
            results_path=tmp_path / "theirs",
            model_cache_path=tmp_path,
            datasets=SETS[:1],
            device="cpu",
            seed=0,
        )
    (file,) = (tmp_path / "theirs").rglob("*.json")
    assert json.loads(file.read_text())[0]["test_acc"] == dense


def test_activations_are_those_of_sae_probes_and_of_this_model_alone(model, llama, tmp_path):
    from sae_probes.generate_model_activations import ensure_dataset_activations
    from sae_probes.utils_data import read_numbered_dataset_df

    ours = probing.prepare_probing(Workers(model), bench(tmp_path, [SHORT]))
    file = f"{SHORT}_{model.hook_name}.pt"
    made = ours.path(file).stat().st_mtime_ns
    ensure_dataset_activations(
        "theirs", [SHORT], [model.hook_name], tmp_path, "cpu", CONTEXT, model=model.bridge
    )
    # they make those of all rows
    row = {text: i for i, text in enumerate(read_numbered_dataset_df(SHORT)["prompt"])}
    rows = [row[text] for text in probing.unique_rows(SHORT)["prompt"]]
    theirs = torch.load(tmp_path / "model_activations_theirs" / file)[rows]
    x = torch.load(ours.path(file))
    assert x.shape == (1810, model.d_model) and (x - theirs).abs().max() < 1e-4 * x.std()
    model.tokenizer.padding_side, model.tokenizer.truncation_side = "right", "right"  # sae_probes set them
    assert (
        probing.prepare_probing(Workers(model), bench(tmp_path, [SHORT])).path(file).stat().st_mtime_ns
        == made
    )

    retrained = load_model(save_model(tmp_path / "retrained", seed=1), layer=1)
    other = probing.prepare_probing(Workers(retrained), bench(tmp_path, [SHORT]))
    assert other.folder != ours.folder and (torch.load(other.path(file)) - x).abs().max() > x.std()
    assert other.parents == {"model": retrained.hash}


def test_rows_are_each_text_once_with_one_label_and_balanced(monkeypatch):
    import pandas as pd
    from sae_probes import utils_data

    rows = [
        ("A cat.", "x"),
        ("a  CAT", "x"),
        ("a dog", "y"),
        ("both", "x"),
        ("both", "y"),
        ("Mixed!", "y"),
        ("mixed", "x"),
        ("!", "x"),
        ("?", "x"),
        ("a dog", "y"),
        *((f"more {i}", "y") for i in range(50)),
    ]
    monkeypatch.setattr(
        utils_data, "read_numbered_dataset_df", lambda name: pd.DataFrame(rows, columns=["prompt", "target"])
    )
    found = [tuple(row) for row in probing.unique_rows("made up").to_numpy()]
    assert [row for row in found if row[1] == "x"] == [("A cat.", "x"), ("!", "x"), ("?", "x")]
    assert [target for _, target in found].count("y") == 3  # of 51
    assert found == [row for row in dict.fromkeys(rows) if row in found]  # in the order of the set


def leaks(texts: list[str], draw: tuple[np.ndarray, np.ndarray]) -> float:
    """The share of a draw's test rows whose text is in its training rows."""
    train, test = draw
    known = {texts[i] for i in train}
    return float(np.mean([texts[i] in known for i in test]))


def test_no_text_that_a_probe_is_tested_on_was_in_its_training_set(llama, tmp_path, monkeypatch):
    import pandas as pd
    from sae_probes import run_sae_evals, utils_data, utils_training

    draw, read, sizes = (
        utils_data.get_train_test_indices,
        utils_data.read_numbered_dataset_df,
        dict(utils_data.get_dataset_sizes()),
    )
    tables = {name: pd.read_csv(wheel_sets()[name], usecols=["prompt", "target"]) for name in PROBING_SETS}
    before, given, drawn = [], [], []
    for name, table in tables.items():
        n, y = len(table), utils_data.get_yvals(name)
        before.append(
            leaks(table["prompt"].tolist(), draw(y, min(n - 100, 1024), n - 1 - min(n - 100, 1024), seed=0))
        )
    assert 0.14 < np.mean(before) < 0.15 and max(before) > 0.35  # what sae_probes does as it comes

    def residuals(model, texts):
        given.append(texts)
        return torch.randn(len(texts), model.d_model, generator=torch.Generator().manual_seed(0))

    def spy(y, *arguments, **options):
        drawn.append((y, draw(y, *arguments, **options)))
        return drawn[-1][1]

    def fit(*_, **__):
        return utils_training.BestClassifierResults(utils_training.Metrics(0.5, 0.5, 0.5, 0.5), None, None)

    monkeypatch.setattr(probing, "_last_token_residuals", residuals)
    monkeypatch.setattr(utils_data, "get_train_test_indices", spy)
    monkeypatch.setattr(utils_training, "find_best_reg", fit)
    monkeypatch.setattr(sys.modules[run_sae_evals.__module__], "find_best_reg", fit)
    with write(
        tmp_path / f"model_activations_{cache_name(llama)}", "probing_activations", {"model": llama.hash}
    ) as writer:
        for name, table in tables.items():  # what an earlier release left there
            torch.save(torch.zeros(len(table), llama.d_model), writer.path(f"{name}_{llama.hook_name}.pt"))
    baselines = probing.probing_baselines(Workers(llama), bench(tmp_path, PROBING_SETS))
    probing.run_probing(probe_sae(llama.d_model, None), llama, bench(tmp_path, PROBING_SETS, (1,)), seed=0)
    assert len(given) == len(PROBING_SETS) and len(drawn) == 2 * len(PROBING_SETS)  # made once, drawn by both
    for (name, table), texts, (y, (train, test)), (again, same) in zip(
        tables.items(), given, drawn, drawn[len(given) :]
    ):
        assert leaks(texts, (train, test)) == 0 and len({text.casefold() for text in texts}) == len(
            texts
        ) == len(y)
        assert np.array_equal(y, again) and all(map(np.array_equal, (train, test), same))
        labels = table.groupby("prompt")["target"].unique()
        assert all(
            list(labels[text]) == [sorted(table["target"].unique())[label]] for text, label in zip(texts, y)
        )
        assert (y == 0).sum() == (y == 1).sum() and len(train) == min(len(texts) - 100, 1024)
        assert len(train) + len(test) == len(texts) - 1 and not set(train) & set(test)
        assert (baselines[name]["n_train"], baselines[name]["n_test"]) == (len(train), len(test))
    # left as it was
    assert utils_data.read_numbered_dataset_df is read and utils_data.get_dataset_sizes() == sizes


def test_what_sae_bench_leaves_out_is_an_error(llama, tmp_path, planted, monkeypatch):
    from sae_bench.evals.sparse_probing_sae_probes import main

    real = main.run_eval
    sae = probe_sae(llama.d_model, planted)

    def forgetful(config, *rest, **options):
        config.dataset_names = config.dataset_names[:1]
        return real(config, *rest, **options)

    for broken, why in ((lambda *_, **__: {}, "0 results for one SAE"), (forgetful, "left out")):
        monkeypatch.setattr(main, "run_eval", broken)
        with pytest.raises(RuntimeError, match=why):
            probing.run_probing(sae, llama, bench(tmp_path), seed=0)


def test_the_process_is_left_as_it_was(llama, tmp_path, planted):
    sides = llama.tokenizer.padding_side, llama.tokenizer.truncation_side
    before = state()
    probing.run_probing(probe_sae(llama.d_model, planted), llama, bench(tmp_path, SETS[:1]), seed=0)
    probing.probing_baselines(Workers(llama), bench(tmp_path, SETS[:1]))
    assert state() == before and sides == (llama.tokenizer.padding_side, llama.tokenizer.truncation_side)
    assert [path.name for path in tmp_path.iterdir()] == [f"model_activations_{probing.probing_cache(llama)}"]


def test_bad_input_is_one_sentence(llama, tmp_path, planted):
    with pytest.raises(UserError, match=r"saebench.probing_sets names 'no_such_set'"):
        probing.prepare_probing(Workers(llama), bench(tmp_path, ["no_such_set"]))
    with pytest.raises(UserError, match=r"saebench.probing_ks is \[1, 11\]: an SAE has 10 latents"):
        probing.run_probing(probe_sae(llama.d_model, planted), llama, bench(tmp_path, ks=(1, 11)), seed=0)
