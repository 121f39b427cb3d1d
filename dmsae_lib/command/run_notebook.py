"""Execute one notebook with parameters: papermill, made strict.

``python -m dmsae_lib.command.run_notebook notebooks/01_harvest.ipynb out.ipynb -p config smoke``

Unlike plain papermill, it refuses a parameter that the notebook does not have or that is of another type,
keeps the executed copy only if every cell passed (a failed one is kept as ``out.failed.ipynb``), leaves times
and paths of this machine out of it, and reports an error as one sentence.
"""

import argparse
import ast
import logging
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from dmsae_lib.store.artifacts import ArtifactError, UserError, explain_os_errors, repository_root, write_json
from dmsae_lib.store.atomic import write_text

sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  # jsonschema's grammar for IRIs: 1.4 s to load

import nbformat  # noqa: E402

START_TIMEOUT = 120  # seconds until the kernel answers
CELL_TIMEOUT = 24 * 3600  # seconds for one cell: a guard against a hanging kernel, not a budget
HEADLINE = 110  # characters of it that are shown
OUT_OF_MEMORY = re.compile(r"MemoryError|OutOfMemoryError|[Cc]an(no|')t allocate memory|bad_alloc")
LOWER = dict.fromkeys(("02", "05", "09"), "training.batch_size or sae.d_sae") | {
    "01": "model.batch_rows, or set data.store to stream",
    "03": "model.batch_rows",
    "06": "threads or saebench.core_rows",
    "11": "model.batch_rows or data.test_tokens",
}  # what takes the memory, by notebook


def parameters_of(notebook: Any, name: str) -> dict[str, Any]:
    """{parameter: default} of the one cell tagged ``parameters``, which holds ``name = literal`` lines alone.

    papermill's own inspection would pass over whatever else is there.
    """
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise UserError(f"{name} has {len(cells)} cells tagged 'parameters': it must have exactly one.")
    found = {}
    for line in ast.parse(cells[0].source).body:
        match line:
            case ast.Assign(targets=[ast.Name(id=key)], value=value):
                found[key] = ast.literal_eval(value)
            case _:
                raise UserError(f"{name}: the cell tagged 'parameters' may only hold lines like `cycle = 0`.")
    return found


def check_parameters(given: dict[str, str], known: dict[str, Any], name: str) -> dict[str, Any]:
    """The given values as the types of the defaults. Raises UserError for an unknown name or another type."""
    checked = {}
    for key, text in given.items():
        if key not in known:
            raise UserError(f"{name} has no parameter {key!r}: its parameters are {', '.join(known)}.")
        kind = type(known[key])
        try:
            value = text if kind is str else yaml.safe_load(text)
            checked[key] = TypeAdapter(kind).validate_python(value, strict=True)
        except (yaml.YAMLError, ValidationError) as error:
            must = f"must be of type {kind.__name__}, like its default {known[key]!r}"
            raise UserError(f"{name}: the parameter {key} is {text!r}, but {must}.") from error
    return checked


def clean(notebook: Any, root: Path) -> None:
    """Take out what differs by run and by machine: times, papermill's records, absolute paths."""
    places = {f"{root}/": "", f"{sys.prefix}/": "<environment>/"}
    if Path.home() != Path("/"):
        places[f"{Path.home()}/"] = "~/"
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.id = "injected-parameters"  # papermill draws a new one each time
        for output in cell.get("outputs", []):
            for holder in (output, output.get("data", {})):
                for key in [key for key in holder if key == "text" or key.startswith("text/")]:
                    for path, name in places.items():
                        holder[key] = holder[key].replace(path, name)


