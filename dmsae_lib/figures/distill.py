"""Figures of the distillation: core by origin, the chains, re-selection, training curves, identity."""

from collections.abc import Callable
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmsae_lib.figures import style
from dmsae_lib.figures.house_style import INK, MUTED, SMALL
from dmsae_lib.figures.style import DOUBLE, FVU, SINGLE
from dmsae_lib.report import series
from dmsae_lib.report.results import Results, Row
from dmsae_lib.report.series import ARMS, Kind

SHARE_LIMIT = 0.75  # core L0 / k above which free latents are starved
COURSE: dict[str, tuple[str, Callable[[Row], float]]] = {  # title: axis, what is drawn by cycle
    "Size of the core": ("core latents", lambda row: row["core_out"]),
    "Share of the budget k": ("core L0 / k (fraction)", lambda row: row["core_share"]),
    "Loss increase": (style.better("nats per token", -1), lambda row: row["loss_increase"]["full"]),
}
MATCHES = {
    "cosine": "|cosine| of\nmatched encoder rows",
    "activation": "correlation of\nmatched activations",
    "span": "overlap of the spans\n(grey: chance)",
}
MATCHED = {  # kind of row: label, and the arm whose colour and marker it has
    "cores": ("distilled cores", "distilled"),
    "plain": ("first latents of plain SAEs", "none"),
    "random": ("random rows", "random_directions"),
}


def origins(results: Results) -> Figure:
    """Core latents by the cycle in which they were first selected."""
    rows, k = results.summary["cycles"], results.summary["sizes"]["k"]
    cycles = range(len(rows))
    last = cycles[-1]
    colours = [style.cycle_colour(cycle, last) for cycle in cycles]
    counts = np.array([[row["origins"].get(str(origin), 0) for row in rows] for origin in cycles])
    below, totals = counts.cumsum(axis=0) - counts, counts.sum(axis=0)
    tallest = totals.max()
    figure = style.new_figure(SINGLE, 2.9)
    axes = figure.subplots()
    for origin in cycles:
        bars = {"color": colours[origin], "edgecolor": MUTED, "linewidth": 0.4}
        axes.bar(cycles, counts[origin], 0.82, below[origin], **bars)
    for cycle, total in enumerate(totals):
        axes.text(cycle, total + 0.012 * tallest, str(total), ha="center", va="bottom", fontsize=SMALL)
    # Labels beside the last bar, pushed apart where its segments are thin.
    floor = 0.0
    for origin in cycles:
        if count := counts[origin, last]:
            middle = below[origin, last] + count / 2
            y = max(middle, floor)
            axes.plot([last + 0.43, last + 0.62], [middle, y], color=MUTED, linewidth=0.5, clip_on=False)
            axes.text(last + 0.68, y, f"cycle {origin}: {count}", va="center", fontsize=SMALL)
            floor = y + 0.062 * tallest
    axes.set(xlim=(-0.6, last + 0.5), ylim=(0, 1.09 * tallest), xticks=cycles)
    axes.grid(False, axis="x")
    title = f"Core by cycle of first selection, k = {k}"
    axes.set(xlabel="cycle", ylabel="core latents leaving the cycle", title=title)
    caption = (
        "Latents of the core that each cycle selects and hands on, by the cycle that selected them first; "
        "above each bar the size of the core. (The bars of figure 1 are the L0 of the core that enters.)"
    )
    which = "main distillation chain" if results.summary["chains"] else "one distillation chain"
    return style.finish(figure, results, caption, which)


def _chains(kind: Kind) -> str:
    return f"{len(kind.chains)} chains" if len(kind.chains) > 1 else "one chain"


def _lines(kinds: list[Kind]) -> str:
    """The footnote's words on what each line is."""
    if any(len(kind.chains) > 1 for kind in kinds):
        return "thin: a chain (own seeds), one SAE per cycle; thick: mean over chains"
    return "one SAE per cycle and chain"


