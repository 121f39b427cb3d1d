"""The adapter to SAEBench: known answers, our own metrics against its, caches, and what it leaves behind."""

import json
import random
import socket
import sys
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from tiny_models import BOS, save_model

from dmsae_lib import saebench
from dmsae_lib.config.sections import ModelConfig, RetrainConfig, SaebenchConfig, SuiteConfig
from dmsae_lib.data.contexts import Contexts
from dmsae_lib.data.corpus import PROBING_SETS, wheel_sets
from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.data.workers import Workers
from dmsae_lib.sae.model import MatryoshkaSAE, save_sae
from dmsae_lib.saebench import Task
from dmsae_lib.saebench import core as saebench_core
from dmsae_lib.saebench import probing as saebench_probing
from dmsae_lib.saebench.adapter import cache_name, undisturbed
from dmsae_lib.store.artifacts import Artifact, UserError, load, write

SETS = ["145_disease_class_digestive system diseases", "105_click_bait"]  # 868 and 1556 texts
SHORT = "114_nyc_borough_Manhattan"  # 1810 texts, some of them longer than a context
CONTEXT = 32


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("SAEBench tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


plain_residuals = saebench_probing._last_token_residuals  # whatever a test puts in its place


def plain_activations(model: LanguageModel, name: str) -> np.ndarray:
    return plain_residuals(model, saebench_probing.unique_rows(name)["prompt"].tolist()).numpy()


def load_model(folder, layer: int) -> LanguageModel:
    hook = f"blocks.{layer}.hook_resid_post"
    return LanguageModel(ModelConfig(name=str(folder), hook_name=hook, context_size=CONTEXT))


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request, tmp_path_factory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("models") / f"not a llama but {request.param}"
    return load_model(save_model(folder, request.param, confidence=8.0), layer=1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> LanguageModel:
    return load_model(save_model(tmp_path_factory.mktemp("models") / "tiny", confidence=8.0), layer=0)


def greedy_rows(model: LanguageModel, rows: int = 7) -> np.ndarray:
    """Rows that the model itself continues greedily, so that its loss is low; one boundary inside, one padded
    row."""
    tokens = torch.randint(3, 300, (rows, 2), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = BOS
    while tokens.shape[1] < CONTEXT:
        tokens = torch.cat([tokens, model.logits(tokens)[:, -1:].argmax(-1)], dim=1)
    tokens[1, 12] = BOS
    tokens[2, 20:] = BOS
    return tokens.numpy()


def identity_sae(d: int) -> MatryoshkaSAE:
    """Positive and negative part of each channel: an exact reconstruction."""
    sae = MatryoshkaSAE(d, 2 * d, (d,))
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    sae.load_state_dict(sae.state_dict() | {"free_rows": both, "W_dec": both})
    return sae.requires_grad_(False)


def zero_sae(d: int) -> MatryoshkaSAE:
    sae = identity_sae(d)
    sae.threshold.fill_(float("inf"))
    return sae


def core_sae(model: LanguageModel, seed: int = 0) -> MatryoshkaSAE:
    """An untrained SAE with a ReLU core of 4 and a threshold on the rest, scaled to the model's
    activations."""
    generator = torch.Generator().manual_seed(seed)
    core = torch.nn.functional.normalize(torch.randn(4, model.d_model, generator=generator), dim=1)
    x = model.lower(torch.randint(3, 300, (4, CONTEXT), generator=generator)).flatten(0, 1)
    sae = MatryoshkaSAE(model.d_model, 64, (8, 16), core).requires_grad_(False)
    sae.initialise(torch.Generator().manual_seed(seed), x)
    sae.threshold.fill_(float(sae.pre_activations(x).quantile(0.8)))
    return sae


def test_core_gives_an_exact_reconstruction_1_and_zero_ablation_0(model):
    # The hook is the last layer's: below it, positions left alone (BOS) would still reach the others by
    # attention.
    tokens = greedy_rows(model)
    exact = saebench_core.run_core(identity_sae(model.d_model), model, tokens)
    assert exact["ce_loss_with_ablation"] > exact["ce_loss_without_sae"] + 1  # there is something to recover
    assert exact["ce_loss_score"] == pytest.approx(1, abs=1e-6)
    assert exact["l0"] == model.d_model and exact["cossim"] == pytest.approx(1, abs=1e-5)
    nothing = saebench_core.run_core(zero_sae(model.d_model), model, tokens)
    assert nothing["ce_loss_score"] == pytest.approx(0, abs=1e-6)
    assert nothing["l0"] == 0 and nothing["cossim"] is None


def test_core_agrees_with_a_plain_recomputation(llama):
    tokens, sae = greedy_rows(llama), core_sae(llama)
    found = saebench_core.run_core(sae, llama, tokens)
    ids = torch.from_numpy(tokens)
    usable = Contexts(ids, torch.full((len(ids),), CONTEXT), llama.bos).usable()
    active = sae.encode(llama.lower(ids)[usable]) > 0
    assert found["l0"] == pytest.approx(float(active.sum(1).float().mean()), rel=1e-6)
    assert 4 < found["l0"] < 32 and active[:, :4].any() and active[:, 4:].any()

    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(llama.folder)
    plain.model.layers[0].register_forward_hook(
        lambda module, given, out: torch.where(usable[..., None], sae(out), out)
    )
    with torch.no_grad():
        logits = plain(ids).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    assert found["ce_loss_with_sae"] == pytest.approx(float(losses[usable[:, :-1]].mean()), rel=1e-4)


def test_core_counts_every_row_once_whatever_the_batch(llama):
    tokens, sae = greedy_rows(llama, rows=6), core_sae(llama)
    whole = saebench_core.run_core(sae, llama, tokens, batch_rows=6)
    for batch_rows in (1, 4):  # 4 does not divide 6
        assert saebench_core.run_core(sae, llama, tokens, batch_rows)["l0"] == pytest.approx(
            whole["l0"], rel=1e-6
        )


@pytest.mark.parametrize("kept", [2**29, 400_000, 0])  # every batch, one of its two passes, none
def test_passes_without_an_sae_are_shared_and_change_nothing(llama, monkeypatch, kept):
    tokens = greedy_rows(llama)
    batch = len(tokens) * CONTEXT * llama.bridge.cfg.d_vocab * 4
    assert 2 * batch > 400_000 > 1.2 * batch
    monkeypatch.setattr(saebench_core, "SHARED_BYTES", kept)
    monkeypatch.setattr(saebench_core.SharedPasses, "known", WeakKeyDictionary())
    saes = [core_sae(llama), identity_sae(llama.d_model)]
    alone = []
    for sae in saes:
        saebench_core.SharedPasses.known.clear()
        alone.append(saebench_core.run_core(sae, llama, tokens))
    saebench_core.SharedPasses.known.clear()
    full = []  # passes through the whole model
    handle = llama.bridge.unembed.register_forward_hook(lambda *_: full.append(1))
    try:
        assert [saebench_core.run_core(sae, llama, tokens) for sae in (*saes, *saes)] == [*alone, *alone]
    finally:
        handle.remove()
    assert len(full) == {2**29: 2 + 4, 400_000: 1 + 4 + 4, 0: 3 * 4}[kept]
    other = greedy_rows(llama)
    other[0, 1] += 1
    assert (
        saebench_core.run_core(saes[0], llama, other)["ce_loss_without_sae"]
        != alone[0]["ce_loss_without_sae"]
    )


def test_the_process_is_left_as_it_was(llama, tmp_path, planted):
    def state():
        sides = llama.tokenizer.padding_side, llama.tokenizer.truncation_side
        draws = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
        return torch.is_grad_enabled(), torch.get_num_threads(), sides, *draws

    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        before = state()
        saebench_core.run_core(core_sae(llama), llama, greedy_rows(llama))
        saebench_probing.run_probing(core_sae(llama), llama, SETS[:1], [1], tmp_path, seed=0)
        saebench_probing.probing_baselines(Workers(llama), SETS[:1], tmp_path, seed=0)
        with undisturbed():  # some of sae_bench's evals do this
            torch.set_grad_enabled(False)
            torch.rand(1), np.random.rand(), random.random()
        assert state() == before and torch.is_grad_enabled()
    finally:
        torch.set_num_threads(threads)
    assert [path.name for path in tmp_path.iterdir()] == [
        f"model_activations_{saebench_probing.probing_cache(llama)}"
    ]


@pytest.fixture
def planted(monkeypatch, llama) -> torch.Tensor:
    """Activations that hold the label on one direction and on channel 3, noise elsewhere. Returns the
    direction."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(llama.d_model, generator=generator)
    direction[3] = 0
    direction /= direction.norm()
    tables = {name: saebench_probing.unique_rows(name) for name in SETS}
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

    monkeypatch.setattr(saebench_probing, "_last_token_residuals", residuals)
    return direction


def probe_sae(d: int, direction: torch.Tensor | None, seed: int = 0) -> MatryoshkaSAE:
    """Ten latents: noise that knows nothing of the label, and the planted direction if it is given."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(10, d, generator=generator)
    if direction is not None:
        rows[6] = direction
    sae = MatryoshkaSAE(d, 10, (4,))
    sae.load_state_dict(
        sae.state_dict() | {"free_rows": rows, "W_dec": torch.nn.functional.normalize(rows, dim=1)}
    )
    return sae.requires_grad_(False)


def blind(sae: MatryoshkaSAE, direction: torch.Tensor) -> MatryoshkaSAE:
    """The same SAE reading nothing along the direction and channel 3."""
    rows = sae.free_rows.clone()
    rows[:, 3] = 0
    sae.free_rows.copy_(rows - (rows @ direction)[:, None] * direction)
    return sae


def test_probing_finds_a_planted_latent_and_nothing_where_there_is_nothing(llama, tmp_path, planted):
    seeing, blinded = probe_sae(llama.d_model, planted), blind(probe_sae(llama.d_model, None), planted)
    found = {
        "planted": saebench_probing.run_probing(seeing, llama, SETS, [1, 5], tmp_path, seed=0),
        "blind": saebench_probing.run_probing(blinded, llama, SETS, [1, 5], tmp_path, seed=0),
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
    other = saebench_probing.run_probing(blinded, llama, SETS, [1, 5], tmp_path, seed=1)
    assert other != found["blind"]  # an old result of the same name is not taken up


def save(folder, sae: MatryoshkaSAE) -> Artifact:
    with write(folder, "sae") as writer:
        save_sae(writer, sae, scale=1.0)
    return load(folder, "sae")


def test_neither_company_nor_processes_decide_a_score(llama, tmp_path, planted):
    settings = SaebenchConfig(probing_sets=SETS, probing_ks=[1, 5])
    bench = saebench.Bench(settings, greedy_rows(llama), tuple(SETS), tmp_path / "cache")
    saes = {
        "none": save(tmp_path / "none", probe_sae(llama.d_model, planted)),
        "random": save(tmp_path / "random", blind(probe_sae(llama.d_model, None), planted)),
    }
    tasks = {
        Task(8, arm, 0, name, 0): sae.folder
        for arm, sae in saes.items()
        for name in ("core", "sparse_probing")
    }
    alone = {
        task: dict(saebench.score_all({task: folder}, bench, Workers(llama)))[task]
        for task, folder in tasks.items()
    }
    probing = {arm: alone[Task(8, arm, 0, "sparse_probing", 0)]["metrics"] for arm in saes}
    assert probing["none"]["probe_top1"] > 0.99 and probing["random"] != probing["none"]
    two = Workers(llama, 2)
    try:
        assert dict(saebench.score_all(tasks, bench, two)) == alone
        one = saebench_probing.probing_baselines(Workers(llama), SETS, bench.cache, seed=0)
        assert saebench_probing.probing_baselines(two, SETS, bench.cache, seed=0) == one
        # not planted there
        ours = saebench_probing.prepare_probing(two, [SHORT, SETS[1]], tmp_path / "by two")
    finally:
        two.close()
    for name in (SHORT, SETS[1]):
        with undisturbed():
            there = torch.load(ours.path(f"{name}_{llama.hook_name}.pt"))
            assert torch.equal(there, torch.from_numpy(plain_activations(llama, name)))


def test_scores_are_known_by_sae_and_by_the_settings_that_decide_them(llama, tmp_path):
    settings, core = SaebenchConfig(probing_sets=[]), Task(8, "none", 0, "core", 0)
    sae, other = save(tmp_path / "a", core_sae(llama)), save(tmp_path / "b", core_sae(llama, seed=1))
    bench = saebench.Bench(settings, greedy_rows(llama), (), tmp_path)
    assert not saebench.is_scored(core, tmp_path / "scores", sae, settings)

    def keep(task: Task) -> dict:
        result = dict(saebench.score_all({task: sae.folder}, bench, Workers(llama)))[task]
        with write(tmp_path / "scores", "scores") as writer:
            about = {"sae": sae.hash, "settings": saebench.depends(task.name, settings)}
            writer.json("scores.json", about | {"result": result})
        return result

    assert keep(core)["metrics"] == saebench_core.run_core(core_sae(llama), llama, bench.rows)
    assert saebench.is_scored(core, tmp_path / "scores", sae, settings)
    assert not saebench.is_scored(core, tmp_path / "scores", other, settings)
    assert not saebench.is_scored(
        core, tmp_path / "scores", sae, SaebenchConfig(probing_sets=[], core_rows=3)
    )
    # does not concern core
    assert saebench.is_scored(core, tmp_path / "scores", sae, SaebenchConfig(probing_ks=[3]))
    probing = core._replace(name="sparse_probing")
    result = keep(probing)
    assert result["metrics"] == {} and "no set that a probe on all channels can do" in result["not_run"]
    assert not saebench.is_scored(probing, tmp_path / "scores", sae, settings)  # it may run another time


def test_the_suite_spares_what_is_scored_already_and_draws_again_on_the_first_training_seed_alone():
    saes = [(k, arm, seed) for k in (4, 8) for arm in ("none", "distilled", "random") for seed in (0, 1)]
    retrain = RetrainConfig(ks=[4, 8], seeds=[0, 1])
    settings = SaebenchConfig(
        suite=SuiteConfig(evals=["core", "sparse_probing", "absorption"], ks=[8], eval_seeds=[0, 5])
    )
    assert {task.name for task in saebench.reproduced_tasks(settings, saes)} == {"core", "sparse_probing"}
    found = saebench.suite_tasks(settings, retrain, saes)
    assert not set(found) & set(saebench.reproduced_tasks(settings, saes)) and len(set(found)) == len(found)
    arms = ("none", "distilled")
    assert set(found) == {Task(8, arm, 0, "sparse_probing", 5) for arm in arms} | {
        Task(8, arm, *rest)
        for arm in arms
        for rest in ((0, "absorption", 0), (0, "absorption", 5), (1, "absorption", 0))
    }


def test_baselines(llama, tmp_path, planted):
    from sae_probes import run_baseline_evals

    found = saebench_probing.probing_baselines(Workers(llama), SETS, tmp_path, seed=0)
    bait = found[SETS[1]]
    assert (bait["n_train"], bait["n_test"], bait["channel"]) == (1024, 531, 3)
    assert bait["dense"]["accuracy"] > 0.99 > bait["best_channel"]["accuracy"] > 0.9
    assert bait["majority"] == pytest.approx(0.5, abs=0.001)
    mean, dense = saebench_probing.mean_baselines(found, SETS), found[SETS[0]]["dense"]["accuracy"]
    assert mean["dense"] == pytest.approx(np.mean([found[name]["dense"]["accuracy"] for name in SETS]))
    assert saebench_probing.suitable(found, 0.9) == tuple(SETS)
    found[SETS[0]]["dense"]["accuracy"] = 0.89
    assert saebench_probing.suitable(found, 0.9) == (SETS[1],)
    found[SETS[0]]["dense"]["accuracy"] = 0.9
    assert saebench_probing.suitable(found, 0.9) == tuple(SETS)
    with saebench_probing._each_text_once(SETS[:1]):
        run_baseline_evals(
            model_name=saebench_probing.probing_cache(llama),
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

    ours = saebench_probing.prepare_probing(Workers(model), [SHORT], tmp_path)
    file = f"{SHORT}_{model.hook_name}.pt"
    made = ours.path(file).stat().st_mtime_ns
    ensure_dataset_activations(
        "theirs", [SHORT], [model.hook_name], tmp_path, "cpu", CONTEXT, model=model.bridge
    )
    # they make those of all rows
    row = {text: i for i, text in enumerate(read_numbered_dataset_df(SHORT)["prompt"])}
    rows = [row[text] for text in saebench_probing.unique_rows(SHORT)["prompt"]]
    theirs = torch.load(tmp_path / "model_activations_theirs" / file)[rows]
    x = torch.load(ours.path(file))
    assert x.shape == (1810, model.d_model) and (x - theirs).abs().max() < 1e-4 * x.std()
    model.tokenizer.padding_side, model.tokenizer.truncation_side = "right", "right"  # sae_probes set them
    assert (
        saebench_probing.prepare_probing(Workers(model), [SHORT], tmp_path).path(file).stat().st_mtime_ns
        == made
    )

    retrained = load_model(save_model(tmp_path / "retrained", seed=1), layer=1)
    other = saebench_probing.prepare_probing(Workers(retrained), [SHORT], tmp_path)
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
    found = [tuple(row) for row in saebench_probing.unique_rows("made up").to_numpy()]
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

    monkeypatch.setattr(saebench_probing, "_last_token_residuals", residuals)
    monkeypatch.setattr(utils_data, "get_train_test_indices", spy)
    monkeypatch.setattr(utils_training, "find_best_reg", fit)
    monkeypatch.setattr(sys.modules[run_sae_evals.__module__], "find_best_reg", fit)
    with write(
        tmp_path / f"model_activations_{cache_name(llama)}", "probing_activations", {"model": llama.hash}
    ) as writer:
        for name, table in tables.items():  # what an earlier release left there
            torch.save(torch.zeros(len(table), llama.d_model), writer.path(f"{name}_{llama.hook_name}.pt"))
    baselines = saebench_probing.probing_baselines(Workers(llama), PROBING_SETS, tmp_path, seed=0)
    saebench_probing.run_probing(probe_sae(llama.d_model, None), llama, PROBING_SETS, [1], tmp_path, seed=0)
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

    def forgetful(config, *rest):
        config.dataset_names = config.dataset_names[:1]
        return real(config, *rest)

    for broken in (lambda *_: {}, forgetful):
        monkeypatch.setattr(main, "run_eval", broken)
        with pytest.raises(RuntimeError, match="left something out"):
            saebench_probing.run_probing(sae, llama, SETS, [1], tmp_path, seed=0)


def test_bad_input_is_one_sentence(llama, tmp_path, planted):
    sae = probe_sae(llama.d_model, planted)
    with pytest.raises(UserError, match=r"saebench.probing_sets names 'no_such_set'"):
        saebench_probing.prepare_probing(Workers(llama), ["no_such_set"], tmp_path)
    with pytest.raises(UserError, match=r"saebench.probing_ks is \[1, 11\]: an SAE has 10 latents"):
        saebench_probing.run_probing(sae, llama, SETS, [1, 11], tmp_path, seed=0)
    with pytest.raises(UserError, match="reads 8 channels"):
        saebench_core.run_core(identity_sae(8), llama, greedy_rows(llama))
    with pytest.raises(UserError, match="raise data.test_tokens"):
        saebench_core.run_core(sae, llama, np.empty((0, CONTEXT), dtype=np.int64))


def test_core_on_an_outside_model(test_model):
    model = load_model(test_model, layer=1)
    ids = model.tokenizer("Once upon a time, there was a little girl. " * 60, add_special_tokens=False)[
        "input_ids"
    ]
    tokens = np.array([[model.bos, *ids[i : i + CONTEXT - 1]] for i in range(0, 4 * CONTEXT, CONTEXT)])
    found = saebench_core.run_core(identity_sae(model.d_model), model, tokens)
    assert found["ce_loss_score"] == pytest.approx(1, abs=1e-6) and found["ce_loss_without_sae"] < 4
