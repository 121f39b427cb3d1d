"""How the paper's figures look: sizes, colours, labels, footnotes, and files without dates or random ids."""

import io
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

from dmsae_lib.figures.house_style import DPI, MUTED, SMALL, in_house_style
from dmsae_lib.report.results import Results, Row
from dmsae_lib.report.series import PLURAL, Look, by_k, units
from dmsae_lib.report.verdicts import t_interval
from dmsae_lib.store.atomic import write_bytes

SINGLE, DOUBLE = 3.3, 6.9  # inches: one and two columns of a paper
LOSS, FVU = "loss increase (nats per token)", "FVU (fraction)"
LOSS_IS = "Loss increase: next-token loss with the SAE's reconstruction in the model minus the bare model's."
FVU_IS = "FVU: fraction of variance unexplained."
HOLLOW = "hollow: unbound (core alone reaches k)"
CHANCE = "#a0a0a0"  # of what no training did
CYCLES = matplotlib.colormaps["YlGnBu"]  # of cycles alone, light is early; neither an arm nor k is a shade


def cycle_colour(cycle: int, last: int) -> tuple[float, float, float, float]:
    return CYCLES(0.2 + 0.8 * cycle / max(last, 1))


@dataclass(frozen=True)
class Plot:
    """A figure of the registry: called with results it is drawn in the house style, whatever the caller's
    settings are; None where ``where`` finds nothing to draw. ``main_chain``: whether it shows the main chain
    alone, and so the same in every run that has that chain."""

    draw: Callable[[Results], Figure]
    where: Callable[[Results], Any] = lambda results: True
    main_chain: Callable[[Results], bool] = lambda results: False

    def __call__(self, results: Results) -> Figure | None:
        with in_house_style():
            return self.draw(results) if self.where(results) else None


class Picture(Figure):
    """A figure that a notebook cell shows as it is, without pyplot and its global state."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with in_house_style():
            self.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()


def new_figure(width: float, height: float) -> Figure:
    return Picture(figsize=(width, height), layout="constrained")


def finish(figure: Figure, results: Results, caption: str, varied: str = "") -> Figure:
    """Add the footnote (what error bars show, and the summary it is from) and keep the caption as the
    figure's label."""
    source = f"{results.summary['config']} · summary\xa0{results.hash[:12]}"  # no line break before the hash
    note = f"{varied}\xa0· {source}" if varied else source
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(note, int(width / 0.056))
    look = {"fontsize": SMALL, "color": MUTED, "va": "bottom", "linespacing": 1.2}
    figure.text(0.012, 0.02 / height, "\n".join(lines), **look)
    room = (0.125 * len(lines) + 0.03) / height
    figure.get_layout_engine().set(rect=(0, room, 1, 1 - room), w_pad=0.06, h_pad=0.04)
    figure.set_label(f"{caption} {varied[:1].upper() + varied[1:] + '.' if varied else ''}".strip())
    return figure


def bars_note(drawn: list[tuple[Look, list[Row]]], mean: str = "points") -> str:
    """The footnote's words on error bars (over how many of what, or why there are none) and on hollow
    markers. ``mean`` names the mark that shows the mean."""
    if not drawn:
        return "not run"
    found = [units(group, total_l0) for _, rows in drawn for group in by_k(rows).values()]
    hollow = f"; {HOLLOW}" if any(row["unbound"] for _, rows in drawn for row in rows) else ""
    fewest, most = min(len(values) for values, _ in found), {}
    for values, varied in found:
        most[varied] = max(most.get(varied, 0), len(values))
    over = [f"{'up to ' * (n > fewest)}{n} {PLURAL[varied]}" for varied, n in most.items() if n > 1]
    if not over:
        return f"one SAE each, no error bars{hollow}"
    return f"{mean}: mean, bars: 95 % t interval over {' or '.join(over)}{hollow}"


def legend(figure: Figure, panels: Iterable[Axes], ncols: int, **how: Any) -> None:
    """One legend for the panels, above them unless ``how`` says otherwise, with every label once."""
    named = {name: mark for axes in panels for mark, name in zip(*axes.get_legend_handles_labels())}
    figure.legend(named.values(), named.keys(), ncols=ncols, **{"loc": "outside upper center"} | how)


def missing(axes: Axes, text: str) -> None:
    """Say in the panel what was not run, in place of axes."""
    axes.set_axis_off()
    middle = {"ha": "center", "va": "center", "transform": axes.transAxes}
    axes.text(0.5, 0.5, textwrap.fill(text, 28), color=MUTED, **middle)


