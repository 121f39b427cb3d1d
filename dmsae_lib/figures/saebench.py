"""Figures of SAEBench: its curves, DMSAE minus baseline, and the released SAEs at paper scale."""

from functools import partial
from typing import Any

from matplotlib.figure import Figure

from dmsae_lib.figures import style
from dmsae_lib.figures.house_style import MUTED, SMALL
from dmsae_lib.figures.retrain import imported
from dmsae_lib.figures.style import DOUBLE
from dmsae_lib.report import series
from dmsae_lib.report.equal_l0 import score
from dmsae_lib.report.results import Results, Row

SCORES = {
    "ce_loss_score": "CE loss score (fraction)",
    "explained_variance_legacy": "explained variance (fraction)",
    "probe_top1": "probing accuracy, top 1",
    "probe_top5": "probing accuracy, top 5",
}
PROBES = (("dense", "dense probe", (0, (4, 2))), ("best_channel", "best residual channel", (0, (1, 1.5))))
BETTER = {1: "higher is better", -1: "lower is better", 0: "neither is better"}
AGAIN = {"color": "#c4c4c4", "linewidth": 3.2}  # interval over evaluation seeds
REFERENCE = "reference/saebench_gemma-2-2b_65k.csv"  # below results/; its README says who measured it
PAPER_MODEL = "google/gemma-2-2b"
RELEASED = {
    "matryoshka": ("Matryoshka", "o", "-"),
    "batchtopk": ("BatchTopK", "s", "-"),
    "topk": ("TopK", "^", "--"),
    "jumprelu": ("JumpReLU", "D", "--"),
    "gated": ("gated", "v", ":"),
    "panneal": ("p-anneal", "P", ":"),
    "standard": ("ReLU", "X", ":"),
}


def scored(results: Results) -> bool:
    return any(row["saebench"] for row in results.summary["retrain"])


def scores(results: Results) -> Figure:
    """SAEBench metrics against measured L0, DMSAE and baseline."""
    drawn = series.lines(results.summary, ["none", "distilled"], lambda row: row["saebench"])
    probing = results.summary["probing_baselines"]
    figure = style.new_figure(DOUBLE, 4.6)
    panels = figure.subplots(2, 2).flat
    for axes, (metric, name) in zip(panels, SCORES.items()):
        found = [style.curve(axes, look, rows, partial(score, metric=metric)) for look, rows in drawn]
        if not any(found):
            style.missing(axes, f"{name}: not run")
            continue
        imported(axes, results, partial(score, metric=metric))
        style.l0_axis(axes, sorted({row["k"] for _, rows in drawn for row in rows}))
        axes.set_ylabel(name)
        axes.margins(y=0.12)
        for key, reference, line in PROBES if metric.startswith("probe_") and probing else ():
            axes.axhline(probing[key], color=MUTED, linewidth=1, linestyle=line, label=reference)
    style.legend(figure, figure.axes, ncols=4)
    caption = (
        "SAEBench scores against measured L0, with and without the distilled core. "
        "Explained variance is SAEBench's older formula: the newer one subtracts the wrong mean."
    )
    return style.finish(figure, results, caption, style.bars_note(drawn))


def _lane_label(row: Row) -> str:
    return f"{row['label']}{' †' * row['doubted']}\n({BETTER[row['better']]})"


