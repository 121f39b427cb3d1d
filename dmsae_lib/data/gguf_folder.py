"""A language model in GGUF, turned once into a Hub-format folder that all runs share.

The folder is an artefact, ``runs/models/<name>-<first of the file's hash>``, whole or not there; its
weights.json says what the weights were before. transformers reads and dequantises them.
"""

import contextlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import psutil
import torch

from dmsae_lib.config.packaged import PACKAGED, lacks, packaged_file
from dmsae_lib.store import artifacts
from dmsae_lib.store.artifacts import ArtifactError, UserError, repository_root, sha256_file
from dmsae_lib.store.atomic import explain_errors, hold

KIND, WEIGHTS = "language_model", "weights.json"
BYTES = 4  # of a weight in the folder, float32
IN_MEMORY = 2.5  # measured: 2.1 times the dequantised weights at the worst moment
AGAIN = "get the file again"


class Content(NamedTuple):
    """What a GGUF file holds: the number of weights, and how many are stored in each type."""

    weights: int
    types: dict[str, int]  # the most frequent first


def hub_folder(name: str) -> Path:
    """The Hub-format folder of a packaged model or GGUF file, made where it is not there yet.

    Raises UserError, before any work, where the file or what reads it is missing, the file is not the
    packaged one or no GGUF, or disk or memory do not suffice; and where transformers cannot read the model.
    """
    start = f"model.name is {name}:"
    file = _located(name, start)
    digest = sha256_file(file)
    if name in PACKAGED and digest != PACKAGED[name].sha256:
        what = f"{file} is not the file that is known (its sha256 begins with {digest[:8]})"
        raise UserError(f"{start} {what}; delete it and run `make model`, which installs it again.")
    stem = name if name in PACKAGED else file.stem
    folder = repository_root() / "runs" / "models" / f"{stem}-{digest[:8]}"
    with _in_turn(folder):
        # a damaged folder is made again: what it is made from is at hand
        with contextlib.suppress(ArtifactError):
            if artifacts.made(folder, KIND, {"gguf": digest}):
                return folder
        content = _read(file, start)
        _check_room(content.weights * BYTES, folder, start)
        with artifacts.write(folder, KIND, {"gguf": digest}) as writer:
            _convert(file, writer.folder, start)
            writer.json(WEIGHTS, {"gguf": digest, "types": content.types, "stored": "float32"})
    return folder


def weights_as_shipped(folder: Path) -> str | None:
    """What must be said of a model's weights beside its numbers; None where they are the folder's own."""
    if not (folder / WEIGHTS).is_file():
        return None
    kind = next(iter(json.loads((folder / WEIGHTS).read_text(encoding="utf-8"))["types"]))
    bits = f"{kind[1]}-bit ({kind})" if kind[0] == "Q" else kind
    return f"{bits} as shipped, dequantised"


def _located(name: str, start: str) -> Path:
    if missing := lacks(name):
        what = f"{start} it needs {missing[0]}, not installed yet"
        raise UserError(f"{what}; run `make model CONFIG=...` with the configuration that names it.")
    file = packaged_file(name) if name in PACKAGED else Path(name).expanduser()
    if not file.is_file():
        remedy = "run `make model`, which installs it again" if name in PACKAGED else "correct the path"
        raise UserError(f"{start} there is no file {file}; {remedy}.")
    return file


@contextlib.contextmanager
def _in_turn(folder: Path) -> Iterator[None]:
    """One process makes the folder, others wait for it; the kernel frees the lock of a killed one."""
    path = folder.with_name(f".{folder.name}.lock")
    with artifacts.explain_os_errors(folder):
        while (held := hold(path, os.O_RDWR | os.O_CREAT)) is None:
            time.sleep(0.2)
    try:
        yield
    finally:
        os.close(held)


def _read(file: Path, start: str) -> Content:
    from gguf import GGUFReader

    with explain_errors(f"{start} it is damaged or no GGUF file", AGAIN):
        tensors = GGUFReader(file).tensors
        types = Counter[str]()
        for tensor in tensors:
            types[tensor.tensor_type.name] += int(tensor.n_elements)
        if not types:
            raise ValueError("it holds no weights")
    return Content(types.total(), dict(types.most_common()))


def _check_room(size: int, folder: Path, start: str) -> None:
    """``size``: bytes of the dequantised weights."""
    free, memory = shutil.disk_usage(folder.parent).free, psutil.virtual_memory().available
    for what, needed, there, remedy in (
        ("of disk", 1.1 * size, free, f"free some space where {folder.parent} lies"),
        ("of memory", IN_MEMORY * size, memory, "close other programs, or choose a smaller model"),
    ):
        if there < needed:
            short = f"its conversion takes {needed / 2**30:.2f} GiB {what}, and {there / 2**30:.2f} are free"
            raise UserError(f"{start} {short}; {remedy}.")


def _convert(file: Path, folder: Path, start: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

    quiet = patch.object(modeling_gguf_pytorch_utils, "tqdm", lambda tensors, **_: tensors)
    with quiet, explain_errors(f"{start} transformers cannot read it", f"choose another model, or {AGAIN}"):
        options: Any = {"gguf_file": file.name, "dtype": torch.float32, "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(file.parent, **options)
        model, report = loaded
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{missing[0]} is missing")
        if not all(weight.isfinite().all() for weight in model.parameters()):
            raise ValueError("its weights hold NaN or Inf")
        # dequantised, which save_pretrained would not believe
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
