"""The figure of bench.json, drawn from it alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.cases import DICTIONARY, OURS, SAELENS
from dmsae_lib.figures import style
from dmsae_lib.figures.house_style import MUTED, SMALL, in_house_style
from dmsae_lib.figures.style import DOUBLE
from dmsae_lib.store.artifacts import hash_json

Case = dict[str, Any]
LOOK = {  # contestant: label, colour (of no arm), marker
    OURS: ("ours", "#222222", "s"),
    SAELENS: ("SAELens", "#8a8a8a", "o"),
    DICTIONARY: ("dictionary_learning", "#c6c6c6", "^"),
}


def cases_of(result: dict[str, Any], kind: str) -> list[Case]:
    return [case for case in result["cases"] if case["kind"] == kind]


def bars(axes: Axes, measured: list[Case], value: str, unit: float = 1.0, scale: str = "linear") -> None:
    """``value`` of every contestant, a group of bars per case."""
    number = {"padding": 2, "rotation": 90, "fontsize": SMALL, "color": MUTED}
    for group, (name, (label, colour, _)) in enumerate(LOOK.items()):
        found = [(place, case["contestants"].get(name, {}).get(value)) for place, case in enumerate(measured)]
        found = [(place + 0.26 * (group - 1), v * unit) for place, v in found if v is not None]
        drawn = axes.bar(
            [place for place, _ in found], [v for _, v in found], 0.24, color=colour, label=label
        )
        axes.bar_label(drawn, [f"{v:.{0 if v > 99 else 1}f}" for _, v in found], **number)
    shapes = [f"{case['shape'].replace('-', chr(10))}\n{case['d_sae']:,}" for case in measured]
    axes.set_xticks(range(len(measured)), shapes)
    axes.set_yscale(scale)
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.32)
    axes.set_xlabel("shape, d_sae")


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
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_yticks([], minor=True)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)


def step_panel(axes: Axes, steps: list[Case]) -> None:
    bars(axes, steps, "times_floor")
    axes.set_ylabel("time (encoder products)")


def memory_panel(axes: Axes, clean: list[Case]) -> None:
    bars(axes, clean, "peak_bytes", 2**-20, "log")
    axes.set_ylabel("peak memory (MiB)")
    axes.set_ylim(top=4 * axes.get_ylim()[1])


def width_panel(axes: Axes, widths: list[Case]) -> None:
    growth(axes, widths, "d_sae", divide=False)
    floors = [1e3 * case["dense"]["floor"]["median"] for case in widths]
    look = {"color": MUTED, "linestyle": ":", "label": "encoder's product"}
    axes.plot([case["d_sae"] for case in widths], floors, **look)
    axes.set(xlabel="d_sae", ylabel="ms per step")


def many_panel(axes: Axes, many: list[Case]) -> None:
    growth(axes, many, "n_saes", divide=True)
    axes.set(xlabel="number of SAEs", ylabel="ms per step and SAE")


def described(cases: list[Case]) -> str:
    """The shapes that bars are named by."""
    names = {"d_in": "d_in", "d_sae": "d_sae", "k": "k", "batch": "batch_size"}
    return "; ".join(
        f"{case['shape']}: " + ", ".join(f"{name} {case[key]:,}" for name, key in names.items())
        for case in cases
    )


def make(result: dict[str, Any]) -> Figure:
    steps, installed, widths, many = (
        cases_of(result, kind) for kind in ("step", "installed", "width", "many")
    )
    clean, dead = ([case for case in steps if bool(case["dead_share"]) is having] for having in (False, True))
    panels = (
        ("a  a step, no latent dead", step_panel, clean),
        ("b  a step, a tenth dead", step_panel, dead),
        ("c  width, d_in and k of S", width_panel, widths),
        ("d  memory, malloc as ours", memory_panel, clean),
        ("e  memory, malloc as installed", memory_panel, installed),
        ("f  SAEs on one stream, S", many_panel, many),
    )
    with in_house_style():
        figure = style.new_figure(DOUBLE, 4.2)
        for axes, (title, panel, cases) in zip(figure.subplots(2, 3).flat, panels):
            axes.set_title(title)
            if cases:
                panel(axes, cases)
            else:
                style.missing(axes, "not measured")
        style.legend(figure, figure.axes[:3], ncols=4)
        on_gpu = any(case["device"] == "cuda" for case in result["cases"][:1])
        hardware = result["hardware"]
        where = hardware["gpu"] if on_gpu else f"{hardware['cpu']}, {result['threads']} threads"
        n = min((case["timed_steps"] for case in result["cases"]), default=0)
        caption = (
            "One training step of ours and of its peers, interleaved in one run; less is better. Time in "
            "products of the batch with the encoder alone; peak memory of trainer and step, with glibc's "
            "malloc set as in our notebooks and as it comes."
        )
        varied = f"{described(clean)}; medians of at least {n} steps on {where}"
        return style.finish(figure, about(result), caption, varied)


def about(result: dict[str, Any]) -> SimpleNamespace:
    """What the house style wants to know of a result."""
    return SimpleNamespace(summary={"config": "make bench"}, hash=hash_json(result))


def draw(result: dict[str, Any], folder: Path) -> None:
    """Write bench.png and bench.svg into ``folder``."""
    style.save(make(result), folder, "bench", about(result))