def headline(notebook: Any) -> str:
    """The last line that the notebook printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout").split("\n")
    return next((line[:HEADLINE] for line in reversed(printed) if line.strip()), "")


def _explain(error: Exception, notebook: str, stage: str, failed: Path) -> str:
    """One sentence for whatever went wrong inside ``notebook``."""
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    lower = f"lower {LOWER[notebook[:2]]}, or run" if notebook[:2] in LOWER else "run"
    kept = f"{lower} it with more memory; what was finished, the last checkpoint too, is kept"
    if isinstance(error, PapermillExecutionError):
        message = re.sub(r"\s+", " ", str(error.evalue)).strip()
        if error.ename in (UserError.__name__, ArtifactError.__name__):
            return f"{stage}: {message}"
        if OUT_OF_MEMORY.search(f"{error.ename}: {message}"):
            asked = re.search(r"tried to allocate [\d.]+ \w+", message, flags=re.IGNORECASE)
            return f"{stage}: the memory did not suffice{f' ({asked[0].lower()})' if asked else ''}: {kept}."
        print(re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)), file=sys.stderr)
        message = f"{error.ename}: {message}"
    elif isinstance(error, DeadKernelError):
        message = f"the notebook's process was killed, most likely for want of memory: {kept}"
    elif isinstance(error, CellTimeoutError):
        message = "a cell ran into the time limit; raise it with TIMEOUT=seconds"
    else:
        message = f"{type(error).__name__}: {error}"
    return f"{stage}: {message}; see {failed}"


def run_notebook(
    source: Path,
    output: Path,
    given: dict[str, str],
    target: Path | None = None,
    timeout: int = CELL_TIMEOUT,
    verbose: bool = False,
) -> str:
    """Execute ``source`` into ``output`` and return the last line that it printed.

    ``target`` is the artefact's manifest that it must leave behind, no older than the call. Raises UserError.
    """
    import papermill
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    class ThisPython(AsyncKernelManager):
        """The kernel of this environment, whatever else is installed under the name of python3."""

        kernel_spec = KernelSpec(**get_kernel_dict())

    stage, root = output.stem, repository_root()
    if not source.is_file():
        raise UserError(f"There is no notebook {source}: run this from the repository's root.")
    notebook = nbformat.read(source, as_version=4)
    parameters = check_parameters(given, parameters_of(notebook, source.name), source.name)
    running, failed = output.with_name(f".{stage}.running.ipynb"), output.with_name(f"{stage}.failed.ipynb")
    started = time.time()
    with explain_os_errors(output):
        running.parent.mkdir(parents=True, exist_ok=True)
        output.unlink(missing_ok=True)  # until all has passed again there is no executed copy
        try:
            papermill.execute_notebook(
                notebook,
                str(running.resolve()),
                parameters,
                kernel_name="python3",
                language="python",
                cwd=str(root),
                progress_bar=False,
                log_output=verbose,
                start_timeout=START_TIMEOUT,
                execution_timeout=timeout,
                kernel_manager_class=ThisPython,
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # it warns of its own loopback sockets
            )
            done = nbformat.read(running, as_version=4)
        except Exception as error:
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                raise  # the disk is full, for instance
            if running.exists():
                os.replace(running, failed)
            raise UserError(_explain(error, source.stem, stage, failed)) from error
        if target and not target.is_file():
            os.replace(running, failed)
            raise UserError(f"{stage}: the notebook ended without writing {target.parent}; see {failed}")
        if target and target.stat().st_mtime < started:
            os.utime(target)  # the stage found its artefact finished: it is up to date from now on
        clean(done, root)
        write_text(output, f"{nbformat.writes(done)}\n")
        running.unlink()
        write_json(output.with_suffix(".json"), {"seconds": round(time.time() - started, 1)})
        failed.unlink(missing_ok=True)
    return headline(done)


def main() -> None:
    parser = argparse.ArgumentParser(description="Execute a notebook with parameters.")
    add = parser.add_argument
    add("source", type=Path)
    add("output", type=Path)
    add("-p", nargs=2, action="append", default=[], metavar=("name", "value"), help="a parameter")
    add("--makes", type=Path, help="the file that the notebook must leave behind")
    add("--timeout", type=int, default=CELL_TIMEOUT, help="seconds for one cell")
    add("--verbose", action="store_true", help="show the notebook's output as it comes")
    options = parser.parse_args()
    started = time.perf_counter()
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    # papermill warns of comments that it cannot read as type hints; parameters are checked here, and better
    logging.getLogger("papermill").setLevel(logging.INFO if options.verbose else logging.ERROR)
    source, output, given = options.source, options.output, dict(options.p)
    said = run_notebook(source, output, given, options.makes, options.timeout, options.verbose)
    print(f"{output.stem:<22} {time.perf_counter() - started:7.1f} s  {said}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on from here.")
