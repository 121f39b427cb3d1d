"""What each figure shows, against the numbers of the summary that it is drawn from."""

import shutil
from itertools import groupby
from statistics import fmean

import pytest
from builders import asked, factory
from builders.published import REPLICATES, identity, published

from dmsae_lib.config.sections import CONTROLS
from dmsae_lib.figures import FIGURES, draw_all, style
from dmsae_lib.report.equal_l0 import baseline_at
from dmsae_lib.report.results import Results
from dmsae_lib.report.series import ARMS, KINDS, OTHER_KINDS, baselines, kinds, lines, units
from dmsae_lib.report.verdicts import t_interval
from dmsae_lib.store.artifacts import UserError

OTHER = OTHER_KINDS[0]  # colour and marker of the ReLU chains
METRICS = ("loss_increase", "fvu")


def points(axes, marker):
    """(x, y) of the single points with a marker."""
    single = [line for line in axes.lines if len(line.get_xdata()) == 1 and line.get_marker() == marker]
    return sorted((line.get_xdata()[0], line.get_ydata()[0]) for line in single)


def mean(rows, value, **wanted):
    """Mean over chains of a value of the retrain rows; each has one training seed."""
    return fmean(value(row) for row in rows if all(row[key] == item for key, item in wanted.items()))


def of_replicates(results):
    return [row for row in results.summary["retrain"] if row["chain"] in REPLICATES]


def legend_of(figure):
    return {text.get_text() for text in figure.legends[0].get_texts()}


@pytest.fixture
def apart(several):
    """Results in which the ReLU chains lie far from the others, so that no mean can hide them."""
    found = Results(several)
    for row in found.summary["retrain"]:
        if row["chain"].startswith("relu"):
            row |= {"loss_increase": 9.0, "fvu": 5.0, "unbound": row["k"] == 64}
    return found


def test_error_bars_say_what_varied(full, several):
    """Seeds where there is one chain, of which controls have fewer; else chains."""
    seeds, chains = (
        FIGURES["3_distilled_vs_random"](Results(folder)).get_label() for folder in (full, several)
    )
    assert "95 % t interval over up to 3 training seeds (one distilled core)" in seeds
    assert "hollow: unbound" in FIGURES["8_quality_vs_l0"](Results(full)).get_label()
    assert "95 % t interval over 3 distillation chains" in chains and "seeds" not in chains


def test_without_seeds_there_are_no_error_bars(smoke):
    caption = FIGURES["8_quality_vs_l0"](Results(smoke)).get_label().lower()
    assert "one sae each, no error bars" in caption and "interval" not in caption


def test_a_notebook_cell_shows_a_figure(smoke):
    assert FIGURES["2_core_by_origin"](Results(smoke))._repr_png_().startswith(b"\x89PNG")


def test_what_was_not_run_has_no_panel(smoke, full):
    assert FIGURES["4_saebench_vs_l0"](Results(smoke)) is None  # nothing was scored
    results = Results(full)
    for row in results.summary["retrain"]:
        for metric in ("probe_top1", "probe_top5"):
            (row["saebench"] or {}).pop(metric, None)
    titles = [axes.get_title(loc="left") for axes in FIGURES["4_saebench_vs_l0"](results).axes]
    assert titles == ["CE loss score\n↑ better", ""]


def test_no_distilled_arm_leaves_its_panel_out(tmp_path):
    config = factory.config(cycles=1, ks=(64,), seeds=(0,), controls={})
    config = config.model_copy(update={"retrain": config.retrain.model_copy(update={"arms": ["none"]})})
    results = Results(published(tmp_path, config, scored=False))
    assert len(FIGURES["6_chains"](results).axes) == 3
    left_out = [name.partition("_")[0] for name, draw in FIGURES.items() if not draw(results)]
    assert left_out == ["3", "4", "12", "14", "15", "16", "17", "18"]


def test_what_default_shows_is_not_published_again(full, tmp_path):
    """Where the run's main chain has default's settings; with another k all figures are its own."""
    for name in ("default", "other"):
        shutil.copytree(full, tmp_path / "results" / name)
    shutil.copytree(full.parent / "base_model", tmp_path / "results" / "base_model")
    drawn = [
        path.stem.partition("_")[0] for path in draw_all(tmp_path / "results/other", tmp_path / "figures")
    ]
    assert drawn == ["3", "6", "8", "10", "13"]
    assert "[those of `default`](../default/README.md)" in (tmp_path / "figures" / "README.md").read_text()
    shutil.rmtree(tmp_path / "results" / "default")
    another = published(tmp_path / "k", factory.config(cycles=1, ks=(64, 96), seeds=(0,), controls={}))
    shutil.copytree(another, tmp_path / "results" / "default")
    drawn = [
        path.stem.partition("_")[0] for path in draw_all(tmp_path / "results/other", tmp_path / "figures")
    ]
    assert drawn == [*"123456789", "10", "12", "13"]


