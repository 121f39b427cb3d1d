"""The core as a format: two files that carry a distilled core out of its run, to be used in anybody's
training.

``core.safetensors`` holds one tensor, ``W_enc`` (d_in, size) float32: the encoder's core columns, for
activations that were divided by ``normaliser.scale`` (so that mean ||x||^2 = 1). ``core.json`` says what they
are; ``core.schema.json`` beside this module fixes its shape:

    format, schema_version    ``dmsae-core``, 1 model, hook_name          whose activations: name, content
    hash, architecture, sizes; TransformerLens' name of the place normaliser                scale: divide the
    residuals by it distilled                 cycle, chain, reading of "the final core", and the SAEs of that
    chain: d_sae, k, prefixes ... data                      the text it was distilled on, as a name and the
    hash of its tokens attribution               aggregator, coverage, tokens, candidates latents
    in column order: id, where it first appeared, every cycle that selected it, score, share, frequency
    parents                   content hashes: the run's core artefact, the core before, the SAE, attribution
    and harvest files, hash               sha256 of core.safetensors, and of core.json without this entry: the
    name of the whole

To train with a core: put W_enc's columns first in the encoder and never change them; initialise everything
else (their decoder rows and biases too); leave the core out of the selection by sparsity, unless
``distilled.core_sparsity`` is ``batchtopk``.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dmsae_lib
from dmsae_lib.config.run import Run
from dmsae_lib.data.language_model import LanguageModel
from dmsae_lib.data.model_folder import model_hash, resolve
from dmsae_lib.distill.core import Latent, final_core, read_core
from dmsae_lib.store import artifacts
from dmsae_lib.store.artifacts import ArtifactError, UserError, sealed, sha256_file, unseal
from dmsae_lib.store.atomic import json_text, write_bytes

FORMAT, SCHEMA_VERSION = "dmsae-core", 1
FILES = ("core.safetensors", "core.json")  # in the order of writing: the second vouches for the first
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class PortableCore:
    """A checked core: W_enc (d_in, size) float32 on the CPU, its latents in column order, and core.json."""

    W_enc: Tensor
    latents: list[Latent]
    record: dict[str, Any]

    def __len__(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def rows(self) -> Tensor:
        """(size, d_in), as :class:`dmsae_lib.sae.model.MatryoshkaSAE` takes them."""
        return self.W_enc.T.contiguous()

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


@cache
def schema() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("core.schema.json").read_text(encoding="utf-8"))


def names_folder(place: str | Path) -> bool:
    """Whether ``place`` is a folder's path rather than a Hub id (owner/name); UserError where it can be
    neither."""
    text = str(place)
    if (
        isinstance(place, Path)
        or text.startswith((".", "/", "~"))
        or text.count("/") > 1
        or text
        and Path(text).is_dir()
    ):
        return True
    if not HUB_ID.fullmatch(text):
        raise UserError(
            f"{text!r} is neither a folder nor a Hub id: give owner/name, or a path such as "
            f"./{text or 'core'}."
        )
    return False


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
        folder: runs/<run>/core by default; a core that is there is replaced. cycle: the last by default.
        reading: of "the final core" (core.READINGS); by default distill.final_core for the last cycle, whose
        members are
            retrained with, and all of C(cycle) for another.

    Raises ArtifactError where a stage is missing or was made from something else than what lies beside it
    now, UserError where no latent fits the reading, or the folder holds other things.
    """
    from safetensors.torch import save

    config, last = run.config.for_chain(chain), run.config.distill.cycles
    cycle = last if cycle is None else cycle
    reading = reading or (config.distill.final_core if cycle == last else "all_of_last")
    harvest = artifacts.load(run.folder / "harvest", "harvest", "stages STAGE=harvest")
    sae, attribution, made = (run.load(cycle, part, chain) for part in ("sae", "attribution", "core"))
    for artifact, name, parent in [
        (sae, "harvest", harvest),
        (attribution, "sae", sae),
        (made, "attribution", attribution),
    ]:
        if artifact.parents.get(name) != parent.hash:
            raise ArtifactError(
                f"{artifact.folder} was made from another {name} than the one in {parent.folder}",
                "run `make reproduce`, which makes it again",
            )
    found, ranked, core = (
        harvest.json("record.json"),
        attribution.json("record.json"),
        final_core(read_core(made), reading),
    )
    model, data, settings = found["model"], found["data"], config.training
    tensors = save({"W_enc": core.rows.T.contiguous()})
    record = sealed(
        {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "made_with": f"dmsae_lib {dmsae_lib.__version__}",
            "size": len(core),
            "model": {
                "name": _without_path(model["name"]),
                "hash": model["hash"],
                "architecture": model["architecture"],
                "n_layers": model["n_layers"],
                "d_model": model["d_model"],
            },
            "hook_name": model["hook_name"],
            "normaliser": {"scale": found["scale"]},
            "distilled": {
                "cycle": cycle,
                "chain": chain,
                "reading": reading,
                "d_sae": config.sae.d_sae,
                "k": settings.k,
                "prefixes": config.sae.prefixes,
                "tokens_per_cycle": config.data.train_tokens,
                **settings.core_settings(),
            },
            "data": {"source": _without_path(data["source"]), "hash": data["hash"]},
            "attribution": {
                "aggregator": config.distill.aggregator,
                "coverage": config.distill.coverage,
                "tokens": ranked["tokens"],
                "candidates": ranked["candidates"],
            },
            "latents": [asdict(latent) for latent in core.latents],
            "parents": {
                "core": made.hash,
                "core_before": core.parent,
                "sae": sae.hash,
                "attribution": attribution.hash,
                "harvest": harvest.hash,
            },
            "files": {FILES[0]: hashlib.sha256(tensors).hexdigest()},
        }
    )
    folder = Path(folder or run.folder / "core")
    _check_record(record, folder)
    write_files(folder, dict(zip(FILES, (tensors, json_text(record).encode()))))
    return folder


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write a core's files into ``folder``, which is new, empty, or holds a core; hidden files (.git) are
    left alone.

    Raises UserError where it holds other things, among them the core artefact of a run.
    """
    there = (
        {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        if folder.is_dir()
        else set()
    )
    if there and not there.intersection(FILES) or "manifest.json" in there:
        raise UserError(f"{folder} holds other files than a core's: give a new or an empty folder.")
    for name, content in files.items():
        write_bytes(folder / name, content)


def load_core(
    source: str | Path, model: LanguageModel | str | None = None, hook_name: str | None = None
) -> PortableCore:
    """The core in a folder, or in a repository of the Hub (owner/name), checked: hashes, schema, shape,
    finite values.

    Args:
        model: what you mean to use it with, where that is to be checked: an open model, an embedded name or a
        folder by the
            content of their files, a Hub id by its name.
        hook_name: likewise; an open model's own hook by default.

    Without network, or with HF_HUB_OFFLINE=1, a repository is taken from the Hub cache. Raises UserError, one
    sentence.
    """
    folder = Path(source).expanduser() if names_folder(source) else _download(str(source))
    again = "get it again, or write it again with `make core`"
    for name in FILES:
        if not (folder / name).is_file():
            raise UserError(
                f"There is no core in {folder} ({name} is missing): give a folder that `make core` wrote, or "
                "a Hub id."
            )
    if (folder / "manifest.json").is_file():
        raise UserError(
            f"{folder} holds a stage of a run, which says nothing of the model: `make core` writes a core to "
            "use."
        )
    try:
        record = unseal(folder / "core.json")
    except ValueError as error:
        reason = str(error) if str(error).startswith("does") else "cannot be read"
        raise UserError(f"{folder} is damaged (core.json {reason}): {again}.") from error
    _check_record(record, folder)
    if sha256_file(folder / FILES[0]) != record["files"][FILES[0]]:
        raise UserError(f"{folder} is damaged ({FILES[0]} does not match its hash): {again}.")
    core = PortableCore(
        _read_tensor(folder, record), [Latent(**latent) for latent in record["latents"]], record
    )
    _check_use(core, source, model, hook_name)
    return core


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*FILES]))
    except Exception as error:  # the Hub client raises a dozen kinds, from DNS to gated repositories
        raise UserError(
            f"There is no folder {name} and the Hub did not give it ({type(error).__name__}); check the "
            "name, the "
            "network, and for a private core that you are logged in (HF_TOKEN)."
        ) from error


def _check_record(record: dict[str, Any], folder: Path) -> None:
    """Hold core.json against its schema, and its latents against each other."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    if record.get("format") != FORMAT or record.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{folder} holds {record.get('format', 'something else')!r} of schema version "
            f"{record.get('schema_version')}, and this code reads {FORMAT!r} of version {SCHEMA_VERSION}: "
            "take the "
            "release of this repository that wrote it."
        )
    if error := best_match(Draft202012Validator(schema()).iter_errors(record)):
        raise UserError(
            f"core.json in {folder} does not follow its schema at {error.json_path}: {error.message[:200]}."
        )
    latents, cycle = record["latents"], record["distilled"]["cycle"]
    if len(latents) != record["size"] or len({latent["id"] for latent in latents}) < len(latents):
        raise UserError(f"core.json in {folder} must describe each of its {record['size']} latents once.")
    for latent in latents:
        if (latent["selected"][0], latent["selected"][-1]) != (latent["first_cycle"], cycle):
            raise UserError(
                f"core.json in {folder}: latent {latent['id']} must have been selected first in cycle "
                f"{latent['first_cycle']} and last in cycle {cycle}."
            )


