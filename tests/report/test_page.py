"""The README's numbers are those of results/, and every file it links to exists."""

import re
from itertools import combinations
from pathlib import Path
from statistics import fmean

import factory
import pytest

from dmsae_lib.config.sections import CONTROLS, UNFROZEN, Chain
from dmsae_lib.report.equal_l0 import advantage
from dmsae_lib.report.page import BEGIN, END, current_block, results_block
from dmsae_lib.report.regime import core_by_rate
from dmsae_lib.report.summary import summarise
from dmsae_lib.report.verdicts import t_interval
from dmsae_lib.store.artifacts import repository_root

ROOT = repository_root(Path(__file__).parent)
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_block_is_what_the_published_results_give():
    if not (ROOT / "results" / "default" / "summary.json").is_file():
        pytest.skip("results/default is not published in this tree")
    written = TEXT[TEXT.index(BEGIN) : TEXT.index(END) + len(END)]
    assert written == current_block(ROOT), "run `make publish`, or put the README's results block back"


def test_links_lead_somewhere():
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", TEXT) if not t.startswith("http")]
    if not (ROOT / "results" / "default").is_dir():
        targets = [t for t in targets if not t.startswith(("results/", "figures/"))]
    missing = [t for t in targets if not (ROOT / t).exists()]
    assert len(targets) >= 3 and not missing


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", TEXT, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"README names make {target}"


EQUAL_L0 = {"core_sparsity": "batchtopk", "core_decoder_init": "encoder"}
EXEMPT = {"core_sparsity": "relu", "core_decoder_init": "random"}
ARMS = ["none", "distilled", *CONTROLS, *UNFROZEN]
MADE = {"hardware": {"cores": 2, "cpu": "a CPU"}, "seconds": {"train": 60.0, "saebench_suite": 120.0}}
CHAINS = ["main", "seed1", "seed2"]


def summary_of(root, chains, seeds, controls, arms=("none", "distilled")):
    config = factory.config(cycles=2, ks=(64, 96), seeds=seeds, controls=controls)
    return summarise(
        factory.build_run(
            root,
            config.model_copy(
                update={
                    "training": config.training.model_copy(update=EQUAL_L0),
                    "distill": config.distill.model_copy(update={"chains": chains}),
                    "retrain": config.retrain.model_copy(update={"arms": list(arms)}),
                }
            ),
        )
    )


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    """One chain, three training seeds, one draw of two controls; a chain with the paper's core beside it."""
    controls = {"random": 1, "pca": 1, "longer_fresh": 1}
    return summary_of(tmp_path_factory.mktemp("default"), [Chain(name="relu", **EXEMPT)], (0, 1, 2), controls)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """Three chains with every arm, and one with the paper's core, whose SAEs lie far from the others."""
    chains = [Chain(name=name, seed=n, retrain=ARMS) for n, name in enumerate(CHAINS) if n]
    chains.append(Chain(name="relu", retrain=["distilled"], **EXEMPT))
    found = summary_of(tmp_path_factory.mktemp("extended"), chains, (0,), {}, ARMS)
    for row in found["retrain"]:
        row |= {"loss_increase": 9.0} if row["chain"] == "relu" else {}
    found["identity"] = [
        {
            "a": a,
            "b": b,
            "kind": kind,
            "size": 9,
            "cosine": cosine,
            "cosine_above": 0.1,
            "span": 0.5,
            "span_chance": 0.25,
            "activation": None if kind == "random" else 0.6,
            "activation_above": None,
        }
        for a, b in combinations(CHAINS, 2)
        for kind, cosine in (("cores", 0.5), ("plain", 0.4), ("random", 0.2))
    ]
    return found


def table(block, first):
    """The rows below the head that begins with ``first``, as lists of cells by the row's text; every row
    fills its head."""
    lines = block.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[start : lines.index("", start)]]
    assert {len(row) for row in rows} == {len(rows[0])}
    return [[cell.strip() for cell in row] for row in (rows[0], *rows[2:])]


