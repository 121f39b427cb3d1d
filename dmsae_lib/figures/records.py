"""Figures of the records beside the summary: the embedded model's loss, and the sizing of notebook 08."""

import json

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmsae_lib.figures import style
from dmsae_lib.figures.house_style import INK, SMALL
from dmsae_lib.figures.style import DOUBLE, SINGLE
from dmsae_lib.report.results import Results, Row
from dmsae_lib.report.series import ARMS

PREDICTORS = {"unigram": "unigram", "trigram": "3-gram with back-off", "model": "embedded model"}
STAGES = {"train": "train cycles", "learning_rate": "learning rate", "saebench": "SAEBench"}
COLOURS = {  # of each kind of stage: an arm's
    "harvest": ARMS["data_points"][1],
    "train": ARMS["none"][1],
    "attribute": ARMS["random"][1],
    "learning_rate": ARMS["random_directions"][1],
    "retrain": ARMS["distilled"][1],
    "saebench": ARMS["most_frequent"][1],
}
MARKS: dict[str, Row] = {
    "predicted work": {"marker": "o", "markerfacecolor": "white", "color": ARMS["none"][1]},
    "and starting up": {"marker": "o", "color": ARMS["distilled"][1]},
    "measured": {"marker": "|", "markersize": 9, "markeredgewidth": 2, "color": INK},
}


def base_model_record(results: Results) -> Row | None:
    """What notebook 00 recorded; None where it is not published."""
    path = results.folder.parent / "base_model" / "base_model.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def base_model(results: Results) -> Figure:
    """Held-out loss of the embedded model beside n-gram references."""
    found = base_model_record(results)
    nats, bits = ([found[unit][name] for name in PREDICTORS] for unit in ("nats_per_token", "bits_per_byte"))
    colours = [ARMS["none"][1] if name == "model" else "#b0b0b0" for name in PREDICTORS]
    figure = style.new_figure(SINGLE, 1.7)
    axes = figure.subplots()
    bars = axes.barh(range(len(PREDICTORS)), nats, color=colours, height=0.7)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=SMALL)
    labels = [f"{label}\n{value:.2f} bits/byte" for label, value in zip(PREDICTORS.values(), bits)]
    axes.set_yticks(range(len(PREDICTORS)), labels)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set(xlabel="held-out loss (nats per token)", ylabel="predictor")
    caption = "Held-out loss of the embedded language model beside two references with the same tokenizer."
    return style.finish(figure, results, caption)


def sizing_record(results: Results) -> Row | None:
    """sizing.json; None where it is not published, or was made from another summary."""
    path = results.folder / "sizing.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found if found and found["summary"] == results.hash else None


def _seconds(axes: Axes, stages: list[Row]) -> None:
    """Predicted and measured seconds, a line for each kind of stage."""
    for y, row in enumerate(stages):
        work, measured = row["work_seconds"], row["measured_seconds"]
        whole = work + row["start_up_seconds"]
        axes.plot([whole, measured], [y, y], color="#c8c8c8", linewidth=1, zorder=1)
        for seconds, mark in zip((work, whole, measured), MARKS.values()):
            if seconds:
                axes.plot(seconds, y, **mark)
    for label, mark in MARKS.items():
        axes.plot([], [], linestyle="", label=label, **mark)
    labels = [f"{STAGES.get(row['kind'], row['kind'])} ({row['processes']})" for row in stages]
    axes.set_yticks(range(len(stages)), labels)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="seconds, all processes of a kind together", ylabel="stage (processes)")


def _hours(axes: Axes, machines: list[Row]) -> None:
    """Predicted hours of each kind of stage, a bar for each machine."""
    for y, machine in enumerate(machines):
        start = 0.0
        for kind, hours in machine["hours"].items():
            label = STAGES.get(kind, kind) if not y else None
            axes.barh(y, hours, left=start, color=COLOURS[kind], height=0.6, label=label)
            start += hours
        style.beside(axes, start, y, f"{start:.0f} h")
    axes.set_yticks(range(len(machines)), [machine["name"] for machine in machines])
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.grid(False, axis="y")
    axes.set(xlabel="hours on one GPU", ylabel="GPU")


def sizing(results: Results, found: Row | None = None) -> Figure:
    """Of the published record, or of ``found``, which is not written yet."""
    found = found or sizing_record(results)
    prediction = found["prediction"]
    figure = style.new_figure(DOUBLE, 2.5)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _seconds(left, found["stages"])
    _hours(right, prediction["machines"])
    left.set_title(f"{found['config']}: predicted and measured")
    right.set_title(f"{prediction['config']}: predicted, not run")
    style.legend(figure, [left], ncols=3, loc="outside upper left")
    style.legend(figure, [right], ncols=3, loc="outside upper right")
    caption = (
        "Left: seconds of each kind of stage (in brackets: processes), from FLOPs and bytes alone, with the "
        "time that processes take to start, and as measured. Right: hours of the same stages at the paper's "
        f"scale, under the assumptions in notebook 08 ({prediction['saes']} SAEs)."
    )
    return style.finish(figure, results, caption)
