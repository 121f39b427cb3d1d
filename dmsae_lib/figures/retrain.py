"""Figures of the SAEs trained after distillation: controls, SAEBench scores, reconstruction against L0."""

from collections.abc import Callable
from itertools import cycle, pairwise
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmsae_lib.config.sections import LONGER
from dmsae_lib.figures import style
from dmsae_lib.figures.house_style import MUTED
from dmsae_lib.figures.style import DOUBLE, styled
from dmsae_lib.report import series
from dmsae_lib.report.equal_l0 import baseline_at, score
from dmsae_lib.report.results import Results, Row
from dmsae_lib.report.series import ARMS
from dmsae_lib.report.verdicts import t_interval

REFERENCES = (("dense", "dense probe", (0, (4, 2))), ("best_channel", "best residual channel", (0, (1, 1.5))))
OTHERS = ("#333333", "#8a6d3b", "#6b4c9a", "#9a4c4c")  # of SAEs trained elsewhere
PLAIN = {"loss_increase": "loss increase (nats per token)", "fvu": "FVU (fraction)"}
SCORES = {
    "ce_loss_score": "CE loss score (fraction)",
    "explained_variance_legacy": "explained variance (fraction)",
    "probe_top1": "probing accuracy, top 1",
    "probe_top5": "probing accuracy, top 5",
}


def _rows(group: list[Row]) -> str:
    """What an arm's frozen rows are like, for its label."""
    l0 = {part: fmean(row["L0"][part] for row in group) for part in ("core", "total")}
    ranks = [row["core_rows"]["rank"] for row in group if row["core_rows"]]
    return (
        f"rank {fmean(ranks):.1f}, L0 {l0['core']:.1f} of {l0['total']:.1f}"
        if ranks
        else f"no core, L0 {l0['total']:.1f}"
    )


@styled
def controls(results: Results) -> Figure:
    """Loss increase and FVU of the distilled core and its controls at the distillation k."""
    k = results.summary["sizes"]["k"]
    arms = [arm for arm in ARMS if arm not in LONGER]
    main = series.kinds(results.summary)[0]
    drawn = series.lines(results.summary, arms, lambda row: row["k"] == k and row["chain"] in main.chains)
    figure = style.new_figure(DOUBLE, 0.9 + 0.31 * max(len(drawn), 4))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (metric, name) in zip(panels, PLAIN.items()):
        for y, ((_, colour, marker), group) in enumerate(drawn):
            values = series.units(group, lambda row, m=metric: row[m])[0]
            if interval := t_interval(values):
                axes.plot(interval, [y + 0.2] * 2, color=colour, linewidth=1.2, marker="|", markersize=5)
                axes.plot([fmean(values)] * 2, [y + 0.02, y + 0.38], color=colour, linewidth=1.8)
            for row in group:
                axes.plot(
                    [row[metric]],
                    [y - 0.12],
                    marker=marker,
                    markersize=4.5,
                    **style.face(colour, row["unbound"]),
                )
        axes.set_xlabel(name)
        axes.set_ylim(len(drawn) - 0.5, -0.5)
        axes.locator_params(axis="x", nbins=6)
        axes.margins(x=0.08)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(drawn)), [f"{name}\n{_rows(group)}" for (name, *_), group in drawn])
    panels[0].set_ylabel("core")
    panels[0].set_title(f"Distilled against other cores of equal size, k = {k}")
    caption = (
        f"Loss increase and FVU at k = {k} with the distilled core ({main.name}, like its controls), with "
        "cores drawn in "
        "other ways, unfrozen from the same start, and with none. Rank: participation rank of the core's "
        "encoder rows; L0: active core latents of all active ones."
    )
    return style.finish(figure, results, caption, f"points: one SAE each; {style.bars_note(drawn, 'ticks')}")