def test_every_table_is_well_formed(default, extended):
    for block in (results_block(default, MADE, None), results_block(default, MADE, None, extended)):
        heads = [
            line
            for before, line in zip(block.split("\n"), block.split("\n")[1:])
            if not before and line.startswith("| ")
        ]
        assert len(heads) > 8 and all(len(table(block, head.split(" | ")[0][2:])) > 1 for head in heads)
        assert block.startswith(BEGIN) and block.endswith(END) and "None" not in block and "nan" not in block


def test_retraining_keeps_kinds_of_core_apart(default, extended):
    head, *rows = table(results_block(default, MADE, None, extended), "k")
    found = {(row[1].removesuffix(" (unbound)"), int(row[0])): dict(zip(head, row)) for row in rows}
    mine = [
        row
        for row in extended["retrain"]
        if (row["arm"], row["k"]) == ("distilled", 64) and row["chain"] in CHAINS
    ]
    cells = found["DMSAE (equal-L0 core)", 64]
    assert (
        cells["n"] == "3" and cells["loss increase"] == f"{fmean(row['loss_increase'] for row in mine):.4f}"
    )
    assert cells["loss recovered, zero ablation"] == f"{fmean(row['loss_recovered'] for row in mine):.4f}"
    assert cells["mean ablation"] == f"{fmean(row['loss_recovered_mean'] for row in mine):.4f}"
    assert found["DMSAE (ReLU core)", 64]["loss increase"] == "9.0000" and len(found) == 6


def test_controls_are_compared_at_measured_l0_over_chains(default, extended):
    block = results_block(default, MADE, None, extended)
    head, *rows = table(block, "core")
    found = {row[0]: dict(zip(head, row)) for row in rows}
    gains = list(
        advantage(
            [row for row in extended["retrain"] if row["chain"] in CHAINS], "pca", 64, "loss_increase"
        ).values()
    )
    low, high = t_interval(gains)
    assert fmean(gains) == pytest.approx(factory.EFFECT["pca"], abs=1e-5) and len(gains) == 3
    assert (
        found["principal components"]["minus baseline at measured L0"]
        == f"{fmean(gains):+.4f} [{low:+.4f}, {high:+.4f}]"
    )
    assert found["principal components"]["rank"] == "30.0" and found["warm start, unfrozen"]["rank"] == "-"
    assert found["Matryoshka baseline"]["minus baseline at measured L0"] == "-" and len(found) == len(ARMS)
    assert "95 % t intervals over n distillation chains" in block


def test_claims_of_the_extended_run_come_first_and_the_default_decides_c3_alone(default, extended):
    head, *claims = table(results_block(default, MADE, None, extended), "claim")
    assert [row[1] for row in claims] == [f"**{claim['verdict']}**" for claim in extended["claims"].values()]
    block = results_block(default, MADE, None, extended)
    own = block[block.index("The default run has") :]
    assert own.startswith("The default run has one distillation chain of its kind and can decide C3 alone:")
    assert table(own, "claim") == [
        ["claim", *default["claims"]],
        ["verdict", *(claim["verdict"] for claim in default["claims"].values())],
    ]


def test_cycles_chains_and_identity(default, extended):
    block = results_block(default, MADE, None, extended)
    head, *rows = table(block, "cycle")
    for row, cycle in zip(rows, default["cycles"], strict=True):
        cells = dict(zip(head, row))
        placebo = cycle["placebos"].get("random_directions")
        assert (
            cells["kept"] == str(cycle["kept"])
            and cells["loss increase"] == f"{cycle['loss_increase']['full']:.4f}"
        )
        assert cells["placebo kept: random directions"] == (str(placebo["kept"]) if placebo else "-")
    head, *rows = table(block, "chain")
    assert [row[:4] for row in rows] == [
        [
            name,
            "ReLU" if name == "relu" else "equal-L0",
            str(seed),
            " ".join(str(size + more) for size, more in zip(factory.SIZES, sizes)),
        ]
        for name, seed, sizes in (
            ("main", 0, (0, 0, 0)),
            ("seed1", 1, (1, 1, 1)),
            ("seed2", 2, (2, 2, 2)),
            ("relu", 0, (0, 3, 3)),
        )
    ]  # the last one's cycle 0 is the main chain's
    head, *rows = table(block, "of two chains")
    assert (
        [row[1] for row in rows] == ["0.500", "0.400", "0.200"]
        and rows[2][3] == "-"
        and "over 3 pairs of chains" in block
    )


