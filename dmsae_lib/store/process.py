"""Process-wide settings that every notebook makes first: threads, determinism, memory."""

import contextlib
import ctypes
import logging
import os
import re
import warnings

import torch

from dmsae_lib.store.atomic import UserError

NUMBER = re.compile(r"\+?\d+")  # as libgomp reads one
# Values with which there are fewer threads than asked for.
FEWER = {
    "OMP_THREAD_LIMIT": lambda value, threads: bool(NUMBER.fullmatch(value)) and int(value) < threads,
    "OMP_DYNAMIC": lambda value, threads: value.lower() == "true",
    "OMP_MAX_ACTIVE_LEVELS": lambda value, threads: bool(NUMBER.fullmatch(value)) and int(value) == 0,
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
KEEP = 2**31 - 1  # bytes


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks instead of giving them back to the kernel.

    Every step allocates the same large temporaries; by default each is mapped and page-faulted anew, which
    took up to nine tenths of a step's time on two cores. Elsewhere than on glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, KEEP)
        libc.mallopt(M_TRIM_THRESHOLD, KEEP)


def prepare(threads: int) -> None:
    """Set the thread count of the configuration, deterministic kernels, and quiet third-party chatter.

    Raises UserError where the environment makes torch compute with fewer threads than it says: sums would
    have other last bits.
    """
    for name, lowers in FEWER.items():
        value = os.environ.get(name, "").strip()
        if threads > 1 and lowers(value, threads):
            raise UserError(
                f"{name} is {value} in the environment, with which torch would use fewer than threads = "
                f"{threads} and get other last bits: unset {name}, or set threads to 1."
            )
    keep_freed_memory()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # sae_probes would unpickle whatever its cache holds
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # our code reads no uninitialised memory
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    # tqdm, where there are no notebook widgets
    warnings.filterwarnings("ignore", message="IProgress not found")
    for noisy in ("transformers", "transformer_lens", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with contextlib.suppress(ImportError):
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging as transformers_logging

        disable_progress_bars()
        transformers_logging.disable_progress_bar()
