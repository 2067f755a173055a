"""A count table as a language model: the residues that followed each short context in the training set, smoothed.

The baseline that shows how much of a score is local statistics. The probability of a residue given the k residues
before it is interpolated with those of the shorter contexts by the rule of Witten and Bell (Chen and Goodman 1998,
section 2.3),

    P_k(x | c) = (n(c x) + t(c) P_{k-1}(x | c')) / (n(c) + t(c)),        P_{-1} uniform

with n the counts in the training set, t(c) the number of different residues seen after c, and c' the context without
its first residue. A context is cut short by a hidden residue and by the beginning of the protein.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from protlm.vocabulary import FIRST_RESIDUE, NUM_RESIDUES, VOCABULARY_SIZE

MAX_ORDER = 4
"""The table of the longest contexts then has 25⁵ counts, 78 MB."""
MOST_CONTEXTS = 4
"""Contexts for each counted residue; of more, nearly all would never have been seen."""
_BLOCK_RESIDUES = 1 << 22


class MarkovCounts:
    """How often each residue followed each context of at most `order` residues.

    Attributes:
        order: Residues of the longest context.
        num_residues: Residues that were counted.
        tables: One table for each length k of a context, from 0: int64 (25**k, 25).
    """

    def __init__(self, order: int) -> None:
        if not 0 <= order <= MAX_ORDER:
            raise ValueError(f"order: expected 0 to {MAX_ORDER}, got {order}")
        self.order = order
        self.num_residues = 0
        self.tables = [np.zeros((NUM_RESIDUES**k, NUM_RESIDUES), dtype=np.int64) for k in range(order + 1)]

    def add(self, proteins: Iterable[np.ndarray]) -> None:
        """Counts the residues of proteins, each given as its residue tokens, uint8 (num_residues,)."""
        for tokens, places in _blocks(proteins):
            residues = tokens.astype(np.int64) - FIRST_RESIDUE
            self.num_residues += len(residues)
            # The cell of a residue after as many of those before it as there are, up to the longest context.
            cells = residues.copy()
            for k in range(1, self.order + 1):
                cells[k:] += np.where(places[k:] >= k, residues[:-k], 0) * NUM_RESIDUES**k
            table = self.tables[self.order]
            counted = np.bincount(cells[places >= self.order], minlength=table.size).reshape(table.shape)
            table += counted
            for k in range(self.order - 1, -1, -1):
                # A context of k residues is a longer one without its first residue, or stands at a protein's start.
                counted = counted.reshape(NUM_RESIDUES, -1, NUM_RESIDUES).sum(axis=0)
                np.add.at(counted.reshape(-1), cells[places == k], 1)
                self.tables[k] += counted

    def reversed(self) -> "MarkovCounts":
        """Returns the counts of the same proteins read backwards: a stretch of k + 1 residues is one cell in both."""
        counts = MarkovCounts(self.order)
        counts.num_residues = self.num_residues
        for k, table in enumerate(self.tables):
            counts.tables[k] = table.reshape([NUM_RESIDUES] * (k + 1)).transpose().reshape(table.shape)
        return counts


def largest_order(num_residues: int) -> int:
    """Returns the largest order worth trying: it has at most `MOST_CONTEXTS` contexts for each counted residue."""
    return max(k for k in range(MAX_ORDER + 1) if k == 0 or NUM_RESIDUES**k <= MOST_CONTEXTS * num_residues)


class MarkovModel:
    """The smoothed probabilities of one order.

    Attributes:
        order: Residues of the longest context.
    """

    def __init__(self, counts: MarkovCounts, order: int) -> None:
        if not 0 <= order <= counts.order:
            raise ValueError(f"order: expected 0 to {counts.order}, got {order}")
        self.order = order
        self._log_probabilities: list[np.ndarray] = []
        shorter = np.full((1, NUM_RESIDUES), 1 / NUM_RESIDUES)
        for k in range(order + 1):
            # Contexts that differ in their first residue only back off to the same row; a part for each, or for none.
            parts = counts.tables[k].reshape(-1, *shorter.shape)
            probabilities, logs = np.empty(parts.shape), np.empty(parts.shape, dtype=np.float32)
            for part, smoothed, log in zip(parts, probabilities, logs, strict=True):
                num_seen, num_kinds = part.sum(axis=1, keepdims=True), (part > 0).sum(axis=1, keepdims=True)
                with np.errstate(invalid="ignore"):
                    mixed = (part + num_kinds * shorter) / (num_seen + num_kinds)
                smoothed[:] = np.where(num_seen > 0, mixed, shorter)
                log[:] = np.log(smoothed)
            shorter = probabilities.reshape(-1, NUM_RESIDUES)
            self._log_probabilities.append(logs.reshape(-1, NUM_RESIDUES))

    def shortened(self, order: int) -> "MarkovModel":
        """Returns the model of a lower order, which shares the tables of this one."""
        if not 0 <= order <= self.order:
            raise ValueError(f"order: expected 0 to {self.order}, got {order}")
        model = object.__new__(MarkovModel)
        model.order, model._log_probabilities = order, self._log_probabilities[: order + 1]
        return model

    def log_probabilities(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Returns the log-probabilities of all tokens at some positions of a row, float32 (positions, 33).

        Args:
            tokens: The row as a model sees it: hidden residues are `<mask>`, and a special token stands between
                proteins.
            positions: The positions that are predicted, from the residues before them.
        """
        predicted = np.full((len(positions), VOCABULARY_SIZE), -np.inf, dtype=np.float32)
        residues = tokens.astype(np.int64) - FIRST_RESIDUE
        is_residue = (residues >= 0) & (residues < NUM_RESIDUES)
        lengths = np.zeros(len(positions), dtype=np.int64)
        codes = np.zeros((self.order + 1, len(positions)), dtype=np.int64)
        is_open = np.ones(len(positions), dtype=bool)
        for k in range(1, self.order + 1):
            is_open &= positions >= k
            before = np.where(is_open, positions - k, 0)
            is_open &= is_residue[before]
            lengths[is_open] = k
            codes[k] = codes[k - 1] + np.where(is_open, residues[before], 0) * NUM_RESIDUES ** (k - 1)
        residue_columns = slice(FIRST_RESIDUE, FIRST_RESIDUE + NUM_RESIDUES)
        for k, table in enumerate(self._log_probabilities):
            (chosen,) = np.nonzero(lengths == k)
            predicted[chosen, residue_columns] = table[codes[k, chosen]]
        return predicted


