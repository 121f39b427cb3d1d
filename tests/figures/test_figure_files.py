"""The files of every figure: there, readable, and the same bytes every time; and the registry."""

import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import matplotlib.style
import pytest
from everything import draw_everything
from matplotlib.text import Text

from dmsae_lib.figures import FIGURES, draw_all, style
from dmsae_lib.figures.style import SMALL
from dmsae_lib.report.results import Results

ROOT = Path(__file__).parents[2]
STYLES = ("ggplot", "seaborn-v0_8-poster", "dark_background")
MATPLOTLIBRC = {
    "text.usetex": "True",  # crashes where there is no LaTeX
    "savefig.bbox": "tight",
    "savefig.transparent": "True",
    "figure.dpi": "43",
    "svg.fonttype": "none",
    "path.sketch": "3, 50, 2",
    "errorbar.capsize": "9",
    "legend.loc": "center",
    "image.cmap": "jet",
    "xtick.direction": "in",
    "figure.constrained_layout.use": "True",
    "axes.xmargin": "0.4",
    "axes.prop_cycle": "cycler('color', ['r', 'g'])",
}


@pytest.fixture(scope="session")
def drawn(several, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    return folder, draw_everything(several, folder)


def test_every_figure_is_there_and_not_blank(drawn):
    assert [path.stem for path in drawn[1]] == list(FIGURES)
    for path in drawn[1]:
        pixels = matplotlib.image.imread(path)[..., :3]
        assert pixels.std() > 0.05 and 600 < pixels.shape[1] <= 1410, path.name
        assert path.with_suffix(".svg").stat().st_size > 5000


def users_settings():
    """A matplotlibrc that changes all that style sheets change."""
    with matplotlib.rc_context():
        for name in STYLES:
            matplotlib.rcParams.update(matplotlib.style.library[name])
        keys = {key for name in STYLES for key in matplotlib.style.library[name]} - {"font.sans-serif"}
        found = {key: str(matplotlib.rcParams[key]).strip("[]").replace("#", "") for key in sorted(keys)}
    return "\n".join(f"{key}: {value}" for key, value in (found | MATPLOTLIBRC).items())


def test_another_process_draws_the_same_bytes_whatever_matplotlibrc_it_reads(drawn, several, tmp_path):
    (tmp_path / "matplotlibrc").write_text(users_settings())
    settings = {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc"), "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, Path(__file__).with_name("everything.py"), several, tmp_path / "figures"]
    ended = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    first, second = (
        {path.name: path.read_bytes() for path in f.iterdir()} for f in (drawn[0], tmp_path / "figures")
    )
    assert first.keys() == second.keys() and len(first) == 2 * len(FIGURES) + 3
    assert [name for name in first if first[name] != second[name]] == []


def test_svg_has_no_date_and_names_its_summary(drawn, several):
    for path in drawn[0].glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        assert "dc:date" not in text and not re.search(r"20\d\d-\d\d-\d\d", text)
        assert Results(several).hash in text


def test_captions_stand_beside_the_figures(drawn, several):
    page = (drawn[0] / "README.md").read_text(encoding="utf-8")
    assert Results(several).hash in page and page.count("![") == len(FIGURES)
    assert "95 % t interval over 3 distillation chains" in page


def test_a_figure_is_added_by_one_line_of_the_registry(smoke, tmp_path, monkeypatch):
    def toy(results):
        assert matplotlib.rcParams["font.size"] == 8  # the house style, whatever the caller's
        figure = style.new_figure(style.SINGLE, 2)
        figure.subplots().plot([row["dead"] for row in results.summary["cycles"]])
        return style.finish(figure, results, "Dead latents by cycle.", "one SAE per cycle")

    toys = {"1_toy": style.Plot(toy), "2_left_out": style.Plot(toy, where=lambda results: [])}
    monkeypatch.setattr("dmsae_lib.figures.FIGURES", toys)
    with matplotlib.rc_context({"font.size": 30}):
        assert [path.name for path in draw_all(smoke, tmp_path)] == ["1_toy.png"]
    assert {path.name for path in tmp_path.iterdir()} == {"1_toy.png", "1_toy.svg", "README.md"}
    page = (tmp_path / "README.md").read_text()
    assert "**1_toy.** Dead latents by cycle. One SAE per cycle." in page


def written(figure):
    """Every text of a figure but its tick labels (those beyond the limits exist without being drawn)."""
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        texts += [*axes.texts, axes.title, axes._left_title]
        texts += [axes.xaxis.label, axes.yaxis.label] if axes.axison else []
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
    return [text for text in texts if text.get_text().strip()]


ASKED = {"15", "16", "17", "18"}  # of notebook 10
UNPUBLISHED = {"smoke": {"4", "9", "10", "12", "14", *ASKED}, "full": {"14", *ASKED}, "several": set()}


@pytest.mark.parametrize("published", UNPUBLISHED)
def test_axes_are_labelled_and_text_is_readable(published, request):
    results = Results(request.getfixturevalue(published))
    figures = {name: plot(results) for name, plot in FIGURES.items()}
    assert {name.partition("_")[0] for name, figure in figures.items() if figure is None} == UNPUBLISHED[
        published
    ]
    for name, figure in figures.items():
        if figure:
            check(name, figure, results)


def check(name, figure, results):
    figure.draw_without_rendering()
    for axes in figure.axes:
        if axes.axison:  # one label serves a row of panels, or a column
            place = axes.get_subplotspec()
            places = {one: one.get_subplotspec() for one in figure.axes}
            assert any(one.get_ylabel() for one in places if places[one].rowspan == place.rowspan), name
            assert any(one.get_xlabel() for one in places if places[one].colspan == place.colspan), name
    assert results.hash[:12] in "".join(text.get_text() for text in figure.texts)
    assert all(text.get_fontsize() >= SMALL for text in figure.findobj(Text) if text.get_text())
    page = figure.bbox.padded(1)
    for text in written(figure):
        box = text.get_window_extent()
        inside = box.x0 >= page.x0 and box.y0 >= page.y0 and box.x1 <= page.x1 and box.y1 <= page.y1
        assert inside, (name, text.get_text())
