"""Every figure from a published folder alone: drawn, readable, and the same bytes every time."""

import os
import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from statistics import fmean

import factory
import matplotlib.image
import matplotlib.style
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from dmsae_lib.config.sections import CONTROLS, Chain
from dmsae_lib.figures import FIGURES, draw_all
from dmsae_lib.figures.saebench import reference
from dmsae_lib.figures.style import SMALL
from dmsae_lib.report.results import Results
from dmsae_lib.report.series import ARMS, KINDS, OTHER_KINDS, kinds, lines, units
from dmsae_lib.report.summary import write_summary
from dmsae_lib.report.verdicts import t_interval
from dmsae_lib.store.artifacts import UserError, write_json

ROOT = Path(__file__).parents[2]
REPLICATES = ["main", "seed1", "seed2"]
OTHER = OTHER_KINDS[0]  # colour and marker of the ReLU chains


def several_chains():
    """Two replicates of an equal-L0 main chain, each with its own retraining, and two chains with the paper's
    ReLU core."""
    equal, arms = (
        {"core_sparsity": "batchtopk", "core_decoder_init": "encoder"},
        ["none", "distilled", *CONTROLS, "warm_start"],
    )
    chains = [Chain(name=f"seed{n}", seed=n, retrain=arms, **equal) for n in (1, 2)]
    exempt = {"core_sparsity": "relu", "core_decoder_init": "random"}
    chains += [Chain(name=f"relu{n}", seed=n, retrain=["distilled"], **exempt) for n in (0, 1)]
    config = factory.config(cycles=2, ks=(64, 96), seeds=(0,), controls={})
    distill = {"chains": chains, "placebos": ["random_directions", "data_points"]}
    return config.model_copy(
        update={
            "training": config.training.model_copy(update=equal),
            "distill": config.distill.model_copy(update=distill),
            "retrain": config.retrain.model_copy(update={"arms": arms}),
        }
    )


def identity():
    """Three kinds of rows for each pair of replicates."""
    return [
        {
            "a": a,
            "b": b,
            "kind": kind,
            "size": 70,
            "cosine": cosine + 0.01 * i,
            "cosine_above": 0.1,
            "span": 0.4 + 0.02 * i,
            "span_chance": 0.3,
            "activation": None if kind == "random" else 0.5 + 0.03 * i,
            "activation_above": None,
        }
        for i, (a, b) in enumerate(combinations(REPLICATES, 2))
        for kind, cosine in (("cores", 0.5), ("plain", 0.3), ("random", 0.2))
    ]


def published(root, *arguments, base_model=True, identity=(), **keywords):
    """A results folder whose run is gone: figures can use nothing else."""
    run = factory.build_run(root, *arguments, **keywords)
    folder = factory.publish(run, base_model)
    if identity:
        shutil.rmtree(folder)
        shutil.copytree(write_summary(run, identity=identity), folder)
    if base_model:
        shutil.copytree(ROOT / "results" / "reference", folder.parent / "reference")
        stage = {
            "kind": "train",
            "processes": 8,
            "work_seconds": 2.0,
            "start_up_seconds": 3.0,
            "measured_seconds": 9.0,
        }
        write_json(
            folder / "sizing.json",
            {
                "config": "synthetic",
                "summary": Results(folder).hash,
                "stages": [stage],
                "prediction": {
                    "config": "large",
                    "saes": 26,
                    "machines": [{"name": "a GPU", "hours": {"train": 20.0}}],
                },
            },
        )
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


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    return published(tmp_path_factory.mktemp("several"), several_chains(), identity=identity())


