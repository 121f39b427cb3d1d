"""sae_bench's own data sets: from a local folder, else from the Hub.

The folder holds them under their Hub names: ``<data>/LabHC/bias_in_bios/train.jsonl``, or what ``hf download
--repo-type dataset`` wrote.

``HF_HUB_OFFLINE=1`` stands for what is in the Hub's cache. sae_bench asks the Hub for two of them,
github-code and openwebtext, with ``trust_remote_code``: their own loading scripts run on this machine.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from dmsae_lib.saebench.runner import NotRun

PATIENCE = 3  # seconds for the one request that tells whether the Hub can be reached


def hub_out_of_reach() -> str | None:
    """Why the Hub cannot be reached, in words; None where it can. One request and no retry."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        answer = get_session().head(constants.ENDPOINT, timeout=PATIENCE, follow_redirects=True)
    except Exception as error:  # the client's kinds change from release to release
        return f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})"
    return f"{constants.ENDPOINT} answers {answer.status_code}" if answer.status_code >= 400 else None


def from_hub(what: str, name: str, data: Path | None, fetch: Callable[[], Any]) -> Any:
    """What ``fetch`` gets of the data set ``name``; NotRun where neither Hub nor (offline) cache has it."""
    reason, place = hub_out_of_reach(), f" and there is no {data / name}" if data else ""
    if reason and "OFFLINE" not in reason:  # offline, what is in the cache is found without a request
        raise NotRun(f"it needs {what} {name}, but {reason}{place}")
    try:
        return fetch()
    except Exception as error:  # gated, renamed, not in the cache: each raises kinds of its own
        first_line = str(error).partition("\n")[0][:200].rstrip(".")
        why = reason or f"the Hub did not give it ({type(error).__name__}: {first_line})"
        raise NotRun(f"it needs {what} {name}, but {why}{place}") from error


def get_dataset(name: str, *which: str, data: Path | None = None, **options: Any) -> Any:
    """``datasets.load_dataset(name, *which, **options)``, from ``<data>/<name>[/<which>]`` where that is
    there. Raises NotRun as :func:`from_hub` does."""
    from datasets import load_dataset

    if data is None or not (folder := data / name).is_dir():
        return from_hub("the data set", name, data, lambda: load_dataset(name, *which, **options))
    if which and (folder / which[0]).is_dir():
        folder, which = folder / which[0], ()
    known = {key: options[key] for key in ("split", "streaming") if key in options}
    return load_dataset(str(folder), *which, **known)


@contextlib.contextmanager
def datasets_from(data: Path | None, *modules: ModuleType) -> Iterator[None]:
    """Each module's ``load_dataset`` is :func:`get_dataset`."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(patch.object(module, "load_dataset", partial(get_dataset, data=data)))
        yield
