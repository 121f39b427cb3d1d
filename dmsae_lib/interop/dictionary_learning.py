"""SAEs to and from dictionary_learning 0.1.0.

Its own loader reads a torch pickle (``ae.pt``) and nothing else. Written here is ``ae.safetensors`` with the
same names, a ``config.json`` as its trainers write it, and README.md with the three lines that load them. An
SAE in which one threshold holds for every latent becomes a MatryoshkaBatchTopKSAE, group sizes included; one
with a ReLU core has two and becomes a JumpReluAutoEncoder, which does not subtract b_dec from its input:
b_enc takes that over, at the price of float32 rounding in units of |b_dec W_enc|.

Read are all of its classes, by the names in config.json, from ``ae.safetensors`` or ``ae.pt``. The latter is
the one pickle that this project reads, with ``weights_only=True``: tensors and plain containers, no code.
"""

import json
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmsae_lib.interop.foreign import Foreign
from dmsae_lib.interop.saelens import build, new_folder, open_sae, thresholds
from dmsae_lib.store.artifacts import Artifact, UserError, write_json

WEIGHTS = ("ae.safetensors", "ae.pt")
FILES = {"ae.safetensors", "config.json", "README.md"}
ARGUMENTS = {
    "JumpReluAutoEncoder": "",
    "MatryoshkaBatchTopKSAE": ', k=int(state["k"]), group_sizes=state["group_sizes"].tolist()',
}
MODULES = {
    "JumpReluAutoEncoder": "dictionary_learning.dictionary",
    "MatryoshkaBatchTopKSAE": "dictionary_learning.trainers.matryoshka_batch_top_k",
}
README = """A {dict_class} of dictionary_learning 0.1.0, for {lm_name} after block {layer}, without a pickle. In this folder:

```python
from safetensors.torch import load_file
from {module} import {dict_class}

state = load_file("ae.safetensors")
ae = {dict_class}(*state["W_enc"].shape{arguments})
ae.load_state_dict(state)
```
"""


@torch.no_grad()
def export_dictionary_learning(sae: Artifact | Path | str, target: Path | str) -> Path:
    """Write an SAE of a run for dictionary_learning: ae.safetensors, config.json and README.md, which says
    how to load it.

    ``sae`` is its artefact, inside its run. Returns ``target``. Raises UserError where ``target`` holds
    something else.
    """
    from safetensors.torch import save_file

    ours, about = open_sae(sae)
    state = {
        "W_enc": ours.W_enc,
        "b_enc": ours.b_enc,
        "W_dec": ours.W_dec,
        "b_dec": ours.b_dec,
        "threshold": thresholds(ours),
    }
    trainer = {
        "dict_class": "JumpReluAutoEncoder",
        "activation_dim": ours.d_in,
        "dict_size": ours.d_sae,
        "k": about["k"],
        "layer": int(about["hook_name"].split(".")[1]),
        "lm_name": about["model_name"],
    }
    trainer["submodule_name"] = f"resid_post_layer_{trainer['layer']}"
    if bool((state["threshold"] != state["threshold"][0]).any()):
        state["b_enc"] = (ours.b_enc.double() - ours.b_dec.double() @ ours.W_enc.double()).float()
    else:
        groups = [b - a for a, b in pairwise([0, *about["widths"]])]
        trainer |= {"dict_class": "MatryoshkaBatchTopKSAE", "group_sizes": groups}
        state |= {
            "threshold": state["threshold"][0],
            "k": torch.tensor(about["k"], dtype=torch.int),
            "group_sizes": torch.tensor(groups),
        }
    name = trainer["dict_class"]
    with new_folder(Path(target), FILES) as place:
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in state.items()}, place / "ae.safetensors"
        )
        config = {"trainer": trainer, "buffer": {"ctx_len": about["context_size"]}, "dmsae": about["dmsae"]}
        write_json(place / "config.json", config | {"matryoshka_widths": about["widths"]})
        text = README.format(module=MODULES[name], arguments=ARGUMENTS[name], **trainer)
        (place / "README.md").write_text(text, encoding="utf-8")
    return Path(target)


