"""SAEBench's sparse probing (sae_probes): how well k latents tell classes of texts apart, and baselines.

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
from dmsae_lib.saebench.adapter import SAE, Adapter, cache_name, residuals_by_length, undisturbed
from dmsae_lib.saebench.runner import Bench, NotRun, Row, evaluate
from dmsae_lib.store.artifacts import Artifact, UserError, load, made, write

KIND = "probing_activations"
METRICS = {"accuracy": "test_accuracy", "auc": "test_auc", "f1": "test_f1"}  # our names: those of sae_bench
REGULARISER = "l1"  # sae_bench's default for the probes on latents
# texts per set: sae_probes/run_baselines.py, generate_sae_activations.py
LARGEST_TRAIN, SMALLEST_TEST = 1024, 100


@cache
def unique_rows(name: str) -> Any:
    """The data frame (prompt, target, ...) of a set of sae_probes: each text once, as many of either class.

    Texts that differ in case, punctuation or white space alone count as one, the first; those that occur with
    both labels are left out. The larger class keeps the texts with the smallest hashes: sae_probes draws half
    of each split from each class.
    """
    from sae_probes.utils_data import read_numbered_dataset_df

    rows = read_numbered_dataset_df(name)
    same = rows["prompt"].map(lambda text: "".join(filter(str.isalnum, text.casefold())) or text)
    rows = rows[(rows.groupby(same)["target"].transform("nunique") == 1) & ~same.duplicated()]
    shuffled = rows.loc[rows["prompt"].map(text_digest).sort_values().index]
    smaller = rows["target"].value_counts().min()
    return shuffled.groupby("target").head(smaller).sort_index().reset_index(drop=True)


@contextlib.contextmanager
def _each_text_once(sets: Sequence[str]) -> Iterator[None]:
    """sae_probes knows :func:`unique_rows` of ``sets`` and no other rows: they fit our activations."""
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
    """The model's name for sae_probes and its cache: activations of all rows are never taken for ours."""
    return f"{cache_name(model)}-each-text-once"


def prepare_probing(workers: Workers, bench: Bench, seed: int = 0) -> Artifact:
    """The residual at each text's last token, in sae_probes' cache: made once, shared by all SAEs and seeds.

    The same numbers as ``sae_probes.generate_model_activations.ensure_dataset_activations`` (BOS first, the
    start of too long texts cut off) for the texts of :func:`unique_rows`, but every text is tokenised once
    and batches are of texts of like length. Raises NotRun where there are no sets.
    """
    if not bench.sets:
        raise NotRun("saebench.probing_sets names no set that a probe on all channels can do")
    model, parents = workers.model, {"model": workers.model.hash}
    place = bench.cache / f"model_activations_{probing_cache(model)}"
    files = {name: f"{name}_{model.hook_name}.pt" for name in bench.sets}
    if (known := made(place, KIND, parents)) and set(files.values()) <= known.files.keys():
        return known
    with undisturbed():
        from sae_probes.utils_data import get_numbered_binary_tags

    if unknown := sorted(set(bench.sets) - set(get_numbered_binary_tags())):
        raise UserError(
            f"saebench.probing_sets names {unknown[0]!r}: the sae-probes wheel holds no such set; "
            "dmsae_lib.data.corpus.PROBING_SETS are those used by default."
        )
    with write(place, KIND, parents) as writer:
        for name, activations in workers.run(_activations, {name: name for name in bench.sets}):
            torch.save(torch.from_numpy(activations), writer.path(files[name]))
    return load(place, KIND)


def _activations(model: LanguageModel, name: str) -> np.ndarray:
    with undisturbed():
        return _last_token_residuals(model, unique_rows(name)["prompt"].tolist()).numpy()


def _last_token_residuals(model: LanguageModel, texts: list[str]) -> Tensor:
    """(texts, d_model) float32 on the CPU: after BOS and the text's last context_size - 1 tokens."""
    room, ids = model.config.context_size - 1, model.tokenizer(texts, add_special_tokens=False)["input_ids"]
    rows = [[model.bos, *one[-room:]] for one in ids]
    found = torch.empty(len(rows), model.d_model)
    for batch, resid in residuals_by_length(model, rows):
        found[batch] = resid[range(len(batch)), [len(rows[i]) - 1 for i in batch]]
    return found


