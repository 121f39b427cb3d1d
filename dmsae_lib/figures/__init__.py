"""Every figure, drawn from ``results/<config>/`` alone: summary.json and the files beside it, never runs.

Each function takes :class:`~dmsae_lib.report.results.Results` and returns a matplotlib Figure whose label is
its caption. What was not run is left out, or named in the empty panel; no number is made up.
"""

from pathlib import Path

from dmsae_lib.figures import distill, records, retrain, saebench, schematic, what_is_a_core
from dmsae_lib.figures.style import Plot, save
from dmsae_lib.report.results import Results
from dmsae_lib.store.atomic import write_text


def always(results: Results) -> bool:
    return True


FIGURES: dict[str, Plot] = {
    "1_schematic": Plot(schematic.schematic, main_chain=always),
    "2_core_by_origin": Plot(distill.origins, main_chain=always),
    "3_distilled_vs_random": Plot(retrain.controls, where=retrain.controlled),
    "4_saebench_vs_l0": Plot(saebench.scores, where=saebench.scored, main_chain=saebench.of_main_chain),
    "5_coverage": Plot(retrain.coverage, where=lambda found: found.summary["heatmap"], main_chain=always),
    "6_chains": Plot(distill.chains),
    "7_training_curves": Plot(distill.training, main_chain=always),
    "8_quality_vs_l0": Plot(retrain.quality),
    "9_language_models": Plot(records.base_model, where=records.base_model_record, main_chain=always),
    "10_sizing": Plot(records.sizing, where=records.sizing_record),
    "12_saebench_differences": Plot(saebench.differences, saebench.others, saebench.of_main_chain),
    "13_reselected": Plot(distill.reselected, where=distill.with_placebos),
    "14_core_identity": Plot(distill.core_identity, where=lambda found: found.summary["identity"]),
    "15_does_a_mean_it": Plot(what_is_a_core.ablation, where=what_is_a_core.record),
    "16_duplicates": Plot(what_is_a_core.duplicates, where=what_is_a_core.record),
    "17_latents_or_subspace": Plot(what_is_a_core.latents_or_subspace, where=what_is_a_core.agreements),
    "18_open_competition": Plot(what_is_a_core.competition, where=what_is_a_core.record),
}


def repeats_default(results: Results) -> bool:
    """Whether the main chain has the settings of the default run's, which is published beside it."""
    default = results.folder.parent / "default"
    if results.summary["config"] == "default" or not (default / "summary.json").is_file():
        return False
    mine, theirs = (
        (found["inputs"]["model"], found["inputs"]["seed"], found["sizes"])
        for found in (results.summary, Results(default).summary)
    )
    return mine == theirs


def draw_all(results_folder: Path, figures_folder: Path) -> list[Path]:
    """Draw every figure as PNG and SVG, with a README of captions; returns the PNG paths.

    The same results give the same bytes. What shows the main chain alone is left out where the default run
    shows that. Raises UserError where the results are missing or broken.
    """
    results, figures_folder = Results(results_folder), Path(figures_folder)
    page = [
        f"# Figures of `{results.summary['config']}`",
        f"Drawn by `make figures` from results whose summary.json has sha256 `{results.hash}`.",
    ]
    drawn, again = [], repeats_default(results)
    if again:
        page.append(
            "What shows the main chain alone is left out: see [those of `default`](../default/README.md)."
        )
    for name, plot in FIGURES.items():
        if again and plot.main_chain(results):
            continue
        if figure := plot(results):
            save(figure, figures_folder, name, results)
            drawn.append(figures_folder / f"{name}.png")
            page += [f"![{name}]({name}.png)", f"**{name}.** {figure.get_label()}"]
    write_text(figures_folder / "README.md", "\n\n".join(page) + "\n")
    return drawn
