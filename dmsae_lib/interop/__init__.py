"""SAEs that leave this project and SAEs that come into it: one door to the formats of the other libraries.

| from | compared with (notebooks 05, 06) | source of a core (notebooks 03, 04) |
|---|---|---|
| SAELens, folder or ``release:sae_id`` | standard, jumprelu, topk, gated | standard, jumprelu |
| dictionary_learning folder | all its classes | all but AutoEncoderTopK and GatedAutoEncoder |

BatchTopK and Matryoshka BatchTopK SAEs of SAELens are saved as jumprelu by itself. Refused are transcoders,
SAEs of attention heads, and those that normalise each token for themselves.
"""

from pathlib import Path

from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.interop.dictionary_learning import (
    WEIGHTS,
    export_dictionary_learning,
    load_dictionary_learning,
)
from dmsae_lib.interop.foreign import Foreign
from dmsae_lib.interop.saelens import export_saelens, load_saelens
from dmsae_lib.sae.model import FoldedSAE, load_folded
from dmsae_lib.store.artifacts import Artifact, Writer

__all__ = [
    "Foreign",
    "export_dictionary_learning",
    "export_saelens",
    "load_any",
    "load_foreign",
    "save_foreign",
]


def load_foreign(where: Path | str, model: LanguageModel) -> Foreign:
    """An SAE that was trained elsewhere on ``model``, on its device, for unnormalised activations.

    ``where`` is a folder of SAELens or dictionary_learning, or ``release:sae_id`` of SAELens, which needs the
    Hub. Raises UserError where it cannot be loaded or used, or belongs to another model, hook or width.
    """
    folder = Path(where).expanduser()
    theirs = any((folder / name).is_file() for name in WEIGHTS)
    found = (load_dictionary_learning if theirs else load_saelens)(where)
    found.check(model)
    return found.to(model.device)


def save_foreign(writer: Writer, foreign: Foreign) -> None:
    """Into an artefact, as a SAELens folder: :func:`load_any` reads it again from there."""
    foreign.sae.save_model(writer.folder)


def load_any(artifact: Artifact, model: LanguageModel) -> FoldedSAE | Foreign:
    """The SAE of an artefact, trained here or elsewhere, for unnormalised activations."""
    return load_folded(artifact) if "sae.json" in artifact.files else load_foreign(artifact.folder, model)
