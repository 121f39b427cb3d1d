"""Figures of the SAEs trained after distillation: controls, quality against L0, core size by coverage."""

from collections.abc import Callable
from functools import partial
from itertools import cycle, pairwise
from operator import itemgetter
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dmsae_lib.config.sections import LONGER
from dmsae_lib.figures import style
from dmsae_lib.figures.house_style import SMALL
from dmsae_lib.figures.style import DOUBLE
from dmsae_lib.report import series
from dmsae_lib.report.equal_l0 import over_baseline
from dmsae_lib.report.results import Results, Row
from dmsae_lib.report.series import ARMS, Look
from dmsae_lib.report.verdicts import t_interval

OTHERS = ("#333333", "#8a6d3b", "#6b4c9a", "#9a4c4c")  # of SAEs trained elsewhere
PLAIN = {"loss_increase": "loss increase (nats per token)", "fvu": "FVU (fraction)"}
MOST_COVERAGES = 10  # rows of the heat map


def _rows(group: list[Row]) -> str:
    """What an arm's frozen rows are like, for its label."""
    core, total = (fmean(row["L0"][part] for row in group) for part in ("core", "total"))
    ranks = [row["core_rows"]["rank"] for row in group if row["core_rows"]]
    return f"rank {fmean(ranks):.1f}, L0 {core:.1f} of {total:.1f}" if ranks else f"no core, L0 {total:.1f}"


def _arm(axes: Axes, y: int, look: Look, group: list[Row], metric: str) -> None:
    """One SAE a point; above them mean and interval where there is one."""
    _, colour, marker = look
    values = series.units(group, itemgetter(metric))[0]
    if interval := t_interval(values):
        axes.plot(interval, [y + 0.2] * 2, color=colour, linewidth=1.2, marker="|", markersize=5)
        axes.plot([fmean(values)] * 2, [y + 0.02, y + 0.38], color=colour, linewidth=1.8)
    for row in group:
        face = style.face(colour, row["unbound"])
        axes.plot([row[metric]], [y - 0.12], marker=marker, markersize=4.5, **face)


def controls(results: Results) -> Figure:
    """Loss increase and FVU of the distilled core and its controls at the distillation k."""
    k = results.summary["sizes"]["k"]
    arms = [arm for arm in ARMS if arm not in LONGER]
    main = series.kinds(results.summary)[0]
    drawn = series.lines(results.summary, arms, lambda row: row["k"] == k and row["chain"] in main.chains)
    figure = style.new_figure(DOUBLE, 0.9 + 0.31 * max(len(drawn), 4))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (metric, name) in zip(panels, PLAIN.items()):
        for y, (look, group) in enumerate(drawn):
            _arm(axes, y, look, group, metric)
        style.lanes(axes, [f"{label}\n{_rows(group)}" for (label, *_), group in drawn])
        axes.set_xlabel(name)
        axes.locator_params(axis="x", nbins=6)
        axes.margins(x=0.08)
    panels[0].set(ylabel="core", title=f"Distilled against other cores of equal size, k = {k}")
    caption = (
        f"Loss increase and FVU at k = {k} with the distilled core ({main.name}, like its controls), with "
        "cores drawn in other ways, unfrozen from the same start, and with none. Rank: participation rank of "
        "the core's encoder rows; L0: active core latents of all active ones."
    )
    return style.finish(figure, results, caption, f"points: one SAE each; {style.bars_note(drawn, 'ticks')}")


def imported(axes: Axes, results: Results, value: Callable[[Row], float | None]) -> None:
    """A star for each SAE that was trained elsewhere."""
    for row, colour in zip(results.summary["imported"], cycle(OTHERS)):
        if (y := value(row)) is not None:
            star = {"linestyle": "none", "marker": "*", "markersize": 8, "color": colour}
            axes.plot([row["L0"]], [y], label=row["name"], **star)


