"""The notebooks: clean sources, and what the smoke run (`make test` makes it first) leaves behind."""

import json
import re
from pathlib import Path

import matplotlib.image
import nbformat
import numpy as np
import pytest
import torch

from dmsae_lib.command.plan import stages
from dmsae_lib.command.run_notebook import parameters_of
from dmsae_lib.config.run import Run, open_run
from dmsae_lib.distill.core import read_core
from dmsae_lib.report.results import validate
from dmsae_lib.saebench import REPRODUCED
from dmsae_lib.store import artifacts

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))
DOCUMENTED = {
    "config",
    "run",
    "overrides",
    "cycle",
    "chain",
    "k",
    "arm",
    "seed",
    "suite",
    "factors",
    "predict",
    "write",
}


def test_the_notebooks_are_numbered_in_the_order_of_the_paper():
    names = [path.stem for path in SOURCES]
    assert all(name[:2].isdecimal() for name in names if name != "start_here")
    assert names[:8] == [
        "00_base_model",
        "01_harvest",
        "02_train_cycle",
        "03_attribute",
        "04_distill",
        "05_retrain_across_k",
        "06_saebench",
        "07_figures",
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_source_holds_no_outputs_and_one_cell_of_literal_parameters(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    parameters = parameters_of(notebook, path.name)  # raises unless there is one such cell, of literals
    assert parameters and (path.stem == "00_base_model" or set(parameters) <= DOCUMENTED)
    if "run" in parameters and "config" in parameters:  # notebook 08 reads what is published
        assert (parameters["config"], parameters["run"], parameters["overrides"]) == ("smoke", "", [])
    title = "# Start here · " if path.stem == "start_here" else f"# {path.stem[:2]} · "
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith(title)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None and cell.source.strip()
            assert len(cell.source.splitlines()) <= 40
    assert "papermill" not in notebook.metadata and str(ROOT) not in path.read_text()
    assert notebook.metadata.kernelspec.name == "python3"


WRONG = {
    str: [202401, ["a"]],
    int: ["first", 1.5, True],
    bool: ["no", 1],
    list: ["training.k=32", ["training.k=32", 5], 3],
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_parameter_of_another_type_is_one_sentence_also_without_our_runner(path, monkeypatch):
    """As plain papermill hands them on: the set-up cell says so, before anything is loaded or written."""
    monkeypatch.setattr(
        "dmsae_lib.distill.harvest.open_harvest",
        lambda run: pytest.fail("the parameters must be checked first"),
    )
    monkeypatch.setattr(
        "dmsae_lib.data.language_model.LanguageModel",
        lambda *_: pytest.fail("the parameters must be checked first"),
    )
    notebook = nbformat.read(path, as_version=4)
    tagged, setup = [cell.source for cell in notebook.cells if cell.cell_type == "code"][:2]
    known = parameters_of(notebook, path.name)
    for name, default in known.items():
        for value in WRONG[type(default)]:
            names: dict[str, object] = {}
            exec(tagged, names)
            names[name] = value
            with pytest.raises(artifacts.UserError) as caught:
                exec(compile(setup, path.stem, "exec"), names)
            sentence = str(caught.value)
            assert sentence.startswith(f"The parameter {name} is {value!r}, but must be "), sentence
            assert (
                "\n" not in sentence and "papermill takes text by -r" in sentence and sentence.endswith(".")
            )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_that_plots_takes_the_house_style_first(path):
    """Whatever matplotlibrc there is; what the style does is tested with the figures."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    plotting = [n for n, source in enumerate(cells) if "plt.subplots" in source]
    styled = [n for n, source in enumerate(cells) if "house_style()" in source.splitlines()]
    assert not plotting or styled == [1] and plotting[0] > 1


def test_what_the_readme_links_first_is_the_teaching_notebook_as_it_is():
    """`make start-here` makes the copy: the source's code, executed without an error, and links that lead
    somewhere from the copy's folder."""
    source, copy = (
        ROOT / folder / "start_here.ipynb" for folder in ("notebooks", Path("results") / "start_here")
    )
    cells, executed = (nbformat.read(path, as_version=4).cells for path in (source, copy))
    assert [cell.source for cell in cells if cell.cell_type == "code"] == [
        cell.source for cell in executed if cell.cell_type == "code"
    ]
    assert all(cell.execution_count for cell in executed if cell.cell_type == "code")
    assert copy.stat().st_size < 700_000
    for path, found in ((source, cells), (copy, executed)):
        text = "\n".join(cell.source for cell in found if cell.cell_type == "markdown")
        targets = re.findall(r"\]\(([^)\s#]+)", text)
        assert targets and all((path.parent / target).exists() for target in targets), path


def test_every_stage_has_its_notebook_and_that_notebook_its_parameters():
    for stage in stages(open_run("extended").config):
        path = ROOT / "notebooks" / f"{stage.notebook}.ipynb"
        known = parameters_of(nbformat.read(path, as_version=4), path.name)
        assert {"config", "run", *stage.parameters} <= set(known)
        assert all(type(value) is type(known[name]) for name, value in stage.parameters.items())


@pytest.fixture(scope="module")
def smoke() -> Run:
    run = open_run("smoke")
    if not (run.folder / "summary" / "manifest.json").is_file():
        pytest.skip(
            "there is no finished smoke run in runs/smoke: `make stages CONFIG=smoke` (or `make test`) makes "
            "it"
        )
    return run


def test_every_stage_left_an_executed_copy_without_errors(smoke):
    for stage in (stage for stage in stages(smoke.config) if not stage.optional):
        notebook = nbformat.read(smoke.folder / "notebooks" / f"{stage.name}.ipynb", as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(cell.execution_count for cell in code), stage.name
        kinds = [output.output_type for cell in code for output in cell.outputs]
        assert "error" not in kinds and "stream" in kinds, stage.name
        pictures = [
            output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})
        ]
        assert pictures or stage.notebook == "04_distill" or stage.parameters.get("k") == 0, stage.name
        assert not list((smoke.folder / "notebooks").glob("*.failed.ipynb"))


def test_every_artefact_is_whole_and_names_the_parents_it_was_made_from(smoke):
    hashes = {}
    for manifest in smoke.folder.rglob("manifest.json"):
        found = artifacts.load(manifest.parent, json.loads(manifest.read_text())["kind"])
        hashes[str(manifest.parent.relative_to(smoke.folder))] = found
    for t in range(smoke.config.distill.cycles + 1):
        sae, core = hashes[f"cycle_{t}/sae"], hashes[f"cycle_{t}/core"]
        assert sae.parents["harvest"] == hashes["harvest"].hash
        assert sae.parents.get("core") == (hashes[f"cycle_{t - 1}/core"].hash if t else None)
        assert hashes[f"cycle_{t}/attribution"].parents["sae"] == core.parents["sae"] == sae.hash
        assert core.parents["attribution"] == hashes[f"cycle_{t}/attribution"].hash
    for k in smoke.config.retrain.ks:
        for arm, seed in [
            pair for pair in smoke.config.retrain_arms(k) if pair[0] in smoke.config.saebench.arms
        ]:
            trained = hashes[f"retrain/k{k}/{arm}-seed{seed}"]
            for name in REPRODUCED:
                assert hashes[f"saebench/k{k}/{arm}-seed{seed}/{name}-seed0"].parents["sae"] == trained.hash


def test_the_core_of_every_cycle_is_bit_identical_to_what_the_cycle_before_handed_on(smoke):
    for t in range(1, smoke.config.distill.cycles + 1):
        core = read_core(artifacts.load(smoke.cycle(t - 1, "core"), "core"))
        sae = artifacts.load(smoke.cycle(t, "sae"), "sae").tensors("sae.safetensors")
        assert len(core) > 0 and sae["core_rows"].dtype == torch.float32
        assert sae["core_rows"].numpy().tobytes() == core.rows.numpy().tobytes()
        kept = read_core(artifacts.load(smoke.cycle(t, "core"), "core"))
        for row, latent in zip(kept.rows, kept.latents):  # and those selected again are handed on unchanged
            if latent.first_cycle < t:
                before = next(i for i, old in enumerate(core.latents) if old.id == latent.id)
                assert torch.equal(row, core.rows[before])


def test_the_summary_follows_its_schema_and_has_a_row_for_everything(smoke):
    summary = json.loads((smoke.folder / "summary" / "summary.json").read_text())
    validate(summary)
    config = smoke.config
    assert summary["config"] == "smoke" and set(summary["claims"]) == {f"C{n}" for n in range(1, 8)}
    assert [row["cycle"] for row in summary["cycles"]] == list(range(config.distill.cycles + 1))
    expected = sorted(
        (chain, k, arm, seed)
        for chain in config.retrained_chains
        for k in config.retrain.ks
        for arm, seed in config.retrain_arms(k, chain)
    )
    assert sorted((row["chain"], row["k"], row["arm"], row["seed"]) for row in summary["retrain"]) == expected
    for row in summary["retrain"]:
        assert row["unbound"] or row["L0"]["total"] == pytest.approx(row["k"], rel=0.05), row


def test_every_figure_exists_and_is_not_blank(smoke):
    figures = sorted(
        (smoke.folder / "figures").glob("*.png"), key=lambda path: int(path.stem.partition("_")[0])
    )
    assert [path.stem.partition("_")[0] for path in figures] == [*"12345678", "12", "13"]
    for path in figures:
        assert path.with_suffix(".svg").stat().st_size > 2000
        picture = matplotlib.image.imread(path)[..., :3]
        inked = (np.abs(picture - picture[0, 0]) > 0.1).any(-1)
        assert inked.mean() > 0.01, path.name
        assert inked.any(0).mean() > 0.7 and inked.any(1).mean() > 0.7, path.name  # reaches across the page