def run_probing(sae: SAE, model: LanguageModel, bench: Bench, seed: int) -> Row:
    """sae_bench's sparse probing of an SAE: the k latents of largest mean difference, then a logistic probe.

    Returns ``{"metrics", "mean": {k: scores}, "sets": {set: {k: scores}}}`` with k as text and scores =
    {accuracy, auc, f1 (weighted)} on the held-out texts; ``metrics`` are the mean accuracies,
    ``probe_top<k>``. ``seed`` splits the texts and draws the training set's. Unlike sae_bench's own, no text
    is on both sides, and each set is as large as it has texts. Results are never cached, because sae_probes
    takes up an old result of the same name.
    """
    sets, ks = list(bench.sets), bench.settings.probing_ks
    if max(ks) > sae.d_sae:
        raise UserError(f"saebench.probing_ks is {ks}: an SAE has {sae.d_sae} latents; lower it.")
    prepare_probing(Workers(model), bench)
    adapter = Adapter(sae, model)
    with undisturbed(), _each_text_once(sets), tempfile.TemporaryDirectory() as scratch:
        from sae_bench.evals.sparse_probing_sae_probes import main

        config = main.SparseProbingSaeProbesEvalConfig(
            model_name=probing_cache(model),
            random_seed=seed,
            dataset_names=sets,
            reg_type=REGULARISER,
            ks=ks,
            results_path=scratch,
            model_cache_path=str(bench.cache),
            include_llm_baseline=False,
        )
        found = evaluate(main, config, adapter)
    by_set = {one["dataset_name"]: one["sae_metrics_by_k"] or {} for one in found["eval_result_details"]}
    if by_set.keys() != set(sets) or any(set(by_k) != set(ks) for by_k in by_set.values()):
        raise RuntimeError(f"sae_bench left out, without saying so, some of {sets} or of ks = {ks}.")
    mean = _by_k(found["sae_metrics_by_k"], ks)
    return {
        "metrics": {f"probe_top{k}": scores["accuracy"] for k, scores in mean.items()},
        "mean": mean,
        "sets": {name: _by_k(by_set[name], ks) for name in sets},
    }


def _by_k(found: Row, ks: Sequence[int]) -> dict[str, dict[str, float]]:
    return {str(k): {ours: found[k][theirs] for ours, theirs in METRICS.items()} for k in ks}


def probing_baselines(workers: Workers, bench: Bench) -> Row:
    """What probing reaches without an SAE, on the splits of :func:`run_probing` with the bench's seed.

    ``dense``: sae_probes' own baseline, a logistic probe on all channels of the residual stream.
    ``best_channel``: the one-latent probe on the channel with the largest training AUC (a stronger choice
    than the mean difference by which latents are picked). ``majority``: the share of the larger class; the
    sets are balanced (:func:`unique_rows`). Returns ``{set: {n_train, n_test, channel, dense, best_channel,
    majority}}``.
    """
    prepare_probing(workers, bench)
    baselines = partial(_baselines, folder=bench.cache, seed=bench.settings.seed)
    by_set = dict(workers.run(baselines, {name: name for name in bench.sets}))
    return {name: by_set[name] for name in bench.sets}


def suitable(baselines: Row, at_least: float) -> tuple[str, ...]:
    """The sets whose classes a dense probe tells apart with this accuracy: others hold nothing to find."""
    return tuple(name for name, row in baselines.items() if row["dense"]["accuracy"] >= at_least)


def mean_baselines(baselines: Row, sets: Sequence[str]) -> dict[str, float]:
    """Mean accuracies over ``sets``: {dense, best_channel, majority}."""
    rows = [baselines[name] for name in sets]
    found = {kind: np.mean([row[kind]["accuracy"] for row in rows]) for kind in ("dense", "best_channel")}
    found["majority"] = np.mean([row["majority"] for row in rows])
    return {kind: float(value) for kind, value in found.items()}


def _baselines(model: LanguageModel, name: str, folder: Path, seed: int) -> Row:
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
        best = [int(auc.abs().argmax())]
        dense = find_best_reg(x, y, x_test, y_test, seed=seed)
        single = find_best_reg(x[:, best], y, x_test[:, best], y_test, penalty=REGULARISER, seed=seed)
    share = float(np.mean(y_test))
    results: Row = {"n_train": len(y), "n_test": len(y_test), "channel": best[0]}
    results["majority"] = max(share, 1 - share)
    for kind, probe in (("dense", dense.metrics), ("best_channel", single.metrics)):
        results[kind] = {"accuracy": probe.test_acc, "auc": probe.test_auc, "f1": probe.test_f1}
    return results
