"""Figure 1: the distillation cycle, with the measured share of the core in k beside it."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from dmsae_lib.figures import style
from dmsae_lib.figures.house_style import INK, MUTED, SMALL
from dmsae_lib.report.results import Results, Row
from dmsae_lib.report.series import ARMS

CORE, FREE = ARMS["distilled"][1], "#b9d7ea"
LEFT, MIDDLE, RIGHT = 23.5, 50, 76.5  # centres of the boxes
TOP, HALFWAY, BOTTOM = 69, 39.5, 10
WIDTH, WIDE, HEIGHT = 46, 62, 17.5
ARROW = {"arrowstyle": "-|>", "mutation_scale": 9, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
ATTRIBUTION = r"$|f_i \cdot \langle \partial L/\partial \hat{x}_0, d_i\rangle|$, mean over tokens"


def _boxes(summary: Row) -> list[tuple[float, float, float, str, str, str]]:
    """(x, y, width, colour, title, text) of each step."""
    sizes, size = summary["sizes"], summary["final_core"]["size"]
    relu = sizes["core_sparsity"] == "relu"
    selection = "core: ReLU, free: BatchTopK" if relu else "one BatchTopK for core and rest"
    train = f"width {sizes['d_sae']}, total L0 = k = {sizes['k']}\n{selection}"
    attribute = f"core + first {sizes['prefixes'][0]} latents reconstruct;\n{ATTRIBUTION}"
    select = f"the smallest set with {100 * sizes['coverage']:.0f} %\nof the attribution: core C(t)"
    freeze = "encoder rows of C(t) are kept;\nall other weights drawn afresh"
    final = f"{size} latents, frozen;\nnew SAEs at every k, with and without it"
    return [
        (LEFT, TOP, WIDTH, "#eaf3f9", "1  Train a Matryoshka SAE", train),
        (RIGHT, TOP, WIDTH, "#fdf3e1", "2  Attribute", attribute),
        (RIGHT, HALFWAY, WIDTH, "#fdf3e1", "3  Select", select),
        (LEFT, HALFWAY, WIDTH, "#fbe6da", "4  Freeze and start again", freeze),
        (MIDDLE, BOTTOM, WIDE, "#f1f1f1", "After the last cycle: the final core", final),
    ]


def _cycle(axes: Axes, summary: Row) -> None:
    axes.set(xlim=(0, 100), ylim=(0, 80), title="The distillation cycle")
    axes.set_axis_off()
    for x, y, width, colour, title, text in _boxes(summary):
        corner, top = (x - width / 2, y - HEIGHT / 2), y + HEIGHT / 2
        look = {"facecolor": colour, "edgecolor": INK, "linewidth": 0.8}
        rounded = "round,pad=0,rounding_size=1.2"
        axes.add_patch(FancyBboxPatch(corner, width, HEIGHT, boxstyle=rounded, **look))
        axes.text(x, top - 1.6, title, ha="center", va="top", fontweight="bold", fontsize=7.5)
        axes.text(x, top - 6.4, text, ha="center", va="top", fontsize=SMALL, linespacing=1.25)
    west, east = LEFT + WIDTH / 2, RIGHT - WIDTH / 2  # facing sides of the left and the right boxes
    south, north = TOP - HEIGHT / 2, HALFWAY + HEIGHT / 2  # and of the upper and the lower ones
    round_trip = [((west, TOP), (east, TOP)), ((RIGHT, south), (RIGHT, north))]
    round_trip += [((east, HALFWAY), (west, HALFWAY)), ((LEFT, north), (LEFT, south))]
    for start, end in round_trip:
        axes.add_patch(FancyArrowPatch(start, end, color=INK, **ARROW))
    start, end = (RIGHT - 8, HALFWAY - HEIGHT / 2), (RIGHT - 8, BOTTOM + HEIGHT / 2)
    axes.add_patch(FancyArrowPatch(start, end, color=MUTED, linestyle="--", **ARROW))
    cycles = f"cycles 1 to {summary['sizes']['n_cycles']}"
    axes.text(LEFT + 1.5, (TOP + HALFWAY) / 2, cycles, va="center", fontsize=SMALL)


def _budget(axes: Axes, summary: Row) -> None:
    """Core L0 as measured, and what it leaves of k, per cycle."""
    k, rows = summary["sizes"]["k"], summary["cycles"]
    at, core = [row["cycle"] for row in rows], [row["L0"]["core"] for row in rows]
    left_over = [max(k - value, 0) for value in core]
    bars = axes.bar(at, core, color=CORE, width=0.8, label="core, measured")
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
    axes.set_title("The core's share of k moves")


def schematic(results: Results) -> Figure:
    figure = style.new_figure(style.DOUBLE, 3.3)
    left, right = figure.subplots(1, 2, width_ratios=(1.9, 1))
    _cycle(left, results.summary)
    _budget(right, results.summary)
    caption = "One distillation cycle, and what the core leaves of the L0 budget k in each cycle."
    return style.finish(figure, results, caption)
