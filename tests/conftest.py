"""Fixtures shared by the tests of the numerical modules."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

CONTEXT = 16


@pytest.fixture(scope="session")
def one_thread():
    """The settings that every notebook makes first, with one thread: what the bit-equality tests rest on."""
    from dmsae_lib.store.process import prepare

    prepare(threads=1)


@pytest.fixture(scope="session")
def tiny_llama(one_thread, tmp_path_factory):
    """A random two-layer Llama of width 32, loaded through the project's own door and split after its first
    block."""
    from builders.models import save_model

    from dmsae_lib.config.sections import ModelConfig
    from dmsae_lib.data.language_model import LanguageModel

    folder = save_model(tmp_path_factory.mktemp("tiny") / "tiny llama", context=CONTEXT, confidence=4.0)
    return LanguageModel(
        ModelConfig(
            name=str(folder), hook_name="blocks.0.hook_resid_post", context_size=CONTEXT, batch_rows=8
        )
    )


@pytest.fixture(scope="session")
def tiny_gemma2(one_thread, tmp_path_factory):
    """A random Gemma-2 of three layers, split after its second: grouped queries, a sliding window of 8, and
    soft caps that are so low, for weights so large, that both bend the logits."""
    from builders.models import save_model

    from dmsae_lib.config.sections import ModelConfig
    from dmsae_lib.data.language_model import LanguageModel

    folder = save_model(
        tmp_path_factory.mktemp("tiny") / "tiny gemma",
        "gemma2",
        layers=3,
        context=CONTEXT,
        initializer_range=0.3,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    )
    return LanguageModel(
        ModelConfig(
            name=str(folder), hook_name="blocks.1.hook_resid_post", context_size=CONTEXT, batch_rows=8
        )
    )


@pytest.fixture(scope="session")
def test_model() -> Path:
    """The folder of a model from outside, named by the environment variable DMSAE_TEST_MODEL."""
    folder = os.environ.get("DMSAE_TEST_MODEL")
    if not folder:
        pytest.skip("DMSAE_TEST_MODEL names no model folder to try a run from outside on")
    return Path(folder)


@pytest.fixture
def small_disk(tmp_path):
    """Maker of a file system of a given size (``256k``) in memory; skips where none can be mounted."""
    made = []

    def mount(size: str) -> Path:
        folder = tmp_path / "small disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a file system can be mounted by root alone")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="session")
def random_split():
    """Maker of random contexts: BOS (id 0) leads each row and stands inside some; one row in five is padded.

    The padding of every second padded row is not BOS, so that only ``lengths`` tells it from text.
    """

    import torch

    from dmsae_lib.data.contexts import Contexts

    def make(rows: int, seed: int = 0) -> Contexts:
        random = np.random.default_rng(seed)
        tokens = random.integers(3, 300, (rows, CONTEXT), dtype=np.int32)
        tokens[random.random(tokens.shape) < 0.06] = 0
        tokens[:, 0] = 0
        lengths = np.full(rows, CONTEXT, dtype=np.int32)
        lengths[::5] = random.integers(2, CONTEXT, len(lengths[::5]))
        for row in range(0, rows, 10):
            tokens[row, lengths[row] :] = 0
        return Contexts(torch.from_numpy(tokens), torch.from_numpy(lengths), 0)

    return make
