"""Figures of the distillation: core by origin, core size against coverage, core share of k, training curves."""

from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

from dmsae_lib import plot_style as style
from dmsae_lib.claims import t_interval
from dmsae_lib.plot_style import ARMS, DOUBLE, INK, MUTED, SEEDS, SINGLE, SMALL, styled
from dmsae_lib.results import Results

SHARE_LIMIT = 0.75  # core L0 / k above which the non-core is starved
CURVES = {"fvu": "FVU (fraction)", "L0_core": "core L0 (latents per token)", "dead": "dead latents"}
MOST_COVERAGES = 10  # rows of the heat map


@styled
def origins(results: Results) -> Figure:
    """Core latents by the cycle in which they were first selected."""
    rows = results.summary["cycles"]
    last = rows[-1]["cycle"]
    figure = style.new_figure(SINGLE, 2.9)
    axes = figure.subplots()
    below = [0] * (last + 1)
    for origin in range(last + 1):
        counts = [row["origins"].get(str(origin), 0) for row in rows]
        axes.bar(range(last + 1), counts, bottom=below, width=0.82, color=style.cycle_colour(origin, last),
                 edgecolor="white", linewidth=0.5)
        below = [a + b for a, b in zip(below, counts)]
    tallest = max(below)
    for cycle, total in enumerate(below):
        axes.text(cycle, total + 0.012 * tallest, str(total), ha="center", va="bottom", fontsize=SMALL)
    # Labels beside the last bar, pushed apart where its segments are thin.
    bottom, floor = 0, 0.0
    for origin in range(last + 1):
        count = rows[-1]["origins"].get(str(origin), 0)
        if count:
            y = max(bottom + count / 2, floor)
            axes.text(last + 0.52, y, f"cycle {origin}: {count}", va="center", fontsize=SMALL,
                      color=INK if origin > 0.6 * last else style.cycle_colour(origin, last))
            bottom, floor = bottom + count, y + 0.062 * tallest
    axes.set_xlim(-0.6, last + 0.5)
    axes.set_ylim(0, 1.09 * tallest)
    axes.set_xticks(range(last + 1))
    axes.grid(False, axis="x")
    axes.set_xlabel("cycle")
    axes.set_ylabel("core latents")
    axes.set_title(f"Core by cycle of first selection, k = {results.summary['sizes']['k']}")
    return style.finish(figure, results, "Core latents after each cycle, by the cycle of their first selection.",
                        "main distillation seed" if results.summary["chains"] else "one distillation seed")


@styled
def heatmap(results: Results) -> Figure:
    """Size of the core that a coverage would select, by k."""
    rows = results.summary["heatmap"]
    arms = [arm for arm in ("none", "distilled") if any(row["arm"] == arm for row in rows)]
    figure = style.new_figure(DOUBLE, 3.1)
    panels = figure.subplots(1, max(len(arms), 1), squeeze=False)[0]
    if not arms:
        style.missing(panels[0], "coverage curves: not run")
    ks = sorted({row["k"] for row in rows})
    found, used = sorted({row["coverage"] for row in rows}, reverse=True), results.summary["sizes"]["coverage"]
    every = 1 + (len(found) - 1) // MOST_COVERAGES
    coverages = [c for i, c in enumerate(found) if i % every == 0 or c == used]
    for axes, arm in zip(panels, arms):
        mine = [row for row in rows if row["arm"] == arm]
        cells = [[[r["size"] for r in mine if (r["k"], r["coverage"]) == (k, c)] for k in ks] for c in coverages]
        means = [[fmean(cell) if cell else float("nan") for cell in line] for line in cells]
        image = axes.imshow(means, cmap="cividis", aspect="auto")
        for y, line in enumerate(means):
            for x, value in enumerate(line):
                if value == value:
                    axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=SMALL,
                              color="black" if image.norm(value) > 0.5 else "white")
        low, high = (f(row["candidates"] for row in mine) for f in (min, max))
        axes.set_title(f"{style.label(arm, results)}, {low if low == high else f'{low}-{high}'} candidates")
        axes.set_xticks(range(len(ks)), ks)
        axes.set_yticks(range(len(coverages)), [f"{100 * c:g} %" for c in coverages])
        axes.set_xlabel("k")
        axes.set_ylabel("coverage of the attribution")
        axes.grid(False)
        figure.colorbar(image, ax=axes, label="latents selected", pad=0.02, ticks=MaxNLocator(6, integer=True))
    seeds = len({row["seed"] for row in rows})
    caption = "Latents needed to reach a share of the total attribution, by k; candidates are the core and prefix 0."
    return style.finish(figure, results, caption,
                        f"mean over {seeds} training seeds" if seeds > 1 else "one training seed")


