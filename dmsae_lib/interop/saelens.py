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
from dmsae_lib.sae.model import MatryoshkaSAE, load_sae
from dmsae_lib.store import artifacts
from dmsae_lib.store.artifacts import Artifact, UserError
from dmsae_lib.store.atomic import claimed, put

FILES = {"cfg.json", "sae_weights.safetensors"}  # of a SAELens folder


def open_sae(sae: Artifact | Path | str) -> tuple[MatryoshkaSAE, dict[str, Any]]:
    """An SAE of a run, for unnormalised activations, and what another library should know of it.

    ``sae`` is its artefact, below the run's folder, from where the harvest's record is read too. Returned
    beside it: model_name, hook_name, context_size, k, widths (cumulative sizes of the nested reconstructions,
    core included) and ``dmsae``, the lineage. Raises UserError where the run's harvest is missing or another
    one, or the SAE is one that was trained elsewhere, kept to compare with.
    """
    sae = sae if isinstance(sae, Artifact) else artifacts.load(Path(sae), "sae")
    if "sae.json" not in sae.files:
        raise UserError(
            f"{sae.folder} was trained elsewhere and is kept as a SAELens folder: load it from there."
        )
    record, metrics, sizes = _harvest_record(sae), sae.json("metrics.json"), sae.json("sae.json")
    found = load_sae(sae)
    # one trained elsewhere has its L0 alone
    name, k = record["model"]["name"], metrics.get("k", round(metrics["L0"]["total"]))
    lineage = {
        "sae": sae.hash,
        "parents": sae.parents,
        "model_hash": record["model"]["hash"],
        "scale": sizes["scale"],
        "core_size": sizes["n_core"],
        "core_sparsity": sizes["core_sparsity"],
        "prefixes": sizes["prefixes"],
        "k": k,
        "L0": metrics["L0"],
        **{key: metrics[key] for key in ("core", "cycle", "seed") if key in metrics},
    }
    return found, {
        # a path means nothing elsewhere
        "model_name": Path(name).name if Path(name).expanduser().is_dir() else name,
        "hook_name": record["model"]["hook_name"],
        "context_size": record["model"]["context_size"],
        "k": k,
        "widths": [found.n_core + m for m in found.prefixes],
        "dmsae": lineage,
    }


def _harvest_record(sae: Artifact) -> dict[str, Any]:
    """record.json of the harvest that ``sae`` was trained on, checked alone: its shards may be gigabytes."""
    for run in sae.folder.resolve().parents:
        harvest = run / "harvest"
        with contextlib.suppress(OSError, ValueError):
            manifest = artifacts.unseal(harvest / "manifest.json")
            if manifest["hash"] == sae.parents["harvest"]:
                if artifacts.sha256_file(harvest / "record.json") == manifest["files"]["record.json"]:
                    return Artifact(harvest, manifest, {}).json("record.json")
    raise UserError(
        f"The harvest that {sae.folder} was trained on is not in a folder above it, and only its record "
        "names the "
        "model: export the SAE from inside its run, runs/<run>."
    )


def thresholds(sae: MatryoshkaSAE) -> Tensor:
    """(d_sae,) float32: the activation that a latent must exceed to count; 0 for a ReLU core."""
    found = sae.threshold.detach().float().expand(sae.d_sae).clone()
    if sae.core_sparsity == "relu":
        found[: sae.n_core] = 0
    return found


@contextlib.contextmanager
def new_folder(target: Path, files: set[str]) -> Iterator[Path]:
    """A folder to fill that becomes ``target`` at once; UserError where that holds anything but an earlier
    ``files``."""
    with artifacts.explain_os_errors(target):
        if target.exists() and (not target.is_dir() or {path.name for path in target.iterdir()} - files):
            raise UserError(f"{target} holds something else: export to a folder that does not exist yet.")
        with claimed(target) as place:
            yield place
            put(place, target)


def build(architecture: str, weights: dict[str, Tensor], metadata: dict[str, Any], **settings: Any) -> Any:
    """A sae_lens SAE on the CPU from its own names of things; float32."""
    from sae_lens import SAE

    d_in, d_sae = weights["W_enc"].shape
    # no random weights
    sae = SAE.from_dict(
        {
            "architecture": architecture,
            "d_in": d_in,
            "d_sae": d_sae,
            "device": "meta",
            "metadata": metadata,
            **settings,
        }
    )
    state = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in weights.items()}
    sae.load_state_dict(state, assign=True)
    return sae.to(device="cpu").requires_grad_(False)


def export_saelens(sae: Artifact | Path | str, target: Path | str) -> Path:
    """Write an SAE of a run as a SAELens folder, which ``sae_lens.SAE.load_from_disk(target)`` and sae_bench
    can use.

    ``sae`` is its artefact, inside its run. metadata in cfg.json has what SAELens itself asks for (model,
    hook, context, BOS), the nested widths where SAELens puts its own
    (``training_architecture_details.matryoshka_widths``), and our lineage under ``dmsae``. Returns
    ``target``. Raises UserError where ``target`` holds something else.
    """
    ours, about = open_sae(sae)
    metadata = {
        "model_name": about["model_name"],
        "hook_name": about["hook_name"],
        "hook_head_index": None,
        "context_size": about["context_size"],
        "prepend_bos": True,
        "model_from_pretrained_kwargs": {},
        "training_architecture": "matryoshka_batchtopk",
        "training_architecture_details": {"matryoshka_widths": about["widths"], "k": about["k"]},
        "dmsae": about["dmsae"],
    }
    weights = {name: getattr(ours, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")} | {
        "threshold": thresholds(ours)
    }
    theirs = build("jumprelu", weights, metadata, apply_b_dec_to_input=True, normalize_activations="none")
    with new_folder(Path(target), FILES) as place:
        theirs.save_model(place)
    return Path(target)


def load_saelens(where: Path | str) -> Foreign:
    """An SAE from a SAELens folder, or from the Hub as ``release:sae_id`` (``owner/repository:folder`` works,
    too).

    Raises UserError where there is none, the Hub does not give it, or it cannot be used here.
    """
    from sae_lens import SAE

    release, colon, sae_id = str(where).partition(":")
    folder = Path(where).expanduser()
    try:
        if folder.is_dir():
            sae = SAE.load_from_disk(folder, dtype="float32")
        elif colon:
            sae = SAE.from_pretrained(release, sae_id)
        else:
            raise FileNotFoundError("there is no such folder")
    # missing files, broken JSON, unknown architectures, the network: each raises another kind
    except Exception as error:
        text = " ".join(str(error).split()).rstrip(".")[:160]
        raise UserError(
            f"{where} is no SAE that SAELens can load ({type(error).__name__}: {text}); give a folder with "
            "cfg.json "
            "and sae_weights.safetensors, or release:sae_id."
        ) from error
    return Foreign(sae, str(where))
