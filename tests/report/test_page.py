"""The pages' numbers are those of results/, whatever the run; and the published pages are today's."""

import itertools
import re
import shutil
from itertools import combinations
from pathlib import Path
from statistics import fmean

import pytest
from builders import asked, factory

from dmsae_lib.config.sections import CONTROLS, UNFROZEN, Chain
from dmsae_lib.report.equal_l0 import advantage, baseline_at
from dmsae_lib.report.page import (
    BEGIN,
    END,
    IN_README,
    published_page,
    results_page,
    update_readme,
    verdict_table,
)
from dmsae_lib.report.regime import core_by_rate
from dmsae_lib.report.summary import summarise
from dmsae_lib.report.verdicts import t_interval
from dmsae_lib.store.artifacts import repository_root

ROOT = repository_root(Path(__file__).parent)
PUBLISHED = sorted(path.parent for path in (ROOT / "results").glob("*/summary.json"))


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_the_page_is_what_the_published_results_give(folder):
    written = (folder / "README.md").read_text(encoding="utf-8")
    assert written == published_page(folder, folder.name, ROOT), "run `make figures`"


def test_the_verdicts_of_the_readme_are_the_published_ones(tmp_path):
    for name in itertools.chain(*IN_README.values()):
        if (ROOT / "results" / name).is_dir():
            shutil.copytree(ROOT / "results" / name, tmp_path / "results" / name)
    shutil.copy(ROOT / "README.md", tmp_path)
    update_readme(tmp_path)
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text(), "run `make figures`"


EQUAL_L0 = {"core_sparsity": "batchtopk", "core_decoder_init": "encoder"}
EXEMPT = {"core_sparsity": "relu", "core_decoder_init": "random"}
ARMS = ["none", "distilled", *CONTROLS, *UNFROZEN]
MADE = {"hardware": {"cores": 2, "cpu": "a CPU"}, "seconds": {"train": 60.0, "saebench_suite": 120.0}}
CHAINS = ["main", "seed1", "seed2"]


def summary_of(root, chains, seeds, controls, arms=("none", "distilled")):
    config = factory.config(cycles=2, ks=(64, 96), seeds=seeds, controls=controls)
    changes = {
        "training": config.training.model_copy(update=EQUAL_L0),
        "distill": config.distill.model_copy(update={"chains": chains}),
        "retrain": config.retrain.model_copy(update={"arms": list(arms)}),
    }
    return summarise(factory.build_run(root, config.model_copy(update=changes)))


@pytest.fixture(scope="module")
def one_chain(tmp_path_factory):
    """Three training seeds, one draw of two controls; a chain with the paper's core beside it."""
    controls = {"random": 1, "pca": 1, "longer_fresh": 1}
    return summary_of(tmp_path_factory.mktemp("one"), [Chain(name="relu", **EXEMPT)], (0, 1, 2), controls)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Three chains with every arm, and one with the paper's core, whose SAEs lie far from the others."""
    chains = [Chain(name=name, seed=n, retrain=ARMS) for n, name in enumerate(CHAINS) if n]
    chains.append(Chain(name="relu", retrain=["distilled"], **EXEMPT))
    found = summary_of(tmp_path_factory.mktemp("several"), chains, (0,), {}, ARMS)
    for row in found["retrain"]:
        row |= {"loss_increase": 9.0} if row["chain"] == "relu" else {}
    like = {"size": 9, "cosine_above": 0.1, "span": 0.5, "span_chance": 0.25, "activation_above": None}
    found["identity"] = [
        {"a": a, "b": b, "kind": kind, "cosine": cosine, "activation": activation} | like
        for a, b in combinations(CHAINS, 2)
        for kind, cosine, activation in (("cores", 0.5, 0.6), ("plain", 0.4, 0.6), ("random", 0.2, None))
    ]
    return found


def table(page, first):
    """The head that begins with ``first`` and the rows below it, as lists of cells; every row fills its
    head."""
    lines = page.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[start : lines.index("", start)]]
    assert {len(row) for row in rows} == {len(rows[0])}
    return [[cell.strip() for cell in row] for row in (rows[0], *rows[2:])]


