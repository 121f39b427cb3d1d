"""How a claim is judged: from which rows, by which function, into which row of the summary; the list of
claims."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from dmsae_lib.report.equal_l0 import CHAIN
from dmsae_lib.report.series import replicates
from dmsae_lib.report.verdicts import FAILS, HOLDS, decided, overall

Row = dict[str, Any]


@dataclass(frozen=True)
class Evidence:
    """What is judged: a summary's rows of the main chain and its replicates, and its sizes."""

    chains: dict[str, list[Row]]  # each one's cycles
    rows: list[Row]  # the SAEs retrained with their cores
    identity: list[Row]
    sizes: Row

    @classmethod
    def of(cls, summary: Row) -> "Evidence":
        chains = replicates(summary)
        rows = [row for row in summary["retrain"] if row["chain"] in chains]
        return cls(chains, rows, summary["identity"], summary["sizes"])


class Finding(NamedTuple):
    parts: list[Row]
    headline: Row | None  # the part whose value, interval and n are the claim's
    detail: str
    varied: str = CHAIN  # what differs between the n values


class Claim(NamedTuple):
    sentence: str
    measure: str  # what the claim's value is, in few words
    find: Callable[[Evidence], Finding]


CLAIMS: dict[str, Claim] = {}


def claim(name: str, sentence: str, measure: str) -> Callable[[Callable], Callable]:
    """Enters the decorated function in CLAIMS: it is judged, published and tabulated from then on."""

    def enter(find: Callable[[Evidence], Finding]) -> Callable[[Evidence], Finding]:
        CLAIMS[name] = Claim(sentence, measure, find)
        return find

    return enter


def judged(name: str, evidence: Evidence) -> Row:
    """One claim as it is in the summary: its verdict, its numbers and its parts."""
    parts, headline, detail, varied = CLAIMS[name].find(evidence)
    shown, parts = headline or {"value": None, "interval": None, "n": 0}, decided(parts)
    verdicts = [p["verdict"] for p in parts if p["decides"]]
    if len(verdicts) > 1:
        held, failed = verdicts.count(HOLDS), verdicts.count(FAILS)
        detail += f" Of {len(verdicts)} deciding parts {held} hold and {failed} do not."
    found = {"claim": CLAIMS[name].sentence, "verdict": overall(parts)}
    found |= {key: shown[key] for key in ("value", "interval", "n")}
    return found | {"varied": varied, "detail": detail, "parts": parts}


def number(value: float | None, digits: int = 4) -> str:
    return "not measured" if value is None else f"{value:+.{digits}f}"


def furthest(parts: list[Row], key: Callable[[float], float]) -> Row | None:
    """The deciding part with the largest ``key`` of its value; None where none has a value."""
    return max((p for p in parts if p["decides"] and p["n"]), key=lambda p: key(p["value"]), default=None)


def lowest(parts: list[Row]) -> Row | None:
    return furthest(parts, lambda value: -value)
