"""Every figure, drawn from ``results/<config>/`` alone: summary.json and the CSV files beside it, never from
runs.

Each function takes :class:`~dmsae_lib.report.results.Results` and returns a matplotlib Figure whose label is
its caption. What was not run is left out, or named in the empty panel; no number is made up.
"""

import json
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from dmsae_lib.figures.distill import core_identity, core_share, heatmap, origins, reselected, training
from dmsae_lib.figures.house_style import SMALL
from dmsae_lib.figures.retrain import controls, quality, scores
from dmsae_lib.figures.saebench import differences, paper_scale
from dmsae_lib.figures.schematic import schematic
from dmsae_lib.figures.sizing import sizing
from dmsae_lib.figures.style import SINGLE, finish, new_figure, save, styled
from dmsae_lib.report.results import Results
from dmsae_lib.report.series import ARMS
from dmsae_lib.store.atomic import write_text


@styled
def base_model(results: Results) -> Figure | None:
    """Held-out loss of the embedded model beside n-gram references; None where its record is not
    published."""
    path = results.folder.parent / "base_model" / "base_model.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    names = {"unigram": "unigram", "trigram": "3-gram with back-off", "model": "embedded model"}
    figure = new_figure(SINGLE, 1.7)
    axes = figure.subplots()
    for y, key in enumerate(names):
        nats = record["nats_per_token"][key]
        axes.barh(y, nats, color=ARMS["none"][1] if key == "model" else "#b0b0b0", height=0.7)
        axes.annotate(
            f"{nats:.2f}", (nats, y), (3, 0), textcoords="offset points", va="center", fontsize=SMALL
        )
    bits = record["bits_per_byte"]
    axes.set_yticks(range(len(names)), [f"{name}\n{bits[key]:.2f} bits/byte" for key, name in names.items()])
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel("held-out loss (nats per token)")
    axes.set_ylabel("predictor")
    return finish(
        figure,
        results,
        "Held-out loss of the embedded language model beside two references with the same tokenizer.",
    )


FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    "1_schematic": schematic,
    "2_core_by_origin": origins,
    "3_distilled_vs_random": controls,
    "4_saebench_vs_l0": scores,
    "5_core_size_heatmap": heatmap,
    "6_core_share_of_k": core_share,
    "7_training_curves": training,
    "8_quality_vs_l0": quality,
    "9_base_model": base_model,
    "10_sizing": sizing,
    "11_paper_scale": paper_scale,
    "12_saebench_differences": differences,
    "13_reselected": reselected,
    "14_core_identity": core_identity,
}


def draw_all(results_folder: Path, figures_folder: Path) -> list[Path]:
    """Draw every figure as PNG and SVG, with a README of captions; returns the PNG paths.

    The same results give the same bytes. Raises UserError where the results are missing or broken.
    """
    results, figures_folder = Results(results_folder), Path(figures_folder)
    page = [
        f"# Figures of `{results.summary['config']}`",
        "",
        f"Drawn by `make figures` from results whose summary.json has sha256 `{results.hash}`.",
        "",
    ]
    drawn = []
    for name, draw in FIGURES.items():
        if figure := draw(results):
            save(figure, figures_folder, name, results)
            drawn.append(figures_folder / f"{name}.png")
            page += [f"![{name}]({name}.png)", "", f"**{name}.** {figure.get_label()}", ""]
    write_text(figures_folder / "README.md", "\n".join(page))
    return drawn