def beside(axes: Axes, x: float, y: float, text: str, points: int = 3) -> None:
    """A small text to the right of a place."""
    axes.annotate(text, (x, y), (points, 0), textcoords="offset points", va="center", fontsize=SMALL)


def lanes(axes: Axes, labels: list[str], **how: Any) -> None:
    """One lane per label, the first on top."""
    axes.set_yticks(range(len(labels)), labels, **how)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def better(label: str, direction: int) -> str:
    """An axis label that says which way is better: 1 up (or right), -1 down, 0 neither."""
    return label + {1: "\nbetter →", -1: "\n← better", 0: ""}[direction]


def cycle_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("cycle")


def l0_axis(axes: Axes, ks: list[int]) -> None:
    """Logarithmic L0 with ticks at the trained k's."""
    axes.set_xscale("log")
    axes.set_xticks(ks, ks)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("measured L0 (active latents per token)")


def face(colour: str, unbound: bool = False) -> Row:
    """Marker style: filled with a white rim, or hollow where the SAE is unbound."""
    if unbound:
        return {"markerfacecolor": "white", "markeredgecolor": colour}
    return {"markerfacecolor": colour, "markeredgecolor": "white", "markeredgewidth": 0.4}


def log_y(axes: Axes) -> None:
    """Logarithmic, with a few labels in each decade, where every value allows it."""
    if axes.dataLim.y0 > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 3, 4, 6)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_yticks([], minor=True)


def total_l0(row: Row) -> float:
    return row["L0"]["total"]


def whisker(axes: Axes, x: float, ends: list[float] | None, n: int, **look: Any) -> None:
    """An interval. One over two values, with one degree of freedom, does not stretch the axis: the panel cuts
    it."""
    if ends:
        line = Line2D([x, x], ends, **look)
        (axes.add_line if n > 2 else axes.add_artist)(line)


def curve(
    axes: Axes,
    look: Look,
    rows: list[Row],
    value: Callable[[Row], float | None],
    place: Callable[[Row], float] = total_l0,
    joined: bool = True,
    intervals: bool = True,
) -> bool:
    """Mean and interval of ``value`` for each k, against ``place``; hollow where an SAE is unbound. Returns
    whether there was anything to draw."""
    name, colour, marker = look
    points = []
    for group in by_k(rows).values():
        if values := units(group, value)[0]:
            unbound = any(row["unbound"] for row in group)
            points.append((fmean(map(place, group)), values, unbound))
    if not points:
        return False
    points.sort(key=lambda point: point[0])
    for x, values, unbound in points:
        if intervals:
            bar = {"color": colour, "linewidth": 1, "marker": "_", "markersize": 4, "zorder": 3}
            whisker(axes, x, t_interval(values), len(values), **bar)
        axes.plot([x], [fmean(values)], marker=marker, zorder=4, **face(colour, unbound))
    bound = [(x, fmean(values)) for x, values, unbound in points if joined and not unbound]
    axes.plot([x for x, _ in bound], [mean for _, mean in bound], color=colour, zorder=2)
    axes.plot(
        [], [], color=colour, marker=marker, label=name, linestyle="-" if joined else "", **face(colour)
    )
    return True


def bundle(axes: Axes, look: Look, chains: Iterable[dict[int, float]]) -> None:
    """Values by cycle: each chain a thin line, their mean a thick one."""
    name, colour, marker = look
    chains = list(chains)
    for values in chains if len(chains) > 1 else ():
        axes.plot(list(values), list(values.values()), color=colour, linewidth=0.6, alpha=0.6, zorder=2)
    cycles = sorted({cycle for values in chains for cycle in values})
    means = [fmean(values[cycle] for values in chains if cycle in values) for cycle in cycles]
    axes.plot(cycles, means, color=colour, marker=marker, label=name, zorder=3, **face(colour))


def settle(figure: Figure) -> None:
    """Lay the figure out once and round the places of its axes: the solver goes by the order of objects in
    memory, so its last digits vary, and ids in an SVG are hashes of them."""
    figure.draw_without_rendering()
    places = [axes.get_position(original=True).bounds for axes in figure.axes]
    figure.set_layout_engine("none")
    for axes, place in zip(figure.axes, places):
        axes.set_position([round(value, 5) for value in place], which="original")


def save(figure: Figure, folder: Path, name: str, results: Results) -> None:
    """PNG and SVG that are the same bytes whenever the same summary is drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"Title": name, "Description": f"{figure.get_label()} Summary sha256 {results.hash}."}
    with in_house_style():
        settle(figure)
        for ending, unsaid in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=ending, dpi=DPI, metadata={**about, **unsaid})
            write_bytes(folder / f"{name}.{ending}", buffer.getvalue())
