"""Figures of the SAEs trained after distillation: controls, quality against L0, core size by coverage."""

from collections.abc import Callable
from functools import partial
from itertools import cycle, pairwise
from operator import itemgetter
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmsae_lib.config.sections import LONGER
from dmsae_lib.figures import style
from dmsae_lib.figures.house_style import MUTED, OTHERS, SMALL
from dmsae_lib.figures.style import DOUBLE, FVU, LOSS, SINGLE
from dmsae_lib.report import series
from dmsae_lib.report.equal_l0 import over_baseline
from dmsae_lib.report.results import Results, Row
from dmsae_lib.report.series import ARMS, Look
from dmsae_lib.report.verdicts import t_interval

MAIN = ("none", "distilled")
PLAIN = {"loss_increase": LOSS, "fvu": FVU}


def _rows(group: list[Row]) -> str:
    """What an arm's frozen rows are like, for its label."""
    core, total = (fmean(row["L0"][part] for row in group) for part in ("core", "total"))
    ranks = [row["core_rows"]["rank"] for row in group if row["core_rows"]]
    return f"rank {fmean(ranks):.1f}, L0 {core:.1f} of {total:.1f}" if ranks else f"no core, L0 {total:.1f}"


def _arm(axes: Axes, y: int, look: Look, group: list[Row], metric: str) -> None:
    """One SAE a point; above them mean and interval where there is one."""
    _, colour, marker = look
    values = series.units(group, itemgetter(metric))[0]
    if interval := t_interval(values):
        axes.plot(interval, [y + 0.2] * 2, color=colour, linewidth=1.2, marker="|", markersize=5)
        axes.plot([fmean(values)] * 2, [y + 0.02, y + 0.38], color=colour, linewidth=1.8)
    for row in group:
        face = style.face(colour, row["unbound"])
        axes.plot([row[metric]], [y - 0.12], marker=marker, markersize=4.5, **face)


def _at_distillation_k(results: Results) -> list[tuple[Look, list[Row]]]:
    k, main = results.summary["sizes"]["k"], series.kinds(results.summary)[0]
    arms = [arm for arm in ARMS if arm not in LONGER]
    return series.lines(results.summary, arms, lambda row: row["k"] == k and row["chain"] in main.chains)


def controlled(results: Results) -> bool:
    """Whether any SAE has another core than the distilled one at the distillation k."""
    return any(row["arm"] not in MAIN for _, rows in _at_distillation_k(results) for row in rows)


def controls(results: Results) -> Figure:
    """Loss increase and FVU of the distilled core and its controls at the distillation k."""
    drawn, k = _at_distillation_k(results), results.summary["sizes"]["k"]
    figure = style.new_figure(DOUBLE, 0.9 + 0.31 * max(len(drawn), 4))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (metric, name) in zip(panels, PLAIN.items()):
        for y, (look, group) in enumerate(drawn):
            _arm(axes, y, look, group, metric)
        style.lanes(axes, [f"{label}\n{_rows(group)}" for (label, *_), group in drawn])
        axes.set_xlabel(style.better(name, -1))
        axes.locator_params(axis="x", nbins=5)
        axes.margins(x=0.08)
    panels[0].set(ylabel="core", title=f"Distilled against other cores of equal size, k = {k}")
    caption = (
        f"SAEs at k = {k} with the distilled core ({series.kinds(results.summary)[0].name}, like its "
        "controls), with cores drawn in other ways, unfrozen from the same start, and with none. Rank: "
        "participation rank of the core's encoder rows; L0: active core latents of all active ones. "
        f"{style.LOSS_IS} {style.FVU_IS}"
    )
    return style.finish(figure, results, caption, f"points: one SAE each; {style.bars_note(drawn, 'ticks')}")


def imported(axes: Axes, results: Results, value: Callable[[Row], float | None]) -> None:
    """A star for each SAE that was trained elsewhere."""
    for row, colour in zip(results.summary["imported"], cycle(OTHERS)):
        if (y := value(row)) is not None:
            star = {"linestyle": "none", "marker": "*", "markersize": 8, "color": colour}
            axes.plot([row["L0"]], [y], label=row["name"], **star)


def _name_unbound(axes: Axes, rows: list[Row], metric: str) -> None:
    """Say beside the hollow markers of an arm what they are."""
    if unbound := [row for row in rows if row["unbound"]]:
        ks = ", ".join(str(k) for k in sorted({row["k"] for row in unbound}))
        place = fmean(map(style.total_l0, unbound)), fmean(row[metric] for row in unbound)
        text = f"k = {ks}: the core\nalone exceeds k"
        left = place[0] > fmean(axes.get_xlim())
        how = {"ha": "right" if left else "left", "va": "center", "fontsize": SMALL, "color": MUTED}
        axes.annotate(text, place, (-7 if left else 7, 0), textcoords="offset points", **how)


