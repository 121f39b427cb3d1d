"""Whether a run is in a regime where a core can mean something: gates, and the rule for the learning rate.

The bounds are method, section 7. A run outside them is no failure of the code, but its verdicts say little:
they are part of the summary, and tests hold cycle 0 of the published runs to them.
"""

import math
from statistics import fmean
from typing import Any

from dmsae_lib.config import RunConfig
from dmsae_lib.report.verdicts import t_interval

Row = dict[str, Any]
FREQUENCY = 0.3  # median share of tokens on which a chosen candidate fires
SPARSITY = 0.25  # k / d_in; the paper has .14
RARE_LATENTS = 1 / 3  # share of latents that fire on fewer than 1 in 1000 tokens
CORE_SHARE = 0.75  # c / k of a core that is exempt from selection: above it the free latents starve
FLAT = 0.10  # share by which FVU may still fall between the last two quarters of the steps before the decay


def still_falling(history: list[dict[str, str]], decay: float) -> float:
    """By what share the batches' FVU falls from the third to the last quarter of the steps before the decay.

    ``history`` is that of a training; batches are noisy, so each end is the mean over a quarter. 1 where no
    batch has an FVU.
    """
    begins = (1 - decay) * float(history[-1]["step"])
    known = [(float(row["step"]), fvu) for row in history if math.isfinite(fvu := float(row["fvu"]))]
    before = [fvu for step, fvu in known if step <= begins] or [fvu for _, fvu in known[:1]]
    if not before:
        return 1.0
    n = max(1, len(before) // 4)
    early, late = fmean(before[-2 * n : -n] or before[-1:]), fmean(before[-n:])
    return 1 - late / early if early else 0.0


def gates(
    config: RunConfig, d_in: int, metrics: Row, history: list[dict[str, str]], attribution: Row
) -> list[Row]:
    """[{gate, value, bound, ok}] of cycle 0; a bound of None: reported, not judged.

    ``metrics`` and ``history`` are the SAE's, ``attribution`` its record.
    """
    chosen, falls = attribution["core"], still_falling(history, config.training.decay)
    share = chosen["selected"] / attribution["candidates"]
    return [
        _gate("median frequency of the chosen candidates", chosen["frequency"], FREQUENCY),
        _gate("share of the candidates that the coverage needs", share, None),
        _gate("k / d_in", config.training.k / d_in, SPARSITY + 1e-9),
        _gate("share of latents that fire on fewer than 1 in 1000 tokens", metrics["rare"], RARE_LATENTS),
        _gate("share by which FVU still falls before the decay", falls, FLAT),
    ]


def _gate(name: str, value: float, bound: float | None) -> Row:
    return {"gate": name, "value": value, "bound": bound, "ok": bound is None or value < bound}


def compared_gates(k: int, exempt: list[int], retrained: list[Row]) -> list[Row]:
    """Gates on what is compared: [{gate, value, bound, ok}].

    ``exempt``: core sizes of cycle 0 in the chains whose core is exempt from selection. ``retrained``: rows
    of the main kind of chain, {arm, k, rare}.
    """
    found = []
    if exempt:
        name = "latents of a core that is exempt from selection, per k"
        found.append(_gate(name, max(exempt) / k, CORE_SHARE))
    for at in sorted({row["k"] for row in retrained}):
        for arm, core in (("none", "no core"), ("distilled", "the distilled core")):
            if rare := [row["rare"] for row in retrained if (row["arm"], row["k"]) == (arm, at)]:
                name = f"share of rare latents after retraining with {core} at k = {at}"
                found.append(_gate(name, fmean(rare), RARE_LATENTS))
    return found


def choose_rate(table: list[Row]) -> float | None:
    """The rule of notebook 09: of the rates that leave neither kind of SAE more than RARE_LATENTS rare, that
    of the lowest mean loss increase; None where no rate is eligible.

    ``table`` has a row per rate and SAE: {lr, with_core, rare, loss_increase}.
    """
    eligible = {}
    for lr in dict.fromkeys(row["lr"] for row in table):
        without, with_core = (
            [row for row in table if (row["lr"], row["with_core"]) == (lr, core)] for core in (False, True)
        )
        if all(fmean(row["rare"] for row in kind) < RARE_LATENTS for kind in (without, with_core)):
            eligible[lr] = fmean(fmean(row["loss_increase"] for row in kind) for kind in (without, with_core))
    return min(eligible, key=eligible.get, default=None)


def core_by_rate(table: list[Row]) -> list[Row]:
    """What the core adds to the loss at each rate, and with each kind of SAE at its own best one, whatever it
    leaves rare.

    [{lr, lr_core, difference, interval}]: SAE with the core minus that without, paired by ``seed``; the last
    row is of the best.
    """
    loss = {(row["lr"], row["with_core"], row["seed"]): row["loss_increase"] for row in table}
    rates, seeds = sorted({row["lr"] for row in table}), sorted({row["seed"] for row in table})

    def best(core: bool) -> float:
        return min(rates, key=lambda lr: fmean(loss[lr, core, seed] for seed in seeds))

    rows = []
    for lr, lr_core in [*zip(rates, rates), (best(False), best(True))]:
        gains = [loss[lr_core, True, seed] - loss[lr, False, seed] for seed in seeds]
        rows.append({"lr": lr, "lr_core": lr_core, "difference": fmean(gains), "interval": t_interval(gains)})
    return rows
