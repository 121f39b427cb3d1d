"""The settings of matplotlib under which every figure and every notebook's plot is drawn, whatever
matplotlibrc there is."""

import contextlib
from collections.abc import Iterator

import matplotlib

DPI = 200
INK, MUTED = "#222222", "#5f5f5f"
SMALL = 7  # points; nothing is smaller
OTHERS = ("#333333", "#9a4c4c", "#8a6d3b", "#6b4c9a", "#9a9a9a")  # of what is no arm, as arms have their own


def house_style() -> None:
    """Make matplotlib's own defaults and then the house's the settings of this process: nothing of the user's
    is left."""
    matplotlib.rcdefaults()
    matplotlib.rc("font", family="DejaVu Sans", size=8)
    matplotlib.rc("text", color=INK)
    matplotlib.rc("axes", titlesize=8, labelsize=8, titlelocation="left", edgecolor=MUTED, labelcolor=INK)
    matplotlib.rc("axes", grid=True, axisbelow=True)
    matplotlib.rc("axes", prop_cycle=matplotlib.cycler(color=OTHERS))
    matplotlib.rc("axes.spines", top=False, right=False)
    matplotlib.rc(("xtick", "ytick"), labelsize=SMALL, color=INK)
    matplotlib.rc("grid", color="#e4e4e4", linewidth=0.6)
    matplotlib.rc("lines", linewidth=1.3, markersize=5.5)
    matplotlib.rc("legend", fontsize=SMALL, frameon=False)
    matplotlib.rc("figure", facecolor="white")
    matplotlib.rc("savefig", dpi=DPI)
    matplotlib.rc("svg", hashsalt="dmsae", fonttype="path")  # the same bytes every time


@contextlib.contextmanager
def in_house_style() -> Iterator[None]:
    """:func:`house_style` for the block alone."""
    with matplotlib.rc_context():
        house_style()
        yield
