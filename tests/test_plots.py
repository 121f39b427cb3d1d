"""Every figure from a published folder alone: drawn, readable, and the same bytes every time."""

import re
import shutil
from pathlib import Path

import factory
import matplotlib.image
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from dmsae_lib.artifacts import UserError, write_json
from dmsae_lib.plot_style import ARMS, SMALL
from dmsae_lib.plots import FIGURES, draw_all
from dmsae_lib.plots_saebench import reference_rows
from dmsae_lib.results import Results

ROOT = Path(__file__).parents[1]


def published(root, *arguments, base_model=True, **keywords):
    """A results folder whose run is gone: figures can use nothing else."""
    folder = factory.publish(factory.build_run(root, *arguments, **keywords), base_model)
    if base_model:
        shutil.copytree(ROOT / "results" / "reference", folder.parent / "reference")
        stage = {"kind": "train", "processes": 8, "work_seconds": 2.0, "start_up_seconds": 3.0, "measured_seconds": 9.0}
        write_json(folder / "sizing.json", {
            "config": "synthetic", "summary": Results(folder).hash, "stages": [stage],
            "prediction": {"config": "large", "saes": 26, "machines": [{"name": "a GPU", "hours": {"train": 20.0}}]}})
    shutil.rmtree(root / "runs")
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return published(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Two cycles, one seed, one control, nothing scored, no base model."""
    config = factory.config(cycles=2, ks=(32, 64), seeds=(0,), controls={"random": 1})
    return published(tmp_path_factory.mktemp("smoke"), config, scored=False, base_model=False)


@pytest.fixture(scope="module", params=["full", "smoke"])
def results(request):
    return Results(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def drawn(full, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    return folder, draw_all(full, folder)


def test_every_figure_is_there_and_not_blank(drawn):
    folder, paths = drawn
    assert [path.stem for path in paths] == list(FIGURES)
    for path in paths:
        pixels = matplotlib.image.imread(path)[..., :3]
        assert pixels.std() > 0.05 and 600 < pixels.shape[1] <= 1410, path.name
        assert path.with_suffix(".svg").stat().st_size > 5000


def test_the_same_bytes_every_time(drawn, full, tmp_path):
    folder, _ = drawn
    draw_all(full, tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir()) and len(names) == 2 * len(FIGURES) + 1
    assert [n for n in names if (folder / n).read_bytes() != (tmp_path / n).read_bytes()] == []


def test_svg_has_no_date_and_names_its_summary(drawn, full):
    folder, _ = drawn
    for path in folder.glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        assert "dc:date" not in text and not re.search(r"20\d\d-\d\d-\d\d", text)
        assert Results(full).hash in text


def test_captions_stand_beside_the_figures(drawn, full):
    page = (drawn[0] / "README.md").read_text(encoding="utf-8")
    assert Results(full).hash in page and page.count("![") == len(FIGURES)
    assert "95 % t interval over 3 training seeds (one distilled core); hollow" in page


@pytest.mark.parametrize("name", FIGURES)
def test_axes_are_labelled_and_text_is_readable(results, name):
    figure = FIGURES[name](results)
    if name in ("9_base_model", "10_sizing", "11_paper_scale") and "smoke" in str(results.folder):
        assert figure is None  # no record was published
        return
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes in figure.axes:
        if axes.axison:
            shared = axes.get_shared_y_axes().get_siblings(axes)  # one label serves panels with one axis
            assert any(one.get_ylabel() for one in shared), name
            assert axes.get_xlabel() or axes.get_label() == "<colorbar>", name
    assert results.hash[:12] in "".join(text.get_text() for text in figure.texts)
    page = figure.bbox.padded(1)
    assert all(text.get_fontsize() >= SMALL for text in figure.findobj(Text) if text.get_text())
    for text in written(figure):
        box = text.get_window_extent()
        inside = box.x0 >= page.x0 and box.y0 >= page.y0 and box.x1 <= page.x1 and box.y1 <= page.y1
        assert inside, (name, text.get_text())


def written(figure):
    """Everything written in a figure but its tick labels (those beyond the limits exist without being drawn)."""
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        texts += [*axes.texts, axes.title, axes._left_title]
        if axes.axison:
            texts += [axes.xaxis.label, axes.yaxis.label]
        if axes.get_legend():
            texts += axes.get_legend().get_texts()
    return [text for text in texts if text.get_text().strip()]


def test_a_notebook_cell_shows_a_figure(smoke):
    assert FIGURES["2_core_by_origin"](Results(smoke))._repr_png_().startswith(b"\x89PNG")


def test_without_seeds_there_are_no_error_bars(smoke):
    caption = FIGURES["8_quality_vs_l0"](Results(smoke)).get_label().lower()
    assert "one seed, no error bars" in caption and "interval" not in caption


def test_what_was_not_run_is_said(smoke):
    figure = FIGURES["4_saebench_vs_l0"](Results(smoke))
    said = [axes.texts[0].get_text().replace("\n", " ") for axes in figure.axes]
    assert len(said) == 4 and all("not run" in text for text in said)


def test_no_distilled_arm_leaves_its_panel_out(tmp_path):
    config = factory.config(cycles=1, ks=(64,), seeds=(0,), controls={})
    config = config.model_copy(update={"retrain": config.retrain.model_copy(update={"arms": ["none"]})})
    folder = published(tmp_path, config, scored=False)
    assert len(FIGURES["6_core_share_of_k"](Results(folder)).axes) == 1
    assert [name for name, draw in FIGURES.items() if not draw(Results(folder))] == ["12_saebench_differences"]


def test_released_saes_stand_behind_a_run_on_their_model_alone(full, tmp_path):
    rows = reference_rows(Results(full))
    assert len(rows) == 7 * 6
    matryoshka = sorted((row for row in rows if row["architecture"] == "matryoshka"), key=lambda row: row["l0"])
    recovered = [.97347, .98490, .99067, .99424, .99642, .99808]  # as the design of this replication quotes them
    assert [row["loss_recovered"] for row in matryoshka] == pytest.approx(recovered, abs=1e-5)
    alone = FIGURES["11_paper_scale"](Results(full))
    assert not any("DMSAE" in text.get_text() for text in alone.legends[0].get_texts())
    assert "no run of ours" in alone.get_label()
    ours = Results(full)
    ours.summary["inputs"]["model"]["name"] = "google/gemma-2-2b"
    figure = FIGURES["11_paper_scale"](ours)
    (axes,) = figure.axes
    assert {"DMSAE, distilled core", "released Matryoshka"} <= {text.get_text() for text in figure.legends[0].get_texts()}
    behind = max(line.get_zorder() for line in axes.lines if line.get_label().startswith("released"))
    mine = [line for line in axes.lines if len(line.get_xdata()) and line.get_color() == ARMS["distilled"][1]]
    assert mine and all(line.get_zorder() > behind for line in mine)


def test_differences_show_value_and_interval(full):
    rows = Results(full).summary["differences"]
    axes = FIGURES["12_saebench_differences"](Results(full)).axes[0]
    points = {round(float(line.get_xdata()[0]), 6) for line in axes.lines if len(line.get_xdata()) == 1}
    assert {round(row["value"], 6) for row in rows} == points
    bars = {tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2}
    assert {tuple(row["interval"]) for row in rows} <= bars


def test_arms_differ_in_colour_and_in_marker():
    assert len({colour for _, colour, _ in ARMS.values()}) == len({marker for *_, marker in ARMS.values()}) == len(ARMS)


def test_a_missing_table_is_named(full, tmp_path):
    shutil.copytree(full, tmp_path / "copy")
    (tmp_path / "copy" / "history_cycles.csv").unlink()
    with pytest.raises(UserError, match="history_cycles.csv is missing.*`make publish`"):
        FIGURES["7_training_curves"](Results(tmp_path / "copy"))
