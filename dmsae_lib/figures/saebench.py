"""Figures of SAEBench beyond its curves: DMSAE minus baseline with error bars, and the released SAEs at paper
scale."""

import csv
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dmsae_lib.figures import style
from dmsae_lib.figures.house_style import MUTED, SMALL
from dmsae_lib.figures.style import DOUBLE, SINGLE, styled
from dmsae_lib.report import series
from dmsae_lib.report.results import Results
from dmsae_lib.report.series import SEEDS

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


@styled
def differences(results: Results) -> Figure | None:
    """DMSAE minus baseline for every headline metric and k; None where nothing was compared."""
    rows = results.summary["differences"]
    if not rows:
        return None
    ks, labels = sorted({row["k"] for row in rows}), list(dict.fromkeys(row["label"] for row in rows))
    doubted = {row["label"] for row in rows if row["doubted"]}
    figure = style.new_figure(DOUBLE, 0.9 + len(labels) * (0.16 + 0.07 * len(ks)))
    axes = figure.subplots()
    axes.axvline(0, color=MUTED, linewidth=0.8)
    for row in rows:
        at = ks.index(row["k"])
        y, colour = (
            labels.index(row["label"]) + 0.7 * ((at + 0.5) / len(ks) - 0.5),
            style.cycle_colour(at, len(ks) - 1),
        )
        if row["evaluation"] and row["evaluation"]["interval"]:
            axes.plot(
                row["evaluation"]["interval"],
                [y, y],
                color="#c4c4c4",
                linewidth=3.2,
                solid_capstyle="butt",
                zorder=2,
            )
        if row["interval"]:
            axes.plot(row["interval"], [y, y], color=colour, linewidth=1.1, zorder=3)
        axes.plot(
            [row["value"]],
            [y],
            marker="o",
            markersize=3.6,
            zorder=4,
            **style.face(colour, row["sign"] == "?"),
        )
    for at, k in enumerate(ks):
        axes.plot(
            [], [], color=style.cycle_colour(at, len(ks) - 1), marker="o", markersize=3.6, label=f"k = {k}"
        )
    if drawn := any(row["evaluation"] for row in rows):
        axes.plot([], [], color="#c4c4c4", linewidth=3.2, label="evaluation seeds")
    better = {
        row["label"]: {1: "higher is better", -1: "lower is better", 0: "neither is better"}[row["better"]]
        for row in rows
    }
    axes.set_yticks(
        range(len(labels)),
        [f"{name}{' †' * (name in doubted)}\n({better[name]})" for name in labels],
        fontsize=SMALL,
    )
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("DMSAE minus Matryoshka baseline at measured L0 (fractions of 1; loss increase: nats)")
    axes.set_ylabel("metric")
    axes.tick_params(axis="y", length=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=min(len(ks) + 1, 7))
    audit = " †: unreliable by an audit (arXiv 2605.18229)." if doubted else ""
    grey = (
        " Grey: 95 % t interval over evaluation seeds (texts, splits and probes) for the first training "
        "seed, at equal k."
        if drawn
        else ""
    )
    bars = any(row["interval"] for row in rows)
    return style.finish(
        figure,
        results,
        "SAEs with the main chain's core minus the Matryoshka baseline, paired by training seed; "
        f"hollow where no interval excludes 0.{grey}{audit}",
        f"points: mean, bars: 95 % t interval over {SEEDS}" if bars else "one training seed, no error bars",
    )


def reference_rows(results: Results) -> list[dict[str, Any]]:
    """{architecture, trainer, l0, loss_recovered} of the released SAEs; [] where the file is not beside the
    results."""
    path = Path(results.folder).parent / REFERENCE
    if not path.is_file():
        return []
    found: dict[tuple[str, str], dict[str, Any]] = {}
    with open(path, newline="", encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            if row["architecture"] in RELEASED:
                sae = found.setdefault(
                    (row["architecture"], row["trainer"]), {"architecture": row["architecture"]}
                )
                sae[row["metric"].removeprefix("core.")] = float(row["value"])
    return list(found.values())


@styled
def paper_scale(results: Results) -> Figure | None:
    """Loss that is not recovered against L0: the released Gemma-2-2B SAEs, and in front of them a run on that
    model."""
    released = reference_rows(results)
    if not released:
        return None
    ours = results.summary["inputs"]["model"]["name"] == PAPER_MODEL
    drawn = series.lines(results.summary, wanted=lambda row: row["saebench"]) if ours else []
    figure = style.new_figure(DOUBLE if ours else SINGLE * 1.3, 3.4)
    axes = figure.subplots()
    for name, (label, marker, line) in RELEASED.items():
        rows = sorted((row for row in released if row["architecture"] == name), key=lambda row: row["l0"])
        axes.plot(
            [row["l0"] for row in rows],
            [1 - row["loss_recovered"] for row in rows],
            color="#8c8c8c" if ours else MUTED,
            marker=marker,
            markersize=3.5,
            linewidth=0.9,
            linestyle=line,
            label=f"released {label}",
            zorder=1,
        )
    for look, rows in drawn:
        style.curve(axes, look, rows, lambda row: 1 - row["saebench"]["ce_loss_score"])
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.set_xlabel("measured L0 (active latents per token)")
    axes.set_ylabel("1 - CE loss score")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    who = "released SAEs of width 65,536, measured by a third party (results/reference)"
    caption = f"Gemma-2-2B, block 12: {who}" + (
        ", behind ours." if ours else "; no run of ours at that scale is in these results."
    )
    return style.finish(
        figure, results, caption, style.bars_note(drawn) if ours else "", "" if ours else "results/reference"
    )