def test_every_table_is_well_formed_and_has_a_heading(one_chain, several):
    for summary, n in ((one_chain, 8), (several, 9)):
        page = results_page("x", summary, MADE)
        lines = page.split("\n")
        heads = [line for before, line in zip(lines, lines[1:]) if not before and line.startswith("| ")]
        assert len(heads) >= n and all(len(table(page, head.split(" | ")[0][2:])) > 1 for head in heads)
        assert page.count("\n## ") >= len(heads) and page.endswith(".\n")
        assert not re.search(r"\b(None|nan|Undefined)\b|\n\n\n|{[{%]", page)
    assert "1.0 min in all, and 2.0 min for `make saebench`" in " ".join(page.split())


def test_retraining_keeps_kinds_of_core_apart(several):
    head, *rows = table(results_page("x", several, MADE), "k")
    found = {(row[1].removesuffix(" (unbound)"), int(row[0])): dict(zip(head, row)) for row in rows}
    mine = [
        row
        for row in several["retrain"]
        if (row["arm"], row["k"]) == ("distilled", 64) and row["chain"] in CHAINS
    ]
    cells = found["DMSAE (equal-L0 core)", 64]
    columns = {"loss increase": "loss_increase", "loss recovered, zero ablation": "loss_recovered"}
    for name, key in (columns | {"mean ablation": "loss_recovered_mean"}).items():
        assert cells[name] == f"{fmean(row[key] for row in mine):.4f}"
    assert cells["n"] == "3" and len(found) == 6
    assert found["DMSAE (ReLU core)", 64]["loss increase"] == "9.0000"
    chains = [row for row in several["retrain"] if row["chain"] in CHAINS]
    gains = advantage(chains, "distilled", 64, "loss_increase").values()
    (low, high), gain = t_interval(gains), fmean(gains)
    assert cells["minus baseline"] == f"{gain:+.4f} [{low:+.4f}, {high:+.4f}]" and len(gains) == 3
    (relu,) = (row for row in several["retrain"] if (row["chain"], row["k"]) == ("relu", 64))
    base = baseline_at(chains, "main", 0, relu["L0"]["total"], "loss_increase")  # the chain of its seed
    assert found["DMSAE (ReLU core)", 64]["minus baseline"] == f"{9 - base:+.4f}" and not relu["unbound"]
    assert found["Matryoshka baseline", 64]["minus baseline"] == "-"


def test_controls_are_compared_at_measured_l0_over_chains(several):
    page = results_page("x", several, MADE)
    head, *rows = table(page, "core")
    found = {row[0]: dict(zip(head, row)) for row in rows}
    mine = [row for row in several["retrain"] if row["chain"] in CHAINS]
    gains = list(advantage(mine, "pca", 64, "loss_increase").values())
    low, high = t_interval(gains)
    assert fmean(gains) == pytest.approx(factory.EFFECT["pca"], abs=1e-5) and len(gains) == 3
    shown = {name: cells["minus baseline at measured L0"] for name, cells in found.items()}
    assert shown["principal components"] == f"{fmean(gains):+.4f} [{low:+.4f}, {high:+.4f}]"
    assert shown["Matryoshka baseline"] == "-" and len(found) == len(ARMS)
    assert found["principal components"]["rank"] == "30.0" and found["warm start, unfrozen"]["rank"] == "-"
    assert "95 % t intervals over n distillation chains" in " ".join(page.split())


def test_one_chain_is_shown_over_its_training_seeds(one_chain):
    page = results_page("x", one_chain, MADE)
    head, *rows = table(page, "core")
    assert {row[0] for row in rows} == {
        "Matryoshka baseline",
        "DMSAE (equal-L0 core)",
        "random core",
        "principal components",
        "baseline, 3x tokens, fresh",
    }
    assert dict(zip(head, rows[1]))["n"] == "3" and dict(zip(head, rows[2]))["n"] == "1"
    assert "over n training seeds (one distilled core)" in page
    assert [row[0] for row in table(page, "chain")[1:]] == ["main", "relu"] and "## Identity" not in page
    for name, row in one_chain["reviewers"].items():
        assert f"- *{name}, {row['question']}* {row['answer']}" in page