def test_a_missing_table_is_named(full, tmp_path):
    copy = shutil.copytree(full, tmp_path / "copy")
    (copy / "history_cycles.csv").unlink()
    with pytest.raises(UserError, match="history_cycles.csv is missing.*`make publish`"):
        FIGURES["7_training_curves"](Results(copy))


def test_scores_are_means_above_and_judged_differences_below(full):
    results = Results(full)
    axes = FIGURES["4_saebench_vs_l0"](results).axes
    _, colour, marker = ARMS["distilled"]
    scored = [row for row in results.summary["retrain"] if row["arm"] == "distilled"]
    for above, below, metric in zip(axes[:3], axes[3:], ("ce_loss_score", "probe_top1", "probe_top5")):
        groups = groupby(sorted(scored, key=lambda row: row["k"]), lambda row: row["k"])
        means = [fmean(row["saebench"][metric] for row in of) for _, of in groups]
        assert [y for _, y in points(above, marker)] == pytest.approx(means)
        shown(
            below, [row for row in results.summary["differences"] if row["metric"] == metric], marker, colour
        )


def shown(axes, rows, marker, colour):
    """A panel has every row's value at its k, and its interval."""
    assert rows and points(axes, marker) == [(row["k"], row["value"]) for row in rows]
    bars = {
        tuple(line.get_ydata())
        for line in axes.lines
        if line.get_marker() == "_" and line.get_color() == colour
    }
    assert bars == {tuple(row["interval"]) for row in rows if row["interval"]}


def test_every_other_metric_has_an_axis_of_its_own(full):
    results = Results(full)
    axes = FIGURES["12_saebench_differences"](results).axes
    assert [one.get_title(loc="left") for one in axes] == ["explained variance\n↑ better"]
    rows = [row for row in results.summary["differences"] if row["metric"] == "explained_variance_legacy"]
    shown(axes[0], rows, ARMS["distilled"][2], ARMS["distilled"][1])


def test_differences_of_one_seed_claim_no_interval(several):
    figure = FIGURES["12_saebench_differences"](Results(several))
    caption = figure.get_label().lower()
    assert "one training seed, no error bars" in caption and "t interval" not in caption
    assert not [line for axes in figure.axes for line in axes.lines if line.get_marker() == "_"]


def test_an_interval_over_two_does_not_stretch_the_axis():
    axes = style.new_figure(style.SINGLE, 2).subplots()
    axes.plot([0, 1], [0, 1])
    tops = []
    for n in (2, 3):
        style.whisker(axes, 0.5, [-9, 9], n)
        axes.autoscale_view()
        tops.append(axes.get_ylim()[1])
    assert tops[0] < 2 and tops[1] > 9 and len(axes.lines) == 3


def test_arms_differ_in_colour_and_in_marker():
    looks = [look[1:] for look in ARMS.values()] + list(OTHER_KINDS)
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == len(looks)


def test_kinds_of_core_are_told_apart(several):
    summary = Results(several).summary
    main, relu = kinds(summary)
    assert (main.name, list(main.chains)) == (KINDS["batchtopk"], REPLICATES)
    assert (relu.name, list(relu.chains), (relu.colour, relu.marker)) == ("ReLU", ["relu0", "relu1"], OTHER)
    for kind in (main, relu):
        assert {row["chain"] for row in kind.rows} == set(kind.chains)
    unusual = {"core_bias_init": "match_frequency", "core_decoder_init": "encoder"}
    summary["chains"]["biases"] = summary["chains"]["relu0"] | unusual
    assert {kind.name: list(kind.chains) for kind in kinds(summary)} == {
        "equal-L0": REPLICATES,
        "ReLU": ["relu0", "relu1"],
        "ReLU, encoder decoder, biases by frequency": ["biases"],
    }


