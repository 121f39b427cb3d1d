"""SAEs to and from SAELens: what `sae_lens.SAE.load_from_disk`, and with it sae_bench, can read.

Written is the JumpReLU form of the SAE for unnormalised activations: ours keeps a latent where ReLU(h) >
threshold, theirs where h > threshold, which is the same for thresholds >= 0; a ReLU core has threshold 0. The
normaliser goes into biases and thresholds alone (:meth:`MatryoshkaSAE.folded`). Thresholds are float64 here
and rounded to float32 there, as :meth:`MatryoshkaSAE.select` itself does before it compares, so both decide
alike on the same pre-activation, also at equality. What is left is the rounding of the matrix product: a
pre-activation within it of the threshold (a relative 1e-6 or so) can come out on the other side.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmsae_lib.interop.foreign import Foreign
from dmsae_lib.sae.model import load_folded
from dmsae_lib.store import artifacts
from dmsae_lib.store.artifacts import Artifact, UserError
from dmsae_lib.store.atomic import explain_errors, replacing

FILES = {"cfg.json", "sae_weights.safetensors"}  # of a SAELens folder
DEFAULTS = {"hook_head_index": None, "prepend_bos": True, "model_from_pretrained_kwargs": {}}  # of metadata


def open_sae(where: Artifact | Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An SAE of a run as a JumpReLU SAE for unnormalised activations: weights, metadata in SAELens's names.

    ``where`` is its artefact, below its run's folder, from where the harvest's record is read too. Weights
    are W_enc, W_dec, b_enc, b_dec and threshold, (d_sae,) float32: what a latent must exceed to count, 0 for
    a ReLU core. Metadata has the nested widths, core included, where SAELens puts its own
    (``training_architecture_details.matryoshka_widths``), k beside them, and our lineage under ``dmsae``.
    Raises UserError where the run's harvest is missing or another one, or the SAE was trained elsewhere.
    """
    artifact = where if isinstance(where, Artifact) else artifacts.load(Path(where), "sae")
    if "sae.json" not in artifact.files:
        raise UserError(f"{artifact.folder} was trained elsewhere and is kept as a SAELens folder: use that.")
    model, metrics, sizes = _model_of(artifact), artifact.json("metrics.json"), artifact.json("sae.json")
    sae, name = load_folded(artifact), model["name"]
    weights = {key: getattr(sae, key) for key in ("W_enc", "W_dec", "b_enc", "b_dec")}
    weights["threshold"] = sae.threshold.float().expand(sae.d_sae).clone()
    if sae.core_sparsity == "relu":
        weights["threshold"][: sae.n_core] = 0
    k = metrics.get("k", round(metrics["L0"]["total"]))  # one trained elsewhere has its L0 alone
    lineage = {"sae": artifact.hash, "parents": artifact.parents, "model_hash": model["hash"], "k": k}
    lineage |= {key: sizes[key] for key in ("scale", "core_sparsity", "prefixes")} | {"core_size": sae.n_core}
    lineage |= {key: metrics[key] for key in ("L0", "arm", "cycle", "seed") if key in metrics}
    widths = [sae.n_core + m for m in sae.prefixes]
    return weights, {
        # a path means nothing elsewhere
        "model_name": Path(name).name if Path(name).expanduser().is_dir() else name,
        "hook_name": model["hook_name"],
        "context_size": model["context_size"],
        "training_architecture": "matryoshka_batchtopk",
        "training_architecture_details": {"matryoshka_widths": widths, "k": k},
        "dmsae": lineage,
    }


def _model_of(sae: Artifact) -> dict[str, Any]:
    """The model, by the record of the harvest that ``sae`` was trained on (never its shards)."""
    for run in sae.folder.resolve().parents:
        harvest = run / "harvest"
        with contextlib.suppress(OSError, ValueError):
            manifest = artifacts.unseal(harvest / "manifest.json")
            digest = artifacts.sha256_file(harvest / "record.json")
            if (manifest["hash"], manifest["files"]["record.json"]) == (sae.parents["harvest"], digest):
                return Artifact(harvest, manifest, {}).json("record.json")["model"]
    raise UserError(
        f"The harvest that {sae.folder} was trained on, which names the model, is not in a folder above it: "
        "export the SAE from inside its run, runs/<run>."
    )


@contextlib.contextmanager
def new_folder(target: Path, files: set[str]) -> Iterator[Path]:
    """A folder to fill that becomes ``target`` at once; UserError where more than ``files`` lies there."""
    with artifacts.explain_os_errors(target):
        if target.exists() and (not target.is_dir() or {path.name for path in target.iterdir()} - files):
            raise UserError(f"{target} holds something else: export to a folder that does not exist yet.")
        with replacing(target) as (place,):
            yield place


def build(architecture: str, weights: dict[str, Tensor], metadata: dict[str, Any], **settings: Any) -> Any:
    """A sae_lens SAE on the CPU from its own names of things; float32."""
    from sae_lens import SAE

    d_in, d_sae = weights["W_enc"].shape
    sizes = {"d_in": d_in, "d_sae": d_sae, "device": "meta"}  # no random weights
    sae = SAE.from_dict({"architecture": architecture, "metadata": DEFAULTS | metadata, **sizes, **settings})
    state = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in weights.items()}
    sae.load_state_dict(state, assign=True)
    return sae.to(device="cpu").requires_grad_(False)


def export_saelens(sae: Artifact | Path | str, target: Path | str) -> Path:
    """Write an SAE of a run as a SAELens folder, which ``sae_lens.SAE.load_from_disk`` and sae_bench can use.

    ``sae`` is its artefact, inside its run. Returns ``target``. Raises UserError where ``target`` holds
    something else, and as :func:`open_sae` does.
    """
    theirs = build("jumprelu", *open_sae(sae), apply_b_dec_to_input=True)
    with new_folder(Path(target), FILES) as place:
        theirs.save_model(place)
    return Path(target)


def load_saelens(where: Path | str) -> Foreign:
    """An SAE from a SAELens folder, or from the Hub by ``release:sae_id`` or ``owner/repository:folder``.

    Raises UserError where there is none, the Hub does not give it, or it cannot be used here.
    """
    from sae_lens import SAE

    release, colon, sae_id = str(where).partition(":")
    folder = Path(where).expanduser()
    remedy = "give a folder with cfg.json and sae_weights.safetensors, or release:sae_id"
    with explain_errors(f"{where} is no SAE that SAELens can load", remedy):
        if colon and not folder.is_dir():
            sae = SAE.from_pretrained(release, sae_id)
        else:
            sae = SAE.load_from_disk(folder, dtype="float32")
    return Foreign(sae, str(where))
