"""A whole run on a toy configuration in seconds: the stages' own notebooks, executed as plain Python in one
process.

What the plan and the notebooks make is found here without being named, so a new stage or kind of artefact is
covered too.
"""

import contextlib
import json
import os
import pydoc_data.topics
import shutil
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import nbformat
import yaml

from dmsae_lib.command.plan import Stage, stages, write_plan
from dmsae_lib.config.run import Run, open_run
from dmsae_lib.store import artifacts

ROOT = Path(__file__).parents[2]
EVERY_STEP = 1e-9  # checkpoint_seconds
TINY = {
    "threads": 1,
    "model": {"name": "wheeltext-4x128", "hook_name": "blocks.1.hook_resid_post", "context_size": 32},
    "data": {"train_tokens": 2000, "select_tokens": 400, "test_tokens": 400},
    "sae": {"d_sae": 128, "prefixes": [8, 24, 56]},
    "training": {"k": 16, "batch_size": 100, "lr": 3e-3},
    "distill": {"cycles": 1, "final_core": "all_of_last"},
    "retrain": {"ks": [16], "seeds": [0], "controls": {"random": 1}},
    "saebench": {
        "probing_sets": ["105_click_bait"],
        "probing_ks": [1],
        "core_rows": 8,
        "suite": {"evals": ["sparse_probing"], "eval_seeds": [0, 1]},
    },
    "learning_rate_sweep": [1.0],
}


def write_settings(root: Path) -> None:
    """configs/tiny.yaml below ``root``, and the text that it names."""
    (root / "configs").mkdir(parents=True, exist_ok=True)
    texts = [
        text for topic in pydoc_data.topics.topics.values() for text in topic.split("\n\n") if len(text) > 80
    ]
    (root / "texts.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8"
    )
    settings = TINY | {"data": TINY["data"] | {"source": str(root / "texts.jsonl")}}
    (root / "configs" / "tiny.yaml").write_text(yaml.safe_dump(settings))


@contextlib.contextmanager
def _inside(root: Path) -> Iterator[None]:
    """``root`` stands in for the repository."""
    before, real = Path.cwd(), artifacts.repository_root
    artifacts.repository_root = lambda *_: root
    os.chdir(root)
    try:
        yield
    finally:
        os.chdir(before)
        artifacts.repository_root = real


def open_tiny(root: Path, name: str, *overrides: str, config: str = "tiny") -> Run:
    """The run ``name`` below ``root``, planned; ``config``: one of the repository's to begin with."""
    if config != "tiny":
        (root / "configs").mkdir(exist_ok=True)
        shutil.copy(ROOT / "configs" / f"{config}.yaml", root / "configs")
    with _inside(root):
        run = open_run(config, name, overrides)
        write_plan(run)
    return run


def execute(run: Run, stage: Stage) -> None:
    """Run the stage's notebook here and now."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{stage.notebook}.ipynb", as_version=4)
    names: dict[str, object] = {"__name__": "__main__"}
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    with _inside(run.root):
        for cell in notebook.cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, stage.name, "exec"), names)
            if "parameters" in cell.metadata.get("tags", []):
                names |= {"config": f"runs/{run.name}/config.yaml", "run": run.name} | stage.parameters
    plt.close("all")


def execute_all(run: Run) -> None:
    """All stages, parents first."""
    for stage in stages(run.config):
        execute(run, stage)


def stage_of(run: Run, name: str) -> Stage:
    return next(stage for stage in stages(run.config) if stage.name == name)


def artefacts(run: Run) -> dict[str, Path]:
    """{place: folder} of every artefact in the run's folder."""
    return {
        str(path.parent.relative_to(run.folder)): path.parent
        for path in sorted(run.folder.rglob("manifest.json"))
    }


def content(run: Run) -> dict[str, bytes]:
    """Every byte in the run's artefacts and figures that two runs must have in common, by place."""
    found = {
        str(path.relative_to(run.folder)): path.read_bytes() for path in (run.folder / "figures").glob("*")
    }
    for place, folder in artefacts(run).items():
        found |= {
            f"{place}/{path.name}": path.read_bytes()
            for path in folder.iterdir()
            if path.name != "provenance.json"
        }
    return found