def test_a_chain_without_a_baseline_is_lent_that_of_its_seed(several):
    summary = Results(several).summary
    own = [row for row in summary["retrain"] if row["arm"] == "none"]
    summary["chains"]["relu9"] = summary["chains"]["relu0"] | {"seed": 9}  # a seed of which there is none
    found = baselines(summary)
    assert found[: len(own)] == own and {row["chain"] for row in found} == {*REPLICATES, "relu0", "relu1"}
    for chain, lender in (("relu0", "main"), ("relu1", "seed1")):
        lent = [row for row in found if row["chain"] == chain]
        assert lent == [row | {"chain": chain} for row in own if row["chain"] == lender] and lent


def test_a_line_is_an_arm_of_one_kind_of_core(apart):
    found = {label: rows for (label, *_), rows in lines(apart.summary)}
    assert {row["chain"] for row in found["DMSAE (equal-L0 core)"]} == set(REPLICATES)
    assert {row["chain"] for row in found["DMSAE (ReLU core)"]} == {"relu0", "relu1"} and len(found) == 11
    with_core = {label for (label, *_), _ in lines(apart.summary, wanted=lambda row: row["arm"] != "none")}
    assert found.keys() - with_core == {"Matryoshka baseline"}
    values, varied = units(found["principal components"], lambda row: row["fvu"])
    assert len(values) == 3 and varied == "distillation chain"


def test_quality_shows_means_over_replicates_and_relu_beside(apart):
    rows = of_replicates(apart)
    figure = FIGURES["8_quality_vs_l0"](apart)
    for axes, metric, far in zip(figure.axes[:2], METRICS, (9.0, 5.0)):
        for arm in ("none", "distilled"):
            values = (lambda row: row["L0"]["total"], lambda row, m=metric: row[m])
            expected = [tuple(mean(rows, value, arm=arm, k=k) for value in values) for k in (64, 96)]
            assert points(axes, ARMS[arm][2]) == [pytest.approx(pair) for pair in expected]
        assert not points(axes, ARMS["pca"][2])  # below alone
        assert [y for _, y in points(axes, OTHER[1])] == [far] * 2
        marks = [line for line in axes.lines if line.get_marker() == OTHER[1] and len(line.get_xdata()) == 1]
        # unbound at k = 64, not at 96
        assert [line.get_markerfacecolor() for line in marks] == ["white", OTHER[0]]
        assert [text.get_text() for text in axes.texts] == ["k = 64: the core\nalone exceeds k"]


def test_controls_of_one_k_are_in_figure_3_alone(full):
    results = Results(full)
    legend = legend_of(FIGURES["8_quality_vs_l0"](results))
    assert legend == {"Matryoshka baseline", "DMSAE (ReLU core)"}
    assert points(FIGURES["3_distilled_vs_random"](results).axes[0], ARMS["pca"][2])


def test_quality_is_compared_at_measured_l0(apart):
    """Chain i lies JITTER (i - 1) beyond the effect, the controls a tenth more."""
    above, _, below, _ = FIGURES["8_quality_vs_l0"](apart).axes
    gains = [y for _, y in points(below, ARMS["pca"][2])]
    assert gains == pytest.approx([factory.EFFECT["pca"]] * 2, abs=1e-6)
    # a ReLU chain has no baseline of its own, but that of its seed's chain; it is bound at k = 96 alone
    rows, lender = apart.summary["retrain"], {"relu0": "main", "relu1": "seed1"}
    relu = [
        row["loss_increase"]
        - baseline_at(rows, lender[row["chain"]], row["seed"], row["L0"]["total"], "loss_increase")
        for row in rows
        if row["chain"] in lender and row["k"] == 96
    ]
    assert [y for _, y in points(below, OTHER[1])] == pytest.approx([fmean(relu)]) and len(relu) == 2
    assert not points(below, ARMS["none"][2]) and above.get_yscale() == "log"


def test_controls_show_every_sae_of_the_replicates_with_ranks_and_intervals(apart):
    figure = FIGURES["3_distilled_vs_random"](apart)
    rows = [row for row in of_replicates(apart) if row["k"] == 64]
    for axes, metric in zip(figure.axes, METRICS):
        for arm in ("none", "distilled", *CONTROLS, "warm_start"):
            _, colour, marker = ARMS[arm]
            values = [row[metric] for row in rows if row["arm"] == arm]
            assert [x for x, _ in points(axes, marker)] == sorted(values) and len(values) == 3
            bars = [line for line in axes.lines if (line.get_marker(), line.get_color()) == ("|", colour)]
            expected = [interval] if (interval := t_interval(values)) else []
            assert [list(line.get_xdata()) for line in bars] == expected
        assert max(line.get_xdata()[0] for line in axes.lines) < 1  # no ReLU core among them
    shown = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    l0 = mean(rows, lambda row: row["L0"]["core"], arm="pca")
    assert f"principal components\nrank 30.0, L0 {l0:.1f} of 63.7" in shown
    assert "warm start, unfrozen\nno core, L0 63.7" in shown