def test_verdicts_of_the_page_and_of_the_readme(one_chain, several):
    for summary, unit in ((one_chain, "1 chain"), (several, "3 chains")):
        head, *rows = table(results_page("x", summary, MADE), "claim")
        short, *lines = table(verdict_table({"toy": [summary]}) + "\n", "claim")
        for row, line, (name, claim) in zip(rows, lines, summary["claims"].items(), strict=True):
            assert row[1] == f"**{claim['verdict']}**" and line[2].startswith(f"{row[1]}: ")
            assert row[0] == f"{name}: {claim['claim']}" and line[0] == f"{name}. {claim['claim']}"
            value, interval = claim["value"], claim["interval"] or []
            numbers = [f"{number:+.3f}" for number in ([] if value is None else [value, *interval])]
            assert re.findall(r"[+-]\d+\.\d+", line[2]) == numbers
        assert short == ["claim", "measure", "toy"] and unit in lines[0][2].split(", ")[-1]
    assert "1 seed of" in lines[2][2]  # C3: one chain alone was scored
    models = {"real": [one_chain], "toy": [several | {"config": "wide"}, one_chain]}
    _, *lines = table(verdict_table(models) + "\n", "claim")
    # each claim, for each model, from where n is largest
    runs = [[re.search(r"\[([\w-]+)\]\(", cell)[1] for cell in line[2:]] for line in lines]
    assert [run for run, _ in runs] == [one_chain["config"]] * 7
    assert [run for _, run in runs] == ["wide", "wide", one_chain["config"], *["wide"] * 4]
    assert "3 seeds of" in lines[2][2]


def test_the_readme_gets_the_verdicts_between_its_markers_and_nothing_else(tmp_path):
    run = factory.build_run(tmp_path, factory.config(cycles=2, ks=(64, 96)), scored=False)
    default = factory.publish(run).rename(tmp_path / "results" / "default")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter {END}\n")
    update_readme(tmp_path)
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n\n| claim |") and text.endswith(f"\n\n{END}\nafter {END}\n")
    assert "old" not in text and text.count("\n| C") == 7
    for content in ("no markers", text):
        readme.write_text(content)
        update_readme(tmp_path)
        assert readme.read_text() == content
    default.rename(tmp_path / "results" / "another")
    readme.write_text(f"{BEGIN}{END}")
    update_readme(tmp_path)  # nothing that it is about is published
    assert readme.read_text() == f"{BEGIN}{END}"


def test_cycles_chains_and_identity(several):
    page = results_page("x", several, MADE)
    head, *rows = table(page, "cycle")
    for row, cycle in zip(rows, several["cycles"], strict=True):
        cells, placebo = dict(zip(head, row)), cycle["placebos"].get("random_directions")
        assert cells["kept"] == str(cycle["kept"])
        assert cells["loss increase"] == f"{cycle['loss_increase']['full']:.4f}"
        assert cells["placebo kept: random directions"] == (str(placebo["kept"]) if placebo else "-")
    head, *rows = table(page, "chain")
    # the last one's cycle 0 is the main chain's
    more = {"main": (0, 0, 0), "seed1": (1, 1, 1), "seed2": (2, 2, 2), "relu": (0, 3, 3)}
    for row, (name, sizes), seed in zip(rows, more.items(), "0120", strict=True):
        core = "ReLU" if name == "relu" else "equal-L0"
        grown = " ".join(str(size + extra) for size, extra in zip(factory.SIZES, sizes))
        assert row[:4] == [name, core, seed, grown]
    head, *rows = table(page, "of two chains")
    assert [row[1] for row in rows] == ["0.500", "0.400", "0.200"] and rows[2][3] == "-"
    assert "over 3 pairs of chains" in page.replace("\n", " ")


def test_what_the_core_adds_at_each_rate(one_chain):
    rows = [
        {"lr": lr, "with_core": core, "seed": seed, "rare": 0.2 + 0.1 * core}
        | {"loss_increase": loss + 0.001 * seed * (1 + core)}
        for lr, losses in ((0.1, (0.5, 0.4)), (0.2, (0.3, 0.45)))
        for core, loss in zip((False, True), losses)
        for seed in (0, 1)
    ]
    sweep = {"configured": 0.1, "chosen": None, "rows": rows, "core": core_by_rate(rows)}
    page = results_page("x", one_chain, MADE, sweep=sweep)
    assert "Rate of all runs: 0.1; by notebook 09's rule: none." in page.replace("\n", " ")
    head, *found = table(page, "rate without core")
    assert [row[:4] for row in found] == [
        ["0.1", "0.1", "0.5005", "0.4010"],
        ["0.2", "0.2", "0.3005", "0.4510"],
        ["0.2", "0.1", "0.3005", "0.4010"],
    ]
    assert found[2][4].startswith("+0.1005 [") and found[2][5:] == ["0.20", "0.30"]


