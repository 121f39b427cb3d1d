"""How every figure looks: sizes, colours, labels, footnotes, and files without dates or random ids."""

import io
import textwrap
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from dmsae_lib.atomic import write_bytes
from dmsae_lib.claims import t_interval
from dmsae_lib.results import Results

Row = dict[str, Any]
SINGLE, DOUBLE = 3.3, 7.0  # inches: one and two columns of a paper
DPI = 200
INK, MUTED = "#222222", "#5f5f5f"
SEEDS = "training seeds (one distilled core)"
HOLLOW = "hollow: unbound (core alone reaches k)"
SMALL = 7  # points; nothing is smaller
STYLE = {"font.family": "DejaVu Sans", "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8,
         "xtick.labelsize": SMALL, "ytick.labelsize": SMALL, "legend.fontsize": SMALL, "legend.frameon": False,
         "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": MUTED,
         "axes.labelcolor": INK, "text.color": INK,
         "xtick.color": INK, "ytick.color": INK, "axes.titlelocation": "left", "lines.linewidth": 1.3,
         "lines.markersize": 5.5, "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.6,
         "axes.axisbelow": True, "figure.facecolor": "white", "savefig.dpi": DPI, "svg.hashsalt": "dmsae",
         "svg.fonttype": "path"}
# Okabe and Ito's palette, told apart by people with any kind of colour blindness; markers differ as well.
ARMS: dict[str, tuple[str, str, str]] = {  # arm: label, colour, marker
    "none": ("Matryoshka baseline", "#0072B2", "o"),
    "distilled": ("DMSAE, distilled core", "#D55E00", "s"),
    "random": ("random core", "#009E73", "^"),
    "frequency_matched": ("random core, frequency matched", "#56B4E9", "v"),
    "random_directions": ("random directions", "#CC79A7", "D"),
    "most_frequent": ("most frequent core", "#E69F00", "P"),
    "longer_repeated": ("baseline, {} tokens, repeated", "#000000", "<"),
    "longer_fresh": ("baseline, {} tokens, fresh", "#8c8c8c", ">"),
}
CYCLES = matplotlib.colormaps["viridis"]  # ordered: dark is early


def label(arm: str, results: Results) -> str:
    return ARMS[arm][0].format(f"{results.summary['sizes']['n_cycles'] + 1}x")


def cycle_colour(cycle: int, last: int) -> tuple:
    return CYCLES(0.95 * cycle / max(last, 1))


def styled(draw: Callable[[Results], Figure | None]) -> Callable[[Results], Figure | None]:
    """Draw under the house style, whatever the caller's settings are."""
    @wraps(draw)
    def wrapper(results: Results) -> Figure | None:
        with matplotlib.rc_context(STYLE):
            return draw(results)
    return wrapper


class Picture(Figure):
    """A figure that a notebook cell shows as it is, without pyplot and its global state."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()


def new_figure(width: float, height: float) -> Figure:
    return Picture(figsize=(width, height), layout="constrained")


def finish(figure: Figure, results: Results, caption: str, varied: str = "") -> Figure:
    """Add the footnote (what error bars show, which summary) and keep the caption as the figure's label."""
    source = f"{results.summary['config']} · summary\xa0{results.hash[:12]}"  # no line break before the hash
    note = f"{varied}\xa0· {source}" if varied else source
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(note, int(width / 0.056))
    figure.text(0.012, 0.02 / height, "\n".join(lines), fontsize=SMALL, color=MUTED, va="bottom", linespacing=1.2)
    room = (0.125 * len(lines) + 0.03) / height
    figure.get_layout_engine().set(rect=(0, room, 1, 1 - room), w_pad=0.06, h_pad=0.04)
    figure.set_label(f"{caption} {varied[:1].upper() + varied[1:] + '.' if varied else ''}".strip())
    return figure


def bars_note(rows: list[Row], varied: str, mean: str = "points") -> str:
    """The footnote's words on error bars (over how many seeds, or why there are none) and on hollow markers.

    ``mean`` names the mark that shows the mean.
    """
    counts = sorted({len(group) for group in by_point(rows).values()})
    hollow = f"; {HOLLOW}" if any(row["unbound"] for row in rows) else ""
    if not rows:
        return "not run"
    if counts[-1] < 2:
        return f"one seed, no error bars{hollow}"
    some = f"{counts[-1]}" if counts[0] == counts[-1] else f"up to {counts[-1]}"
    return f"{mean}: mean, bars: 95 % t interval over {some} {varied}{hollow}"


def by_point(rows: Iterable[Row]) -> dict[tuple[str, int], list[Row]]:
    """Rows of equal arm and k, in order of arm and k."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["core"], row["k"]), []).append(row)
    order = list(ARMS)
    return dict(sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))


def missing(axes: Axes, text: str) -> None:
    """Say in the panel what was not run, in place of axes."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, textwrap.fill(text, 28), ha="center", va="center", color=MUTED, transform=axes.transAxes)


def l0_axis(axes: Axes, ks: list[int]) -> None:
    """Logarithmic L0 with ticks at the trained k's."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ks))
    axes.xaxis.set_major_formatter(FixedFormatter([str(k) for k in ks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("measured L0 (active latents per token)")


def face(colour: str, unbound: bool) -> Row:
    """Marker style: filled with a white rim, or hollow where the SAE is unbound."""
    return {"markerfacecolor": "white", "markeredgecolor": colour} if unbound else \
        {"markerfacecolor": colour, "markeredgecolor": "white", "markeredgewidth": 0.4}


def curve(axes: Axes, rows: list[Row], arm: str, results: Results, value: Callable[[Row], float | None]) -> bool:
    """Mean and interval of ``value`` against measured L0 for one arm; hollow where an SAE is unbound.

    Returns whether there was anything to draw.
    """
    _, colour, marker = ARMS[arm]
    points = []
    for (_, _), group in by_point(row for row in rows if row["core"] == arm).items():
        values = [v for v in map(value, group) if v is not None]
        if values:
            x, unbound = fmean(row["L0"]["total"] for row in group), any(row["unbound"] for row in group)
            points.append((x, fmean(values), t_interval(values), unbound))
    if not points:
        return False
    points.sort(key=lambda point: point[0])
    bound = [point for point in points if not point[3]]
    axes.plot([p[0] for p in bound], [p[1] for p in bound], color=colour, zorder=2)
    for x, mean, interval, unbound in points:
        if interval:
            axes.plot([x, x], interval, color=colour, linewidth=1, marker="_", markersize=4, zorder=3)
        axes.plot([x], [mean], marker=marker, zorder=4, **face(colour, unbound))
    axes.plot([], [], color=colour, marker=marker, label=label(arm, results))
    return True


def settle(figure: Figure) -> None:
    """Lay the figure out once and round the places of its axes.

    The layout's solver goes by the order of objects in memory, so its last digits vary, and ids in an SVG are hashes of them.
    """
    figure.draw_without_rendering()
    places = [axes.get_position(original=True).bounds for axes in figure.axes]
    figure.set_layout_engine("none")
    for axes, place in zip(figure.axes, places):
        axes.set_position([round(value, 5) for value in place], which="original")


def save(figure: Figure, folder: Path, name: str, results: Results) -> None:
    """PNG and SVG that are the same bytes whenever the same summary is drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"Title": name, "Description": f"{figure.get_label()} Summary sha256 {results.hash}."}
    with matplotlib.rc_context(STYLE):
        settle(figure)
        for ending, unsaid in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=ending, dpi=DPI, metadata={**about, **unsaid})
            write_bytes(folder / f"{name}.{ending}", buffer.getvalue())