def test_chains_have_a_line_each_and_a_mean_per_kind(several):
    results = Results(several)
    size, share, cost, after = FIGURES["6_chains"](results).axes
    course = {
        size: lambda row: row["core_out"],
        share: lambda row: row["core_share"],
        cost: lambda row: row["loss_increase"]["full"],
    }
    for kind in kinds(results.summary):
        for axes, value in course.items():
            drawn = [list(line.get_ydata()) for line in axes.lines if line.get_color() == kind.colour]
            each = [[value(row) for row in rows] for rows in kind.chains.values()]
            assert drawn == [*each, pytest.approx([fmean(values) for values in zip(*each)])]
        rows = [row for row in kind.rows if row["arm"] == "distilled"]
        shares = {k: mean(rows, lambda row: row["L0"]["core"] / row["k"], k=k) for k in (64, 96)}
        assert points(after, kind.marker) == [(k, pytest.approx(value)) for k, value in shares.items()]
    for axes in (share, after):
        assert {0.75, 1} <= {line.get_ydata()[0] for line in axes.lines if len(line.get_ydata())}


def test_coverage_has_a_line_per_arm_and_k(full):
    results = Results(full)
    (axes,) = FIGURES["5_coverage"](results).axes
    rows = results.summary["heatmap"]
    for arm in ("none", "distilled"):
        of_arm = [row for row in rows if row["arm"] == arm]
        expected = {
            tuple((100 * row["coverage"], row["size"]) for row in of_arm if row["k"] == k)
            for k in {row["k"] for row in rows}
        }
        lines = [line for line in axes.lines if line.get_color() == ARMS[arm][1]]
        assert {tuple(zip(line.get_xdata(), line.get_ydata())) for line in lines} == expected
    assert 100 * results.summary["sizes"]["coverage"] in {
        line.get_xdata()[0] for line in axes.lines if len(line.get_xdata())
    }


def test_training_shows_the_first_two_cycles_and_the_last(full):
    results = Results(full)
    left, right = FIGURES["7_training_curves"](results).axes
    for axes, column in ((left, "fvu"), (right, "L0_core")):
        for line, cycle in zip(axes.lines, (0, 1, 7)):
            rows = [row for row in results.table("history_cycles.csv") if float(row["cycle"]) == cycle]
            rows = [row for row in rows if float(row["tokens"]) > 0]
            assert list(line.get_ydata()) == [float(row[column]) for row in rows]
            assert line.get_label().startswith(f"cycle {cycle}, ")


def test_the_runs_own_model_stands_beside_the_embedded_one(full):
    results = Results(full)
    results.summary["language_model"]["bits_per_byte"] = 1.25
    (axes,) = FIGURES["9_language_models"](results).axes
    assert [bar.get_width() for bar in axes.patches] == [3.0, 2.2, 1.7, 1.25]
    results.summary["inputs"]["model"]["name"] = "wheeltext-4x128"
    assert len(FIGURES["9_language_models"](results).axes[0].patches) == 3


def test_reselection_shows_cores_placebos_and_uniform_selection(several):
    results = Results(several)
    (axes,) = FIGURES["13_reselected"](results).axes  # placebos run beside the main chain's kind alone
    named = {line.get_label(): line for line in axes.lines}
    chains = [rows[1:] for rows in kinds(results.summary)[0].chains.values()]
    expected = {
        "distilled core": lambda row: row["kept"] / row["core_in"],
        "placebo: random activations": lambda row: row["placebos"]["data_points"]["kept"] / row["core_in"],
        "uniform selection": lambda row: row["core_out"] / (row["core_in"] + factory.M_0),
    }
    for label, share in expected.items():
        assert list(named[label].get_xdata()) == [1, 2]
        assert list(named[label].get_ydata()) == pytest.approx(
            [fmean(map(share, rows)) for rows in zip(*chains)]
        )
    # a thin line per chain: the core, two kinds of placebo
    assert sum(line.get_linewidth() < 1 for line in axes.lines) == 3 * 3
    for chain in (results.summary, *results.summary["chains"].values()):
        for row in chain["cycles"]:
            row["placebos"] = {}
    assert FIGURES["13_reselected"](results) is None


