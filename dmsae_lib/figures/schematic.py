"""Figure 1: an SAE with its nested prefixes, one distillation cycle, and the core's measured share of k."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from dmsae_lib.figures import style
from dmsae_lib.figures.house_style import INK, MUTED, SMALL
from dmsae_lib.report.results import Results, Row
from dmsae_lib.report.series import ARMS

CORE, FREE = ARMS["distilled"][1], "#b9d7ea"
ARROW = {"arrowstyle": "-|>", "mutation_scale": 8, "linewidth": 1, "shrinkA": 0, "shrinkB": 0}
ATTRIBUTION = r"$|f_i \, \langle \partial L/\partial \hat{x}_0, d_i\rangle|$"
# Places in hundredths of an inch. The SAE: left edge of its latents, edge between core and free ones, width
# of a prefix, height of the row; the cycle: width of a box and of the space between two.
START, EDGE, STEP, TOP = 62, 138, 41, 140
BOX, GAP = 150, 26


def _arrow(axes: Axes, *corners: tuple[float, float], **look: str) -> None:
    """Along straight lines, with its head at the last corner."""
    axes.plot(*zip(*corners[:-1]), linewidth=1, **{"color": INK} | look)
    axes.add_patch(FancyArrowPatch(*corners[-2:], **ARROW, **{"color": INK} | look))


def _latents(axes: Axes, end: float, y: float, height: float) -> None:
    """The core and the free latents up to a prefix's end."""
    for left, right, colour in ((START, EDGE, CORE), (EDGE, end, FREE)):
        axes.add_patch(Rectangle((left, y), right - left, height, facecolor=colour, linewidth=0))


def _sae(axes: Axes, summary: Row) -> None:
    """The latents in a row, core first; below, what each nested prefix reconstructs from."""
    sizes, core = summary["sizes"], summary["final_core"]["size"]
    prefixes = [*sizes["prefixes"][:-1], sizes["d_sae"] - core]
    ends = [EDGE + STEP * (n + 1) for n in range(len(prefixes))]
    axes.set(xlim=(0, 445), ylim=(0, 180), title="The SAE of a cycle: core and nested prefixes")
    axes.set_axis_off()
    middle = {"ha": "center", "va": "center", "fontsize": SMALL}
    axes.text(22, TOP + 11, "residual\nstream $x$", **middle)
    _arrow(axes, (46, TOP + 11), (START - 3, TOP + 11))
    _latents(axes, ends[-1], TOP, 22)
    axes.text((START + EDGE) / 2, TOP + 11, f"core: {core}", color="white", fontweight="bold", **middle)
    for end, count in zip(ends, [prefixes[0], *(b - a for a, b in zip(prefixes, prefixes[1:]))]):
        axes.plot([end - STEP] * 2, [TOP, TOP + 22], color="white", linewidth=1.2)
        axes.text(end - STEP / 2, TOP + 11, f"+{count}" if end > ends[0] else str(count), **middle)
    axes.text((START + EDGE) / 2, TOP + 31, "encoder frozen", **middle)
    axes.text((EDGE + ends[-1]) / 2, TOP + 31, "free latents, drawn afresh", **middle)
    for n, (end, prefix) in enumerate(zip(ends, prefixes)):
        y = TOP - 19 - 17 * n
        _latents(axes, end, y, 9)
        of = f"all {sizes['d_sae']}" if end == ends[-1] else f"core + {prefix}"
        _arrow(axes, (end + 2, y + 4.5), (ends[-1] + 12, y + 4.5))
        axes.text(ends[-1] + 15, y + 4.5, rf"$\hat{{x}}_{n}$: {of}", **middle | {"ha": "left"})
    relu = sizes["core_sparsity"] == "relu"
    chosen = "core by ReLU, the rest by BatchTopK" if relu else "one BatchTopK over core and rest"
    loss = r"loss: sum of $\Vert x - \hat{x}_i\Vert^2$ over the prefixes"
    text = f"{loss}\ntotal L0 = k = {sizes['k']}: {chosen}"
    axes.text(START, TOP - 22 - 17 * len(ends), text, va="top", fontsize=SMALL, linespacing=1.4)


