"""What an eval is given, how sae_bench's ``run_eval`` is called, and where what SAEs share is kept."""

import contextlib
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dmsae_lib.config.sections import SaebenchConfig
from dmsae_lib.saebench.adapter import Adapter
from dmsae_lib.store.artifacts import hash_json
from dmsae_lib.store.atomic import SCRATCH

Row = dict[str, Any]
# sae_bench's 32 rows of 128 for Gemma-2-2B (activation_collection.py); no score depends on it
LLM_BATCH_TOKENS = 2**12


class NotRun(Exception):
    """An eval that cannot be run with this model or without the Hub; the text says why, in one sentence."""


@dataclass(frozen=True)
class Bench:
    """What the scoring of a run's SAEs shares."""

    settings: SaebenchConfig
    rows: np.ndarray  # (rows, context): token ids of the test split, BOS first
    sets: tuple[str, ...]  # the probing sets
    cache: Path  # the folder below which is kept what is made once for all SAEs

    @property
    def data(self) -> Path | None:
        """The folder to look for sae_bench's own data sets in before the Hub is asked."""
        return Path(self.settings.suite.data) if self.settings.suite.data else None


def configured(config: type, adapter: Adapter, seed: int, **settings: Any) -> Any:
    """sae_bench's configuration of an eval, for this model, SAE and seed."""
    ours = {"model_name": adapter.cfg.model_name, "llm_dtype": adapter.cfg.dtype, "random_seed": seed}
    return config(**ours | settings)


def evaluate(main: ModuleType, config: Any, adapter: Adapter, **options: Any) -> Row:
    """What ``main.run_eval`` of sae_bench gives for one SAE; RuntimeError where it gives nothing."""
    with tempfile.TemporaryDirectory() as out:
        found = main.run_eval(
            config, [("dmsae", adapter)], str(adapter.device), output_path=f"{out}/results", **options
        )
    if len(found) != 1:
        raise RuntimeError(f"{main.__name__} gave {len(found)} results for one SAE.")
    return next(iter(found.values()))


def finite(found: dict[str, Any]) -> dict[str, float | None]:
    """The numbers, None for NaN and infinity; what is None, settings not asked for, is left out."""
    return {
        name: float(value) if math.isfinite(value) else None
        for name, value in found.items()
        if value is not None
    }


def kept(cache: Path, name: str, decisive: Any, fill: Callable[[Path], Any]) -> Path:
    """The folder below ``cache`` that ``fill`` makes once, whole or not at all, named by the hash of
    ``decisive``: all that decides what is in it. Where another worker was first, its folder stays."""
    place = cache / f"{name}-{hash_json(decisive)[:16]}"
    if not place.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=cache) as scratch:
            (fresh := Path(scratch) / "fresh").mkdir()
            fill(fresh)
            with contextlib.suppress(OSError):
                os.rename(fresh, place)
    return place