def test_identity_shows_every_pair_and_the_chance_of_spans(several):
    axes = FIGURES["14_core_identity"](Results(several)).axes
    lanes = {"cores": "distilled", "plain": "none", "random": "random_directions"}
    for panel, metric in zip(axes, ("cosine", "activation", "span")):
        for y, (kind, arm) in enumerate(lanes.items()):
            values = [row[metric] for row in identity() if row["kind"] == kind and row[metric] is not None]
            drawn = [line for line in panel.lines if line.get_marker() == ARMS[arm][2]]
            assert [list(line.get_xdata()) for line in drawn] == ([pytest.approx(values)] if values else [])
            assert all(set(line.get_ydata()) == {y} for line in drawn)
    chance = [
        {line.get_xdata()[0] for line in panel.lines if line.get_color() == "#a0a0a0"} for panel in axes
    ]
    assert chance == [set(), set(), {0.3}]


def test_figure_2_is_about_the_main_chain(several):
    (axes,) = FIGURES["2_core_by_origin"](Results(several)).axes
    totals = [sum(bars[t].get_height() for bars in axes.containers) for t in range(3)]
    assert totals == factory.SIZES[:3]


def test_promised_and_measured_changes_are_the_candidates(several):
    """A point for each by A and by IG, on one scale, and what is kept alone in the last cycle."""
    *scatters, kept = FIGURES["15_does_a_mean_it"](Results(several)).axes
    found = asked.record()["effects"]
    for axes, row in zip(scatters, found, strict=True):
        for key, marker in (("promised", "s"), ("ig_promised", "o")):
            (line,) = [line for line in axes.lines if line.get_marker() == marker]
            for drawn, name in ((line.get_xdata(), key), (line.get_ydata(), "measured")):
                assert list(drawn) == pytest.approx([latent[name] for latent in row["latents"]])
        assert axes.get_xlim() == axes.get_ylim()
    values, last = [bar.get_width() for bar in kept.patches], found[-1]["kept"]
    keys = ("mean_abs", "ig_mean_abs", "frequency", "abs_mean", "ablation_by_context")
    assert values == pytest.approx([*(last[key] for key in keys), 2.0])  # the mean of the random draws


def test_competition_shows_share_loss_and_frequency_of_every_arm(several):
    share, loss, kept = FIGURES["18_open_competition"](Results(several)).axes
    rows = [row for row in asked.competition() if row["arm"] != "none"]
    for y, row in enumerate(rows):
        marker, over = ARMS[row["arm"]][2], row["loss_increase_over_baseline"]
        assert points(share, marker) == [(row["core_share"], y)] and points(loss, marker) == [
            (over["value"], y)
        ]
        assert points(kept, marker) == ([] if row["frequency"] is None else [(row["frequency"], y)])
        bars = [
            line for line in loss.lines if len(line.get_xdata()) == 2 and list(line.get_ydata()) == [y, y]
        ]
        assert [list(line.get_xdata()) for line in bars] == [over["interval"]]


def test_a_core_without_copies_beside_the_core_as_it_is(several):
    (axes,) = FIGURES["16_duplicates"](Results(several)).axes
    thick = {line.get_label(): list(line.get_ydata()) for line in axes.lines if line.get_linewidth() > 1}
    assert thick["as it is"] == [28, 38, 48] and thick["rank"] == [17.5] * 3
    assert thick["no two above .7"] == [20] * 3 and thick["no two above .9"] == [25] * 3


def test_matches_are_curves_of_every_pair_and_kind(several):
    axes = FIGURES["17_latents_or_subspace"](Results(several)).axes
    for panel, key, kinds_drawn in zip(axes, ("cosines", "activations", "angles"), (4, 3, 4)):
        thin = [line for line in panel.lines if line.get_linewidth() < 1]
        assert len(thin) == 3 * kinds_drawn, key  # three pairs of chains; random rows have no activations
    (cores,) = [line for line in axes[0].lines if line.get_label() == "distilled cores"]
    assert [cores.get_ydata()[at] for at in (0, 50, 100)] == pytest.approx([0.6, 0.5, 0.4])
