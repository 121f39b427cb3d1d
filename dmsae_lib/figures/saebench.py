"""Figures of SAEBench: scores against L0, and DMSAE minus baseline."""

import textwrap
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmsae_lib.figures import style
from dmsae_lib.figures.house_style import MUTED
from dmsae_lib.figures.retrain import PLAIN, imported
from dmsae_lib.figures.style import DOUBLE
from dmsae_lib.report import series
from dmsae_lib.report.equal_l0 import score
from dmsae_lib.report.results import Results, Row

SCORES = {  # metrics that have a panel against L0: label, and which way is better
    "ce_loss_score": ("CE loss score", 1),
    "absorption.mean_full_absorption_score": ("full absorption", -1),
    "probe_top1": ("sparse probing, top 1", 1),
    "probe_top5": ("sparse probing, top 5", 1),
}
PROBES = (("dense", "dense probe", (0, (4, 2))), ("best_channel", "best residual channel", (0, (1, 1.5))))
AGAIN = {"color": "#c4c4c4", "linewidth": 3.5, "solid_capstyle": "butt"}  # interval over evaluation seeds
BETTER = {1: "↑ better", -1: "↓ better", 0: "neither is better"}
PANELS = 4  # in a row


def scored(results: Results) -> list[Row]:
    """The SAEs that SAEBench scored."""
    return [row for row in results.summary["retrain"] if row["saebench"]]


def _titled(axes: Axes, name: str, direction: int) -> None:
    """A narrow panel's title, and which way is better."""
    axes.set_title("\n".join([*textwrap.wrap(name, 22), BETTER[direction]]))


def of_main_chain(results: Results) -> bool:
    return {row["chain"] for row in scored(results)} <= {"main"}


def _difference(axes: Axes, summary: Row, metric: str) -> list[Row]:
    """DMSAE minus baseline by k for each kind of core: mean, its interval, and that over evaluation seeds."""
    kinds, drawn = {kind.name: kind for kind in series.kinds(summary)}, []
    by_core = series.differences(summary)
    for at, (core, rows) in enumerate(by_core.items()):
        kind, rows = kinds[core], [row for row in rows if row["metric"] == metric]
        places = [row["k"] * 1.2 ** (at - (len(by_core) - 1) / 2) for row in rows]  # side by side
        for x, row in zip(places, rows):
            if again := row["evaluation"]:
                style.whisker(axes, x, again["interval"], again["n"], zorder=1, **AGAIN)
            bar = {"color": kind.colour, "linewidth": 1, "marker": "_", "markersize": 4, "zorder": 3}
            style.whisker(axes, x, row["interval"], row["n"], **bar)
            axes.plot([x], [row["value"]], marker=kind.marker, zorder=4, **style.face(kind.colour))
        axes.plot(places, [row["value"] for row in rows], color=kind.colour, zorder=2)
        drawn += rows
    axes.axhline(0, color=series.ARMS["none"][1], linewidth=1, zorder=1)
    return drawn


def _finish(figure: Figure, results: Results, caption: str, rows: list[Row]) -> Figure:
    """With the words on what the differences' ``rows`` have: evaluation seeds, doubts, intervals."""
    if any(row["evaluation"] for row in rows):
        over = "evaluation seeds (texts, splits and probes) for the first training seed, at equal k"
        caption += f" Grey: 95 % t interval over {over}."
    if any(row["doubted"] for row in rows):
        caption += " †: unreliable by an audit (arXiv 2605.18229), or counts outliers."
    over = series.varied(row for row in rows if row["interval"])
    bars = f"differences: mean, bars: 95 % t interval over {over}"
    return style.finish(figure, results, caption, bars if over else "one training seed, no error bars")


def scores(results: Results) -> Figure:
    """SAEBench metrics against measured L0, and DMSAE minus baseline."""
    summary = results.summary
    drawn = series.lines(summary, ["none", "distilled"], lambda row: row["saebench"])
    ks = sorted({row["k"] for _, rows in drawn for row in rows})
    shown = [metric for metric in SCORES if any(score(row, metric) is not None for row in scored(results))]
    compared: list[Row] = []
    figure = style.new_figure(DOUBLE, 3.6)
    panels = figure.subplots(2, len(shown), squeeze=False, sharex=True)
    for (above, below), metric in zip(panels.T, shown):
        name, direction = SCORES[metric]
        for look, rows in drawn:
            style.curve(above, look, rows, partial(score, metric=metric), intervals=False)
        imported(above, results, partial(score, metric=metric))
        for key, reference, line in PROBES if metric.startswith("probe_") else ():
            if probing := summary["probing_baselines"]:
                above.axhline(probing[key], color=MUTED, linewidth=1, linestyle=line, label=reference)
        mine = _difference(below, summary, metric)
        _titled(above, name + " †" * any(row["doubted"] for row in mine), direction)
        compared += mine
        for axes, label in ((above, ""), (below, "k")):
            style.l0_axis(axes, ks)
            axes.set_xlabel(label)
    panels[0, 0].set_ylabel("score (fraction)")
    panels[1, 0].set_ylabel("minus baseline")
    style.legend(figure, panels[0], ncols=4)
    caption = (
        "SAEBench with the distilled core and without. Above: mean scores against measured L0 (active "
        "latents per token, core included). Below: DMSAE minus the Matryoshka baseline, paired by chain and "
        "training seed, at measured L0."
    )
    return _finish(figure, results, caption, compared)


def others(results: Results) -> list[str]:
    """Metrics that are compared and have no panel in figures 4 and 8."""
    metrics = dict.fromkeys(row["metric"] for row in results.summary["differences"])
    return [metric for metric in metrics if metric not in SCORES and metric not in PLAIN]


def differences(results: Results) -> Figure:
    """DMSAE minus baseline in every other headline metric, an axis each."""
    shown, rows = others(results), results.summary["differences"]
    columns = min(len(shown), PANELS)
    height = -(-len(shown) // columns)
    figure = style.new_figure(DOUBLE, 0.7 + 1.6 * height)
    panels = list(figure.subplots(height, columns, squeeze=False).flat)
    ks, compared = sorted({row["k"] for row in rows}), list[Row]()
    for axes, metric in zip(panels, shown):
        mine = _difference(axes, results.summary, metric)
        _titled(axes, mine[0]["label"] + " †" * mine[0]["doubted"], mine[0]["better"])
        style.l0_axis(axes, ks)
        axes.set(xlabel="k", xlim=(0.75 * ks[0], 1.33 * ks[-1]))
        compared += mine
    for axes in panels[::columns]:
        axes.set_ylabel("minus baseline")
    for axes in panels[len(shown) :]:
        axes.remove()
    by_core = series.differences(results.summary)
    for kind in [kind for kind in series.kinds(results.summary) if kind.name in by_core]:
        label = series.ARMS["distilled"][0].format(kind=kind.name)
        panels[0].plot([], [], color=kind.colour, marker=kind.marker, label=label, **style.face(kind.colour))
    style.legend(figure, panels[:1], ncols=4)
    caption = (
        "DMSAE minus the Matryoshka baseline in SAEBench's other metrics, paired by chain and training seed, "
        "at measured L0; fractions."
    )
    return _finish(figure, results, caption, compared)