def quality(results: Results) -> Figure:
    """Loss increase and FVU against total L0, every arm; and below, above the baseline at equal L0."""
    drawn = series.lines(results.summary)
    ks = sorted({row["k"] for _, rows in drawn for row in rows})
    baselines = series.baselines(results.summary)
    compared = [(look, rows) for look, rows in drawn if rows[0]["arm"] != "none"]
    # between two arms
    aside = min((b / a for a, b in pairwise(ks)), default=2) ** (0.4 / max(len(compared), 1))
    figure = style.new_figure(DOUBLE, 6.2)
    for (above, below), (metric, name) in zip(figure.subplots(2, 2).T, PLAIN.items()):
        for look, rows in drawn:
            style.curve(above, look, rows, itemgetter(metric))
        imported(above, results, itemgetter(metric))
        style.l0_axis(above, ks)
        style.log_y(above)
        above.set(xlabel="measured total L0 (core included)", ylabel=name)
        for at, (look, rows) in enumerate(compared):
            gain = partial(over_baseline, baselines=baselines, metric=metric)
            shift = aside ** ((at + 1) // 2 * (-1) ** at)
            style.curve(below, look, rows, gain, lambda row, shift=shift: row["k"] * shift)
        below.axhline(0, color=ARMS["none"][1], linewidth=1, zorder=1)
        style.l0_axis(below, ks)
        below.set_xlim(0.82 * ks[0], 1.22 * ks[-1])
        below.set(xlabel="k (arms side by side)", ylabel=f"{name.partition(' (')[0]}, minus baseline")
    style.legend(figure, figure.axes[:1], ncols=3)
    caption = (
        "Loss increase and FVU against total L0, the core counted, for every arm; below, minus the baseline "
        "of the same chain (or, where it has none, of its seed's) and training seed at measured L0."
    )
    return style.finish(figure, results, caption, style.bars_note(drawn))


def _coverage_panel(axes: Axes, rows: list[Row], coverages: list[float], ks: list[int], title: str) -> None:
    import pandas as pd

    sizes = pd.DataFrame(rows).pivot_table("size", "coverage", "k").reindex(index=coverages, columns=ks)
    image = axes.imshow(sizes, cmap="cividis", aspect="auto")
    for (y, x), size in np.ndenumerate(sizes.to_numpy()):
        if not np.isnan(size):
            colour = "black" if image.norm(size) > 0.5 else "white"
            axes.text(x, y, f"{size:.0f}", color=colour, ha="center", va="center", fontsize=SMALL)
    low, high = (f(row["candidates"] for row in rows) for f in (min, max))
    axes.set_title(f"{title}, {low if low == high else f'{low}-{high}'} candidates")
    axes.set_xticks(range(len(ks)), ks)
    axes.set_yticks(range(len(coverages)), [f"{100 * c:g} %" for c in coverages])
    axes.set(xlabel="k", ylabel="coverage of the attribution")
    axes.grid(False)
    ticks = MaxNLocator(6, integer=True)
    axes.figure.colorbar(image, ax=axes, label="latents selected", pad=0.02, ticks=ticks)


def heatmap(results: Results) -> Figure:
    """Size of the core that a coverage would select, by k."""
    rows, used = results.summary["heatmap"], results.summary["sizes"]["coverage"]
    arms = [arm for arm in ("none", "distilled") if any(row["arm"] == arm for row in rows)]
    figure = style.new_figure(DOUBLE, 3.1)
    panels = figure.subplots(1, max(len(arms), 1), squeeze=False)[0]
    if not arms:
        style.missing(panels[0], "coverage curves: not run")
    ks = sorted({row["k"] for row in rows})
    found = sorted({row["coverage"] for row in rows}, reverse=True)
    every = 1 + (len(found) - 1) // MOST_COVERAGES
    coverages = [c for i, c in enumerate(found) if i % every == 0 or c == used]
    for axes, arm in zip(panels, arms):
        mine = [row for row in rows if row["arm"] == arm]
        _coverage_panel(axes, mine, coverages, ks, series.label(arm, results.summary))
    seeds = len({row["seed"] for row in rows})
    caption = "Latents needed to reach a share of the total attribution, by k; candidates: core and prefix 0."
    many = f"mean over {seeds} training seeds of the main chain"
    return style.finish(figure, results, caption, many if seeds > 1 else "main chain, one training seed")