def _cycle(axes: Axes, summary: Row) -> None:
    sizes, last = summary["sizes"], summary["sizes"]["n_cycles"]
    steps = [
        ("1  Train", "the SAE above\n(cycle 0: without a core)"),
        ("2  Attribute", f"core and first {sizes['prefixes'][0]} latents:\n{ATTRIBUTION}, mean"),
        ("3  Select", f"the fewest latents that hold\n{100 * sizes['coverage']:.0f} %: the core C(t)"),
        ("4  Freeze", "encoder rows of C(t);\nall else is drawn afresh"),
    ]
    axes.set(xlim=(0, 690), ylim=(0, 92))
    axes.set_axis_off()
    lefts = [2 + n * (BOX + GAP) for n in range(len(steps))]
    for left, (title, text) in zip(lefts, steps):
        look = {"facecolor": "#f3f3f3", "edgecolor": MUTED, "linewidth": 0.8}
        axes.add_patch(FancyBboxPatch((left, 44), BOX, 46, boxstyle="round,pad=0,rounding_size=4", **look))
        axes.text(left + 7, 86, title, va="top", fontweight="bold")
        axes.text(left + 7, 72, text, va="top", fontsize=SMALL, linespacing=1.25)
    for left in lefts[1:]:
        _arrow(axes, (left - GAP, 67), (left, 67))
    first, third, fourth = lefts[0] + BOX / 2, lefts[2] + BOX / 2, lefts[3] + BOX / 2
    _arrow(axes, (fourth, 44), (fourth, 8), (first, 8), (first, 44))
    axes.text(first + 6, 12, f"cycles 1 to {last}", va="bottom", fontsize=SMALL)
    _arrow(axes, (third, 44), (third, 32), color=CORE)
    final = f"after cycle {last}: the final core, for new SAEs at every k"
    axes.text(third, 30, final, ha="center", va="top", fontsize=SMALL)


def _budget(axes: Axes, summary: Row) -> None:
    """Core L0 as measured, and what it leaves of k, per cycle."""
    k, rows = summary["sizes"]["k"], summary["cycles"]
    at, core = [row["cycle"] for row in rows], [row["L0"]["core"] for row in rows]
    left_over = [max(k - value, 0) for value in core]
    bars = axes.bar(at, core, color=CORE, width=0.8, label="entering core")
    rest = axes.bar(at, left_over, bottom=core, color=FREE, width=0.8, label="left for free latents")

    def number(value: float) -> str:
        return f"{value:.0f}" if value > 0.08 * k else ""

    inside = {"label_type": "center", "fmt": number, "fontsize": SMALL}
    axes.bar_label(bars, color="white", fontweight="bold", **inside)
    axes.bar_label(rest, **inside)
    axes.axhline(k, color=INK, linewidth=1, linestyle="--")
    top = max(k, *core)
    axes.text(at[0] - 0.4, k + 0.02 * top, f"k = {k}", va="bottom", fontsize=SMALL)
    close = {"handlelength": 1, "borderaxespad": 0.1, "labelspacing": 0.3}
    axes.legend(handles=[rest, bars], loc="upper right", **close)
    axes.grid(False)
    axes.set(xlabel="cycle", ylabel="L0 (active latents per token)", xticks=at, ylim=(0, 1.32 * top))
    axes.set_title("What the core takes of k")


def schematic(results: Results) -> Figure:
    figure = style.new_figure(style.DOUBLE, 3.5)
    places = figure.add_gridspec(2, 2, width_ratios=(2, 1), height_ratios=(2, 1))
    _sae(figure.add_subplot(places[0, 0]), results.summary)
    _budget(figure.add_subplot(places[0, 1]), results.summary)
    _cycle(figure.add_subplot(places[1, :]), results.summary)
    for axes in (figure.axes[0], figure.axes[2]):
        for text in axes.texts:
            text.set_in_layout(False)  # the drawing stays as large as its axes
    caption = (
        "Left: the SAE of a cycle. Each prefix of its free latents reconstructs together with the whole "
        "core. Right: measured L0 of the core that enters a cycle, and what it leaves of the budget k. "
        "(The bars of figure 2 are the size of the core that leaves it.) Below: one distillation cycle; "
        r"f: activation, d: decoder row, L: next-token loss with the reconstruction from the first prefix."
    )
    return style.finish(figure, results, caption, "main chain, one SAE per cycle")
