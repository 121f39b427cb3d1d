"""sae_bench's targeted probe perturbation (TPP) and spurious correlation removal (SCR) on embedded texts.

Probes on the mean residual of a text tell classes apart (:mod:`dmsae_lib.saebench.class_pairs`). TPP: what
ablating the n latents of largest effect on one class's probe takes from that probe's accuracy, less what it
takes from the other classes' probes. SCR: a probe learns two attributes that always come together; what share
of its lost accuracy on one of them comes back when the n latents of the other are ablated.

Probes, effects, ablations and metrics are sae_bench 0.6.0's functions, with its settings but for the number
of texts: at most 1200 train and 600 test a probe (4000 and 1000 there), in as many steps. Ours is what they
work on: since decoding is linear, a text's mean residual after an ablation is its mean residual less its mean
activations times their decoder rows. So every token is encoded once, and sae_bench's functions see texts of
one position, :class:`Pooled`.

**Padding**: sae_bench sets padding and BOS to zero, but its ablation encodes the zeros too and counts them in
a text's mean. An SAE that subtracts b_dec has large activations at zero (about as large as on a text's
tokens), so that short texts measure the padding. Here the tokens of the text alone count; what sae_bench
computes stands beside it as ``padded``.

``seed`` governs the texts drawn, their split into training and test, the probes (initialisation, order of the
texts) and the negatives that they are tested on. An audit found both evals unreliable at the settings in use
(arXiv 2605.18229): compare several seeds.
"""

import importlib.metadata
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.data.workers import Workers
from dmsae_lib.saebench.adapter import SAE, Adapter, cache_name, residuals_by_length, undisturbed
from dmsae_lib.saebench.class_pairs import SCR_PAIRS, TPP_SETS, Texts, probing_texts, scr_texts, tpp_texts
from dmsae_lib.saebench.runner import Bench, Row
from dmsae_lib.store.artifacts import Artifact, hash_json, load, made, write

KIND = "perturbation_probes"
NS = (2, 5, 10, 20, 50, 100)  # latents ablated; sae_bench adds 500
CONTEXT = 128  # tokens per text, BOS included: sae_bench's context_length
# sae_bench's; the batch decides how biased SCR's probe is
PROBE = {"batch_size": 16, "lr": 1e-3, "l1_penalty": 1e-3}
PROBE_STEPS = 5000  # of training a probe: sae_bench's 20 epochs of 4000 texts in batches of 16
TEST_BATCH, TOKENS = 500, 8192  # texts per test batch (sae_bench's), tokens encoded at a time
# sae_bench has no gate here: that of its absorption eval (F1 of a ground-truth probe), classes being balanced
GATE = 0.6
SIZES = ("train_texts", "test_texts", "tokens_per_text", "in_probing_sets")  # shown with a set's scores
# sae_bench's names
ATTRIBUTES, BIASED = ("professor / nurse", "male / female"), "male_professor / female_nurse"


def prepare_perturbation(workers: Workers, bench: Bench, seed: int, scr: bool) -> dict[str, Artifact]:
    """What SAEs share, by set of texts: residuals at the hook and probes on their means, made once.

    Each artefact holds ``residuals`` (tokens, d_model), without BOS; ``lengths`` (texts,); ``train/<class>``
    and ``test/<class>``, numbers of texts; ``weight/<class>`` (1, d_model) and ``bias/<class>`` (1,). Its
    folder's name covers model, hook, texts and settings, so nothing old is ever taken up.
    """
    eval_name, names, texts_of = ("scr", SCR_PAIRS, scr_texts) if scr else ("tpp", TPP_SETS, tpp_texts)
    model, version = workers.model, importlib.metadata.version("sae-bench")
    parents = {"model": model.hash}
    with undisturbed():
        texts = {name: texts_of(name, seed) for name in names}
    places = {}
    for name in names:
        decisive = hash_json([model.hook_name, CONTEXT, texts[name], PROBE, PROBE_STEPS, seed, version])
        places[name] = bench.cache / f"{eval_name}_{name}_{decisive[:12]}_{cache_name(model)}"
    found = {name: made(place, KIND, parents) for name, place in places.items()}
    missing = {name: texts[name] for name in names if found[name] is None}
    for name, (arrays, record) in workers.run(partial(_shared, scr=scr, seed=seed), missing):
        with write(places[name], KIND, parents) as writer:
            tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
            writer.tensors("shared.safetensors", tensors)
            writer.json("shared.json", record)
        found[name] = load(places[name], KIND)
    return found