def differences(results: Results) -> Figure:
    """DMSAE minus baseline for every headline metric and k, one panel per kind of core."""
    rows, by_core = results.summary["differences"], series.differences(results.summary)
    ks, labels = sorted({row["k"] for row in rows}), list(dict.fromkeys(map(_lane_label, rows)))
    colours = {k: style.cycle_colour(at, len(ks) - 1) for at, k in enumerate(ks)}
    name = "DMSAE minus Matryoshka baseline at measured L0 (fractions of 1; loss increase: nats)"
    point: dict[str, Any] = {"marker": "o", "markersize": 3.6}
    figure = style.new_figure(DOUBLE, 0.9 + len(labels) * (0.16 + 0.07 * len(ks)))
    narrow = len(by_core) > 1
    panels = figure.subplots(1, len(by_core), sharex=True, sharey=True, squeeze=False)[0]
    for axes, core in zip(panels, by_core):
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_title(f"{core} core" if narrow else "", fontsize=SMALL)
    for axes, row in [(axes, row) for axes, mine in zip(panels, by_core.values()) for row in mine]:
        y = labels.index(_lane_label(row)) + 0.7 * ((ks.index(row["k"]) + 0.5) / len(ks) - 0.5)
        colour = colours[row["k"]]
        if row["evaluation"] and row["evaluation"]["interval"]:
            axes.plot(row["evaluation"]["interval"], [y, y], solid_capstyle="butt", zorder=2, **AGAIN)
        if row["interval"]:
            axes.plot(row["interval"], [y, y], color=colour, linewidth=1.1, zorder=3)
        axes.plot([row["value"]], [y], zorder=4, **point, **style.face(colour, row["sign"] == "?"))
    for axes in panels:
        style.lanes(axes, labels, fontsize=SMALL)
        axes.set_xlabel(name.replace(" (", "\n(") if narrow else name)
        if narrow:
            axes.locator_params(axis="x", nbins=5)
    axes = panels[0]
    for k in ks:
        axes.plot([], [], color=colours[k], label=f"k = {k}", **point)
    if again := any(row["evaluation"] for row in rows):
        axes.plot([], [], label="evaluation seeds", **AGAIN)
    axes.set_ylabel("metric")
    style.legend(figure, [axes], ncols=min(len(ks) + 1, 7))
    whose = "the main chain's core" if len(by_core) == 1 else f"{' and '.join(by_core)} cores"
    caption = (
        f"SAEs with {whose} minus the Matryoshka baseline, paired by training seed; "
        "hollow where no interval excludes 0."
    )
    if again:
        over = "evaluation seeds (texts, splits and probes) for the first training seed, at equal k"
        caption += f" Grey: 95 % t interval over {over}."
    if any(row["doubted"] for row in rows):
        caption += " †: unreliable by an audit (arXiv 2605.18229)."
    if over := series.varied(row for row in rows if row["interval"]):
        return style.finish(figure, results, caption, f"points: mean, bars: 95 % t interval over {over}")
    return style.finish(figure, results, caption, "one training seed, no error bars")


def reference(results: Results) -> list[Row]:
    """{architecture, trainer, l0, loss_recovered} of the released SAEs, by L0; [] where the results are of
    another model, or the file is not beside them."""
    import pandas as pd

    path = results.folder.parent / REFERENCE
    if results.summary["inputs"]["model"]["name"] != PAPER_MODEL or not path.is_file():
        return []
    table = pd.read_csv(path, dtype={"trainer": str})
    table["metric"] = table["metric"].str.removeprefix("core.")
    saes = table.pivot(index=["architecture", "trainer"], columns="metric", values="value").reset_index()
    return saes[saes["architecture"].isin(RELEASED)].sort_values("l0").to_dict("records")


def paper_scale(results: Results) -> Figure:
    """Loss that is not recovered against L0: a run on Gemma-2-2B in front of its released SAEs."""
    released = reference(results)
    drawn = series.lines(results.summary, wanted=lambda row: row["saebench"])
    figure = style.new_figure(DOUBLE, 3.4)
    axes = figure.subplots()
    behind = {"color": "#8c8c8c", "markersize": 3.5, "linewidth": 0.9, "zorder": 1}
    for name, (label, marker, line) in RELEASED.items():
        saes = [(row["l0"], 1 - row["loss_recovered"]) for row in released if row["architecture"] == name]
        axes.plot(*zip(*saes), marker=marker, linestyle=line, label=f"released {label}", **behind)
    for look, rows in drawn:
        style.curve(axes, look, rows, lambda row: 1 - row["saebench"]["ce_loss_score"])
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="measured L0 (active latents per token)", ylabel="1 - CE loss score")
    style.legend(figure, [axes], ncols=3)
    caption = (
        "Gemma-2-2B, block 12: released SAEs of width 65,536, measured by a third party "
        "(results/reference), behind ours."
    )
    return style.finish(figure, results, caption, style.bars_note(drawn))
