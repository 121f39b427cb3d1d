"""results/<name>/atlas: written by ``make atlas``, kept by ``make publish``.

``python -m dmsae_lib.command.atlas --config default``
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from dmsae_lib.command.plan import published_as, run_arguments
from dmsae_lib.config.lock import locked
from dmsae_lib.config.run import Run, open_run
from dmsae_lib.store.artifacts import UserError, explain_os_errors, load
from dmsae_lib.store.atomic import replacing


def write_atlas_of(run: Run, name: str = "") -> None:
    """Copy the run's atlas to results/<name>/atlas with its pages, and the executed notebook beside it."""
    from dmsae_lib.atlas.page import publish_atlas

    name = published_as(name or run.name)
    artifact, results = load(run.folder / "atlas", "atlas", "atlas"), run.root / "results" / name
    with explain_os_errors(results), locked(run), replacing(results / "atlas") as (new,):
        publish_atlas(artifact, new, run.root, name)
        (results / "notebooks").mkdir(exist_ok=True)
        shutil.copy(run.folder / "notebooks" / "atlas.ipynb", results / "notebooks")
    size = sum(path.stat().st_size for path in (results / "atlas").rglob("*") if path.is_file())
    print(f"wrote results/{name}/atlas/index.html ({size / 2**20:.1f} MiB with all that is beside it)")


def _is_of(run: Run, parents: dict[str, str]) -> bool:
    """Whether the run's own artefacts are those of these hashes."""
    manifests = {hash_: run.folder / name / "manifest.json" for name, hash_ in parents.items()}
    return all(
        path.is_file() and json.loads(path.read_text(encoding="utf-8"))["hash"] == hash_
        for hash_, path in manifests.items()
    )


def carry_atlas(run: Run, published: Path, new: Path, name: str) -> None:
    """Into ``new``, which takes the place of results/<name>: the run's atlas, or the ``published`` one if it
    is of the SAEs that this run holds; else none."""
    from dmsae_lib.atlas.page import publish_atlas

    for folder in (run.folder / "atlas", published / "atlas"):
        if (folder / "manifest.json").is_file():
            artifact = load(folder, "atlas", "atlas")
            if _is_of(run, artifact.parents):
                publish_atlas(artifact, new / "atlas", run.root, name)
                return
            print(
                f"{folder.relative_to(run.root)} is of other SAEs: left out; `make atlas` makes one of these"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the atlas of a run to results/.")
    parser.add_argument("--as", dest="name", default="", help="the name below results/")
    run_arguments(parser)
    options = parser.parse_args()
    write_atlas_of(open_run(options.config, options.run, options.set), options.name)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
