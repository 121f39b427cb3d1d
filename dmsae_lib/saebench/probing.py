"""SAEBench's sparse probing (sae_probes): how well k latents tell the classes of labelled texts apart, and
baselines.

sae_probes finds the model's activations already in its cache, so it looks for no model on the Hub.

**Repeated texts**: sae_probes splits the rows of a set into training and test, and most of its sets repeat
their texts. In those that we use by default 14 % of the test rows have their text among the training rows, 35
% in the worst set. Here sae_probes and sae_bench get every set with each text once (:func:`unique_rows`), and
all sizes follow the texts that there are, so scores are not comparable with those that sae_bench gives as it
comes.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from dmsae_lib.data.corpus import text_digest
from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.data.workers import Workers
from dmsae_lib.sae.model import MatryoshkaSAE
from dmsae_lib.saebench.adapter import Adapter, cache_name, residuals_by_length, undisturbed
from dmsae_lib.store.artifacts import Artifact, UserError, load, write

METRICS = {"accuracy": "test_accuracy", "auc": "test_auc", "f1": "test_f1"}  # our names: those of sae_bench
REGULARISER = "l1"  # sae_bench's default for the probes on latents
# texts per set: sae_probes/run_baselines.py, generate_sae_activations.py
LARGEST_TRAIN, SMALLEST_TEST = 1024, 100


@cache
def unique_rows(name: str) -> Any:
    """The data frame (prompt, target, ...) of a set of sae_probes with each text once, and as many rows of
    either class.

    Texts that differ in case, punctuation or white space alone count as one, the first; those that occur with
    both labels are left out. The larger class keeps the texts with the smallest hashes: sae_probes draws half
    of each split from each class.
    """
    from sae_probes.utils_data import read_numbered_dataset_df

    rows = read_numbered_dataset_df(name)
    same = rows["prompt"].map(lambda text: "".join(filter(str.isalnum, text.casefold())) or text)
    rows = rows[(rows.groupby(same)["target"].transform("nunique") == 1) & ~same.duplicated()]
    shuffled = rows.loc[rows["prompt"].map(text_digest).sort_values().index]
    return (
        shuffled.groupby("target")
        .head(rows["target"].value_counts().min())
        .sort_index()
        .reset_index(drop=True)
    )


@contextlib.contextmanager
def _each_text_once(sets: Sequence[str]) -> Iterator[None]:
    """sae_probes knows :func:`unique_rows` of ``sets`` and no other rows: labels and sizes are those of our
    activations."""
    from sae_probes import utils_data

    # one dictionary for all of its modules; of all rows, so not to be made in here
    sizes = utils_data.get_dataset_sizes()
    rows = {name: unique_rows(name) for name in sets}
    with (
        patch.object(utils_data, "read_numbered_dataset_df", rows.__getitem__),
        patch.dict(sizes, {name: len(found) for name, found in rows.items()}),
    ):
        yield


def probing_cache(model: LanguageModel) -> str:
    """The name of the model for sae_probes, which its cache has, too: activations of all rows are never taken
    for ours."""
    return f"{cache_name(model)}-each-text-once"


def prepare_probing(workers: Workers, sets: Sequence[str], folder: Path) -> Artifact:
    """The residual at each text's last token, in sae_probes' cache below ``folder``: made once, shared by all
    SAEs.

    The same numbers as ``sae_probes.generate_model_activations.ensure_dataset_activations`` (BOS first, the
    start of too long texts cut off) for the texts of :func:`unique_rows`, but every text is tokenised once
    and batches are of texts of like length.
    """
    model = workers.model
    place = Path(folder) / f"model_activations_{probing_cache(model)}"
    files = {name: f"{name}_{model.hook_name}.pt" for name in sets}
    if place.exists() and all((place / file).exists() for file in files.values()):
        return load(place, "probing_activations")
    with undisturbed():
        from sae_probes.utils_data import get_numbered_binary_tags

    if unknown := sorted(set(sets) - set(get_numbered_binary_tags())):
        raise UserError(
            f"saebench.probing_sets names {unknown[0]!r}: the sae-probes wheel holds no such set; "
            "dmsae_lib.data.corpus.PROBING_SETS are those used by default."
        )
    with write(place, "probing_activations", {"model": model.hash}) as writer:
        for name, activations in workers.run(_activations, dict(zip(sets, sets))):
            torch.save(torch.from_numpy(activations), writer.path(files[name]))
    return load(place, "probing_activations")


def _activations(model: LanguageModel, name: str) -> np.ndarray:
    with undisturbed():
        return _last_token_residuals(model, unique_rows(name)["prompt"].tolist()).numpy()


def _last_token_residuals(model: LanguageModel, texts: list[str]) -> Tensor:
    """(texts, d_model) float32 on the CPU: BOS, then at most context_size - 1 tokens from the end of the
    text."""
    room = model.config.context_size - 1
    rows = [
        [model.bos, *ids[-room:]] for ids in model.tokenizer(texts, add_special_tokens=False)["input_ids"]
    ]
    found = torch.empty(len(rows), model.d_model)
    for batch, resid in residuals_by_length(model, rows):
        found[batch] = resid[range(len(batch)), [len(rows[i]) - 1 for i in batch]]
    return found


def run_probing(
    sae: MatryoshkaSAE, model: LanguageModel, sets: Sequence[str], ks: Sequence[int], folder: Path, seed: int
) -> dict[str, Any]:
    """sae_bench's sparse probing of an SAE: the k latents of largest mean difference, then a logistic probe.

    Returns ``{"metrics", "mean": {k: scores}, "sets": {set: {k: scores}}}`` with k as text and scores =
    {accuracy, auc, f1 (weighted)} on the held-out texts; ``metrics`` are the mean accuracies,
    ``probe_top<k>``. ``seed`` splits the texts and draws the training set's. Unlike sae_bench's own, no text
    is on both sides, and each set is as large as it has texts. Model activations are cached in ``folder``;
    results never are, because sae_probes takes up an old result of the same name.
    """
    if max(ks) > sae.d_sae:
        raise UserError(f"saebench.probing_ks is {list(ks)}: an SAE has {sae.d_sae} latents; lower it.")
    prepare_probing(Workers(model), sets, folder)
    adapter = Adapter(sae, model)
    with undisturbed(), _each_text_once(sets), tempfile.TemporaryDirectory() as scratch:
        from sae_bench.evals.sparse_probing_sae_probes.main import SparseProbingSaeProbesEvalConfig, run_eval

        config = SparseProbingSaeProbesEvalConfig(
            model_name=probing_cache(model),
            random_seed=seed,
            dataset_names=list(sets),
            reg_type=REGULARISER,
            ks=list(ks),
            results_path=f"{scratch}/probes",
            model_cache_path=str(folder),
            include_llm_baseline=False,
        )
        results = list(
            run_eval(config, [("dmsae", adapter)], str(adapter.device), f"{scratch}/results").values()
        )
    scores = {
        detail["dataset_name"]: detail["sae_metrics_by_k"]
        for result in results
        for detail in result["eval_result_details"]
    }
    if (
        len(results) != 1
        or set(scores) != set(sets)
        or any(set(by_k or ()) != set(ks) for by_k in scores.values())
    ):
        raise RuntimeError(
            f"sae_bench gave {len(results)} results with {len(scores)} sets for one SAE, {len(sets)} "
            f"sets and ks = {list(ks)}: it left something out without saying so."
        )
    by_set = {name: {str(k): _scores(scores[name][k]) for k in ks} for name in sets}
    mean = {str(k): _scores(results[0]["sae_metrics_by_k"][k]) for k in ks}
    return {
        "metrics": {f"probe_top{k}": scores["accuracy"] for k, scores in mean.items()},
        "mean": mean,
        "sets": by_set,
    }


def _scores(found: dict[str, float]) -> dict[str, float]:
    return {ours: found[theirs] for ours, theirs in METRICS.items()}


def probing_baselines(workers: Workers, sets: Sequence[str], folder: Path, seed: int) -> dict[str, Any]:
    """What probing reaches without an SAE, on the texts and splits of :func:`run_probing`.

    ``dense``: sae_probes' own baseline, a logistic probe on all channels of the residual stream.
    ``best_channel``: the one-latent probe on the channel with the largest training AUC (a stronger choice
    than the mean difference by which latents are picked). ``majority``: the share of the larger class; the
    sets are balanced (:func:`unique_rows`). Returns ``{set: {n_train, n_test, channel, dense, best_channel,
    majority}}``.
    """
    prepare_probing(workers, sets, folder)
    by_set = dict(workers.run(partial(_baselines, folder=Path(folder), seed=seed), dict(zip(sets, sets))))
    return {name: by_set[name] for name in sets}


def suitable(baselines: dict[str, Any], at_least: float) -> tuple[str, ...]:
    """The sets whose classes a dense probe tells apart with this accuracy: in the others there is nothing to
    find."""
    return tuple(name for name, row in baselines.items() if row["dense"]["accuracy"] >= at_least)


def mean_baselines(baselines: dict[str, Any], sets: Sequence[str]) -> dict[str, float]:
    """Mean accuracies over ``sets``: {dense, best_channel, majority}."""
    rows = [baselines[name] for name in sets]
    found = {
        kind: float(np.mean([row[kind]["accuracy"] for row in rows])) for kind in ("dense", "best_channel")
    }
    return found | {"majority": float(np.mean([row["majority"] for row in rows]))}


def _baselines(model: LanguageModel, name: str, folder: Path, seed: int) -> dict[str, Any]:
    with undisturbed(), _each_text_once([name]):
        from sae_probes.run_baselines import DATASET_SIZES
        from sae_probes.utils_data import get_xy_traintest
        from sae_probes.utils_training import find_best_reg

        n_train = min(DATASET_SIZES[name] - SMALLEST_TEST, LARGEST_TRAIN)
        x, y, x_test, y_test = get_xy_traintest(
            n_train, name, model.hook_name, probing_cache(model), folder, seed=seed
        )
        ranks = x.argsort(dim=0).argsort(dim=0).double()
        auc = ranks[y == 1].mean(0) - ranks[y == 0].mean(0)  # proportional to AUC - 1/2
        channel = [int(auc.abs().argmax())]
        dense = find_best_reg(x, y, x_test, y_test, seed=seed).metrics
        single = find_best_reg(
            x[:, channel], y, x_test[:, channel], y_test, penalty=REGULARISER, seed=seed
        ).metrics
    results: dict[str, Any] = {
        kind: {"accuracy": found.test_acc, "auc": found.test_auc, "f1": found.test_f1}
        for kind, found in (("dense", dense), ("best_channel", single))
    }
    share = float(np.mean(y_test))
    results |= {
        "n_train": len(y),
        "n_test": len(y_test),
        "channel": channel[0],
        "majority": max(share, 1 - share),
    }
    return results
