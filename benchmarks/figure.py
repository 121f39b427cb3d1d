"""The figure of bench.json, drawn from it alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from benchmarks.cases import DICTIONARY, OURS, SAELENS
from dmsae_lib.figures import style as plot_style
from dmsae_lib.figures.house_style import MUTED, in_house_style
from dmsae_lib.figures.style import DOUBLE
from dmsae_lib.store.artifacts import hash_json

Case = dict[str, Any]
LOOK = {  # contestant: label, colour, marker
    OURS: ("ours", "#D55E00", "s"),
    SAELENS: ("SAELens", "#0072B2", "o"),
    DICTIONARY: ("dictionary_learning", "#009E73", "^"),
}


def cases_of(result: dict[str, Any], kind: str) -> list[Case]:
    return [case for case in result["cases"] if case["kind"] == kind]


def bars(axes: Axes, measured: list[Case], value: str, unit: float = 1.0, scale: str = "linear") -> None:
    """``value`` of every contestant, a group of bars per case."""
    for number, (name, (label, colour, _)) in enumerate(LOOK.items()):
        found = [
            (place, case["contestants"][name][value])
            for place, case in enumerate(measured)
            if case["contestants"].get(name, {}).get(value) is not None
        ]
        places = [place + 0.26 * (number - 1) for place, _ in found]
        axes.bar(places, [v * unit for _, v in found], 0.24, color=colour, label=label)
        for place, (_, v) in zip(places, found):
            text = f"{v * unit:.{0 if v * unit > 99 else 1}f}"
            axes.annotate(
                text,
                (place, v * unit),
                (0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                rotation=90,
                fontsize=plot_style.SMALL - 1,
                color=MUTED,
            )
    axes.set_xticks(range(len(measured)), [case["name"].replace("-", "\n", 1) for case in measured])
    axes.set_yscale(scale)
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.2)


def growth(axes: Axes, measured: list[Case], over: str, divide: bool) -> None:
    """Milliseconds per step (``divide``: and per SAE) against ``over``."""
    for name, (label, colour, marker) in LOOK.items():
        rows = [
            (case[over], case["contestants"][name]["median"] * 1e3 / (case["n_saes"] if divide else 1))
            for case in measured
            if name in case["contestants"]
        ]
        if rows:
            axes.plot(
                *zip(*rows),
                color=colour,
                marker=marker,
                label=label,
                markeredgecolor="white",
                markeredgewidth=0.4,
            )
    ticks = [case[over] for case in measured]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{tick:,}" for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())


def make(result: dict[str, Any]) -> Figure:
    steps, installed, widths, many = (
        cases_of(result, kind) for kind in ("step", "installed", "width", "many")
    )
    clean = [case for case in result["cases"] if case in steps + installed and not case["dead_share"]]
    with in_house_style():
        figure = plot_style.new_figure(DOUBLE, 4.9)
        grid = figure.subplots(2, 2)
        if steps:
            bars(grid[0, 0], steps, "times_floor")
            for place, case in enumerate(steps):
                five = case["dense"]["five_gemms"]["median"] / case["dense"]["floor"]["median"]
                grid[0, 0].plot(
                    [place - 0.4, place + 0.4],
                    [five, five],
                    color=MUTED,
                    linestyle=":",
                    label="five dense products" if place == 0 else None,
                )
            grid[0, 0].set(title="a  time of a step", ylabel="encoder products")
            grid[0, 0].legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
            bars(grid[0, 1], clean, "peak_bytes", 2**-20, "log")
            grid[0, 1].set(title="b  peak memory of trainer and step", ylabel="MiB")
        if widths:
            growth(grid[1, 0], widths, "d_sae", divide=False)
            floors = [(case["d_sae"], case["dense"]["floor"]["median"] * 1e3) for case in widths]
            grid[1, 0].plot(*zip(*floors), color=MUTED, linestyle=":", label="encoder's product")
            first = widths[0]
            grid[1, 0].set(
                title=f"c  width at d_in {first['d_in']}, k {first['k']}",
                xlabel="d_sae",
                ylabel="ms per step",
            )
            grid[1, 0].set_ylim(top=20 * grid[1, 0].get_ylim()[1])
            grid[1, 0].legend(ncols=2, loc="upper left")
        if many:
            growth(grid[1, 1], many, "n_saes", divide=True)
            grid[1, 1].set(
                title=f"d  SAEs on one stream, shape {many[0]['shape']}",
                xlabel="number of SAEs",
                ylabel="ms per step and SAE",
            )
        for axes, shown in zip(grid.flat, (steps, steps, widths, many)):
            if not shown:
                plot_style.missing(axes, "not measured")
        device = result["cases"][0]["device"] if result["cases"] else "cpu"
        where = (
            result["hardware"]["gpu"]
            if device == "cuda"
            else f"{result['hardware']['cpu']}, {result['threads']} threads"
        )
        n = min((case["timed_steps"] for case in result["cases"]), default=0)
        return plot_style.finish(
            figure,
            about(result),
            "One training step of ours and of its peers, interleaved in one run.",
            f"medians of at least {n} steps on {where}",
        )


def about(result: dict[str, Any]) -> SimpleNamespace:
    """What the house style wants to know of a result."""
    return SimpleNamespace(summary={"config": "make bench"}, hash=hash_json(result))


def draw(result: dict[str, Any], folder: Path) -> None:
    """Write bench.png and bench.svg into ``folder``."""
    plot_style.save(make(result), folder, "bench", about(result))