class TwoSidedMarkovModel:
    """A residue from those on both sides of it, as a masked model sees them.

    The product of two count tables, one of the proteins as they are and one of the proteins reversed, each given the
    residues on its side, and divided by the frequencies that both contain: P(x | l, r) ∝ P(x | l) P(x | r) / P(x). This
    is exact if the two sides are independent given x.

    Attributes:
        order: Residues of the longest context on either side.
    """

    def __init__(self, before: MarkovModel, after: MarkovModel) -> None:
        """Joins two tables of one order; `after` is of the reversed proteins."""
        if before.order != after.order:
            raise ValueError(f"after: expected order {before.order} as of the other side, got {after.order}")
        self.order = before.order
        self._before, self._after, self._frequencies = before, after, before.shortened(0)

    def log_probabilities(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Returns the log-probabilities of all tokens at some positions of a row, float32 (positions, 33)."""
        joined = self._before.log_probabilities(tokens, positions).astype(np.float64)
        columns = slice(FIRST_RESIDUE, FIRST_RESIDUE + NUM_RESIDUES)
        joined[:, columns] += self._after.log_probabilities(tokens[::-1], len(tokens) - 1 - positions)[:, columns]
        joined[:, columns] -= self._frequencies.log_probabilities(tokens, positions)[:, columns]
        norms = np.log(np.exp(joined[:, columns]).sum(axis=1, keepdims=True))
        joined[:, columns] -= norms
        return joined.astype(np.float32)


def _blocks(proteins: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields proteins back to back, some millions of residues at a time, with each residue's place in its protein."""
    held: list[np.ndarray] = []
    size = 0
    for tokens in proteins:
        held.append(tokens)
        size += len(tokens)
        if size >= _BLOCK_RESIDUES:
            yield _joined(held)
            held, size = [], 0
    if held:
        yield _joined(held)


def _joined(held: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(tokens) for tokens in held])
    starts = np.cumsum(lengths) - lengths
    return np.concatenate(held), np.arange(lengths.sum()) - np.repeat(starts, lengths)