def test_what_the_core_adds_at_each_rate(default):
    rows = [
        {
            "lr": lr,
            "with_core": core,
            "seed": seed,
            "loss_increase": loss + 0.001 * seed * (1 + core),
            "rare": 0.2 + 0.1 * core,
        }
        for lr, losses in ((0.1, (0.5, 0.4)), (0.2, (0.3, 0.45)))
        for core, loss in zip((False, True), losses)
        for seed in (0, 1)
    ]
    sweep = {"configured": 0.1, "chosen": None, "rows": rows, "core": core_by_rate(rows)}
    block = results_block(default, MADE, None, None, sweep)
    assert "rate of all runs 0.1, by notebook 09's rule none" in block
    head, *found = table(block, "rate without core")
    assert [row[:4] for row in found] == [
        ["0.1", "0.1", "0.5005", "0.4010"],
        ["0.2", "0.2", "0.3005", "0.4510"],
        ["0.2", "0.1", "0.3005", "0.4010"],
    ]
    assert found[2][4].startswith("+0.1005 [") and found[2][5:] == ["0.20", "0.30"]


def test_every_loss_of_the_one_model_is_told_from_the_others(default):
    base = {
        "nats_per_token": dict.fromkeys(("model", "trigram", "unigram"), 3.9),
        "bits_per_byte": dict.fromkeys(("model", "trigram", "unigram"), 1.7),
    }
    block = results_block(default, MADE, base)
    assert (
        "model 3.90 nats" in block
        and f"increases are counted is {factory.CLEAN:.2f}: on the first tokens of today's" in block
    )
    assert "sae_bench" not in block.partition("**The regime**")[0]  # this run has no such number
    rows = [row | {"saebench": {"ce_loss_without_sae": 4.2}} for row in default["retrain"]]
    assert "core eval gives 4.20, since it counts BOS" in results_block(
        default | {"retrain": rows}, MADE, base
    )


def test_gates_that_are_not_met_say_so(default):
    default = default | {
        "regime": [
            {"gate": "k / d_in", "value": 0.5, "bound": 0.25, "ok": False},
            {"gate": "share", "value": 0.7, "bound": None, "ok": True},
        ]
    }
    head, *rows = table(results_block(default, MADE, None), "gate")
    assert rows == [["k / d_in", "0.500", "< 0.25, **not met**"], ["share", "0.700", "-"]]


def test_without_an_extended_run_the_default_gives_every_table(default):
    block = results_block(default, MADE, None)
    head, *rows = table(block, "core")
    assert {row[0] for row in rows} == {
        "Matryoshka baseline",
        "DMSAE (equal-L0 core)",
        "random core",
        "principal components",
        "baseline, 3x tokens, fresh",
    }
    assert dict(zip(head, rows[1]))["n"] == "3" and dict(zip(head, rows[2]))["n"] == "1"
    assert "95 % t intervals over n training seeds (one distilled core)" in block and "extended" not in block
    assert [row[0] for row in table(block, "chain")[1:]] == ["main", "relu"] and "**Identity" not in block


def test_answers_about_chains_are_those_of_the_extended_run(default, extended):
    block = results_block(default, MADE, None, extended)
    for name, one in (
        ("R3", default),
        ("R4", default),
        ("R1", extended),
        ("R5", extended),
        ("R6", extended),
        ("R13", extended),
    ):
        assert f"- *{name}, {one['reviewers'][name]['question']}* {one['reviewers'][name]['answer']}" in block
