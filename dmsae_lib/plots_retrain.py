"""Figures of the SAEs trained after distillation: controls, SAEBench scores, reconstruction against L0."""

from collections.abc import Callable
from itertools import cycle
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmsae_lib import plot_style as style
from dmsae_lib.claims import score, t_interval
from dmsae_lib.plot_style import ARMS, DOUBLE, MUTED, SEEDS, styled
from dmsae_lib.results import Results, Row

REFERENCES = (("dense", "dense probe", (0, (4, 2))), ("best_channel", "best residual channel", (0, (1, 1.5))))
OTHERS = ("#333333", "#8a6d3b", "#6b4c9a", "#9a4c4c")  # of SAEs trained elsewhere
PLAIN = {"loss_recovered": "loss recovered (fraction)", "fvu": "FVU (fraction)"}
SCORES = {"ce_loss_score": "CE loss score (fraction)", "explained_variance_legacy": "explained variance (fraction)",
          "probe_top1": "probing accuracy, top 1", "probe_top5": "probing accuracy, top 5"}


@styled
def controls(results: Results) -> Figure:
    """Loss recovered and FVU of the distilled core and its controls at the distillation k."""
    k = results.summary["sizes"]["k"]
    rows = [row for row in results.summary["retrain"] if row["k"] == k and not row["core"].startswith("longer")]
    groups = {arm: group for (arm, _), group in style.by_point(rows).items()}
    figure = style.new_figure(DOUBLE, 0.9 + 0.27 * max(len(groups), 4))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (metric, name) in zip(panels, PLAIN.items()):
        for y, (arm, group) in enumerate(groups.items()):
            _, colour, marker = ARMS[arm]
            values = [row[metric] for row in group]
            if interval := t_interval(values):
                axes.plot(interval, [y, y], color=colour, linewidth=1.4, marker="|", markersize=7)
                axes.plot([fmean(values)] * 2, [y - 0.28, y + 0.28], color=colour, linewidth=1.6)
            for row in group:
                axes.plot([row[metric]], [y], marker=marker, **style.face(colour, row["unbound"]))
        axes.set_xlabel(name)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.locator_params(axis="x", nbins=6)
        axes.margins(x=0.08)
        axes.tick_params(axis="y", length=0)
    l0 = {arm: fmean(row["L0"]["total"] for row in group) for arm, group in groups.items()}
    panels[0].set_yticks(range(len(groups)), [f"{style.label(arm, results)} (L0 {l0[arm]:.1f})" for arm in groups])
    panels[0].set_ylabel("core")
    panels[0].set_title(f"Distilled against other cores of equal size, k = {k}")
    caption = (f"Loss recovered and FVU at k = {k} with the distilled core, with cores drawn in other ways (draw r "
               "with training seed r), and with none.")
    return style.finish(figure, results, caption, f"points: one SAE each; {style.bars_note(rows, SEEDS, 'ticks')}")


def _imported(axes: Axes, results: Results, value: Callable[[Row], float | None]) -> None:
    """A star for each SAE that was trained elsewhere."""
    for row, colour in zip(results.summary["imported"], cycle(OTHERS)):
        if value(row) is not None:
            axes.plot([row["L0"]], [value(row)], linestyle="none", marker="*", markersize=8, color=colour, label=row["name"])


@styled
def saebench(results: Results) -> Figure:
    """SAEBench metrics against measured L0, DMSAE and baseline."""
    rows = [row for row in results.summary["retrain"] if row["core"] in ("none", "distilled") and row["saebench"]]
    probing = results.summary["probing_baselines"]
    figure = style.new_figure(DOUBLE, 4.6)
    for axes, (metric, name) in zip(figure.subplots(2, 2).flat, SCORES.items()):
        drawn = [style.curve(axes, rows, arm, results, lambda row, m=metric: score(row, m))
                 for arm in ("none", "distilled")]
        if not any(drawn):
            style.missing(axes, f"{name}: not run")
            continue
        _imported(axes, results, lambda row, m=metric: (row["saebench"] or {}).get(m))
        style.l0_axis(axes, sorted({row["k"] for row in rows}))
        axes.set_ylabel(name)
        axes.margins(y=0.12)
        if metric.startswith("probe_") and probing:
            for key, reference, line in REFERENCES:
                axes.axhline(probing[key], color=MUTED, linewidth=1, linestyle=line, label=reference)
    named = {name: handle for axes in figure.axes for handle, name in zip(*axes.get_legend_handles_labels())}
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=4)
    return style.finish(figure, results, "SAEBench scores against measured L0, with and without the distilled core. "
                        "Explained variance is SAEBench's older formula: the newer one subtracts the wrong mean.",
                        style.bars_note(rows, SEEDS))


@styled
def quality(results: Results) -> Figure:
    """Loss recovered and FVU against total L0, every arm."""
    rows = results.summary["retrain"]
    figure = style.new_figure(DOUBLE, 3.8)
    panels = figure.subplots(1, 2)
    for axes, (metric, name) in zip(panels, PLAIN.items()):
        for arm in ARMS:
            style.curve(axes, rows, arm, results, lambda row, m=metric: row[m])
        _imported(axes, results, lambda row, m=metric: row[m])
        style.l0_axis(axes, sorted({row["k"] for row in rows}))
        axes.set_xlabel("measured total L0 (core included)")
        axes.set_ylabel(name)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return style.finish(figure, results, "Loss recovered and FVU against total L0, the core counted, for every arm.",
                        style.bars_note(rows, SEEDS))
