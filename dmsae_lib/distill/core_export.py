"""From a finished run to a core that travels: see :mod:`dmsae_lib.distill.core_format`."""

import hashlib
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import dmsae_lib
from dmsae_lib.config.run import Run
from dmsae_lib.distill.core import final_core, read_core
from dmsae_lib.distill.core_format import FILES, check_record, write_files
from dmsae_lib.distill.core_record import FORMAT, SCHEMA_VERSION, Distilled, ModelEntry, Parents
from dmsae_lib.store import artifacts
from dmsae_lib.store.artifacts import ArtifactError, sealed
from dmsae_lib.store.atomic import json_text


def _without_path(name: str) -> str:
    """A model's or text's name as others may see it: of a local path the last part alone."""
    path = Path(name).expanduser()
    local = path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    return path.absolute().name if local else name


def export_core(
    run: Run,
    folder: Path | None = None,
    cycle: int | None = None,
    reading: str | None = None,
    chain: str = "main",
) -> Path:
    """Write a core of ``run`` as a folder in this format; the same core gives the same bytes.

    Args:
        folder: runs/<run>/core by default; a core that is there is replaced.
        cycle: the last by default.
        reading: of "the final core" (core.READINGS). By default distill.final_core for the last cycle, whose
            members are retrained with, and all of C(cycle) for another.

    Raises ArtifactError where a stage is missing or was made from something else than what lies beside it
    now, UserError where no latent fits the reading, or the folder holds other things.
    """
    from safetensors.torch import save

    config, last = run.config.for_chain(chain), run.config.distill.cycles
    cycle = last if cycle is None else cycle
    reading = reading or (config.distill.final_core if cycle == last else "all_of_last")
    harvest = artifacts.load(run.folder / "harvest", "harvest", "stages STAGE=harvest")
    sae, attribution, made = (run.load(cycle, part, chain) for part in ("sae", "attribution", "core"))
    parents = {"core": made, "attribution": attribution, "sae": sae, "harvest": harvest}
    for (_, artifact), (name, parent) in pairwise(parents.items()):
        if artifact.parents.get(name) != parent.hash:
            what = f"{artifact.folder} was made from another {name} than the one in {parent.folder}"
            raise ArtifactError(what, "run `make reproduce`, which makes it again")
    found, ranking, core = harvest.json("record.json"), attribution.json("record.json"), read_core(made)
    core = final_core(core, reading)
    tensors = save({"W_enc": core.W_enc})
    model, data, distill, training = found["model"], found["data"], config.distill, config.training
    distilled = {
        "cycle": cycle,
        "chain": chain,
        "reading": reading,
        "tokens_per_cycle": config.data.train_tokens,
    }
    distilled |= {"k": training.k} | config.sae.model_dump() | training.core_settings()
    hashes = {"core_before": core.parent} | {name: artifact.hash for name, artifact in parents.items()}
    ranked = {name: ranking[name] for name in ("tokens", "candidates")}
    record = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "made_with": f"dmsae_lib {dmsae_lib.__version__}",
        "size": len(core),
        "model": {n: model[n] for n in ModelEntry.model_fields} | {"name": _without_path(model["name"])},
        "hook_name": model["hook_name"],
        "normaliser": {"scale": found["scale"]},
        "distilled": {name: distilled[name] for name in Distilled.model_fields},
        "data": {"source": _without_path(data["source"]), "hash": data["hash"]},
        "attribution": {"aggregator": distill.aggregator, "coverage": distill.coverage} | ranked,
        "latents": [asdict(latent) for latent in core.latents],
        "parents": {name: hashes[name] for name in Parents.model_fields},
        "files": {FILES[0]: hashlib.sha256(tensors).hexdigest()},
    }
    folder, record = Path(folder or run.folder / "core"), sealed(record)
    check_record(record, folder)
    write_files(folder, dict(zip(FILES, (tensors, json_text(record).encode()))))
    return folder
