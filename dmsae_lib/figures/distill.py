"""Figures of the distillation: core by origin, core size against coverage, core share of k, training curves,
re-selection, identity across chains."""

from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dmsae_lib.figures import style
from dmsae_lib.figures.house_style import INK, MUTED, SMALL
from dmsae_lib.figures.style import DOUBLE, SINGLE, styled
from dmsae_lib.report import series
from dmsae_lib.report.results import Results
from dmsae_lib.report.series import ARMS

SHARE_LIMIT = 0.75  # core L0 / k above which free latents are starved
CURVES = {"fvu": "FVU (fraction)", "L0_core": "core L0 (latents per token)", "dead": "dead latents"}
MOST_COVERAGES = 10  # rows of the heat map
MATCHES = {
    "cosine": "|cosine| of\nmatched encoder rows",
    "activation": "correlation of\nmatched activations",
    "span": "overlap of the spans\n(grey: chance)",
}
MATCHED = {
    "cores": ("distilled cores", "distilled"),
    "plain": ("first latents of plain SAEs", "none"),
    # label, and the arm whose colour and marker it has
    "random": ("random rows", "random_directions"),
}


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
        axes.bar(
            range(last + 1),
            counts,
            bottom=below,
            width=0.82,
            color=style.cycle_colour(origin, last),
            edgecolor="white",
            linewidth=0.5,
        )
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
            axes.text(
                last + 0.52,
                y,
                f"cycle {origin}: {count}",
                va="center",
                fontsize=SMALL,
                color=INK if origin > 0.6 * last else style.cycle_colour(origin, last),
            )
            bottom, floor = bottom + count, y + 0.062 * tallest
    axes.set_xlim(-0.6, last + 0.5)
    axes.set_ylim(0, 1.09 * tallest)
    axes.set_xticks(range(last + 1))
    axes.grid(False, axis="x")
    axes.set_xlabel("cycle")
    axes.set_ylabel("core latents")
    axes.set_title(f"Core by cycle of first selection, k = {results.summary['sizes']['k']}")
    return style.finish(
        figure,
        results,
        "Core latents after each cycle, by the cycle of their first selection.",
        "main distillation chain" if results.summary["chains"] else "one distillation chain",
    )


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
    found, used = (
        sorted({row["coverage"] for row in rows}, reverse=True),
        results.summary["sizes"]["coverage"],
    )
    every = 1 + (len(found) - 1) // MOST_COVERAGES
    coverages = [c for i, c in enumerate(found) if i % every == 0 or c == used]
    for axes, arm in zip(panels, arms):
        mine = [row for row in rows if row["arm"] == arm]
        cells = [
            [[r["size"] for r in mine if (r["k"], r["coverage"]) == (k, c)] for k in ks] for c in coverages
        ]
        means = [[fmean(cell) if cell else float("nan") for cell in line] for line in cells]
        image = axes.imshow(means, cmap="cividis", aspect="auto")
        for y, line in enumerate(means):
            for x, value in enumerate(line):
                if value == value:
                    axes.text(
                        x,
                        y,
                        f"{value:.0f}",
                        ha="center",
                        va="center",
                        fontsize=SMALL,
                        color="black" if image.norm(value) > 0.5 else "white",
                    )
        low, high = (f(row["candidates"] for row in mine) for f in (min, max))
        axes.set_title(
            f"{series.label(arm, results.summary)}, {low if low == high else f'{low}-{high}'} candidates"
        )
        axes.set_xticks(range(len(ks)), ks)
        axes.set_yticks(range(len(coverages)), [f"{100 * c:g} %" for c in coverages])
        axes.set_xlabel("k")
        axes.set_ylabel("coverage of the attribution")
        axes.grid(False)
        figure.colorbar(
            image, ax=axes, label="latents selected", pad=0.02, ticks=MaxNLocator(6, integer=True)
        )
    seeds = len({row["seed"] for row in rows})
    caption = "Latents needed to reach a share of the total attribution, by k; candidates: core and prefix 0."
    return style.finish(
        figure,
        results,
        caption,
        f"mean over {seeds} training seeds of the main chain"
        if seeds > 1
        else "main chain, one training seed",
    )


def _chains(kind: series.Kind) -> str:
    return f"{len(kind.chains)} chains" if len(kind.chains) > 1 else "one chain"


def _lines(kinds: list[series.Kind]) -> str:
    """The footnote's words on what each line is."""
    several = any(len(kind.chains) > 1 for kind in kinds)
    return (
        "thin: a chain (own seeds), one SAE per cycle; thick: mean over chains"
        if several
        else "one SAE per cycle and chain"
    )


@styled
def core_share(results: Results) -> Figure:
    """Core L0 / k, per cycle and after distillation per k, for each kind of core."""
    kinds, k = series.kinds(results.summary), results.summary["sizes"]["k"]
    drawn = series.lines(results.summary, ["distilled"])
    figure = style.new_figure(DOUBLE, 2.5)
    panels = figure.subplots(1, 2 if drawn else 1, sharey=True, squeeze=False)[0]
    left = panels[0]
    for kind in kinds:
        shares = [{row["cycle"]: row["core_share"] for row in rows} for rows in kind.chains.values()]
        style.bundle(left, (f"{kind.name} core ({_chains(kind)})", kind.colour, kind.marker), shares)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_xlabel("cycle")
    left.set_title(f"While distilling, k = {k}")
    for right in panels[1:]:
        for look, rows in drawn:
            style.curve(right, look, rows, lambda row: row["L0"]["core"] / row["k"], lambda row: row["k"])
        style.l0_axis(right, sorted({row["k"] for _, rows in drawn for row in rows}))
        right.set_xlabel("k")
        right.set_title("After distillation, by k")
    for axes in panels:
        axes.axhline(1, color=INK, linewidth=0.9, zorder=1, label="1: the core alone reaches k")
        axes.axhline(
            SHARE_LIMIT,
            color=MUTED,
            linewidth=1,
            linestyle="--",
            zorder=1,
            label=f"{SHARE_LIMIT}: little is left for free latents",
        )
        axes.set_ylabel("core L0 / k (fraction)")
        axes.set_ylim(bottom=-0.06)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    note = _lines(kinds)
    return style.finish(
        figure,
        results,
        "Share of the L0 budget k that the core takes.",
        f"left: {note}; right: {style.bars_note(drawn)}" if drawn else note,
    )