def _imported(axes: Axes, results: Results, value: Callable[[Row], float | None]) -> None:
    """A star for each SAE that was trained elsewhere."""
    for row, colour in zip(results.summary["imported"], cycle(OTHERS)):
        if value(row) is not None:
            axes.plot(
                [row["L0"]],
                [value(row)],
                linestyle="none",
                marker="*",
                markersize=8,
                color=colour,
                label=row["name"],
            )


@styled
def scores(results: Results) -> Figure:
    """SAEBench metrics against measured L0, DMSAE and baseline."""
    drawn = series.lines(results.summary, ["none", "distilled"], lambda row: row["saebench"])
    probing = results.summary["probing_baselines"]
    figure = style.new_figure(DOUBLE, 4.6)
    for axes, (metric, name) in zip(figure.subplots(2, 2).flat, SCORES.items()):
        found = [style.curve(axes, look, rows, lambda row, m=metric: score(row, m)) for look, rows in drawn]
        if not any(found):
            style.missing(axes, f"{name}: not run")
            continue
        _imported(axes, results, lambda row, m=metric: (row["saebench"] or {}).get(m))
        style.l0_axis(axes, sorted({row["k"] for _, rows in drawn for row in rows}))
        axes.set_ylabel(name)
        axes.margins(y=0.12)
        if metric.startswith("probe_") and probing:
            for key, reference, line in REFERENCES:
                axes.axhline(probing[key], color=MUTED, linewidth=1, linestyle=line, label=reference)
    named = {name: handle for axes in figure.axes for handle, name in zip(*axes.get_legend_handles_labels())}
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=4)
    return style.finish(
        figure,
        results,
        "SAEBench scores against measured L0, with and without the distilled core. "
        "Explained variance is SAEBench's older formula: the newer one subtracts the wrong mean.",
        style.bars_note(drawn),
    )


def _over_baseline(row: Row, baselines: list[Row], metric: str) -> float | None:
    """Above the baseline of the same chain and seed at the row's L0; None where that is unbound or has no
    such baseline."""
    base = (
        None
        if row["unbound"]
        else baseline_at(baselines, row["chain"], row["seed"], row["L0"]["total"], metric)
    )
    return None if base is None else row[metric] - base


@styled
def quality(results: Results) -> Figure:
    """Loss increase and FVU against total L0, every arm; and below, above the baseline at equal L0."""
    drawn = series.lines(results.summary)
    ks = sorted({row["k"] for _, rows in drawn for row in rows})
    baselines = [row for _, rows in drawn for row in rows if row["arm"] == "none"]
    compared = [(look, rows) for look, rows in drawn if rows[0]["arm"] != "none"]
    # between two arms
    aside = min((b / a for a, b in pairwise(ks)), default=2) ** (0.4 / max(len(compared), 1))
    figure = style.new_figure(DOUBLE, 6.2)
    for (above, below), (metric, name) in zip(figure.subplots(2, 2).T, PLAIN.items()):
        for look, rows in drawn:
            style.curve(above, look, rows, lambda row, m=metric: row[m])
        _imported(above, results, lambda row, m=metric: row[m])
        style.l0_axis(above, ks)
        style.log_y(above)
        above.set_xlabel("measured total L0 (core included)")
        above.set_ylabel(name)
        for at, (look, rows) in enumerate(compared):
            style.curve(
                below,
                look,
                rows,
                lambda row, m=metric: _over_baseline(row, baselines, m),
                lambda row, at=at: row["k"] * aside ** ((at + 1) // 2 * (-1) ** at),
            )
        below.axhline(0, color=ARMS["none"][1], linewidth=1, zorder=1)
        style.l0_axis(below, ks)
        below.set_xlim(0.82 * ks[0], 1.22 * ks[-1])
        below.set_xlabel("k (arms side by side)")
        below.set_ylabel(f"{name.partition(' (')[0]}, minus baseline")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return style.finish(
        figure,
        results,
        "Loss increase and FVU against total L0, the core counted, for every arm; below, minus "
        "the baseline of the same chain and seed at measured L0, where there is one.",
        style.bars_note(drawn),
    )
