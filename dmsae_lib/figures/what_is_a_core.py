"""Figures of notebook 10, one for each of its questions, from its record alone."""

import json
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmsae_lib.figures import style
from dmsae_lib.figures.house_style import INK
from dmsae_lib.figures.style import DOUBLE
from dmsae_lib.report.results import Results, Row
from dmsae_lib.report.series import ARMS
from dmsae_lib.report.what_is_a_core import RECORD, mean_of_random

A, IG = ARMS["distilled"][1], ARMS["none"][1]
KEPT = {  # scores by which as many candidates are kept alone
    "mean_abs": ("mean |A|", A),
    "ig_mean_abs": ("mean |IG|", IG),
    "frequency": ("frequency", ARMS["most_frequent"][1]),
    "abs_mean": ("|mean A|", A),
    "ablation_by_context": ("ablation, one at a time", INK),
}
MATCHED = {  # rows of two chains: label, colour
    "cores": ("distilled cores", ARMS["distilled"][1]),
    "turned": ("one turned in its span", ARMS["rotated"][1]),
    "plain": ("first latents of plain SAEs", ARMS["none"][1]),
    "random": ("random rows", style.CHANCE),
}


class Unpublished(NamedTuple):
    """In place of results that are not published yet, for a footnote."""

    summary: Row
    hash: str


def record(results: Results) -> Row | None:
    """what_is_a_core.json beside the summary; None where notebook 10 did not run."""
    path = results.folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def agreements(results: Results) -> list[Row] | None:
    return (record(results) or {}).get("agreement")


def _scatter(axes: Axes, row: Row) -> None:
    for name, key, colour, marker in (("A", "promised", A, "s"), ("IG", "ig_promised", IG, "o")):
        x, y = ([latent[at] for latent in row["latents"]] for at in (key, "measured"))
        pearson = row["agreement"][name]["pearson"]
        shown = f"{name}, r = {pearson:.2f}" if pearson is not None else name
        axes.plot(x, y, marker, markersize=4, label=shown, **style.face(colour))
    ends = [*axes.get_xlim(), *axes.get_ylim()]
    axes.axline((0, 0), slope=1, color=style.CHANCE, linewidth=1, linestyle="--", zorder=1)
    axes.set(xlim=(min(ends), max(ends)), ylim=(min(ends), max(ends)))
    axes.set(xlabel="promised (nats per token)", ylabel="measured")
    axes.set_title(f"cycle {row['cycle']}, {row['candidates']} candidates")
    axes.legend(loc="upper left")


def ablation(results: Results | Unpublished, found: Row | None = None) -> Figure:
    """Promised against measured changes of the loss, and what sets of one size are worth when kept alone."""
    found = found or record(results)
    effects = list({row["cycle"]: row for row in found["effects"]}.values())
    figure = style.new_figure(DOUBLE, 2.7)
    *scatters, kept = figure.subplots(1, len(effects) + 1)
    for axes, row in zip(scatters, effects):
        _scatter(axes, row)
    last = effects[-1]
    bars = [(name, last["kept"][key], colour) for key, (name, colour) in KEPT.items()]
    bars.append(("random", mean_of_random(last["kept"]), style.CHANCE))
    for y, (_, value, colour) in enumerate(bars):
        kept.barh(y, value, color=colour, height=0.65)
        style.beside(kept, max(value, 0), y, f"{value:.2f}")
    style.lanes(kept, [name for name, *_ in bars])
    kept.margins(x=0.22)
    kept.grid(False, axis="y")
    kept.set(xlabel="loss increase (nats)", ylabel="kept by")
    kept.set_title(f"{last['kept_size']} of {last['candidates']} kept alone")
    caption = (
        "The change of the loss when a candidate of the first reconstruction is ablated, against what "
        "gradient "
        "x activation and integrated gradients promise for it; right: loss with equally many candidates "
        "alone, "
        "by what selected them, minus the loss with all."
    )
    return style.finish(
        figure,
        results,
        caption,
        f"A: gradient x activation, IG: integrated gradients; {last['tokens']} tokens",
    )


def duplicates(results: Results | Unpublished, found: Row | None = None) -> Figure:
    """Size of the cores as they are, and of cores of the same coverage without near-copies."""
    found = found or record(results)
    rows = found["redundancy"]
    cores = list(dict.fromkeys(row["core"] for row in rows))
    figure = style.new_figure(DOUBLE if len(cores) > 1 else DOUBLE / 2, 2.4)
    panels = figure.subplots(1, len(cores), sharey=True, squeeze=False)[0]
    sizes = {
        "as it is": (lambda row: row["size"], ARMS["distilled"][1], "s"),
        "no two above .9": (lambda row: row["without"]["0.9"]["merged"], ARMS["random"][1], "^"),
        "no two above .7": (lambda row: row["without"]["0.7"]["merged"], ARMS["none"][1], "o"),
        "rank": (lambda row: row["rank"], style.CHANCE, "v"),
    }
    for axes, core in zip(panels, cores):
        mine = [row for row in rows if row["core"] == core]
        for name, (value, colour, marker) in sizes.items():
            chains = [
                {row["cycle"]: value(row) for row in mine if row["chain"] == chain}
                for chain in dict.fromkeys(row["chain"] for row in mine)
            ]
            style.bundle(axes, (name, colour, marker), chains)
        axes.set_ylim(bottom=0)
        style.cycle_axis(axes)
        axes.set(ylabel="latents", title=f"{core} core")
    style.legend(figure, panels[:1], ncols=len(sizes) if len(cores) > 1 else 2)
    caption = (
        "Latents of each cycle's core; of a core of the same coverage in which no two are more alike, by "
        "encoder "
        "rows or activations, than the bound (a copy's score counts for the latent it is a copy of); and the "
        "participation rank of its rows."
    )
    return style.finish(figure, results, caption, "thin: chains, thick: their mean")


