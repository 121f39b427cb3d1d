"""Figures of the records beside the summary: the language models' loss, and the sizing of notebook 08."""

import json

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmsae_lib.config.fields import EMBEDDED
from dmsae_lib.figures import style
from dmsae_lib.figures.house_style import INK, MUTED, SMALL
from dmsae_lib.figures.style import DOUBLE, SINGLE
from dmsae_lib.report.results import Results, Row

PREDICTORS = {"unigram": "unigram", "trigram": "3-gram with back-off", "model": "embedded model"}
STAGES = {"train": "train cycles", "learning_rate": "learning rate", "saebench": "SAEBench"}
GREYS = ("#5f5f5f", "#a3a3a3", "#dddddd")  # of kinds of stage: arms alone have colours
PART = 0.05  # of the hours: smaller ones are drawn together


def base_model_record(results: Results) -> Row | None:
    """What notebook 00 recorded; None where it is not published."""
    path = results.folder.parent / "base_model" / "base_model.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def base_model(results: Results) -> Figure:
    """Held-out loss of the embedded model beside n-gram references, and of another model that the run has."""
    record, model = base_model_record(results), results.summary["inputs"]["model"]["name"]
    bits = {label: record["bits_per_byte"][name] for name, label in PREDICTORS.items()}
    if (own := results.summary["language_model"].get("bits_per_byte")) and not (EMBEDDED / model).is_dir():
        bits[model] = own
    figure = style.new_figure(SINGLE, 0.7 + 0.25 * len(bits))
    axes = figure.subplots()
    colours = [MUTED if label in (PREDICTORS["model"], model) else GREYS[2] for label in bits]
    bars = axes.barh(range(len(bits)), bits.values(), color=colours, height=0.7)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=SMALL)
    style.lanes(axes, list(bits))
    axes.margins(x=0.12)
    axes.grid(False, axis="y")
    axes.set(xlabel=style.better("held-out loss (bits per byte)", -1), ylabel="predictor")
    caption = (
        "Held-out loss of the language models (dark) beside two references, in bits per byte of text, which "
        "compare across tokenizers. Each model on held-out text of its own run, of the same kind."
    )
    return style.finish(figure, results, caption)


def sizing_record(results: Results) -> Row | None:
    """sizing.json; None where it is not published, or was made from another summary."""
    path = results.folder / "sizing.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found if found and found["summary"] == results.hash else None


def _seconds(axes: Axes, stages: list[Row]) -> None:
    """Predicted and measured seconds, a line for each kind of stage."""
    marks = {
        "predicted": {"marker": "o", "color": MUTED},
        "measured": {"marker": "|", "markersize": 9, "markeredgewidth": 2, "color": INK},
    }
    for y, row in enumerate(stages):
        seconds = (row["work_seconds"] + row["start_up_seconds"], row["measured_seconds"])
        axes.plot(seconds, [y, y], color=GREYS[1], linewidth=1, zorder=1)
        for x, (label, mark) in zip(seconds, marks.items()):
            axes.plot([x], [y], linestyle="", label=None if y else label, **mark)
        style.beside(axes, max(seconds), y, f"× {seconds[1] / seconds[0]:.1f}", points=6)
    style.lanes(axes, [f"{STAGES.get(row['kind'], row['kind'])} ({row['processes']})" for row in stages])
    axes.margins(x=0.16)
    axes.set(xscale="log", xlabel="seconds, all processes of a kind together", ylabel="stage (processes)")


def _hours(axes: Axes, machines: list[Row]) -> None:
    """Predicted hours of the kinds of stage that take most of them, a bar for each machine."""
    hours = machines[0]["hours"]
    large = [kind for kind, value in hours.items() if value > PART * sum(hours.values())][: len(GREYS) - 1]
    for y, machine in enumerate(machines):
        parts = {STAGES.get(kind, kind): machine["hours"][kind] for kind in large}
        whole, start = sum(machine["hours"].values()), 0.0
        parts["all else"] = whole - sum(parts.values())
        for (label, value), colour in zip(parts.items(), GREYS):
            axes.barh(y, value, left=start, color=colour, height=0.6, label=None if y else label)
            start += value
        style.beside(axes, whole, y, f"{whole:.0f} h")
    style.lanes(axes, [machine["name"] for machine in machines])
    axes.margins(x=0.16)
    axes.grid(False, axis="y")
    axes.set(xlabel="hours on one GPU", ylabel="GPU")


def sizing(results: Results, found: Row | None = None) -> Figure:
    """Of the published record, or of ``found``, which is not written yet."""
    found = found or sizing_record(results)
    prediction = found["prediction"]
    figure = style.new_figure(DOUBLE, 2.4)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _seconds(left, found["stages"])
    _hours(right, prediction["machines"])
    left.set_title(f"{found['config']}: predicted and measured")
    right.set_title(f"{prediction['config']}: predicted, not run")
    style.legend(figure, [left], ncols=2, loc="outside upper left")
    style.legend(figure, [right], ncols=3, loc="outside upper right")
    caption = (
        "Left: seconds of each kind of stage (in brackets: processes) as predicted, from FLOPs, bytes and "
        "the time that a process takes to start, and as measured, with their ratio. Right: hours of the same "
        f"stages at the paper's scale, under the assumptions in notebook 08 ({prediction['saes']} SAEs)."
    )
    return style.finish(figure, results, caption)
