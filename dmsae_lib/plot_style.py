"""How the paper's figures look: sizes, colours, labels, footnotes, and files without dates or random ids."""

import io
import textwrap
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, FormatStrFormatter, LogLocator, NullLocator

from dmsae_lib.atomic import write_bytes
from dmsae_lib.claims import judged_chains
from dmsae_lib.equal_l0 import CHAIN, SEED, per_unit
from dmsae_lib.house_style import DPI, MUTED, SMALL, in_house_style
from dmsae_lib.results import Results
from dmsae_lib.verdicts import t_interval

Row = dict[str, Any]
Look = tuple[str, str, str | tuple[int, int, int]]  # label, colour, marker
SINGLE, DOUBLE = 3.3, 7.0  # inches: one and two columns of a paper
SEEDS = "training seeds (one distilled core)"
PLURAL = {CHAIN: "distillation chains", SEED: SEEDS}
HOLLOW = "hollow: unbound (core alone reaches k)"
# The palettes of Okabe and Ito and of Tol, told apart by people with any kind of colour blindness; markers differ as well.
ARMS: dict[str, Look] = {
    "none": ("Matryoshka baseline", "#0072B2", "o"),
    "distilled": ("DMSAE ({kind} core)", "#D55E00", "s"),
    "random": ("random core", "#009E73", "^"),
    "random_outside": ("random, outside the core", "#117733", (4, 1, 0)),
    "most_frequent": ("most frequent core", "#E69F00", "P"),
    "random_directions": ("random directions", "#CC79A7", "D"),
    "data_points": ("random activations", "#56B4E9", "v"),
    "pca": ("principal components", "#332288", "X"),
    "rotated": ("rotated in its span", "#882255", "d"),
    "warm_start": ("warm start, unfrozen", "#999933", "p"),
    "cold_start": ("same nesting, no start", "#661100", (6, 1, 0)),
    "longer_repeated": ("baseline, {times}x tokens, repeated", "#000000", "<"),
    "longer_fresh": ("baseline, {times}x tokens, fresh", "#8c8c8c", ">"),
}
KINDS = {"relu": "ReLU", "batchtopk": "equal-L0"}  # core_sparsity: the core is exempt from selection, or competes for k
OTHER_KINDS = (("#5c3317", "8"), ("#b3a125", "h"), ("#7f7f7f", "*"), ("#3b5323", "H"))  # beside the main chain's
CYCLES = matplotlib.colormaps["viridis"]  # ordered: dark is early


class Kind(NamedTuple):
    """The distillation chains with one kind of core; those of different kinds are never averaged."""

    name: str
    colour: str
    marker: str | tuple[int, int, int]
    chains: dict[str, list[Row]]  # their cycle rows
    rows: list[Row]  # retrained with their cores


def kind_name(settings: Row) -> str:
    """A chain's core settings in a word, and how they differ from the usual ones of that word."""
    sparsity, decoder = settings["core_sparsity"], settings["core_decoder_init"]
    unusual = [f"{decoder} decoder"] if (decoder == "encoder") != (sparsity == "batchtopk") else []
    unusual += ["biases by frequency"] if settings["core_bias_init"] == "match_frequency" else []
    return ", ".join([KINDS[sparsity], *unusual])


def kinds(summary: Row) -> list[Kind]:
    """The main chain with its replicates (its core settings, other seeds), then every other kind of core."""
    chains = {kind_name(summary["sizes"]): judged_chains(summary)}
    own = next(iter(chains))
    for name, chain in summary["chains"].items():
        if kind_name(chain) != own:
            chains.setdefault(kind_name(chain), {})[name] = chain["cycles"]
    return [Kind(name, *look, mine, [row for row in summary["retrain"] if row["chain"] in mine])
            for (name, mine), look in zip(chains.items(), (ARMS["distilled"][1:], *OTHER_KINDS))]


def label(arm: str, summary: Row) -> str:
    return ARMS[arm][0].format(times=summary["sizes"]["n_cycles"] + 1, kind=kind_name(summary["sizes"]))


def lines(summary: Row, arms: Iterable[str] = ARMS, wanted: Callable[[Row], Any] = bool) -> list[tuple[Look, list[Row]]]:
    """What there is of each arm over the main chain and its replicates; then DMSAEs with each other kind of core."""
    main, *others = kinds(summary)
    found = [((label(arm, summary), *ARMS[arm][1:]), [row for row in main.rows if row["core"] == arm]) for arm in arms]
    found += [((ARMS["distilled"][0].format(kind=kind.name), kind.colour, kind.marker),
               [row for row in kind.rows if row["core"] == "distilled"]) for kind in others]
    found = [(look, [row for row in rows if wanted(row)]) for look, rows in found]
    return [(look, rows) for look, rows in found if rows]


def by_k(rows: Iterable[Row]) -> dict[int, list[Row]]:
    groups: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["k"]):
        groups.setdefault(row["k"], []).append(row)
    return groups