def _read_tensor(folder: Path, record: dict[str, Any]) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load((folder / FILES[0]).read_bytes())  # mapped memory would change with the file
    except SafetensorError as error:
        raise UserError(
            f"{folder / FILES[0]} is not in the safetensors format: get the core again."
        ) from error
    shape, W_enc = (record["model"]["d_model"], record["size"]), tensors.get("W_enc")
    if set(tensors) != {"W_enc"} or W_enc.dtype != torch.float32 or W_enc.shape != shape:
        held = ", ".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items())
        raise UserError(
            f"{folder / FILES[0]} must hold W_enc {shape} torch.float32 alone, but holds {held}: get the "
            "core again."
        )
    if not bool(torch.isfinite(W_enc).all()):
        raise UserError(
            f"W_enc in {folder / FILES[0]} holds NaN or Inf: get the core again, or distil it again."
        )
    return W_enc


def _check_use(
    core: PortableCore, source: str | Path, model: LanguageModel | str | None, hook_name: str | None
) -> None:
    made_for = core.record["model"]
    if isinstance(model, LanguageModel):
        same, called, hook_name = (
            model.hash == made_for["hash"],
            model.config.name,
            hook_name or model.hook_name,
        )
    elif model is not None:
        embedded_or_local = "/" not in model or names_folder(model)
        same = (
            model_hash(resolve(model)) == made_for["hash"] if embedded_or_local else model == made_for["name"]
        )
        called = model
    if model is not None and not same:
        raise UserError(
            f"The core in {source} was made for {made_for['name']} (content hash {made_for['hash'][:12]}), "
            f"and {called} is another model: use that one, or distil a core from yours."
        )
    if hook_name is not None and hook_name != core.hook_name:
        raise UserError(
            f"The core in {source} was made for activations at {core.hook_name}, not at {hook_name}: use "
            "those, or "
            "distil a core there."
        )