def _curve(axes: Axes, rows: list[Row], key: str, kind: str) -> None:
    """Sorted values of each pair of chains against their rank, and the mean of all."""
    lists = [row[key] for row in rows if row["kind"] == kind and row[key]]
    if not lists:
        return
    name, colour = MATCHED[kind]
    grid = np.linspace(0, 1, 101)
    curves = [np.interp(grid, np.linspace(0, 1, len(values)), values) for values in lists]
    for values in curves if len(curves) > 1 else ():
        axes.plot(grid, values, color=colour, linewidth=0.5, alpha=0.5)
    axes.plot(grid, np.mean(curves, axis=0), color=colour, label=name)


def latents_or_subspace(results: Results | Unpublished, found: Row | None = None) -> Figure:
    """How well two chains' cores match: their latents, what these fire on, and their subspaces."""
    found = found or record(results)
    core = found["agreement"][0]["core"]
    rows = [row for row in found["agreement"] if row["core"] == core]
    figure = style.new_figure(DOUBLE, 2.6)
    panels = figure.subplots(1, 3, sharey=True)
    titles = {
        "cosines": ("encoder rows", "matched latents (fraction)", "|cosine|, or correlation"),
        "activations": ("activations", "matched latents (fraction)", ""),
        "angles": ("subspaces", "principal angles (fraction)", ""),
    }
    for axes, (key, (title, x, y)) in zip(panels, titles.items()):
        for kind in MATCHED:
            _curve(axes, rows, key, kind)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel=x, title=title)
        if y:
            axes.set_ylabel(y)
    style.legend(figure, panels[:1], ncols=4)
    pairs = len({(row["a"], row["b"]) for row in rows})
    caption = (
        f"Two chains' {core} cores: |cosine| of latents matched by encoder rows, correlation of latents "
        "matched by "
        "activations on the same tokens, and cosines of the principal angles of their spans, each sorted. "
        "Turned: "
        "one of the cores at random within its own span, as often active, so of the same subspace alone."
    )
    return style.finish(figure, results, caption, f"thin: pairs of chains ({pairs}), thick: their mean")


def competition(results: Results | Unpublished, found: Row | None = None) -> Figure:
    """Each core's share of k, and what it costs in loss at equal L0."""
    found = found or record(results)
    rows = [row for row in found["competition"]["rows"] if row["arm"] != "none"]
    figure = style.new_figure(DOUBLE, 0.95 + 0.2 * max(len(rows), 4))
    share, loss, kept = figure.subplots(1, 3, sharey=True)
    for y, row in enumerate(rows):
        _, colour, marker = ARMS[row["arm"]]
        share.plot([row["core_share"]], [y], marker=marker, **style.face(colour, bool(row["unbound"])))
        if row["frequency"] is not None:
            kept.plot([row["frequency"]], [y], marker=marker, **style.face(colour))
        over = row["loss_increase_over_baseline"]
        if over["interval"]:
            loss.plot(over["interval"], [y, y], color=colour, linewidth=1.2, marker="|", markersize=5)
        if over["value"] is not None:
            loss.plot([over["value"]], [y], marker=marker, **style.face(colour))
    names = [ARMS[row["arm"]][0].partition(" (")[0].format(times="n") for row in rows]
    style.lanes(share, [f"{name} ({row['saes']})" for name, row in zip(names, rows)])
    loss.axvline(0, color=ARMS["none"][1], linewidth=1, zorder=1)
    share.set_xlim(left=0)
    share.set(xlabel="core L0 / k", ylabel="frozen rows (SAEs)", title="share of the budget")
    loss.set(xlabel="nats, minus baseline", title="loss increase at equal L0")
    kept.set(xlabel="correlation", title="frequencies kept")
    varied = next((row["loss_increase_over_baseline"]["varied"] for row in rows), "")
    n = [row["loss_increase_over_baseline"]["n"] for row in rows]
    over = (
        f"95 % t interval over up to {max(n, default=0)} of: {varied}"
        if max(n, default=0) > 1
        else "one SAE each"
    )
    caption = (
        f"Cores in open competition at k = {found['k']}: the share of k that they win, the loss increase "
        "minus "
        "that without a core at measured L0, and how far their latents keep the frequencies of the cycle "
        "before."
    )
    return style.finish(figure, results, caption, f"points: mean, bars: {over}")
