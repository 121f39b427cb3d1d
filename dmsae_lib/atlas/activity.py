"""When a latent fires: its histogram, and contexts from every tenth of its activations."""

from typing import Any

import numpy as np
from torch import Tensor

from dmsae_lib.data.contexts import Contexts
from dmsae_lib.report.examples import document_window

BINS = 32  # of the histogram
TENTHS = 10
PER_TENTH = 2  # contexts shown
BEFORE, AFTER = 16, 6  # tokens of context around the one that was chosen
OCCURRENCES, NAMED = 5, 8  # a token must occur so often to be among the so many with the highest means
DIGITS = 3  # significant, of activations


def rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def histogram(active: np.ndarray) -> list[int]:
    """Counts of the activations above 0 (n,) in BINS equal bins from 0 to their maximum."""
    return np.histogram(active, BINS, (0, float(active.max(initial=0)) or 1))[0].tolist()


def tenths(active: np.ndarray) -> list[np.ndarray]:
    """The places in ``active`` (n,) by tenth of the activations, the weakest tenth first, each ascending.

    The r-th of n (from 0; ties by place) is in tenth floor(10 r / n): where n < 10, some are empty.
    """
    order = np.argsort(active, kind="stable")
    which = np.arange(len(active)) * TENTHS // max(len(active), 1)
    return [order[which == tenth] for tenth in range(TENTHS)]


def chosen(active: np.ndarray, rows: np.ndarray) -> list[list[int]]:
    """PER_TENTH places of every tenth, the strongest of it first, the others evenly below it.

    ``rows`` (n,) say in which context each activation is: as far as there are others in the tenth, no context
    is taken twice for one latent.
    """
    found, used = [], set()
    for places in tenths(active):
        mine: list[int] = []
        for j in range(min(PER_TENTH, len(places))):
            last = len(places) - 1 - j * len(places) // PER_TENTH
            below = [p for p in places[last::-1].tolist() if p not in mine]
            unseen = [p for p in below if rows[p] not in used]
            if below:
                mine.append((unseen or below)[0])
                used.add(rows[mine[-1]])
        found.append(mine)
    return found


def by_token(values: np.ndarray, ids: np.ndarray) -> list[tuple[int, float, int]]:
    """(token id, mean activation, occurrences) of the NAMED ids with the highest mean of ``values`` (n,),
    zeros included, among those of ``ids`` (n,) that occur OCCURRENCES times; ties go to the lower id."""
    known, places, counts = np.unique(ids, return_inverse=True, return_counts=True)
    means = np.bincount(places, weights=values, minlength=len(known)) / counts
    often = np.flatnonzero((counts >= OCCURRENCES) & (means > 0))
    best = often[np.argsort(-means[often], kind="stable")][:NAMED]
    return [(int(known[i]), rounded(means[i]), int(counts[i])) for i in best]


def activity(f: Tensor, usable: Tensor, contexts: Contexts) -> dict[str, Any]:
    """What a card says of one latent's activations ``f`` (rows, positions) at the ``usable`` positions.

    active: at how many of how many ``tokens``; frequency; max; histogram; tenths: [low, high] of each,
    weakest first, None where it is empty; contexts, strongest tenth first: {tenth (1 to 10), row, start,
    at (a position of the row), values (from ``start`` on)}; by_token: see :func:`by_token`.
    """
    fired = (f > 0) & usable
    rows, positions = (part.numpy() for part in fired.nonzero(as_tuple=True))
    active, grid = f[fired].numpy(), (f * usable).numpy()
    shown = []
    for tenth, places in reversed(list(enumerate(chosen(active, rows), start=1))):
        for place in places:
            row, at = int(rows[place]), int(positions[place])
            start, stop = document_window(contexts, row, at, BEFORE, AFTER)
            values = [rounded(value) for value in grid[row, start:stop].tolist()]
            shown.append({"tenth": tenth, "row": row, "start": start, "at": at, "values": values})
    bounds = [active[places[[0, -1]]].tolist() if len(places) else None for places in tenths(active)]
    tokens = int(usable.sum())
    return {
        "active": len(active),
        "tokens": tokens,
        "frequency": rounded(len(active) / tokens),
        "max": rounded(float(active.max(initial=0))),
        "histogram": histogram(active),
        "tenths": [ends and [rounded(end) for end in ends] for ends in bounds],
        "contexts": shown,
        "by_token": by_token(f[usable].numpy(), contexts.tokens[usable].numpy()),
    }
