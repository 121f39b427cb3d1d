"""Figure 1: the distillation cycle, with the measured share of the core in k beside it."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from dmsae_lib.figures.house_style import INK, MUTED, SMALL
from dmsae_lib.figures.style import DOUBLE, finish, new_figure, styled
from dmsae_lib.report.results import Results
from dmsae_lib.report.series import ARMS

CORE, FREE = ARMS["distilled"][1], "#b9d7ea"


def box(
    axes: Axes, x: float, y: float, width: float, height: float, title: str, text: str, colour: str
) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            facecolor=colour,
            edgecolor=INK,
            linewidth=0.8,
            boxstyle="round,pad=0,rounding_size=1.2",
        )
    )
    axes.text(x, y + height / 2 - 1.6, title, ha="center", va="top", fontweight="bold", fontsize=7.5)
    axes.text(x, y + height / 2 - 6.4, text, ha="center", va="top", fontsize=SMALL, linespacing=1.25)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0, **kw) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>",
            mutation_scale=9,
            linewidth=1.1,
            color=kw.get("color", INK),
            linestyle=kw.get("linestyle", "-"),
            shrinkA=0,
            shrinkB=0,
        )
    )


def cycle(axes: Axes, results: Results) -> None:
    sizes = results.summary["sizes"]
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 80)
    axes.set_axis_off()
    relu = (
        "core: ReLU, free: BatchTopK"
        if sizes["core_sparsity"] == "relu"
        else "one BatchTopK for core and rest"
    )
    width, height = 46, 17.5
    left, right, top, middle, bottom = 23.5, 76.5, 69, 39.5, 10
    box(
        axes,
        left,
        top,
        width,
        height,
        "1  Train a Matryoshka SAE",
        f"width {sizes['d_sae']}, total L0 = k = {sizes['k']}\n{relu}",
        "#eaf3f9",
    )
    formula = r"$|f_i \cdot \langle \partial L/\partial \hat{x}_0, d_i\rangle|$, mean over tokens"
    box(
        axes,
        right,
        top,
        width,
        height,
        "2  Attribute",
        f"core + first {sizes['prefixes'][0]} latents reconstruct;\n{formula}",
        "#fdf3e1",
    )
    box(
        axes,
        right,
        middle,
        width,
        height,
        "3  Select",
        f"the smallest set with {100 * sizes['coverage']:.0f} %\nof the attribution: core C(t)",
        "#fdf3e1",
    )
    box(
        axes,
        left,
        middle,
        width,
        height,
        "4  Freeze and start again",
        "encoder rows of C(t) are kept;\nall other weights drawn afresh",
        "#fbe6da",
    )
    size = results.summary["final_core"]["size"]
    box(
        axes,
        50,
        bottom,
        62,
        height,
        "After the last cycle: the final core",
        f"{size} latents, frozen;\nnew SAEs at every k, with and without it",
        "#f1f1f1",
    )
    arrow(axes, (left + width / 2, top), (right - width / 2, top))
    arrow(axes, (right, top - height / 2), (right, middle + height / 2))
    arrow(axes, (right - width / 2, middle), (left + width / 2, middle))
    arrow(axes, (left, middle + height / 2), (left, top - height / 2))
    arrow(
        axes, (right - 8, middle - height / 2), (right - 8, bottom + height / 2), color=MUTED, linestyle="--"
    )
    axes.text(left + 1.5, (top + middle) / 2, f"cycles 1 to {sizes['n_cycles']}", va="center", fontsize=SMALL)


def budget(axes: Axes, results: Results) -> None:
    """Core L0 as measured, and what it leaves of k, per cycle."""
    k, rows = results.summary["sizes"]["k"], results.summary["cycles"]
    at, core = [row["cycle"] for row in rows], [row["L0"]["core"] for row in rows]
    left_over = [max(k - value, 0) for value in core]
    axes.bar(at, core, color=CORE, width=0.8)
    axes.bar(at, left_over, bottom=core, color=FREE, width=0.8)
    axes.axhline(k, color=INK, linewidth=1, linestyle="--")
    for t, value, free in zip(at, core, left_over):
        if value > 0.08 * k:
            axes.text(
                t,
                value / 2,
                f"{value:.0f}",
                ha="center",
                va="center",
                fontsize=SMALL,
                color="white",
                fontweight="bold",
            )
        if free > 0.08 * k:
            axes.text(t, value + free / 2, f"{free:.0f}", ha="center", va="center", fontsize=SMALL)
    top = max(k, *core)
    axes.set_ylim(0, 1.32 * top)
    axes.text(at[0] - 0.4, k + 0.02 * top, f"k = {k}", va="bottom", fontsize=SMALL)
    axes.legend(
        handles=[axes.containers[1], axes.containers[0]],
        labels=["left for free latents", "core, measured"],
        loc="upper right",
        handlelength=1,
        borderaxespad=0.1,
        labelspacing=0.3,
    )
    axes.set_xticks(at)
    axes.grid(False)
    axes.set_xlabel("cycle")
    axes.set_ylabel("L0 (active latents per token)")


@styled
def schematic(results: Results) -> Figure:
    figure = new_figure(DOUBLE, 3.3)
    left, right = figure.subplots(1, 2, width_ratios=(1.9, 1))
    cycle(left, results)
    budget(right, results)
    left.set_title("The distillation cycle")
    right.set_title("The core's share of k moves")
    return finish(
        figure, results, "One distillation cycle, and what the core leaves of the L0 budget k in each cycle."
    )