def units(rows: list[Row], value: Callable[[Row], float | None]) -> tuple[list[float], str]:
    """One value per chain where there are several, else per training seed; and which of the two it is."""
    return per_unit({(row["chain"], row["seed"]): v for row in rows if (v := value(row)) is not None})


def cycle_colour(cycle: int, last: int) -> tuple:
    return CYCLES(0.95 * cycle / max(last, 1))


def styled(draw: Callable[[Results], Figure | None]) -> Callable[[Results], Figure | None]:
    """Draw under the house style, whatever the caller's settings are."""
    @wraps(draw)
    def wrapper(results: Results) -> Figure | None:
        with in_house_style():
            return draw(results)
    return wrapper


class Picture(Figure):
    """A figure that a notebook cell shows as it is, without pyplot and its global state."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with in_house_style():
            self.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()


def new_figure(width: float, height: float) -> Figure:
    return Picture(figsize=(width, height), layout="constrained")


def finish(figure: Figure, results: Results, caption: str, varied: str = "", source: str = "") -> Figure:
    """Add the footnote (what error bars show, and from where: the summary, or ``source``) and keep the caption as the figure's
    label."""
    source = source or f"{results.summary['config']} · summary\xa0{results.hash[:12]}"  # no line break before the hash
    note = f"{varied}\xa0· {source}" if varied else source
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(note, int(width / 0.056))
    figure.text(0.012, 0.02 / height, "\n".join(lines), fontsize=SMALL, color=MUTED, va="bottom", linespacing=1.2)
    room = (0.125 * len(lines) + 0.03) / height
    figure.get_layout_engine().set(rect=(0, room, 1, 1 - room), w_pad=0.06, h_pad=0.04)
    figure.set_label(f"{caption} {varied[:1].upper() + varied[1:] + '.' if varied else ''}".strip())
    return figure


def bars_note(drawn: list[tuple[Look, list[Row]]], mean: str = "points") -> str:
    """The footnote's words on error bars (over how many of what, or why there are none) and on hollow markers.

    ``mean`` names the mark that shows the mean.
    """
    if not drawn:
        return "not run"
    found = [units(group, lambda row: row["L0"]["total"]) for _, rows in drawn for group in by_k(rows).values()]
    hollow = f"; {HOLLOW}" if any(row["unbound"] for _, rows in drawn for row in rows) else ""
    fewest, most = min(len(values) for values, _ in found), {}
    for values, varied in found:
        most[varied] = max(most.get(varied, 0), len(values))
    over = [f"{'up to ' * (n > fewest)}{n} {PLURAL[varied]}" for varied, n in most.items() if n > 1]
    bars = f"{mean}: mean, bars: 95 % t interval over {' or '.join(over)}" if over else "one SAE each, no error bars"
    return bars + hollow


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


def log_y(axes: Axes) -> None:
    """Logarithmic, with a few labels in each decade, where every value allows it."""
    if axes.dataLim.y0 > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 3, 4, 6)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(NullLocator())


def curve(axes: Axes, look: Look, rows: list[Row], value: Callable[[Row], float | None],
          place: Callable[[Row], float] = lambda row: row["L0"]["total"]) -> bool:
    """Mean and interval of ``value`` for each k, against ``place`` (measured L0); hollow where an SAE is unbound.

    Returns whether there was anything to draw.
    """
    name, colour, marker = look
    points = []
    for group in by_k(rows).values():
        if values := units(group, value)[0]:
            points.append((fmean(map(place, group)), fmean(values), t_interval(values), any(row["unbound"] for row in group)))
    if not points:
        return False
    points.sort(key=lambda point: point[0])
    bound = [point for point in points if not point[3]]
    axes.plot([p[0] for p in bound], [p[1] for p in bound], color=colour, zorder=2)
    for x, mean, interval, unbound in points:
        if interval:
            axes.plot([x, x], interval, color=colour, linewidth=1, marker="_", markersize=4, zorder=3)
        axes.plot([x], [mean], marker=marker, zorder=4, **face(colour, unbound))
    axes.plot([], [], color=colour, marker=marker, label=name)
    return True


def bundle(axes: Axes, look: Look, chains: Iterable[dict[int, float]]) -> None:
    """Values by cycle: each chain a thin line, their mean a thick one."""
    name, colour, marker = look
    chains = list(chains)
    for values in chains if len(chains) > 1 else ():
        axes.plot(list(values), list(values.values()), color=colour, linewidth=0.6, alpha=0.6, zorder=2)
    cycles = sorted({cycle for values in chains for cycle in values})
    axes.plot(cycles, [fmean(values[cycle] for values in chains if cycle in values) for cycle in cycles], color=colour,
              marker=marker, label=name, zorder=3, markeredgecolor="white", markeredgewidth=0.4)


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
    with in_house_style():
        settle(figure)
        for ending, unsaid in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=ending, dpi=DPI, metadata={**about, **unsaid})
            write_bytes(folder / f"{name}.{ending}", buffer.getvalue())
