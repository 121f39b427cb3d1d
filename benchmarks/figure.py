"""The figure of bench.json, drawn from it alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cases import DICTIONARY, OURS, SAELENS
from dmsae_lib.figures import style
from dmsae_lib.figures.house_style import MUTED, SMALL, in_house_style
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
    number = {"padding": 2, "rotation": 90, "fontsize": SMALL - 1, "color": MUTED}
    for group, (name, (label, colour, _)) in enumerate(LOOK.items()):
        found = [(place, case["contestants"].get(name, {}).get(value)) for place, case in enumerate(measured)]
        found = [(place + 0.26 * (group - 1), v * unit) for place, v in found if v is not None]
        drawn = axes.bar(
            [place for place, _ in found], [v for _, v in found], 0.24, color=colour, label=label
        )
        axes.bar_label(drawn, [f"{v:.{0 if v > 99 else 1}f}" for _, v in found], **number)
    axes.set_xticks(range(len(measured)), [case["name"].replace("-", "\n", 1) for case in measured])
    axes.set_yscale(scale)
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.2)


def growth(axes: Axes, measured: list[Case], over: str, divide: bool) -> None:
    """Milliseconds per step (``divide``: and per SAE) against ``over``."""
    for name, (label, colour, marker) in LOOK.items():
        there = [case for case in measured if name in case["contestants"]]
        seconds = [case["contestants"][name]["median"] / (case["n_saes"] if divide else 1) for case in there]
        if there:
            look = {"color": colour, "marker": marker, "label": label} | style.face(colour)
            axes.plot([case[over] for case in there], [1e3 * s for s in seconds], **look)
    ticks = [case[over] for case in measured]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)


def step_panel(axes: Axes, steps: list[Case]) -> None:
    bars(axes, steps, "times_floor")
    look = {"color": MUTED, "linestyle": ":"}
    for place, case in enumerate(steps):
        five = case["dense"]["five_gemms"]["median"] / case["dense"]["floor"]["median"]
        label = None if place else "five dense products"
        axes.plot([place - 0.4, place + 0.4], [five, five], label=label, **look)
    axes.set(title="a  time of a step", ylabel="encoder products")
    axes.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def memory_panel(axes: Axes, clean: list[Case]) -> None:
    bars(axes, clean, "peak_bytes", 2**-20, "log")
    axes.set(title="b  peak memory of trainer and step", ylabel="MiB")


def width_panel(axes: Axes, widths: list[Case]) -> None:
    growth(axes, widths, "d_sae", divide=False)
    floors = [1e3 * case["dense"]["floor"]["median"] for case in widths]
    look = {"color": MUTED, "linestyle": ":", "label": "encoder's product"}
    axes.plot([case["d_sae"] for case in widths], floors, **look)
    title = f"c  width at d_in {widths[0]['d_in']}, k {widths[0]['k']}"
    axes.set(title=title, xlabel="d_sae", ylabel="ms per step")
    axes.set_ylim(top=20 * axes.get_ylim()[1])
    axes.legend(ncols=2, loc="upper left")


def many_panel(axes: Axes, many: list[Case]) -> None:
    growth(axes, many, "n_saes", divide=True)
    title = f"d  SAEs on one stream, shape {many[0]['shape']}"
    axes.set(title=title, xlabel="number of SAEs", ylabel="ms per step and SAE")


def make(result: dict[str, Any]) -> Figure:
    steps, installed, widths, many = (
        cases_of(result, kind) for kind in ("step", "installed", "width", "many")
    )
    clean = [case for case in result["cases"] if case in steps + installed and not case["dead_share"]]
    panels = ((step_panel, steps), (memory_panel, clean), (width_panel, widths), (many_panel, many))
    with in_house_style():
        figure = style.new_figure(DOUBLE, 4.9)
        for axes, (panel, cases) in zip(figure.subplots(2, 2).flat, panels):
            if cases:
                panel(axes, cases)
            else:
                style.missing(axes, "not measured")
        on_gpu = any(case["device"] == "cuda" for case in result["cases"][:1])
        hardware = result["hardware"]
        where = hardware["gpu"] if on_gpu else f"{hardware['cpu']}, {result['threads']} threads"
        n = min((case["timed_steps"] for case in result["cases"]), default=0)
        caption = "One training step of ours and of its peers, interleaved in one run."
        return style.finish(figure, about(result), caption, f"medians of at least {n} steps on {where}")


def about(result: dict[str, Any]) -> SimpleNamespace:
    """What the house style wants to know of a result."""
    return SimpleNamespace(summary={"config": "make bench"}, hash=hash_json(result))


def draw(result: dict[str, Any], folder: Path) -> None:
    """Write bench.png and bench.svg into ``folder``."""
    style.save(make(result), folder, "bench", about(result))
