"""The settings of matplotlib under which every figure and every notebook's plot is drawn, whatever
matplotlibrc there is."""

import contextlib
from collections.abc import Iterator

import matplotlib

DPI = 200
INK, MUTED = "#222222", "#5f5f5f"
SMALL = 7  # points; nothing is smaller
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlelocation": "left",
    "lines.linewidth": 1.3,
    "lines.markersize": 5.5,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "savefig.dpi": DPI,
    "svg.hashsalt": "dmsae",
    "svg.fonttype": "path",
}


def house_style() -> None:
    """Make matplotlib's own defaults and then the house's the settings of this process: nothing of the user's
    is left."""
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(STYLE)


@contextlib.contextmanager
def in_house_style() -> Iterator[None]:
    """:func:`house_style` for the block alone."""
    with matplotlib.rc_context():
        house_style()
        yield
