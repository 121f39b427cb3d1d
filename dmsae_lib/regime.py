"""Whether a run is in a regime where a core can mean something: gates on cycle 0, and the rule for the learning rate.

The bounds are method, section 7. A run outside them is no failure of the code, but its verdicts say little: they are part of
the summary, and tests hold the published runs to them.
"""

from statistics import fmean
from typing import Any

from dmsae_lib.config import RunConfig

Row = dict[str, Any]
FREQUENCY = 0.3  # median share of tokens on which a chosen candidate fires
SPARSITY = 0.25  # k / d_in; the paper has .14
RARE_LATENTS = 1 / 3  # share of latents that fire on fewer than 1 in 1000 tokens
FLAT = 0.10  # by what share FVU may still fall from one quarter of the steps before the rate decays to the next


def still_falling(history: list[dict[str, str]], decay: float) -> float:
    """By what share the FVU of the training batches falls from the third to the last quarter of the steps before the decay.

    ``history`` is that of a training; batches are noisy, so each end is the mean over a quarter.
    """
    begins = (1 - decay) * float(history[-1]["step"])
    before = [float(row["fvu"]) for row in history if float(row["step"]) <= begins] or [float(history[0]["fvu"])]
    n = max(1, len(before) // 4)
    early, late = fmean(before[-2 * n : -n] or before[-1:]), fmean(before[-n:])
    return 1 - late / early


def gates(config: RunConfig, d_in: int, metrics: Row, history: list[dict[str, str]], attribution: Row) -> list[Row]:
    """[{gate, value, bound, ok}] of cycle 0; a bound of None: reported, not judged.

    ``metrics`` and ``history`` are the SAE's, ``attribution`` its record.
    """
    chosen = attribution["core"]
    found = [
        ("median frequency of the chosen candidates", chosen["frequency"], FREQUENCY),
        ("share of the candidates that the coverage needs", chosen["selected"] / attribution["candidates"], None),
        ("k / d_in", config.training.k / d_in, SPARSITY + 1e-9),
        ("share of latents that fire on fewer than 1 in 1000 tokens", metrics["rare"], RARE_LATENTS),
        ("share by which FVU still falls before the decay", still_falling(history, config.training.decay), FLAT),
    ]
    return [{"gate": name, "value": value, "bound": bound, "ok": bound is None or value < bound} for name, value, bound in found]


def choose_rate(table: list[Row]) -> float | None:
    """The rule of notebook 09: of the rates that leave no SAE more than RARE_LATENTS rare, that of the lowest mean loss increase.

    ``table`` has a row per rate and SAE: {lr, rare, loss_increase}. None where no rate is eligible.
    """
    rates: dict[float, list[Row]] = {}
    for row in table:
        rates.setdefault(row["lr"], []).append(row)
    eligible = {lr: fmean(row["loss_increase"] for row in rows) for lr, rows in rates.items()
                if max(row["rare"] for row in rows) < RARE_LATENTS}
    return min(eligible, key=eligible.get, default=None)

