"""Two plain references for a language model, on the same tokens: unigram frequencies and a 3-gram with
back-off."""

import numpy as np

DISCOUNT = 0.75  # absolute discounting (Ney, Essen & Kneser 1994), the usual constant


class Ngram:
    """Interpolated absolute discounting: p(w|h) = (max(c(hw) - D, 0) + D n(h) p(w|h')) / c(h).

    h' is the history without its oldest token, n(h) the number of different tokens seen after h; the unigram
    is add-one smoothed. Unseen histories back off entirely.
    """

    def __init__(self, rows: np.ndarray, vocab_size: int):
        """``rows``: (contexts, positions) token ids; n-grams do not cross rows."""
        self.vocab = vocab_size
        self.unigram = (np.bincount(rows.ravel(), minlength=vocab_size) + 1) / (rows.size + vocab_size)
        self.tables = [self._count(rows, order) for order in (2, 3)]

    def _keys(self, rows: np.ndarray, order: int) -> np.ndarray:
        """Each n-gram of consecutive tokens as one integer, (contexts, positions - order + 1)."""
        n = rows.shape[1] - order + 1
        keys = np.zeros((len(rows), n), dtype=np.int64)
        for i in range(order):
            keys = keys * self.vocab + rows[:, i : i + n]
        return keys

    def _count(self, rows: np.ndarray, order: int) -> tuple[np.ndarray, ...]:
        grams, counts = np.unique(self._keys(rows, order), return_counts=True)
        histories, first = np.unique(grams // self.vocab, return_index=True)
        kinds = np.diff(np.append(first, len(grams)))
        return grams, counts, histories, np.add.reduceat(counts, first), kinds

    def probabilities(self, rows: np.ndarray, order: int = 3) -> np.ndarray:
        """p of every token from the third on, given the ``order - 1`` before it, (contexts, positions -
        2)."""
        p = self.unigram[rows[:, 2:]]
        for n, table in zip(range(2, order + 1), self.tables):
            keys = self._keys(rows, n)[:, 3 - n :]
            p = self._interpolate(keys.ravel(), p.ravel(), *table).reshape(p.shape)
        return p

    def _interpolate(self, keys, lower, grams, counts, histories, totals, kinds) -> np.ndarray:
        history = keys // self.vocab
        at = np.minimum(np.searchsorted(histories, history), len(histories) - 1)
        seen = histories[at] == history
        gram_at = np.minimum(np.searchsorted(grams, keys), len(grams) - 1)
        count = np.where(grams[gram_at] == keys, counts[gram_at], 0)
        p = (np.maximum(count - DISCOUNT, 0) + DISCOUNT * kinds[at] * lower) / totals[at]
        return np.where(seen, p, lower)

    def nats_per_token(self, rows: np.ndarray, bos: int, order: int = 3) -> float:
        """Mean -log p over the targets that are not BOS, from each row's third token on."""
        return float(-np.log(self.probabilities(rows, order))[rows[:, 2:] != bos].mean())
