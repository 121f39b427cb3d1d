"""Draws all that has the house style: every figure, one as a notebook shows it, and a notebook's own plot."""

import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from dmsae_lib.figures import FIGURES, draw_all
from dmsae_lib.figures.house_style import house_style
from dmsae_lib.report.results import Results


def draw_everything(results: Path, folder: Path) -> list[Path]:
    paths = draw_all(results, folder)
    (folder / "cell.png").write_bytes(FIGURES["1_schematic"](Results(results))._repr_png_())
    with matplotlib.rc_context():
        house_style()  # as every notebook does before its own plots
        figure, axes = plt.subplots(figsize=(5, 2.4))
        axes.plot([1, 2], [1, -3], label="text")
        axes.legend()
        axes.set(xlabel="x", title="title")
        figure.savefig(folder / "notebook.png", metadata={"Software": None})
        plt.close(figure)
    return paths


if __name__ == "__main__":
    assert matplotlib.rcParams["text.usetex"]  # the user's matplotlibrc is read
    draw_everything(Path(sys.argv[1]), Path(sys.argv[2]))