def _shared(model: LanguageModel, texts: Texts, scr: bool, seed: int) -> tuple[dict[str, np.ndarray], Row]:
    every = list(dict.fromkeys(t for half in texts.values() for found in half.values() for t in found))
    number = {text: i for i, text in enumerate(every)}
    context = min(CONTEXT, model.config.context_size)
    residuals = _residuals(model, every, context)
    means = torch.stack([x.mean(0) for x in residuals])
    rows = {
        split: {label: [number[text] for text in found] for label, found in half.items()}
        for split, half in texts.items()
    }
    train, test = ({label: means[i] for label, i in rows[split].items()} for split in ("train", "test"))
    classes = [*ATTRIBUTES, BIASED] if scr else list(texts["train"])
    size = len(rows["train"][classes[0]])
    epochs = math.ceil(PROBE_STEPS * PROBE["batch_size"] / (2 * size))
    with undisturbed():
        from sae_bench.evals.scr_and_tpp.main import get_probe_test_accuracy
        from sae_bench.evals.sparse_probing.probe_training import prepare_probe_data, train_probe_gpu

        torch.manual_seed(seed)
        torch.set_grad_enabled(True)
        # train_probe_on_activations does the same, but for SCR trains each probe twice, once swapped
        how = {"dim": model.d_model, "epochs": epochs, "early_stopping_patience": epochs} | PROBE
        probes = {}
        for label in classes:
            given = *prepare_probe_data(train, label, scr), *prepare_probe_data(test, label, scr)
            probes[label] = train_probe_gpu(*given, **how)[0]
        accuracy = get_probe_test_accuracy(probes, classes, test, TEST_BATCH, scr)
    tensors = {"residuals": torch.cat(residuals), "lengths": torch.tensor([len(x) for x in residuals])}
    for split, half in rows.items():
        tensors |= {f"{split}/{label}": torch.tensor(found) for label, found in half.items()}
    for label, probe in probes.items():
        tensors |= {f"weight/{label}": probe.net.weight.detach(), f"bias/{label}": probe.net.bias.detach()}
    known = probing_texts()
    record = {
        "classes": classes,
        "probe_accuracy": accuracy,
        "padded_to": context,
        "train_texts": 2 * size,
        "test_texts": 2 * len(rows["test"][classes[0]]),
        "probe_epochs": epochs,
        "tokens_per_text": len(tensors["residuals"]) / len(every),
        "in_probing_sets": sum(text in known for text in every) / len(every),
    }
    return {key: tensor.numpy() for key, tensor in tensors.items()}, record


def _residuals(model: LanguageModel, texts: list[str], context: int) -> list[Tensor]:
    """Each text's residuals (tokens, d_model) on the CPU, of its beginning, without BOS and outliers."""
    ids = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
    rows = [[model.bos, *one[: context - 1]] for one in ids]
    found: dict[int, Tensor] = {}
    for batch, resid in residuals_by_length(model, rows):
        for i, one in zip(batch, resid):
            x = one[1 : len(rows[i])]
            found[i] = x[~(x.norm(dim=1) > model.outlier_limit)].clone()
    return [found[i] for i in range(len(rows))]


class Pooled:
    """An SAE on mean residuals, for sae_bench's ablations: one more channel holds the text's number.

    ``encode`` looks up the text's mean activations; what an ablation takes away is linear in them, so the
    outcome is the mean over the tokens of what ablating token by token gives. ``W_dec`` is (d_sae, d_in + 1),
    its last column 0.
    """

    def __init__(self, adapter: Adapter, means: Tensor):
        self.means, self.W_dec = means, F.pad(adapter.W_dec.float(), (0, 1))

    def encode(self, x: Tensor) -> Tensor:
        return self.means[x[..., -1].long()]

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.W_dec  # b_dec cancels: sae_bench adds the reconstruction's error again


