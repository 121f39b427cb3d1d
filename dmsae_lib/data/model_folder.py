"""The folder of a language model: where it is, what identifies it, and its tokenizer."""

import hashlib
from pathlib import Path
from typing import Any

from dmsae_lib.config.fields import EMBEDDED
from dmsae_lib.config.packaged import PACKAGED, is_gguf
from dmsae_lib.data.gguf_folder import hub_folder
from dmsae_lib.store.artifacts import UserError, sha256_file
from dmsae_lib.store.atomic import explain_errors

DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.py"]
NOT_HASHED = ("manifest.json", "provenance.json")  # an artefact's: when and where it was made
TOKENIZER_REMEDY = "put its tokenizer.json and tokenizer_config.json beside the weights"


def resolve(name: str) -> Path:
    """The folder of an embedded, packaged, local or Hub model.

    A packaged model, or one in a GGUF file, is converted where that has not been done; the files of a Hub
    model are downloaded where they are not cached. Raises UserError where there is no such model, or its
    folder lacks config.json or safetensors weights.
    """
    if is_gguf(name):
        return hub_folder(name)
    start = f"model.name is {name}:"
    folder = EMBEDDED / name if (EMBEDDED / name / "config.json").is_file() else Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"{start} there is no such folder; correct the path.")
        if "/" not in name:
            known = ", ".join(
                [*sorted(path.parent.name for path in EMBEDDED.glob("*/config.json")), *PACKAGED]
            )
            raise UserError(
                f"{start} give one that is here ({known}), a folder, a GGUF file, or a Hub id (owner/name)."
            )
        folder = _download(name)
    if not (folder / "config.json").is_file():
        raise UserError(f"{start} that folder holds no config.json; give a model in Hub format.")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{start} that folder holds no .safetensors file; put the weights there in that format."
        )
    return folder


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    what = f"model.name is {name}: there is no such folder and the Hub did not give it"
    remedy = "check the name, the network, and for a gated model that you are logged in (HF_TOKEN)"
    with explain_errors(what, remedy):
        return Path(snapshot_download(name, allow_patterns=DOWNLOADED))


def model_hash(folder: Path) -> str:
    """sha256 over the names and contents of the model's configuration, weight and tokenizer files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if _counts(p)):
        digest.update(f"{path.name}\0{sha256_file(path)}\0".encode())
    return digest.hexdigest()


def _counts(path: Path) -> bool:
    return path.suffix in (".json", ".safetensors", ".model") and path.name not in NOT_HASHED


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer; UserError if there is none or it has neither BOS nor EOS token."""
    from transformers import AutoTokenizer

    with explain_errors(f"model.name: {folder} has no tokenizer that can be loaded", TOKENIZER_REMEDY):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if len(tokenizer) < 3:  # without files, transformers makes up an empty one
        raise UserError(f"model.name: {folder} has no tokenizer; {TOKENIZER_REMEDY}.")
    if tokenizer.bos_token_id is None:
        if tokenizer.eos_token_id is None:
            what = f"the tokenizer of {folder} has neither a BOS nor an EOS token to start contexts with"
            raise UserError(f"model.name: {what}; name one in its tokenizer_config.json.")
        tokenizer.bos_token = tokenizer.eos_token  # GPT-2 and NeoX have one token for both
    return tokenizer
