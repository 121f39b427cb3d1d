"""Latents in the JSON form that Neuronpedia takes in: the batches that SAEDashboard 0.8 writes.

SAEDashboard itself (MIT) cannot be installed beside transformer-lens 3 and transformers 5, so the form is
written here. A folder of them is what Neuronpedia's convert-saedashboard-to-neuronpedia-export.py reads.
Fields that we have no number for stay empty, as SAEDashboard leaves them.
"""

from typing import Any

from dmsae_lib.report.layout import Row

EMPTY = ("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1")
EMPTY += ("correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1")
EMPTY += ("correlated_features_indices", "correlated_features_pearson", "correlated_features_l1")
EMPTY += ("decoder_weights_dist",)


def _middles(low: float, high: float, n: int) -> list[float]:
    return [round(low + (i + 0.5) * (high - low) / n, 4) for i in range(n)]


def _activation(atlas: Row, latent: Row, context: Row) -> Row:
    """A context, in the bin that is its tenth."""
    row, start = atlas["text"][context["row"]], context["start"]
    low, high = latent["tenths"][context["tenth"] - 1]
    tokens = [atlas["tokens"][row[start + i]] for i in range(len(context["values"]))]
    share = 1 / sum(ends is not None for ends in latent["tenths"])
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": round(share, 4),
        "tokens": tokens,
        "values": context["values"],
    }


def feature(atlas: Row, latent: Row) -> Row:
    """One latent; ``feature_index`` is its index in the SAE."""
    logits, bins = latent["logits"], latent["histogram"]
    spread = logits["histogram"]
    words: dict[str, list[Any]] = {}
    for name, pairs in (("pos", logits["raises"]), ("neg", logits["lowers"])):
        words |= {f"{name}_str": [text for text, _ in pairs], f"{name}_values": [value for _, value in pairs]}
    return {
        "feature_index": latent["index"],
        **{name: [] for name in EMPTY},
        **words,
        "frac_nonzero": latent["frequency"],
        "freq_hist_data_bar_values": _middles(0, latent["max"], len(bins)),
        "freq_hist_data_bar_heights": bins,
        "logits_hist_data_bar_heights": spread["counts"],
        "logits_hist_data_bar_values": _middles(spread["low"], spread["high"], len(spread["counts"])),
        "n_prompts_total": atlas["n_contexts"],
        "n_tokens_in_prompt": atlas["context_size"],
        "dataset": atlas["data"],
        "activations": [_activation(atlas, latent, context) for context in latent["contexts"]],
    }


def batches(atlas: Row) -> dict[str, Row]:
    """{chain: the batch of its SAE}: one SAE is one source there."""
    found = {}
    for chain in dict.fromkeys(group["chain"] for group in atlas["groups"]):
        names = [group["name"] for group in atlas["groups"] if group["chain"] == chain]
        latents = [latent for latent in atlas["latents"] if latent["group"] in names]
        found[chain] = {
            "model_id": atlas["model"],
            "layer": int(atlas["hook"].split(".")[1]),
            "sae_set": f"dmsae-{chain}",
            "sae_id_suffix": None,
            "features": [feature(atlas, latent) for latent in latents],
        }
    return found