def run_perturbation(sae: SAE, model: LanguageModel, bench: Bench, seed: int, scr: bool) -> Row:
    """``{"metrics": {tpp_threshold_n_total_metric}, "sets": {set: ...}, ...}``, means over the sets in
    TPP_SETS; for SCR ``scr_metric_threshold_n`` over SCR_PAIRS, and ``"ties"``, the pairs without a metric.

    Needs a linear decoder, f @ W_dec + b_dec. Where a class's probe is right on fewer than GATE of the test
    texts, its set means nothing and is left out; with none left the result is ``{"metrics": {}, "not_run":
    why, ...}``. A pair of SCR is left out, too, where bias costs the probe no more accuracy than two standard
    errors of it: there is nothing to give back. A pair's metric is None, and is not in the mean, if the
    biased probe is equally good at both attributes.
    """
    adapter = Adapter(sae, model)
    shared = prepare_perturbation(Workers(model), bench, seed, scr)
    records = {name: artifact.json("shared.json") for name, artifact in shared.items()}
    poor = {name: why for name, record in records.items() if (why := _poor(record, scr))}
    accuracy = {name: record["probe_accuracy"] for name, record in records.items()}
    detail: Row = {"probe_accuracy": accuracy, "left_out": poor}
    if len(poor) == len(shared):
        return {"metrics": {}, "not_run": "; ".join(f"{name}: {why}" for name, why in poor.items())} | detail
    ns = [n for n in NS if n < sae.d_sae]
    sets = {
        name: {key: records[name][key] for key in SIZES} | _score(adapter, shared[name], ns, scr, seed)
        for name in shared
        if name not in poor
    }
    keys = [f"scr_metric_threshold_{n}" if scr else f"tpp_threshold_{n}_total_metric" for n in ns]

    def mean(kind: str) -> dict[str, float | None]:
        values = {key: [one[kind][key] for one in sets.values() if key in one[kind]] for key in keys}
        return {key: float(np.mean(found)) if found else None for key, found in values.items()}

    if scr:
        detail["ties"] = [name for name, one in sets.items() if keys[0] not in one["scores"]]
    return {"metrics": mean("scores"), "padded": mean("padded"), "sets": sets} | detail


def _poor(record: Row, scr: bool) -> str:
    """Why a set's probes are too poor for the eval to mean something; "" if they are not."""
    accuracy = record["probe_accuracy"]
    worst = min(ATTRIBUTES if scr else record["classes"], key=lambda label: accuracy[label])
    if accuracy[worst] < GATE:
        return f"the probe of {worst} is right on {accuracy[worst]:.3f} of the test texts, less than {GATE}"
    if scr:
        biased = {label: accuracy[f"{BIASED} probe on {label} data"] for label in ATTRIBUTES}
        scored = min(ATTRIBUTES, key=lambda label: biased[label])
        lost, error = accuracy[scored] - biased[scored], 0.5 / math.sqrt(record["test_texts"])
        if lost <= 2 * error:
            return f"bias costs the probe of {scored} {lost:.3f} of its accuracy (standard error {error:.3f})"
    return ""


@torch.no_grad()
def _score(adapter: Adapter, shared: Artifact, ns: list[int], scr: bool, seed: int) -> Row:
    """sae_bench's metrics of one set: ``scores`` of the texts' own tokens, ``padded`` as it pads them."""
    record = shared.json("shared.json")
    held = {key: tensor.to(adapter.device) for key, tensor in shared.tensors("shared.safetensors").items()}
    residuals, lengths, classes = held["residuals"], held["lengths"], record["classes"]
    x = _text_means(residuals, lengths, lambda part: part)
    f = _text_means(residuals, lengths, lambda part: adapter.encode(part).float())
    zeros = (record["padded_to"] - lengths) / lengths  # BOS is one of them
    padded = f + zeros[:, None] * adapter.encode(torch.zeros_like(residuals[:1])).float()
    numbered = torch.cat([x, torch.arange(len(x), device=x.device)[:, None]], dim=1)[:, None]
    train, test = (
        {key.removeprefix(split): numbered[held[key]] for key in sorted(held) if key.startswith(split)}
        for split in ("train/", "test/")
    )
    with undisturbed():
        from sae_bench.evals.scr_and_tpp import main as bench
        from sae_bench.evals.sparse_probing.probe_training import Probe

        probes = {label: Probe(numbered.shape[-1], torch.float32).to(adapter.device) for label in classes}
        for label, probe in probes.items():
            probe.net.weight.copy_(F.pad(held[f"weight/{label}"], (0, 1)))
            probe.net.bias.copy_(held[f"bias/{label}"])
        torch.manual_seed(seed)
        effects = bench.get_all_node_effects_for_one_sae(
            Pooled(adapter, f), probes, classes, scr, train, TEST_BATCH
        )

        def scores(activations: Tensor) -> dict[str, float]:
            torch.manual_seed(seed)
            accuracy = bench.perform_feature_ablations(
                probes, Pooled(adapter, activations), TEST_BATCH, test, effects, ns, classes, TEST_BATCH, scr
            )
            if scr:
                return bench.get_scr_plotting_dict(accuracy, record["probe_accuracy"])
            return bench.create_tpp_plotting_dict(accuracy, record["probe_accuracy"])[0]

        return {"scores": scores(f), "padded": scores(padded)}


def _text_means(residuals: Tensor, lengths: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean of a function of the residuals over each text's tokens: (texts, the function's width)."""
    text = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    total = torch.zeros(len(lengths), function(residuals[:1]).shape[1], device=residuals.device)
    for start in range(0, len(residuals), TOKENS):
        part = slice(start, start + TOKENS)
        total.index_add_(0, text[part], function(residuals[part]))
    return total / lengths[:, None]