def quality(results: Results) -> Figure:
    """Loss increase and FVU against total L0; below, minus the baseline at equal L0, with the controls."""
    several = len({row["k"] for row in results.summary["retrain"]}) > 1
    drawn = [  # controls that were trained at one k alone are in figure 3
        (look, rows)
        for look, rows in series.lines(results.summary)
        if rows[0]["arm"] in MAIN or not several or len(series.by_k(rows)) > 1
    ]
    ks = sorted({row["k"] for _, rows in drawn for row in rows})
    baselines = series.baselines(results.summary)
    compared = [(look, rows) for look, rows in drawn if rows[0]["arm"] != "none"]
    # between two arms
    aside = min(min((b / a for a, b in pairwise(ks)), default=2) ** (0.6 / max(len(compared), 1)), 1.07)
    figure = style.new_figure(DOUBLE, 4.6)
    for (above, below), (metric, name) in zip(figure.subplots(2, 2).T, PLAIN.items()):
        for look, rows in drawn:
            if rows[0]["arm"] in MAIN:
                style.curve(above, look, rows, itemgetter(metric))
        imported(above, results, itemgetter(metric))
        style.l0_axis(above, ks)
        style.log_y(above)
        above.set(title=name, xlabel="measured total L0 (core included)")
        above.set_ylabel(style.better(name.partition(" (")[0], -1))
        for _, rows in drawn:
            _name_unbound(above, rows, metric)
        for at, (look, rows) in enumerate(compared):
            gain = partial(over_baseline, baselines=baselines, metric=metric)
            shift, joined = aside ** (at - (len(compared) - 1) / 2), rows[0]["arm"] in MAIN
            style.curve(below, look, rows, gain, lambda row, shift=shift: row["k"] * shift, joined)
        below.axhline(0, color=ARMS["none"][1], linewidth=1, zorder=1)
        style.l0_axis(below, ks)
        below.set(xlabel="k (arms side by side)" if len(compared) > 1 else "k")
        below.set_ylabel(style.better("minus baseline", -1))
    style.legend(figure, [figure.axes[0], figure.axes[2]], ncols=3)
    caption = (
        "Above: SAEs with the distilled core and without against total L0, the core counted. Below: those "
        "with a core, and controls that were trained at several k, minus the baseline of the same chain "
        "(or, where it has none, of its seed's) and training seed at measured L0"
    )
    note = style.bars_note(drawn)
    caption += "; the panel cuts intervals over two chains." if "interval" in note else "."
    return style.finish(figure, results, f"{caption} {style.LOSS_IS} {style.FVU_IS}", note)


def coverage(results: Results) -> Figure:
    """Size of the core that a coverage would select, by k."""
    rows, used = results.summary["heatmap"], results.summary["sizes"]["coverage"]
    ks = sorted({row["k"] for row in rows})
    dashes = {ks[0]: (0, (3, 1)), ks[-1]: "-"}  # those between are thin
    figure = style.new_figure(SINGLE, 2.7)
    axes = figure.subplots()
    for arm in ("none", "distilled"):
        mine = [row for row in rows if row["arm"] == arm]
        _, colour, marker = ARMS[arm]
        for k, of in series.by_k(mine).items():
            shares = sorted({row["coverage"] for row in of})
            sizes = [fmean(row["size"] for row in of if row["coverage"] == share) for share in shares]
            look = {
                "color": colour,
                "linestyle": dashes.get(k, "-"),
                "linewidth": 1.3 if k in dashes else 0.5,
            }
            look |= {"marker": marker, "markersize": 4} if k == ks[-1] else {}
            label = series.label(arm, results.summary) if k == ks[-1] else None
            axes.plot([100 * share for share in shares], sizes, label=label, **look, **style.face(colour))
    for k, dash in dashes.items():
        axes.plot([], [], color=MUTED, linestyle=dash, label=f"k = {k}")
    axes.axvline(100 * used, color=MUTED, linewidth=0.9, linestyle="--", zorder=1)
    axes.set(xlabel="coverage of the attribution (%)", ylabel="latents needed", ylim=(0, None))
    style.legend(figure, [axes], ncols=2)
    seeds = len({row["seed"] for row in rows})
    caption = (
        "The fewest latents that hold a share of the attribution, among the candidates of an SAE (its core "
        "and prefix 0), for each k; upright: the coverage that selects a core."
    )
    many = f"mean over {seeds} training seeds of the main chain"
    return style.finish(figure, results, caption, many if seeds > 1 else "main chain, one training seed")