@styled
def core_share(results: Results) -> Figure:
    """Core L0 / k, per cycle and after distillation per k."""
    cycles, k = results.summary["cycles"], results.summary["sizes"]["k"]
    rows = [row for row in results.summary["retrain"] if row["core"] == "distilled"]
    shares = {at: [row["L0"]["core"] / at for row in group] for (_, at), group in style.by_point(rows).items()}
    unbound = {row["k"] for row in rows if row["unbound"]}
    figure = style.new_figure(DOUBLE, 2.3)
    panels = figure.subplots(1, 2 if rows else 1, sharey=True, squeeze=False)[0]
    colour, marker = ARMS["distilled"][1:]
    left = panels[0]
    left.plot([row["cycle"] for row in cycles], [row["core_share"] for row in cycles], color=colour, marker=marker)
    left.set_xticks([row["cycle"] for row in cycles])
    left.set_xlabel("cycle")
    left.set_title(f"While distilling, k = {k}")
    for right in panels[1:]:
        right.plot(list(shares), [fmean(values) for values in shares.values()], color=colour)
        for at, values in shares.items():
            right.plot([at] * 2, t_interval(values) or [fmean(values)] * 2, color=colour, linewidth=1, marker="_")
            right.plot([at], [fmean(values)], marker=marker, **style.face(colour, at in unbound))
        style.l0_axis(right, list(shares))
        right.set_xlabel("k")
        right.set_title("After distillation, by k")
    for axes in panels:
        axes.axhline(1, color=INK, linewidth=0.9, zorder=1)
        axes.axhline(SHARE_LIMIT, color=MUTED, linewidth=1, linestyle="--", zorder=1)
        axes.set_ylabel("core L0 / k (fraction)")
    highest = max([1, *(row["core_share"] for row in cycles), *(max(values) for values in shares.values())])
    left.set_ylim(-0.03, 1.08 * highest)
    lines = ((SHARE_LIMIT, "little is left for the non-core", MUTED), (1, "the core alone reaches k", INK))
    for height, text, ink in lines:
        left.text(0, height + 0.02 * highest, f"{height}: {text}", fontsize=SMALL, color=ink)
    note = f"left: one SAE per cycle; right: {style.bars_note(rows, SEEDS)}" if rows else "one SAE per cycle"
    return style.finish(figure, results, "Share of the L0 budget k that the core takes.", note)


@styled
def training(results: Results) -> Figure:
    """Training curves of every cycle."""
    history = results.table("history_cycles.csv")
    last, k = results.summary["sizes"]["n_cycles"], results.summary["sizes"]["k"]
    figure = style.new_figure(DOUBLE, 2.4)
    panels = figure.subplots(1, 3)
    millions = max(float(row["tokens"]) for row in history) > 2e6
    unit, name = (1e6, "million") if millions else (1e3, "thousand")
    for axes, (column, title) in zip(panels, CURVES.items()):
        for cycle in range(last + 1):
            mine = [row for row in history if int(float(row["cycle"])) == cycle]
            axes.plot([float(row["tokens"]) / unit for row in mine], [float(row[column]) for row in mine],
                      color=style.cycle_colour(cycle, last), linewidth=1, label=f"{cycle}")
        axes.set_xlabel(f"tokens ({name})")
        axes.set_ylabel(title)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 3, 5)))
    panels[0].yaxis.set_major_formatter(FormatStrFormatter("%g"))
    panels[0].yaxis.set_minor_locator(NullLocator())
    panels[1].axhline(k, color=INK, linewidth=0.9, linestyle="--")
    panels[1].annotate(f"k = {k}", (1, k), (0, -2), xycoords=panels[1].get_yaxis_transform(),
                       textcoords="offset points", ha="right", va="top", fontsize=SMALL)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", title="cycle",
                  title_fontsize=SMALL, handlelength=1.2)
    return style.finish(figure, results, "Training curves of every cycle's SAE, on training batches.",
                        "one run per cycle")
