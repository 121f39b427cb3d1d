"""SAEs that were trained elsewhere, in the place of ours."""

from pathlib import Path
from typing import Any

from dmsae_lib.distill.evaluation import evaluate, made_sae
from dmsae_lib.distill.harvest import Harvest
from dmsae_lib.interop import load_foreign, save_foreign
from dmsae_lib.sae.model import save_sae
from dmsae_lib.store import artifacts
from dmsae_lib.store.artifacts import Artifact, hash_json


def adopt(
    folder: Path, where: str, harvest: Harvest, record: dict[str, Any], as_cycle_0: bool = False
) -> Artifact:
    """The artefact of an SAE that was trained elsewhere, measured as ours are, at its own thresholds.

    ``as_cycle_0`` puts it into our form and gauge, so that a core is distilled from it as from our own; else
    it is kept as its own library computes it, to compare with. Raises UserError where it does not fit the
    run's model or cannot be used.
    """
    config, model, scale = harvest.run.config, harvest.model, harvest.scale
    foreign = load_foreign(where, model)
    ours = foreign.source(scale, config.distill.from_prefixes) if as_cycle_0 else None
    prefixes = foreign.prefixes if ours is None else ours.prefixes
    settings = hash_json([config.threads, prefixes])
    parents = {"harvest": harvest.artifact.hash, "settings": settings, "source": foreign.hash}
    if found := made_sae(folder, parents):
        return found
    with artifacts.write(folder, "sae", parents) as writer:
        measured = foreign if ours is None else ours.folded(scale)
        test, losses = harvest.splits["test"], harvest.losses("test")
        record = record | evaluate(measured, model, test, losses, as_cycle_0, harvest.tested)
        if ours is None:
            save_foreign(writer, foreign)
        else:
            save_sae(writer, ours, scale)
        about = {"d_sae": foreign.d_sae, "core_size": 0, "prefixes": prefixes, "imported": foreign.record}
        writer.json("metrics.json", record | about)
    return artifacts.load(folder, "sae")