def _limits(axes: Axes) -> None:
    axes.axhline(1, color=INK, linewidth=0.9, zorder=1, label="1: the core alone reaches k")
    starved = f"{SHARE_LIMIT}: little is left for free latents"
    axes.axhline(SHARE_LIMIT, color=MUTED, linewidth=1, linestyle="--", zorder=1, label=starved)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))


def chains(results: Results) -> Figure:
    """Every chain: its core's size, share of k and cost by cycle, and the share of k after distillation."""
    kinds, k = series.kinds(results.summary), results.summary["sizes"]["k"]
    drawn = series.lines(results.summary, ["distilled"])
    figure = style.new_figure(DOUBLE, 4.2)
    *course, after = figure.subplots(2, 2).flat
    for axes, (title, (name, value)) in zip(course, COURSE.items()):
        for kind in kinds:
            found = [{row["cycle"]: value(row) for row in rows} for rows in kind.chains.values()]
            style.bundle(axes, (f"{kind.name} core ({_chains(kind)})", kind.colour, kind.marker), found)
        style.cycle_axis(axes)
        axes.set(title=f"{title}, while distilling at k = {k}", ylabel=name)
    course[0].set_ylim(bottom=0)
    _limits(course[1])
    for look, rows in drawn:
        style.curve(after, look, rows, lambda row: row["L0"]["core"] / row["k"], lambda row: row["k"])
    if drawn:
        style.l0_axis(after, sorted({row["k"] for _, rows in drawn for row in rows}))
        after.set(
            xlabel="k", ylabel="core L0 / k (fraction)", title="Share of k in new SAEs, after distillation"
        )
        _limits(after)
    else:
        after.remove()
    style.legend(figure, course[:2], ncols=2)
    caption = (
        "The course of each kind of core. Size of the core that a cycle selects; share of the L0 budget k "
        "that the core in that cycle's SAE takes (cycle 0 has none); loss increase of that SAE; and the "
        f"share that the final core takes in new SAEs at other k. {style.LOSS_IS}"
    )
    note = _lines(kinds)
    return style.finish(
        figure, results, caption, f"{note}; by k: {style.bars_note(drawn)}" if drawn else note
    )


def with_placebos(results: Results) -> list[Kind]:
    """The kinds of core beside which placebo chains ran."""
    found = series.kinds(results.summary)
    return [kind for kind in found if any(row["placebos"] for rows in kind.chains.values() for row in rows)]


def _kept(rows: list[Row], placebo: str) -> dict[int, float]:
    """Share of a placebo's rows that each cycle selected again, by cycle."""
    found = {row["cycle"]: row["placebos"][placebo] for row in rows if placebo in row["placebos"]}
    return {cycle: null["kept"] / null["core_in"] for cycle, null in found.items()}


def _reselected(axes: Axes, kind: Kind, m_0: int) -> None:
    chains = [[row for row in rows if row["cycle"]] for rows in kind.chains.values()]
    kept = [{row["cycle"]: row["kept"] / row["core_in"] for row in rows} for rows in chains]
    style.bundle(axes, ("distilled core", kind.colour, kind.marker), kept)
    for placebo in sorted({name for rows in chains for row in rows for name in row["placebos"]}):
        name, *look = ARMS[placebo]
        shares = [_kept(rows, placebo) for rows in chains]
        style.bundle(axes, (f"placebo: {name}", *look), filter(None, shares))
    cycles = [row["cycle"] for row in chains[0]]
    even = [fmean(row["core_out"] / (row["core_in"] + m_0) for row in rows) for rows in zip(*chains)]
    axes.plot(cycles, even, color=style.CHANCE, linestyle="--", label="uniform selection", zorder=1)
    axes.set_ylim(-0.03, 1.03)
    style.cycle_axis(axes)
    axes.set(ylabel="selected again (fraction)", title=f"{kind.name} core, {_chains(kind)}")


def reselected(results: Results) -> Figure:
    """Share of the frozen rows that is selected again, for cores and for placebo rows."""
    kinds = with_placebos(results)
    figure = style.new_figure(DOUBLE, 2.4)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds):
        _reselected(axes, kind, results.summary["sizes"]["prefixes"][0])
    style.legend(figure, panels, ncols=1, loc="outside right center")
    caption = (
        "Share of the frozen rows that the next selection takes again, for the core and for placebo chains "
        "of as many rows: those of them that were selected again, and new ones that nothing selected. "
        "Uniform selection, a weak reference: as many latents drawn evenly from core and prefix 0."
    )
    return style.finish(figure, results, caption, _lines(kinds))


