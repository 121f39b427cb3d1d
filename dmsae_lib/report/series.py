"""What is compared: the arms and kinds of core by name and mark, and which of a summary's rows belong to
which."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from dmsae_lib.config import sections
from dmsae_lib.config.sections import CoreSettings
from dmsae_lib.report.equal_l0 import CHAIN, SEED, per_unit

Row = dict[str, Any]
Look = tuple[str, str, str | tuple[int, int, int]]  # label, colour, marker
SEEDS = "training seeds (one distilled core)"
PLURAL = {CHAIN: "distillation chains", SEED: SEEDS}
# The palettes of Okabe and Ito and of Tol, told apart by people with any kind of colour blindness; markers
# differ as well.
ARMS: dict[str, Look] = {
    "none": ("Matryoshka baseline", "#0072B2", "o"),
    "distilled": ("DMSAE ({kind} core)", "#D55E00", "s"),
    "random": ("random core", "#009E73", "^"),
    "random_outside": ("random, outside the core", "#117733", (4, 1, 0)),
    "most_frequent": ("most frequent core", "#E69F00", "P"),
    "random_directions": ("random directions", "#CC79A7", "D"),
    "data_points": ("random activations", "#56B4E9", "v"),
    "pca": ("principal components", "#332288", "X"),
    "rotated": ("rotated in its span", "#882255", "d"),
    "other_chain": ("another seed's core", "#44AA99", (8, 1, 0)),
    "warm_start": ("warm start, unfrozen", "#999933", "p"),
    "cold_start": ("same nesting, no start", "#661100", (6, 1, 0)),
    "longer_repeated": ("baseline, {times}x tokens, repeated", "#000000", "<"),
    "longer_fresh": ("baseline, {times}x tokens, fresh", "#8c8c8c", ">"),
}
# core_sparsity: the core is exempt from selection, or competes for k
KINDS = {"relu": "ReLU", "batchtopk": "equal-L0"}
# beside the main chain's
OTHER_KINDS = (("#5c3317", "8"), ("#b3a125", "h"), ("#7f7f7f", "*"), ("#3b5323", "H"))


def check_names() -> None:
    """Every arm that a configuration may name has its look here; else RuntimeError."""
    if missing := [arm for arm in sections.ARMS if arm not in ARMS]:
        raise RuntimeError(
            f"The arm {missing[0]} of config.sections.ARMS has no look: add it to report.series.ARMS."
        )


check_names()


class Kind(NamedTuple):
    """The distillation chains with one kind of core; those of different kinds are never averaged."""

    name: str
    colour: str
    marker: str | tuple[int, int, int]
    chains: dict[str, list[Row]]  # their cycle rows
    rows: list[Row]  # retrained with their cores


def replicates(summary: Row) -> dict[str, list[Row]]:
    """{chain: its cycle rows}: the main chain, and those that differ from it in their seed alone, as
    ``RunConfig.replicates`` has them (which lets no chain be there twice)."""
    own = {name: summary["sizes"][name] for name in CoreSettings.model_fields}
    alike = {
        name: chain["cycles"] for name, chain in summary["chains"].items() if own.items() <= chain.items()
    }
    return {"main": summary["cycles"]} | alike


def kind_name(settings: Row) -> str:
    """A chain's core settings in a word, and how they differ from the usual ones of that word."""
    sparsity, decoder = settings["core_sparsity"], settings["core_decoder_init"]
    unusual = [f"{decoder} decoder"] if (decoder == "encoder") != (sparsity == "batchtopk") else []
    unusual += ["biases by frequency"] if settings["core_bias_init"] == "match_frequency" else []
    return ", ".join([KINDS[sparsity], *unusual])


def kinds(summary: Row) -> list[Kind]:
    """The main chain with its replicates, then every other kind of core."""
    chains = {kind_name(summary["sizes"]): replicates(summary)}
    own = next(iter(chains))
    for name, chain in summary["chains"].items():
        if kind_name(chain) != own:
            chains.setdefault(kind_name(chain), {})[name] = chain["cycles"]
    looks = (ARMS["distilled"][1:], *OTHER_KINDS)
    return [
        Kind(name, *look, mine, [row for row in summary["retrain"] if row["chain"] in mine])
        for (name, mine), look in zip(chains.items(), looks)
    ]


def lenders(summary: Row) -> dict[str, str]:
    """{chain: the one whose SAEs without a core are its baseline}: its own, else those of the first chain of
    its distillation seed that trained any; without a core chains of one seed differ in the retraining's
    random streams alone. A chain of which neither is there has none."""
    trained = dict.fromkeys(row["chain"] for row in summary["retrain"] if row["arm"] == "none")
    seeds = {"main": summary["inputs"]["seed"]}
    seeds |= {name: chain["seed"] for name, chain in summary["chains"].items()}
    first: dict[int, str] = {}
    for chain in trained:
        first.setdefault(seeds[chain], chain)
    return {
        name: name if name in trained else first[seed]
        for name, seed in seeds.items()
        if name in trained or seed in first
    }


def baselines(summary: Row) -> list[Row]:
    """The SAEs without a core that each chain is compared with, as rows of its own (see :func:`lenders`)."""
    own = [row for row in summary["retrain"] if row["arm"] == "none"]
    return [
        row | {"chain": name}
        for name, lender in lenders(summary).items()
        for row in own
        if row["chain"] == lender
    ]


def differences(summary: Row) -> dict[str, list[Row]]:
    """{kind of core: its differences to the baseline}, the main chain's kind first."""
    found: dict[str, list[Row]] = {}
    for row in summary["differences"]:  # an older run's are of the main kind
        found.setdefault(row.get("core") or kind_name(summary["sizes"]), []).append(row)
    return found


def varied(rows: Iterable[Row]) -> str:
    """What differs between the n values of differences; an older run's are those of one chain."""
    return " or ".join(dict.fromkeys(PLURAL[row.get("varied", SEED)] for row in rows))


def label(arm: str, summary: Row) -> str:
    return ARMS[arm][0].format(times=summary["sizes"]["n_cycles"] + 1, kind=kind_name(summary["sizes"]))


def lines(
    summary: Row, arms: Iterable[str] = ARMS, wanted: Callable[[Row], Any] = bool
) -> list[tuple[Look, list[Row]]]:
    """Each arm's rows over the main chain and its replicates; then DMSAEs with each other kind of core."""
    main, *others = kinds(summary)
    found = [((label(arm, summary), *ARMS[arm][1:]), arm, main.rows) for arm in arms]
    for kind in others:
        look = (ARMS["distilled"][0].format(kind=kind.name), kind.colour, kind.marker)
        found.append((look, "distilled", kind.rows))
    drawn = [(look, [row for row in rows if row["arm"] == arm and wanted(row)]) for look, arm, rows in found]
    return [(look, rows) for look, rows in drawn if rows]


def by_k(rows: Iterable[Row]) -> dict[int, list[Row]]:
    groups: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["k"]):
        groups.setdefault(row["k"], []).append(row)
    return groups


def units(rows: list[Row], value: Callable[[Row], float | None]) -> tuple[list[float], str]:
    """One value per chain where there are several, else per training seed; and which of the two it is."""
    return per_unit({(row["chain"], row["seed"]): v for row in rows if (v := value(row)) is not None})
