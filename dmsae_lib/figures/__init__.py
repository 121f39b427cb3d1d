"""Every figure, drawn from ``results/<config>/`` alone: summary.json and the files beside it, never runs.

Each function takes :class:`~dmsae_lib.report.results.Results` and returns a matplotlib Figure whose label is
its caption. What was not run is left out, or named in the empty panel; no number is made up.
"""

from pathlib import Path

from dmsae_lib.figures import distill, records, retrain, saebench, schematic, what_is_a_core
from dmsae_lib.figures.style import Plot, save
from dmsae_lib.report.results import Results
from dmsae_lib.store.atomic import write_text

FIGURES: dict[str, Plot] = {
    "1_schematic": Plot(schematic.schematic),
    "2_core_by_origin": Plot(distill.origins),
    "3_distilled_vs_random": Plot(retrain.controls),
    "4_saebench_vs_l0": Plot(saebench.scores, where=saebench.scored),
    "5_core_size_heatmap": Plot(retrain.heatmap),
    "6_core_share_of_k": Plot(distill.core_share),
    "7_training_curves": Plot(distill.training),
    "8_quality_vs_l0": Plot(retrain.quality),
    "9_base_model": Plot(records.base_model, where=records.base_model_record),
    "10_sizing": Plot(records.sizing, where=records.sizing_record),
    "11_paper_scale": Plot(saebench.paper_scale, where=saebench.reference),
    "12_saebench_differences": Plot(saebench.differences, where=lambda found: found.summary["differences"]),
    "13_reselected": Plot(distill.reselected, where=distill.with_placebos),
    "14_core_identity": Plot(distill.core_identity, where=lambda found: found.summary["identity"]),
    "15_does_a_mean_it": Plot(what_is_a_core.ablation, where=what_is_a_core.record),
    "16_duplicates": Plot(what_is_a_core.duplicates, where=what_is_a_core.record),
    "17_latents_or_subspace": Plot(what_is_a_core.latents_or_subspace, where=what_is_a_core.agreements),
    "18_open_competition": Plot(what_is_a_core.competition, where=what_is_a_core.record),
}


def draw_all(results_folder: Path, figures_folder: Path) -> list[Path]:
    """Draw every figure as PNG and SVG, with a README of captions; returns the PNG paths.

    The same results give the same bytes. Raises UserError where the results are missing or broken.
    """
    results, figures_folder = Results(results_folder), Path(figures_folder)
    page = [
        f"# Figures of `{results.summary['config']}`",
        f"Drawn by `make figures` from results whose summary.json has sha256 `{results.hash}`.",
    ]
    drawn = []
    for name, plot in FIGURES.items():
        if figure := plot(results):
            save(figure, figures_folder, name, results)
            drawn.append(figures_folder / f"{name}.png")
            page += [f"![{name}]({name}.png)", f"**{name}.** {figure.get_label()}"]
    write_text(figures_folder / "README.md", "\n\n".join(page) + "\n")
    return drawn
