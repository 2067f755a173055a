"""The time that forward passes take on this machine, from a sample of them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from protlm.config import SPECIAL_TOKENS_PER_SEGMENT

_QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""The lengths that are timed: these quantiles of all residues, sorted by the length of their protein or window."""

_SAMPLE_TOKENS = 4096
_SAMPLE_SECONDS = 30.0


@dataclass(frozen=True)
class Pace:
    """The seconds that a token takes.

    Attributes:
        fixed: In any protein.
        per_residue: For each residue of its protein: the quadratic cost of exact attention, near zero for FAVOR.
    """

    fixed: float
    per_residue: float

    def seconds(self, sizes: np.ndarray, counts: np.ndarray | int = 1) -> float:
        """Returns the time of passes of so many residues, each made so many times."""
        tokens = (sizes + SPECIAL_TOKENS_PER_SEGMENT) * counts
        return float((tokens * (self.fixed + self.per_residue * sizes)).sum())


def pace_of(
    compute: Callable[[Sequence[np.ndarray]], bool],
    letters: np.ndarray,
    sizes: np.ndarray,
    tokens_per_batch: int,
    counts: np.ndarray | None = None,
) -> Pace:
    """Returns the pace of a model on this machine.

    Args:
        compute: Computes a row of proteins; returns whether each fitted into memory.
        letters: Residue tokens of real proteins.
        sizes: The residues of each pass, or of each kind of pass.
        tokens_per_batch: Budget of a row.
        counts: How often each is made; None: once.

    Raises:
        MemoryError: Not even the shorter of the passes fit into memory; its text says how long these are.
    """
    order = np.argsort(sizes, kind="stable")
    rising = sizes[order]
    residues = np.cumsum(rising if counts is None else rising * counts[order])
    shares = residues / residues[-1]
    lengths = sorted({int(rising[np.searchsorted(shares, quantile)]) for quantile in _QUANTILES})
    seconds, begun = [], time.perf_counter()
    for length in lengths:
        size = length + SPECIAL_TOKENS_PER_SEGMENT
        row = [np.resize(letters, length)] * max(1, min(tokens_per_batch, _SAMPLE_TOKENS) // size)
        if not compute(row):
            break
        start = time.perf_counter()
        compute(row)
        seconds.append((time.perf_counter() - start) / (len(row) * size))
        if time.perf_counter() - begun > _SAMPLE_SECONDS:
            break
    if not seconds:
        raise MemoryError(f"proteins of {lengths[0]:,} residues do not fit into memory")
    if len(seconds) > 1:
        per_residue, fixed = np.polyfit(lengths[: len(seconds)], seconds, 1)
        if per_residue > 0 and fixed > 0:
            return Pace(float(fixed), float(per_residue))
    return Pace(float(np.mean(seconds)), 0.0)
