"""The sizing figure: what notebook 08 predicted for each kind of stage beside what the published run
measured."""

import json
from typing import Any

from matplotlib.figure import Figure

from dmsae_lib.figures.house_style import INK, SMALL
from dmsae_lib.figures.style import DOUBLE, finish, new_figure, styled
from dmsae_lib.report.results import Results
from dmsae_lib.report.series import ARMS

NAMES = {"train": "train cycles", "learning_rate": "learning rate", "saebench": "SAEBench"}
WORK, WHOLE = ARMS["none"][1], ARMS["distilled"][1]
COLOURS = {
    kind: ARMS[arm][1]
    for kind, arm in [
        ("harvest", "data_points"),
        ("train", "none"),
        ("attribute", "random"),
        ("learning_rate", "random_directions"),
        ("retrain", "distilled"),
        ("saebench", "most_frequent"),
    ]
}


def sizing(results: Results) -> Figure | None:
    """None where sizing.json is not published, or was made from another summary."""
    path = results.folder / "sizing.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return sizing_of(results, record) if record and record["summary"] == results.hash else None


def sizing_of(results: Results, record: dict[str, Any]) -> Figure:
    """The figure of a record, written or not."""
    return styled(lambda found: _draw(found, record))(results)


def _draw(results: Results, record: dict[str, Any]) -> Figure:
    figure = new_figure(DOUBLE, 2.5)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    rows = record["stages"]
    for y, row in enumerate(rows):
        work, whole, measured = (
            row["work_seconds"],
            row["work_seconds"] + row["start_up_seconds"],
            row["measured_seconds"],
        )
        left.plot([whole, measured], [y, y], color="#c8c8c8", linewidth=1, zorder=1)
        if work:
            left.plot(work, y, marker="o", markerfacecolor="white", color=WORK)
        left.plot(whole, y, marker="o", color=WHOLE)
        left.plot(measured, y, marker="|", markersize=9, markeredgewidth=2, color=INK)
    for label, style in (
        ("predicted work", {"marker": "o", "markerfacecolor": "white", "color": WORK}),
        ("and starting up", {"marker": "o", "color": WHOLE}),
        ("measured", {"marker": "|", "markersize": 9, "markeredgewidth": 2, "color": INK}),
    ):
        left.plot([], [], linestyle="", label=label, **style)
    left.set_yticks(
        range(len(rows)), [f"{NAMES.get(row['kind'], row['kind'])} ({row['processes']})" for row in rows]
    )
    left.invert_yaxis()
    left.set(
        xscale="log",
        xlabel="seconds, all processes of a kind together",
        ylabel="stage (processes)",
        title=f"{record['config']}: predicted and measured",
    )
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    prediction = record["prediction"]
    for y, machine in enumerate(prediction["machines"]):
        start = 0.0
        for kind, hours in machine["hours"].items():
            right.barh(
                y,
                hours,
                left=start,
                color=COLOURS[kind],
                height=0.6,
                label=NAMES.get(kind, kind) if not y else None,
            )
            start += hours
        right.annotate(
            f"{start:.0f} h", (start, y), (3, 0), textcoords="offset points", va="center", fontsize=SMALL
        )
    right.set_yticks(
        range(len(prediction["machines"])), [machine["name"] for machine in prediction["machines"]]
    )
    right.invert_yaxis()
    right.margins(x=0.14)
    right.grid(False, axis="y")
    right.set(xlabel="hours on one GPU", ylabel="GPU", title=f"{prediction['config']}: predicted, not run")
    figure.legend(*right.get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return finish(
        figure,
        results,
        "Left: seconds of each kind of stage (in brackets: processes), from FLOPs and bytes alone, "
        "with the time that processes take to start, and as measured. Right: hours of the same stages at the "
        f"paper's scale, under the assumptions in notebook 08 ({prediction['saes']} SAEs).",
    )
