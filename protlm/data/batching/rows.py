"""Rows planned from draws: hides how proteins are packed into rows, from their lengths alone.

A training run is one endless stream of rows that is a function of (seed, lengths, settings), so a resumed run finds its
place by planning the stream again. No protein is read for it, and no torch is needed.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from protlm.config import SPECIAL_TOKENS_PER_SEGMENT, DataConfig
from protlm.data.batching.draws import Draws

Segment = TypeVar("Segment")

ROWS_PER_PORTION = 16
"""Rows that one process computes before it writes their results, where work is done in portions."""

_MOST_PORTION_RECORDS = 1 << 16


@dataclass(frozen=True)
class Row:
    """The plan of one row: its records, and their draws in the run.

    Attributes:
        records: The records of which it holds tokens, in order.
        first_draw: Number of the first record's draw in the whole run; the others follow it.
        epoch: Number of epochs that the stream completed before.
        first_token: Of concatenated proteins: number of tokens of the first record that are in the previous row.
        num_tokens: Of concatenated proteins: number of tokens in this row, with the `<eos>` of each protein and without
            `<cls>`; the last record may continue in the next row. None: whole records.
    """

    records: np.ndarray
    first_draw: int
    epoch: int
    first_token: int = 0
    num_tokens: int | None = None


@dataclass(frozen=True)
class EpochSize:
    """The size of an epoch of training; special tokens count among the tokens."""

    num_rows: int
    num_tokens: int
    num_residues: int


def pack(num_residues: np.ndarray, tokens_per_batch: int) -> Iterator[slice]:
    """Yields the slices of consecutive proteins that fill one row each; a protein beyond the budget has its own row."""
    ends = np.cumsum(num_residues + SPECIAL_TOKENS_PER_SEGMENT)
    start = used = 0
    while start < len(ends):
        stop = max(start + 1, int(ends.searchsorted(used + tokens_per_batch, side="right")))
        yield slice(start, stop)
        start, used = stop, int(ends[stop - 1])


def packed_in_order(
    segments: Iterable[Segment], num_tokens: Callable[[Segment], int], tokens_per_batch: int
) -> Iterator[list[Segment]]:
    """Yields the segments of each row, in order, reading no further than a row: `pack` for a stream.

    Args:
        segments: The segments.
        num_tokens: Returns the tokens of a segment, special ones included.
        tokens_per_batch: Budget of a row; a segment beyond it has a row of its own.
    """
    row: list[Segment] = []
    used = 0
    for segment in segments:
        size = num_tokens(segment)
        if row and used + size > tokens_per_batch:
            yield row
            row, used = [], 0
        row.append(segment)
        used += size
    if row:
        yield row


def portion_bounds(costs: np.ndarray, budget: int, counts: np.ndarray | None = None) -> np.ndarray:
    """Returns the bounds of the portions of some records: each has as many as the budget allows, but at least one.

    Args:
        costs: The cost of each record, int64; with `counts`, of each record of a run.
        budget: Most that the records of a portion may cost together.
        counts: Lengths of runs of records of equal costs, int64; None: every record is a run of its own.

    Returns:
        The first record of each portion, then the number of records, int64.
    """
    counts = np.ones(len(costs), dtype=np.int64) if counts is None else counts
    ends, cost_ends = np.cumsum(counts), np.cumsum(costs * counts)
    total = int(ends[-1]) if len(ends) else 0
    bounds, start, used = [0], 0, 0
    while start < total:
        # The run in which the budget ends, and the records of it that fit.
        run = int(cost_ends.searchsorted(used + budget, side="right"))
        stop = total if run == len(ends) else int(ends[run] + (used + budget - cost_ends[run]) // costs[run])
        start = min(max(start + 1, stop), start + _MOST_PORTION_RECORDS)
        run = int(ends.searchsorted(start))
        used = int(cost_ends[run] - (ends[run] - start) * costs[run])
        bounds.append(start)
    return np.array(bounds, dtype=np.int64)


def training_rows(draws: Draws, lengths: np.ndarray, config: DataConfig, first_row: int = 0) -> Iterator[Row]:
    """Yields the endless stream of training rows from row first_row on; the last row of an epoch may be short.

    Args:
        draws: The draws of the run.
        lengths: Number of residues of each record.
        config: The settings by which proteins become rows.
        first_row: Number of the first row to yield, from 0.
    """
    epoch, row_number = 0, 0
    while True:
        for row in _epoch_rows(draws, lengths, config, epoch):
            if row_number >= first_row:
                yield row
            row_number += 1
        epoch += 1


def epoch_size(draws: Draws, lengths: np.ndarray, config: DataConfig) -> EpochSize:
    """Returns the size of the first epoch; other epochs may differ slightly."""
    sizes = lengths[draws.epoch(0)]
    if config.mode == "concatenated":
        num_joined = int(sizes.sum()) + len(sizes)
        return EpochSize(
            num_rows=-(-num_joined // _joined_per_row(config.tokens_per_batch, config.window_tokens)),
            num_tokens=num_joined + -(-num_joined // (config.window_tokens - 1)),
            num_residues=int(sizes.sum()),
        )
    sizes = np.minimum(sizes, config.window)
    return EpochSize(
        num_rows=sum(1 for _ in pack(sizes, config.tokens_per_batch)),
        num_tokens=int(sizes.sum()) + SPECIAL_TOKENS_PER_SEGMENT * len(sizes),
        num_residues=int(sizes.sum()),
    )


def packed_rows(order: np.ndarray, sizes: np.ndarray, tokens_per_batch: int, epoch: int) -> Iterator[Row]:
    """Yields rows of whole records, in this order, whose numbers of residues are `sizes`."""
    for packed in pack(sizes, tokens_per_batch):
        yield Row(order[packed], epoch * len(order) + packed.start, epoch)


def joined_rows(
    order: np.ndarray, sizes: np.ndarray, tokens_per_batch: int, window_tokens: int, epoch: int
) -> Iterator[Row]:
    """Yields rows of whole windows over all records joined, in this order; the last window may be short."""
    ends = np.cumsum(sizes + 1)
    num_joined = int(ends[-1])
    per_row = _joined_per_row(tokens_per_batch, window_tokens)
    for start in range(0, num_joined, per_row):
        stop = min(start + per_row, num_joined)
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, stop, side="left"))
        before = int(ends[first - 1]) if first else 0
        yield Row(order[first : last + 1], epoch * len(order) + first, epoch, start - before, stop - start)


def _epoch_rows(draws: Draws, lengths: np.ndarray, config: DataConfig, epoch: int) -> Iterator[Row]:
    order = draws.epoch(epoch)
    if config.mode == "concatenated":
        return joined_rows(order, lengths[order], config.tokens_per_batch, config.window_tokens, epoch)
    return packed_rows(order, np.minimum(lengths, config.window)[order], config.tokens_per_batch, epoch)


def _joined_per_row(tokens_per_batch: int, window_tokens: int) -> int:
    """Returns the number of tokens of the joined proteins in a row, without the `<cls>` of each window."""
    return max(1, tokens_per_batch // window_tokens) * (window_tokens - 1)
