"""SAEs to and from dictionary_learning 0.1.0.

Its own loader reads a torch pickle (``ae.pt``) and nothing else. Written here is ``ae.safetensors`` with the
same names, a ``config.json`` as its trainers write it, and README.md with the three lines that load them. An
SAE in which one threshold holds for every latent becomes a MatryoshkaBatchTopKSAE, group sizes included; one
with a ReLU core has two and becomes a JumpReluAutoEncoder, which does not subtract b_dec from its input:
b_enc takes that over, at the price of float32 rounding in units of |b_dec W_enc|.

Read are all of its classes, by the names in config.json, from ``ae.safetensors`` or ``ae.pt``. The latter is
the one pickle that this project reads, with ``weights_only=True``: tensors and plain containers, no code.
SAELens's own loader of this format takes it from the Hub alone, and without group sizes and checks.
"""

import json
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmsae_lib.interop.foreign import Foreign
from dmsae_lib.interop.saelens import build, new_folder, open_sae
from dmsae_lib.store.artifacts import Artifact, UserError, write_json
from dmsae_lib.store.atomic import explain_errors

WEIGHTS = ("ae.safetensors", "ae.pt")
FILES = {"ae.safetensors", "config.json", "README.md"}
README = """\
A {dict_class} of dictionary_learning 0.1.0, for {lm_name} after block {layer}, without a pickle.
In this folder:

```python
from safetensors.torch import load_file
from dictionary_learning.{module} import {dict_class}

state = load_file("ae.safetensors")
ae = {dict_class}(*state["W_enc"].shape{arguments})
ae.load_state_dict(state)
```
"""


@torch.no_grad()
def export_dictionary_learning(sae: Artifact | Path | str, target: Path | str) -> Path:
    """Write an SAE of a run for dictionary_learning, with the README that says how to load it.

    ``sae`` is its artefact, inside its run. Returns ``target``. Raises UserError where ``target`` holds
    something else.
    """
    from safetensors.torch import save_file

    state, about = open_sae(sae)
    (d_in, d_sae), threshold = state["W_enc"].shape, state["threshold"]
    lm_name, layer = about["model_name"], int(about["hook_name"].split(".")[1])
    widths, k = (about["training_architecture_details"][name] for name in ("matryoshka_widths", "k"))
    trainer = {"activation_dim": d_in, "dict_size": d_sae, "k": k, "layer": layer, "lm_name": lm_name}
    trainer["submodule_name"] = f"resid_post_layer_{layer}"
    if bool((threshold != threshold[0]).any()):
        dict_class, module, arguments = "JumpReluAutoEncoder", "dictionary", ""
        state["b_enc"] = (state["b_enc"].double() - state["b_dec"].double() @ state["W_enc"].double()).float()
    else:
        dict_class, module = "MatryoshkaBatchTopKSAE", "trainers.matryoshka_batch_top_k"
        arguments = ', k=int(state["k"]), group_sizes=state["group_sizes"].tolist()'
        trainer["group_sizes"] = [b - a for a, b in pairwise([0, *widths])]
        state |= {"threshold": threshold[0], "k": torch.tensor(k, dtype=torch.int)}
        state["group_sizes"] = torch.tensor(trainer["group_sizes"])
    config = {
        "trainer": {"dict_class": dict_class, **trainer},
        "buffer": {"ctx_len": about["context_size"]},
        "dmsae": about["dmsae"],
        "matryoshka_widths": widths,
    }
    text = README.format(dict_class=dict_class, module=module, arguments=arguments, **trainer)
    with new_folder(Path(target), FILES) as place:
        save_file({name: value.contiguous() for name, value in state.items()}, place / "ae.safetensors")
        write_json(place / "config.json", config)
        (place / "README.md").write_text(text, encoding="utf-8")
    return Path(target)


DIRECT = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
LAYERS = {"W_enc": "encoder.weight", "W_dec": "decoder.weight"}  # of torch: held transposed
BIASED = LAYERS | {"b_enc": "encoder.bias"}
GATED = LAYERS | {"b_dec": "decoder_bias", "b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}
# dict_class: SAELens's architecture, whether b_dec is subtracted from the input, and the weights' names, here
# and there (dictionary_learning/dictionary.py and trainers/{top_k,batch_top_k,matryoshka_batch_top_k}.py)
CLASSES: dict[str, tuple[str, bool, dict[str, str]]] = {
    "AutoEncoder": ("standard", True, BIASED | {"b_dec": "bias"}),
    "AutoEncoderNew": ("standard", False, BIASED | {"b_dec": "decoder.bias"}),
    "JumpReluAutoEncoder": ("jumprelu", False, DIRECT),
    "BatchTopKSAE": ("jumprelu", True, BIASED | {"b_dec": "b_dec", "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True, DIRECT),
    "AutoEncoderTopK": ("topk", True, BIASED | {"b_dec": "b_dec"}),
    "GatedAutoEncoder": ("gated", True, GATED),
}


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the state dict."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (folder / "ae.safetensors").is_file():
        return config, load_file(folder / "ae.safetensors")
    return config, torch.load(folder / "ae.pt", map_location="cpu", weights_only=True)


def load_dictionary_learning(where: Path | str) -> Foreign:
    """An SAE from a folder of dictionary_learning: config.json with ae.safetensors or ae.pt.

    Raises UserError where a file is missing, damaged or a pickle of more than tensors, or the SAE cannot be
    used here.
    """
    remedy = (
        f"it must hold {' or '.join(WEIGHTS)}, and config.json with trainer.dict_class, layer and lm_name"
    )
    with explain_errors(f"{where} is no SAE of dictionary_learning", remedy):
        config, state = _read(Path(where).expanduser())
        trainer = config["trainer"]
        name, layer, model_name = trainer["dict_class"], int(trainer["layer"]), trainer["lm_name"]
    if name not in CLASSES:
        raise UserError(f"{where} is a {name}: only {', '.join(CLASSES)} of dictionary_learning can be used.")
    submodule = trainer.get("submodule_name") or "resid_post"
    if not submodule.startswith("resid_post"):
        raise UserError(f"{where} reads {submodule}: use an SAE of the residual stream after a block.")
    architecture, subtracts, names = CLASSES[name]
    settings, widths = {"apply_b_dec_to_input": subtracts}, config.get("matryoshka_widths")
    if "group_sizes" in state:
        widths = list(accumulate(state["group_sizes"].tolist()))
    metadata = {
        "model_name": model_name,
        "hook_name": f"blocks.{layer}.hook_resid_post",
        "context_size": (config.get("buffer") or {}).get("ctx_len"),
        "training_architecture": name,
        "training_architecture_details": {"matryoshka_widths": widths},
        "dmsae": config.get("dmsae"),
    }
    with explain_errors(f"{where} lacks weights of a {name}", "get its files again"):
        weights = {ours: state[theirs] for ours, theirs in names.items()}
        if names is not DIRECT:
            weights |= {name: weights[name].T for name in LAYERS}
        if architecture == "topk":
            settings["k"] = int(state["k"])
        if architecture == "jumprelu":
            weights["threshold"] = weights["threshold"].expand(weights["W_enc"].shape[1])
            if bool((weights["threshold"] < 0).all()):
                raise UserError(
                    f"{where} has no threshold yet: train it past threshold_start_step, or set it."
                )
        sae = build(architecture, weights, metadata, **settings)
    return Foreign(sae, str(where))
