"""The core as a format: two files that carry a distilled core out of its run, for anybody's training.

``core.safetensors`` holds one tensor, ``W_enc`` (d_in, size) float32: encoder columns of the core, for
activations that were divided by ``normaliser.scale`` (so that mean ||x||^2 = 1). ``core.json`` says what they
are: a :class:`dmsae_lib.distill.core_record.CoreRecord`, whose JSON schema is beside it in
``core.schema.json``.

To train with a core: put W_enc's columns first in the encoder and never change them; initialise everything
else (their decoder rows and biases too); leave the core out of the selection by sparsity, unless
``distilled.core_sparsity`` is ``batchtopk``.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.data.model_folder import model_hash, resolve
from dmsae_lib.distill.core import Core, Latent
from dmsae_lib.distill.core_record import FORMAT, SCHEMA_VERSION, CoreRecord
from dmsae_lib.store.artifacts import UserError, sha256_file, unseal
from dmsae_lib.store.atomic import explain_errors, json_text, write_bytes

FILES = ("core.safetensors", "core.json")  # in the order of writing: the second vouches for the first
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
AGAIN = "get it again, or write it again with `make core`"


@dataclass
class PortableCore(Core):
    """A core that came by itself, checked, with what core.json says of it."""

    record: dict[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """What activations must be divided by."""
        return self.record["normaliser"]["scale"]

    @property
    def hook_name(self) -> str:
        return self.record["hook_name"]

    @property
    def hash(self) -> str:
        return self.record["hash"]


def names_folder(place: str | Path) -> bool:
    """Whether ``place`` is a folder's path and not a Hub id (owner/name); UserError where it is neither."""
    text = str(place)
    path_like = text.startswith((".", "/", "~")) or text.count("/") > 1
    if isinstance(place, Path) or path_like or text and Path(text).is_dir():
        return True
    if not HUB_ID.fullmatch(text):
        example = f"./{text or 'core'}"
        raise UserError(
            f"{text!r} is neither a folder nor a Hub id: give owner/name, or a path such as {example}."
        )
    return False


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write a core's files into ``folder``, which is new, empty, or holds a core; hidden files stay.

    Raises UserError where it holds other things, among them the core artefact of a run.
    """
    there = {path.name for path in folder.glob("[!.]*")}
    if there and not there.intersection(FILES) or "manifest.json" in there:
        raise UserError(f"{folder} holds other files than a core's: give a new or an empty folder.")
    for name, content in files.items():
        write_bytes(folder / name, content)


def load_core(
    source: str | Path, model: LanguageModel | str | None = None, hook_name: str | None = None
) -> PortableCore:
    """The core in a folder, or in a repository of the Hub (owner/name), checked: hashes, schema, tensor.

    Args:
        model: what you mean to use it with, where that is to be checked: an open model, an embedded name or a
            folder by the content of their files, a Hub id by its name.
        hook_name: likewise; an open model's own hook by default.

    Without network, or with HF_HUB_OFFLINE=1, a repository is taken from the Hub cache. Raises UserError, one
    sentence.
    """
    folder = Path(source).expanduser() if names_folder(source) else _download(str(source))
    for name in FILES:
        if not (folder / name).is_file():
            give = "give a folder that `make core` wrote, or a Hub id"
            raise UserError(f"There is no core in {folder} ({name} is missing): {give}.")
    if (folder / "manifest.json").is_file():
        what = "holds a stage of a run, which says nothing of the model"
        raise UserError(f"{folder} {what}: `make core` writes a core to use.")
    try:
        record = unseal(folder / "core.json")
    except ValueError as error:
        reason = str(error) if str(error).startswith("does") else "cannot be read"
        raise UserError(f"{folder} is damaged (core.json {reason}): {AGAIN}.") from error
    check_record(record, folder)
    if sha256_file(folder / FILES[0]) != record["files"][FILES[0]]:
        raise UserError(f"{folder} is damaged ({FILES[0]} does not match its hash): {AGAIN}.")
    rows, latents = _read_rows(folder, record), [Latent(**latent) for latent in record["latents"]]
    core = PortableCore(record["distilled"]["cycle"], rows, latents, record["parents"]["core_before"], record)
    _check_use(core, source, model, hook_name)
    return core


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    what = f"There is no folder {name} and the Hub did not give it"
    remedy = "check the name, the network, and for a private core that you are logged in (HF_TOKEN)"
    with explain_errors(what, remedy):
        return Path(snapshot_download(name, allow_patterns=[*FILES]))


def check_record(record: dict[str, Any], folder: Path) -> None:
    """Hold core.json against its schema, and its latents against each other."""
    written, version = record.get("format", "something else"), record.get("schema_version")
    if (written, version) != (FORMAT, SCHEMA_VERSION):
        raise UserError(
            f"{folder} holds {written!r} of schema version {version}, and this code reads {FORMAT!r} of "
            f"version {SCHEMA_VERSION}: take the release of this repository that wrote it."
        )
    try:
        CoreRecord.model_validate_json(json_text(record))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"core.json in {folder} does not follow its schema at {where}: {first['msg']}."
        ) from error
    latents, cycle = record["latents"], record["distilled"]["cycle"]
    if not len(latents) == len({latent["id"] for latent in latents}) == record["size"]:
        raise UserError(f"core.json in {folder} must describe each of its {record['size']} latents once.")
    for latent in latents:
        first, last = latent["selected"][0], latent["selected"][-1]
        if (first, last) != (latent["first_cycle"], cycle):
            raise UserError(
                f"core.json in {folder}: latent {latent['id']} must have been selected first in cycle "
                f"{latent['first_cycle']} and last in cycle {cycle}."
            )


def _read_rows(folder: Path, record: dict[str, Any]) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load

    file, shape = folder / FILES[0], (record["model"]["d_model"], record["size"])
    try:
        tensors = load(file.read_bytes())  # mapped memory would change with the file
    except SafetensorError as error:
        raise UserError(f"{file} is not in the safetensors format: get the core again.") from error
    held = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if held != {"W_enc": (shape, torch.float32)}:
        raise UserError(
            f"{file} must hold W_enc {shape} torch.float32 alone, but holds {held}: get the core again."
        )
    if not bool(torch.isfinite(tensors["W_enc"]).all()):
        raise UserError(f"W_enc in {file} holds NaN or Inf: get the core again, or distil it again.")
    return tensors["W_enc"].T.contiguous()


def _check_use(
    core: PortableCore, source: str | Path, model: LanguageModel | str | None, hook_name: str | None
) -> None:
    made_for = core.record["model"]
    name, digest = made_for["name"], made_for["hash"]
    if isinstance(model, LanguageModel):
        same, called, hook_name = model.hash == digest, model.config.name, hook_name or model.hook_name
    elif model is not None:
        local = "/" not in model or names_folder(model)  # or embedded
        same, called = model_hash(resolve(model)) == digest if local else model == name, model
    if model is not None and not same:
        raise UserError(
            f"The core in {source} was made for {name} (content hash {digest[:12]}), and {called} is another "
            "model: use that one, or distil a core from yours."
        )
    if hook_name is not None and hook_name != core.hook_name:
        raise UserError(
            f"The core in {source} was made for activations at {core.hook_name}, not at {hook_name}: use "
            "those, or distil a core there."
        )