def test_every_loss_of_the_one_model_is_told_from_the_others(one_chain):
    kinds = ("model", "trigram", "unigram")
    base = {"nats_per_token": dict.fromkeys(kinds, 3.9), "bits_per_byte": dict.fromkeys(kinds, 1.7)}
    page = results_page("x", one_chain, MADE, base).replace("\n", " ")
    assert "model 3.90 (1.70), 3-gram" in page
    assert f"increases are counted is {factory.CLEAN:.2f}: on the first tokens of today's" in page
    assert "sae_bench's core eval" not in page  # this run has no such number
    rows = [row | {"saebench": {"ce_loss_without_sae": 4.2}} for row in one_chain["retrain"]]
    page = results_page("x", one_chain | {"retrain": rows}, MADE, base)
    assert "core eval gives 4.20, since it counts BOS" in page
    assert "embedded model" not in results_page("x", one_chain, MADE)


def test_another_model_is_set_beside_the_embedded_one_by_bytes_of_text(one_chain):
    more = {
        "bits_per_byte": 1.32,
        "dtype": "bfloat16",
        "bfloat16_loss": -0.0026,
        "weights": "4-bit, dequantised",
    }
    summary = one_chain | {"language_model": one_chain["language_model"] | more}
    base = {"bits_per_byte": {"model": 1.66, "trigram": 1.8, "unigram": 3.26}}
    page = results_page("x", summary, MADE, beside=base).replace("\n", " ")
    assert f"(its weights are 4-bit, dequantised) loses {factory.CLEAN:.2f} nats per token" in page
    assert "1.32 bits per byte; on text of the same kind the embedded model takes 1.66" in page
    assert (
        "3-gram with back-off 1.80, a unigram 3.26. It computed in bfloat16" in page
        and "-0.0026 nats" in page
    )
    plain = {name: None for name in more} | {"bits_per_byte": 1.32}
    summary = one_chain | {"language_model": one_chain["language_model"] | plain}
    page = results_page("x", summary, MADE)
    assert "1.32 bits per byte." in page and "weights" not in page.partition("## Claims")[0]
    assert "bfloat16" not in page


def test_gates_that_are_not_met_say_so(one_chain):
    gates = [
        {"gate": "k / d_in", "value": 0.5, "bound": 0.25, "ok": False},
        {"gate": "share", "value": 0.7, "bound": None, "ok": True},
    ]
    head, *rows = table(results_page("x", one_chain | {"regime": gates}, MADE), "gate")
    assert rows == [["k / d_in", "0.500", "< 0.25, **not met**"], ["share", "0.700", "-"]]


def test_what_notebook_10_found_has_a_section(several):
    found = asked.record()
    page = results_page("x", several, MADE, asked=found)
    assert not re.search(r"\b(None|nan|Undefined)\b|\n\n\n|{[{%]", page) and "## What is a core?" in page
    head, *rows = table(page, "score")  # of cycle 0
    first = found["effects"][0]
    assert [row[1] for row in rows] == [str(entry["size"]) for entry in first["sets"].values()]
    assert [row[4] for row in rows] == [f"{first['kept'][name]:.3f}" for name in first["sets"]]
    head, *rows = table(page, "rows")
    assert [row[:2] for row in rows] == [
        ["cores", "0.500"],
        ["turned", "0.400"],
        ["plain", "0.300"],
        ["random", "0.200"],
    ]
    assert rows[3][3] == "-"
    head, *rows = table(page.partition("## What is a core?")[2], "core")
    assert len(rows) == len(found["competition"]["rows"])
    pca = next(row for row in rows if row[0] == "principal components")
    (known,) = (row for row in found["competition"]["rows"] if row["arm"] == "pca")
    value, interval = (known["loss_increase_over_baseline"][key] for key in ("value", "interval"))
    assert pca[5] == f"{value:+.4f} [{interval[0]:+.4f}, {interval[1]:+.4f}]"
    assert "Not trained when this was written: 1 SAEs." in page
    assert "## What is a core?" not in results_page("x", several, MADE)