@styled
def reselected(results: Results) -> Figure | None:
    """Share of the frozen rows that is selected again, for cores and for placebo rows; None where no placebo
    ran."""
    kinds = [
        kind
        for kind in series.kinds(results.summary)
        if any(row["placebos"] for rows in kind.chains.values() for row in rows)
    ]
    if not kinds:
        return None
    m_0 = results.summary["sizes"]["prefixes"][0]
    figure = style.new_figure(DOUBLE if len(kinds) > 1 else SINGLE * 1.4, 2.9)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds):
        chains = [[row for row in rows if row["cycle"]] for rows in kind.chains.values()]
        style.bundle(
            axes,
            ("distilled core", kind.colour, kind.marker),
            [{row["cycle"]: row["kept"] / row["core_in"] for row in rows} for rows in chains],
        )
        for placebo in sorted({name for rows in chains for row in rows for name in row["placebos"]}):
            shares = [
                {
                    row["cycle"]: row["placebos"][placebo]["kept"] / row["placebos"][placebo]["core_in"]
                    for row in rows
                    if placebo in row["placebos"]
                }
                for rows in chains
            ]
            name, *look = ARMS[placebo]
            style.bundle(axes, (f"placebo: {name}", *look), filter(None, shares))
        uniform = {
            t: fmean(rows[t - 1]["core_out"] / (rows[t - 1]["core_in"] + m_0) for rows in chains)
            for t in range(1, len(chains[0]) + 1)
        }
        axes.plot(
            list(uniform),
            list(uniform.values()),
            color="#a0a0a0",
            linestyle="--",
            label="uniform selection",
            zorder=1,
        )
        axes.set_ylim(-0.03, 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("cycle")
        axes.set_ylabel("frozen rows kept (fraction)")
        axes.set_title(f"{kind.name} core, {_chains(kind)}")
    named = {name: handle for axes in panels for handle, name in zip(*axes.get_legend_handles_labels())}
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=2)
    caption = (
        "Share of the frozen rows that the next selection takes again, for the core and for placebo chains "
        "of as many rows: those of them that were selected again, and new ones that nothing selected. "
        "Uniform selection, a weak reference: as many latents drawn evenly from core and prefix 0."
    )
    return style.finish(figure, results, caption, _lines(kinds))


@styled
def core_identity(results: Results) -> Figure | None:
    """How well two chains' cores match, beside plain SAEs' latents and random rows; None below two chains."""
    rows = results.summary["identity"]
    if not rows:
        return None
    figure = style.new_figure(DOUBLE, 2.0)
    for axes, (metric, name) in zip(figure.subplots(1, 3, sharey=True), MATCHES.items()):
        for y, kind in enumerate(MATCHED):
            _, colour, marker = ARMS[MATCHED[kind][1]]
            values = [row[metric] for row in rows if row["kind"] == kind and row[metric] is not None]
            if not values:
                axes.text(0.02, y, "no activations", va="center", fontsize=SMALL, color=MUTED)
                continue
            if metric == "span":
                chance = fmean(row["span_chance"] for row in rows if row["kind"] == kind)
                axes.plot([chance] * 2, [y - 0.38, y + 0.38], color="#a0a0a0", linewidth=2.5, zorder=1)
            axes.plot(values, [y] * len(values), marker, markersize=4, zorder=2, **style.face(colour, False))
            axes.plot([fmean(values)] * 2, [y - 0.3, y + 0.3], color=colour, linewidth=1.6, zorder=3)
            axes.annotate(
                f"{fmean(values):.2f}",
                (max(values), y),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=SMALL,
            )
        axes.set_xlim(0, 1)
        axes.set_xlabel(name)
        axes.set_yticks(range(len(MATCHED)), [label for label, _ in MATCHED.values()])
        axes.set_ylim(len(MATCHED) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
    figure.axes[0].set_ylabel("rows of two chains")
    pairs = len({(row["a"], row["b"]) for row in rows})
    caption = (
        "Latents of two chains' cores matched one to one, against as many first latents of plain SAEs and "
        "random rows; and how far their spans agree (mean squared cosine of the principal angles)."
    )
    return style.finish(
        figure,
        results,
        caption,
        f"points: pairs of chains ({pairs}), ticks and numbers: mean over pairs, which "
        "share chains, so no interval",
    )


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
            axes.plot(
                [float(row["tokens"]) / unit for row in mine],
                [float(row[column]) for row in mine],
                color=style.cycle_colour(cycle, last),
                linewidth=1,
                label=f"{cycle}",
            )
        axes.set_xlabel(f"tokens ({name})")
        axes.set_ylabel(title)
    style.log_y(panels[0])
    panels[1].axhline(k, color=INK, linewidth=0.9, linestyle="--")
    panels[1].annotate(
        f"k = {k}",
        (1, k),
        (0, -2),
        xycoords=panels[1].get_yaxis_transform(),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=SMALL,
    )
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside right center",
        title="cycle",
        title_fontsize=SMALL,
        handlelength=1.2,
    )
    return style.finish(
        figure,
        results,
        "Training curves of every cycle's SAE, on training batches.",
        "main chain, one run per cycle",
    )
