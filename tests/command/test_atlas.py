"""results/<name>/atlas: what `make atlas` writes, and when `make publish` keeps it."""

import pytest
from builders.atlas import hostile_atlas
from builders.factory import config

from dmsae_lib.command.atlas import carry_atlas, write_atlas_of
from dmsae_lib.config.run import Run
from dmsae_lib.store.artifacts import ArtifactError, load, write


def harvested(run: Run, content: int) -> str:
    with write(run.folder / "harvest", "harvest") as writer:
        writer.json("record.json", content)
    return load(run.folder / "harvest", "harvest").hash


def atlas_in(folder, harvest: str, title: str) -> None:
    with write(folder, "atlas", {"harvest": harvest}) as writer:
        writer.json("atlas.json", hostile_atlas() | {"hook": title})


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(config(), "toy", tmp_path)


def test_publish_keeps_an_atlas_of_the_runs_own_saes_alone(run, tmp_path, capsys):
    published, harvest = tmp_path / "results" / "toy", harvested(run, 1)

    def carried(name: str) -> str:
        carry_atlas(run, published, tmp_path / name, "toy")
        page = tmp_path / name / "atlas" / "index.html"
        return page.read_text() if page.is_file() else ""

    assert carried("none") == ""
    atlas_in(published / "atlas", harvest, "blocks.3.published")
    assert "blocks.3.published" in carried("kept")
    atlas_in(run.folder / "atlas", harvest, "blocks.4.own")
    assert "blocks.4.own" in carried("own") and not capsys.readouterr().out
    harvested(run, 2)
    assert carried("stale") == ""
    assert capsys.readouterr().out.count("is of other SAEs: left out") == 2


def test_make_atlas_writes_the_page_and_the_executed_notebook(run, tmp_path, capsys):
    with pytest.raises(ArtifactError, match="There is no atlas artefact"):
        write_atlas_of(run)
    atlas_in(run.folder / "atlas", harvested(run, 1), "blocks.4.own")
    (run.folder / "notebooks").mkdir()
    (run.folder / "notebooks" / "atlas.ipynb").write_text("executed")
    write_atlas_of(run)
    results = tmp_path / "results" / "toy"
    assert "blocks.4.own" in (results / "atlas" / "index.html").read_text()
    assert (results / "notebooks" / "atlas.ipynb").read_text() == "executed"
    assert load(results / "atlas", "atlas").json("atlas.json")["hook"] == "blocks.4.own"
    assert "wrote results/toy/atlas/index.html" in capsys.readouterr().out