@pytest.fixture(scope="module", params=["full", "smoke", "several"])
def results(request):
    return Results(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def drawn(several, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    return folder, draw_all(several, folder)


def test_every_figure_is_there_and_not_blank(drawn):
    folder, paths = drawn
    assert [path.stem for path in paths] == list(FIGURES)
    for path in paths:
        pixels = matplotlib.image.imread(path)[..., :3]
        assert pixels.std() > 0.05 and 600 < pixels.shape[1] <= 1410, path.name
        assert path.with_suffix(".svg").stat().st_size > 5000


def test_the_same_bytes_every_time(drawn, several, tmp_path):
    folder, _ = drawn
    draw_all(several, tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir()) and len(names) == 2 * len(FIGURES) + 1
    assert [n for n in names if (folder / n).read_bytes() != (tmp_path / n).read_bytes()] == []


MATPLOTLIBRC = {
    "text.usetex": "True",
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
}
DRAW = """
import io, pathlib, sys
import matplotlib
import matplotlib.pyplot as plt
from dmsae_lib.figures.house_style import house_style
from dmsae_lib.figures import FIGURES, draw_all
from dmsae_lib.report.results import Results
results, folder = map(pathlib.Path, sys.argv[1:])
assert matplotlib.matplotlib_fname() == str(folder.parent / "matplotlibrc")
assert matplotlib.rcParams["text.usetex"] is (folder.parent.name == "user")
draw_all(results, folder)
(folder / "cell.png").write_bytes(FIGURES["1_schematic"](Results(results))._repr_png_())
house_style()  # as every notebook does before its own plots
fig, ax = plt.subplots(figsize=(5, 2.4))
ax.plot([1, 2], [1, -3], label="text")
ax.legend()
ax.set(xlabel="x", title="title")
plt.savefig(folder / "notebook.png", metadata={"Software": None})
"""


def test_the_same_bytes_whatever_matplotlibrc_there_is(drawn, several, tmp_path):
    """A file that changes all that style sheets change, and asks for LaTeX, which crashes where there is
    none."""
    styles = matplotlib.style.library
    lines = [f"{key}: {value}" for key, value in MATPLOTLIBRC.items()]
    (tmp_path / "user").mkdir()
    with matplotlib.rc_context():
        for name in ("ggplot", "seaborn-v0_8-poster", "dark_background"):
            matplotlib.rcParams.update(styles[name])
        changed = {
            key for name in ("ggplot", "seaborn-v0_8-poster", "dark_background") for key in styles[name]
        } - set(MATPLOTLIBRC)
        for key in sorted(changed - {"axes.prop_cycle", "font.sans-serif"}):
            lines.append(f"{key}: {str(matplotlib.rcParams[key]).strip('[]').replace('#', '')}")
    lines.append("axes.prop_cycle: cycler('color', ['r', 'g'])")
    (tmp_path / "user" / "matplotlibrc").write_text("\n".join(lines))
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "matplotlibrc").touch()
    for name in ("user", "none"):
        environment = os.environ | {
            "MATPLOTLIBRC": str(tmp_path / name / "matplotlibrc"),
            "MPLBACKEND": "agg",
        }
        ended = subprocess.run(
            [sys.executable, "-c", DRAW, several, tmp_path / name / "figures"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr
    names = sorted(path.name for path in (tmp_path / "none" / "figures").iterdir())
    assert len(names) == 2 * len(FIGURES) + 3
    found = [{n: (tmp_path / name / "figures" / n).read_bytes() for n in names} for name in ("user", "none")]
    assert [n for n in names if found[0][n] != found[1][n]] == []
    assert [n for n in names if (drawn[0] / n).is_file() and (drawn[0] / n).read_bytes() != found[1][n]] == []


def test_svg_has_no_date_and_names_its_summary(drawn, several):
    folder, _ = drawn
    for path in folder.glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        assert "dc:date" not in text and not re.search(r"20\d\d-\d\d-\d\d", text)
        assert Results(several).hash in text


def test_captions_stand_beside_the_figures(drawn, several):
    page = (drawn[0] / "README.md").read_text(encoding="utf-8")
    assert Results(several).hash in page and page.count("![") == len(FIGURES)
    assert "95 % t interval over 3 distillation chains" in page


def test_error_bars_say_what_varied(full, several):
    """Seeds where there is one chain, of which controls have fewer; else chains."""
    over = {
        folder: FIGURES["3_distilled_vs_random"](Results(folder)).get_label() for folder in (full, several)
    }
    assert "95 % t interval over up to 3 training seeds (one distilled core)" in over[full]
    assert "hollow: unbound" in FIGURES["8_quality_vs_l0"](Results(full)).get_label()
    assert "95 % t interval over 3 distillation chains" in over[several] and "seeds" not in over[several]


@pytest.mark.parametrize("name", FIGURES)
def test_axes_are_labelled_and_text_is_readable(results, name):
    figure = FIGURES[name](results)
    recorded = ("9_base_model", "10_sizing", "11_paper_scale")
    if (
        name in recorded
        and "smoke" in str(results.folder)
        or name == "14_core_identity"
        and not results.summary["identity"]
    ):
        assert figure is None  # no record was published, or there is one chain
        return
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes in figure.axes:
        if axes.axison:
            shared = axes.get_shared_y_axes().get_siblings(axes)  # one label serves panels with one axis
            assert any(one.get_ylabel() for one in shared), name
            assert axes.get_xlabel() or axes.get_label() == "<colorbar>", name
    source = (
        "results/reference" if name == "11_paper_scale" else results.hash[:12]
    )  # others' numbers are not from our run
    assert source in "".join(text.get_text() for text in figure.texts)
    page = figure.bbox.padded(1)
    assert all(text.get_fontsize() >= SMALL for text in figure.findobj(Text) if text.get_text())
    for text in written(figure):
        box = text.get_window_extent()
        inside = box.x0 >= page.x0 and box.y0 >= page.y0 and box.x1 <= page.x1 and box.y1 <= page.y1
        assert inside, (name, text.get_text())


def written(figure):
    """Everything written in a figure but its tick labels (those beyond the limits exist without being
    drawn)."""
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
    assert "one sae each, no error bars" in caption and "interval" not in caption


def test_what_was_not_run_is_said(smoke):
    figure = FIGURES["4_saebench_vs_l0"](Results(smoke))
    said = [axes.texts[0].get_text().replace("\n", " ") for axes in figure.axes]
    assert len(said) == 4 and all("not run" in text for text in said)


def test_no_distilled_arm_leaves_its_panel_out(tmp_path):
    config = factory.config(cycles=1, ks=(64,), seeds=(0,), controls={})
    config = config.model_copy(update={"retrain": config.retrain.model_copy(update={"arms": ["none"]})})
    folder = published(tmp_path, config, scored=False)
    assert len(FIGURES["6_core_share_of_k"](Results(folder)).axes) == 1
    assert [name for name, draw in FIGURES.items() if not draw(Results(folder))] == [
        "12_saebench_differences",
        "14_core_identity",
    ]


def test_released_saes_stand_behind_a_run_on_their_model_alone(full, tmp_path):
    rows = reference(Results(full))
    assert len(rows) == 7 * 6
    matryoshka = sorted(
        (row for row in rows if row["architecture"] == "matryoshka"), key=lambda row: row["l0"]
    )
    # as the design of this replication quotes them
    recovered = [0.97347, 0.98490, 0.99067, 0.99424, 0.99642, 0.99808]
    assert [row["loss_recovered"] for row in matryoshka] == pytest.approx(recovered, abs=1e-5)
    alone = FIGURES["11_paper_scale"](Results(full))
    assert not any("DMSAE" in text.get_text() for text in alone.legends[0].get_texts())
    assert "no run of ours" in alone.get_label()
    ours = Results(full)
    ours.summary["inputs"]["model"]["name"] = "google/gemma-2-2b"
    figure = FIGURES["11_paper_scale"](ours)
    (axes,) = figure.axes
    assert {"DMSAE (ReLU core)", "released Matryoshka"} <= {
        text.get_text() for text in figure.legends[0].get_texts()
    }
    behind = max(line.get_zorder() for line in axes.lines if line.get_label().startswith("released"))
    mine = [line for line in axes.lines if len(line.get_xdata()) and line.get_color() == ARMS["distilled"][1]]
    assert mine and all(line.get_zorder() > behind for line in mine)


def test_differences_show_value_and_interval(full):
    rows = Results(full).summary["differences"]
    axes = FIGURES["12_saebench_differences"](Results(full)).axes[0]
    points = {round(float(line.get_xdata()[0]), 6) for line in axes.lines if len(line.get_xdata()) == 1}
    assert {round(row["value"], 6) for row in rows} == points
    bars = {tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2}
    assert {tuple(row["interval"]) for row in rows if row["interval"]} <= bars


def test_differences_of_one_seed_claim_no_interval(several):
    figure = FIGURES["12_saebench_differences"](Results(several))
    assert (
        "one training seed, no error bars" in figure.get_label().lower()
        and "t interval" not in figure.get_label()
    )
    assert all(len(line.get_xdata()) == 1 for line in figure.axes[0].lines[1:] if len(line.get_xdata()))


def test_arms_differ_in_colour_and_in_marker():
    looks = [look[1:] for look in ARMS.values()] + list(OTHER_KINDS)
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == len(looks)


def points(axes, marker):
    """(x, y) of the single points with a marker."""
    return sorted(
        (line.get_xdata()[0], line.get_ydata()[0])
        for line in axes.lines
        if len(line.get_xdata()) == 1 and line.get_marker() == marker
    )


def mean(rows, value, **wanted):
    """Mean over chains of a value of the retrain rows; each has one training seed."""
    return fmean(value(row) for row in rows if all(row[key] == item for key, item in wanted.items()))


@pytest.fixture
def apart(several):
    """Results in which the ReLU chains lie far from the others, so that no mean can hide them."""
    found = Results(several)
    for row in found.summary["retrain"]:
        if row["chain"].startswith("relu"):
            row |= {"loss_increase": 9.0, "fvu": 5.0, "unbound": row["k"] == 64}
    return found


def test_kinds_of_core_are_told_apart(several):
    summary = Results(several).summary
    main, relu = kinds(summary)
    assert (main.name, list(main.chains)) == (KINDS["batchtopk"], REPLICATES)
    assert (relu.name, list(relu.chains), (relu.colour, relu.marker)) == ("ReLU", ["relu0", "relu1"], OTHER)
    assert {row["chain"] for row in main.rows} == set(REPLICATES) and {
        row["chain"] for row in relu.rows
    } == set(relu.chains)
    summary["chains"] |= {
        "again": summary["chains"]["seed1"],
        "biases": summary["chains"]["relu0"]
        | {"core_bias_init": "match_frequency", "core_decoder_init": "encoder"},
    }
    # a chain that repeats another is none of them
    names = {kind.name: list(kind.chains) for kind in kinds(summary)}
    assert names == {
        "equal-L0": REPLICATES,
        "ReLU": ["relu0", "relu1"],
        "ReLU, encoder decoder, biases by frequency": ["biases"],
    }


def test_a_line_is_an_arm_of_one_kind_of_core(apart):
    found = {label: rows for (label, *_), rows in lines(apart.summary)}
    assert {row["chain"] for row in found["DMSAE (equal-L0 core)"]} == set(REPLICATES)
    assert {row["chain"] for row in found["DMSAE (ReLU core)"]} == {"relu0", "relu1"} and len(found) == 11
    assert "Matryoshka baseline" not in {
        label for (label, *_), _ in lines(apart.summary, wanted=lambda row: row["arm"] != "none")
    }
    values, varied = units(found["principal components"], lambda row: row["fvu"])
    assert len(values) == 3 and varied == "distillation chain"


def test_quality_shows_means_over_replicates_and_relu_beside(apart):
    rows = [row for row in apart.summary["retrain"] if row["chain"] in REPLICATES]
    figure = FIGURES["8_quality_vs_l0"](apart)
    for axes, metric in zip(figure.axes[:2], ("loss_increase", "fvu")):
        for arm in ("none", "distilled", "pca", "warm_start"):
            expected = [
                (
                    mean(rows, lambda row: row["L0"]["total"], arm=arm, k=k),
                    mean(rows, lambda row, m=metric: row[m], arm=arm, k=k),
                )
                for k in (64, 96)
            ]
            assert points(axes, ARMS[arm][2]) == [pytest.approx(pair) for pair in expected]
        assert [y for _, y in points(axes, OTHER[1])] == [9.0 if metric == "loss_increase" else 5.0] * 2
        filled = [
            line.get_markerfacecolor()
            for line in axes.lines
            if line.get_marker() == OTHER[1] and len(line.get_xdata())
        ]
        assert filled == ["white", OTHER[0]]  # unbound at k = 64, not at 96


def test_quality_is_compared_at_measured_l0(apart):
    """Chain i lies JITTER (i - 1) beyond the effect, the controls a tenth more."""
    above, _, below, _ = FIGURES["8_quality_vs_l0"](apart).axes
    assert [y for _, y in points(below, ARMS["pca"][2])] == pytest.approx(
        [factory.EFFECT["pca"]] * 2, abs=1e-6
    )
    assert not points(below, OTHER[1])  # a ReLU chain has no baseline of its own
    assert not points(below, ARMS["none"][2]) and above.get_yscale() == "log"


def test_controls_show_every_sae_of_the_replicates_with_ranks_and_intervals(apart):
    figure = FIGURES["3_distilled_vs_random"](apart)
    rows = [row for row in apart.summary["retrain"] if row["k"] == 64 and row["chain"] in REPLICATES]
    for axes, metric in zip(figure.axes, ("loss_increase", "fvu")):
        for arm in ("none", "distilled", *CONTROLS, "warm_start"):
            values = [row[metric] for row in rows if row["arm"] == arm]
            assert [x for x, _ in points(axes, ARMS[arm][2])] == sorted(values) and len(values) == 3
            bars = [
                list(line.get_xdata())
                for line in axes.lines
                if line.get_marker() == "|" and line.get_color() == ARMS[arm][1]
            ]
            assert bars == ([t_interval(values)] if t_interval(values) else [])
        assert max(line.get_xdata()[0] for line in axes.lines) < 1  # no ReLU core among them
    shown = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    l0 = mean(rows, lambda row: row["L0"]["core"], arm="pca")
    assert (
        f"principal components\nrank 30.0, L0 {l0:.1f} of 63.7" in shown
        and "warm start, unfrozen\nno core, L0 63.7" in shown
    )


def test_core_share_has_a_line_per_chain_and_a_mean_per_kind(several):
    results = Results(several)
    left, right = FIGURES["6_core_share_of_k"](results).axes
    for kind in kinds(results.summary):
        drawn = [list(line.get_ydata()) for line in left.lines if line.get_color() == kind.colour]
        shares = [[row["core_share"] for row in rows] for rows in kind.chains.values()]
        assert drawn == [*shares, [pytest.approx(fmean(values)) for values in zip(*shares)]]
        assert points(right, kind.marker) == [
            (
                k,
                pytest.approx(
                    mean(kind.rows, lambda row: row["L0"]["core"] / row["k"], k=k, arm="distilled")
                ),
            )
            for k in (64, 96)
        ]
    assert {0.75, 1} <= {line.get_ydata()[0] for line in left.lines}


def test_reselection_shows_cores_placebos_and_uniform_selection(several):
    results = Results(several)
    (axes,) = FIGURES["13_reselected"](results).axes  # placebos run beside the main chain's kind alone
    named = {line.get_label(): line for line in axes.lines}
    chains = [rows[1:] for rows in kinds(results.summary)[0].chains.values()]
    core = [fmean(rows[t]["kept"] / rows[t]["core_in"] for rows in chains) for t in (0, 1)]
    placebo = [
        fmean(rows[t]["placebos"]["data_points"]["kept"] / rows[t]["core_in"] for rows in chains)
        for t in (0, 1)
    ]
    uniform = [
        fmean(rows[t]["core_out"] / (rows[t]["core_in"] + factory.M_0) for rows in chains) for t in (0, 1)
    ]
    for label, values in {
        "distilled core": core,
        "placebo: random activations": placebo,
        "uniform selection": uniform,
    }.items():
        assert list(named[label].get_xdata()) == [1, 2] and list(named[label].get_ydata()) == pytest.approx(
            values
        )
    # a thin line per chain: the core, two kinds of placebo
    assert sum(line.get_linewidth() < 1 for line in axes.lines) == 3 * 3
    for chain in (results.summary, *results.summary["chains"].values()):
        for row in chain["cycles"]:
            row["placebos"] = {}
    assert FIGURES["13_reselected"](results) is None


def test_identity_shows_every_pair_and_the_chance_of_spans(several):
    axes = FIGURES["14_core_identity"](Results(several)).axes
    for panel, metric in zip(axes, ("cosine", "activation", "span")):
        for y, (kind, arm) in enumerate(
            (("cores", "distilled"), ("plain", "none"), ("random", "random_directions"))
        ):
            values = [row[metric] for row in identity() if row["kind"] == kind and row[metric] is not None]
            (drawn,) = [line for line in panel.lines if line.get_marker() == ARMS[arm][2]] or [None]
            assert (
                (list(drawn.get_xdata()), set(drawn.get_ydata())) == (pytest.approx(values), {y})
                if values
                else drawn is None
            )
    ticks = {line.get_xdata()[0] for line in axes[2].lines if line.get_color() == "#a0a0a0"}
    assert ticks == {0.3} and not [line for line in axes[0].lines if line.get_color() == "#a0a0a0"]


def test_figure_2_is_about_the_main_chain(several):
    (axes,) = FIGURES["2_core_by_origin"](Results(several)).axes
    totals = [sum(bars[t].get_height() for bars in axes.containers) for t in range(3)]
    assert totals == factory.SIZES[:3]


def test_a_missing_table_is_named(full, tmp_path):
    shutil.copytree(full, tmp_path / "copy")
    (tmp_path / "copy" / "history_cycles.csv").unlink()
    with pytest.raises(UserError, match="history_cycles.csv is missing.*`make publish`"):
        FIGURES["7_training_curves"](Results(tmp_path / "copy"))