def _linear(state: dict[str, Tensor], b_dec: str, **biases: str) -> dict[str, Tensor]:
    """The weights of two torch Linear layers by SAELens's names; ``biases`` maps those names to theirs."""
    return {
        "W_enc": state["encoder.weight"].T,
        "W_dec": state["decoder.weight"].T,
        "b_dec": state[b_dec],
        **{ours: state[theirs] for ours, theirs in biases.items()},
    }


def _direct(state: dict[str, Tensor]) -> dict[str, Tensor]:
    threshold = state["threshold"].expand(state["W_enc"].shape[1])
    return {name: state[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")} | {"threshold": threshold}


def _batch_top_k(state: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = _linear(state, "b_dec", b_enc="encoder.bias")
    return weights | {"threshold": state["threshold"].expand(weights["W_enc"].shape[1])}


# dict_class: SAELens's architecture, whether b_dec is subtracted from the input, and the weights by SAELens's
# names (dictionary_learning/dictionary.py and trainers/{top_k,batch_top_k,matryoshka_batch_top_k}.py)
CLASSES: dict[str, tuple[str, bool, Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = {
    "AutoEncoder": ("standard", True, lambda state: _linear(state, "bias", b_enc="encoder.bias")),
    "AutoEncoderNew": ("standard", False, lambda state: _linear(state, "decoder.bias", b_enc="encoder.bias")),
    "JumpReluAutoEncoder": ("jumprelu", False, _direct),
    "BatchTopKSAE": ("jumprelu", True, _batch_top_k),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True, _direct),
    "AutoEncoderTopK": ("topk", True, lambda state: _linear(state, "b_dec", b_enc="encoder.bias")),
    "GatedAutoEncoder": (
        "gated",
        True,
        lambda state: _linear(state, "decoder_bias", b_gate="gate_bias", b_mag="mag_bias", r_mag="r_mag"),
    ),
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
    folder = Path(where).expanduser()
    try:
        config, state = _read(folder)
        trainer = config["trainer"]
        name, layer, model_name = trainer["dict_class"], int(trainer["layer"]), trainer["lm_name"]
    # missing files and keys, broken JSON, and whatever safetensors and torch raise
    except Exception as error:
        text = " ".join(str(error).split()).rstrip(".")[:160]
        raise UserError(
            f"{where} is no SAE of dictionary_learning ({type(error).__name__}: {text}); it must hold "
            f"config.json with trainer.dict_class, layer and lm_name, and {' or '.join(WEIGHTS)}."
        ) from error
    if name not in CLASSES:
        raise UserError(
            f"{where} is a {name}: of dictionary_learning, only {', '.join(CLASSES)} can be used here."
        )
    submodule = trainer.get("submodule_name") or "resid_post"
    if not submodule.startswith("resid_post"):
        raise UserError(f"{where} reads {submodule}: use an SAE of the residual stream after a block.")
    architecture, subtracts, weights_of = CLASSES[name]
    try:
        weights = weights_of(state)
        settings = {"k": int(state["k"])} if architecture == "topk" else {}
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{where} lacks weights of a {name} ({error}): get its files again.") from error
    if architecture == "jumprelu" and bool((weights["threshold"] < 0).all()):
        raise UserError(
            f"{where} has no threshold yet: train it past threshold_start_step, or set the threshold before "
            "saving it."
        )
    widths = config.get("matryoshka_widths")
    if "group_sizes" in state:
        widths = list(accumulate(state["group_sizes"].tolist()))
    metadata = {
        "model_name": model_name,
        "hook_name": f"blocks.{layer}.hook_resid_post",
        "hook_head_index": None,
        "prepend_bos": True,
        "context_size": (config.get("buffer") or {}).get("ctx_len"),
        "model_from_pretrained_kwargs": {},
        "training_architecture": name,
        "training_architecture_details": {"matryoshka_widths": widths},
        "dmsae": config.get("dmsae"),
    }
    return Foreign(
        build(architecture, weights, metadata, apply_b_dec_to_input=subtracts, **settings), str(where)
    )