def training(results: Results) -> Figure:
    """Training curves of the first SAE, the first one with a core, and the last."""
    import pandas as pd

    history = pd.DataFrame(results.table("history_cycles.csv")).astype(float)
    last, k = results.summary["sizes"]["n_cycles"], results.summary["sizes"]["k"]
    core = ARMS["distilled"][1]
    shown = {0: (ARMS["none"][1], "-"), 1: (core, (0, (3, 1))), last: (core, "-")}
    figure = style.new_figure(DOUBLE, 2.3)
    left, right = figure.subplots(1, 2)
    for axes, column in ((left, "fvu"), (right, "L0_core")):
        for cycle, (colour, dash) in shown.items():
            mine = history[(history["cycle"] == cycle) & (history["tokens"] > 0)]
            label = f"cycle {cycle}, with a core" if cycle else "cycle 0, no core"
            axes.plot(mine["tokens"], mine[column], color=colour, linestyle=dash, label=label)
        axes.set(xlabel="training tokens", xscale="log")
    left.set(ylabel=style.better(FVU, -1))
    style.log_y(left)
    right.set(ylabel="core L0\n(active latents per token)")
    right.axhline(k, color=INK, linewidth=0.9, linestyle="--")
    place = {"xycoords": right.get_yaxis_transform(), "textcoords": "offset points"}
    right.annotate(f"k = {k}", (0, k), (3, -2), **place, va="top", fontsize=SMALL)
    style.legend(figure, [left], ncols=3)
    caption = (
        "Training without a core (cycle 0), with the first one and with the last one: FVU and the core's L0 "
        f"on training batches, both axes of FVU logarithmic. {style.FVU_IS}"
    )
    return style.finish(figure, results, caption, "main chain, one SAE per cycle")


def _lane(axes: Axes, y: int, rows: list[Row], metric: str, arm: str) -> None:
    """Every pair's value, and their mean."""
    _, colour, marker = ARMS[arm]
    values = [row[metric] for row in rows if row[metric] is not None]
    if not values:
        axes.text(0.02, y, "no activations", va="center", fontsize=SMALL, color=MUTED)
        return
    if metric == "span":
        chance = fmean(row["span_chance"] for row in rows)
        axes.plot([chance] * 2, [y - 0.38, y + 0.38], color=style.CHANCE, linewidth=2.5, zorder=1)
    axes.plot(values, [y] * len(values), marker, markersize=4, zorder=2, **style.face(colour))
    axes.plot([fmean(values)] * 2, [y - 0.3, y + 0.3], color=colour, linewidth=1.6, zorder=3)
    style.beside(axes, max(values), y, f"{fmean(values):.2f}", points=5)


def core_identity(results: Results) -> Figure:
    """How well two chains' cores match, beside plain SAEs' latents and random rows."""
    rows = results.summary["identity"]
    figure = style.new_figure(DOUBLE, 2.0)
    for axes, (metric, name) in zip(figure.subplots(1, 3, sharey=True), MATCHES.items()):
        for y, (kind, (_, arm)) in enumerate(MATCHED.items()):
            _lane(axes, y, [row for row in rows if row["kind"] == kind], metric, arm)
        style.lanes(axes, [label for label, _ in MATCHED.values()])
        axes.set(xlim=(0, 1), xlabel=name)
    figure.axes[0].set_ylabel("rows of two chains")
    pairs = len({(row["a"], row["b"]) for row in rows})
    caption = (
        "Latents of two chains' cores matched one to one, against as many first latents of plain SAEs and "
        "random rows; and how far their spans agree (mean squared cosine of the principal angles)."
    )
    marks = f"points: pairs of chains ({pairs}), ticks and numbers: mean over pairs"
    return style.finish(figure, results, caption, f"{marks}, which share chains, so no interval")
