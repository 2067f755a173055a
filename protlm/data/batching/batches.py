"""From draws to batches: hides how proteins are put into rows, and what of a row is hidden and predicted.

A training run is one endless stream of rows that is a function of (seed, lengths, settings), so a resumed run finds its
place by planning it again. A row is planned from lengths alone, and only its own proteins are read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from protlm.config import SPECIAL_TOKENS_PER_SEGMENT, DataConfig
from protlm.data.batching.draws import Draws
from protlm.data.batching.masking import MaskRates, evaluation_generator, mask_residues, training_generator
from protlm.errors import ShardError
from protlm.vocabulary import CLS, EOS, are_residues

_END = np.array([EOS], dtype=np.uint8)
_SCORED, _NOT_SCORED = np.array([True]), np.array([False])


class Proteins(Protocol):
    """What a batch needs of a split: lengths in residues, and the residue tokens of each record."""

    @property
    def lengths(self) -> np.ndarray:
        """int64, one a record."""

    def tokens(self, record: int) -> np.ndarray:
        """uint8 residue tokens of one record."""


@dataclass(frozen=True)
class Objective:
    """What the model learns to predict.

    Attributes:
        causal: Each token from those before it, and nothing is hidden; otherwise hidden residues from all others.
        rates: Which residues are targets, and what is seen there; unused where causal.
    """

    causal: bool
    rates: MaskRates


class Batch(NamedTuple):
    """One row and what is scored in it.

    Attributes:
        tokens: int64 (length,), segment after segment. One protein: `<cls> residues <eos>`. A window of concatenated
            proteins: `<cls>` and a stretch of all proteins joined, each with its `<eos>`. Masked targets are hidden.
        cu_seqlens: int32 (segments + 1,), the bounds of the segments.
        target_positions: int64 (targets,), where in the row the predictions are made: at the hidden residues, or
            causally one token before each target, in its segment. A row may have none.
        targets: int64 (targets,), the true tokens.
        epoch: Times that the stream has gone through the data before this row.
        num_residues: Residues in the row.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    target_positions: Tensor
    targets: Tensor
    epoch: int
    num_residues: int


@dataclass(frozen=True)
class Row:
    """The plan of one row: which records, and where in the run they were drawn.

    Attributes:
        records: The records that it touches, in order.
        first_draw: Number of the first one's draw in the whole run; the others follow.
        epoch: Times that the stream has gone through the data before.
        first_token: Of concatenated proteins: tokens of the first record that are in the row before.
        num_tokens: Of concatenated proteins: tokens in this row, `<eos>` of each protein included and `<cls>` not; the
            last record may go on in the next row. None: whole records.
    """

    records: np.ndarray
    first_draw: int
    epoch: int
    first_token: int = 0
    num_tokens: int | None = None


@dataclass(frozen=True)
class EpochSize:
    """What an epoch of training comes to; special tokens are among the tokens."""

    num_rows: int
    num_tokens: int
    num_residues: int


def pack(num_residues: np.ndarray, tokens_per_batch: int) -> Iterator[slice]:
    """Yields the stretches of consecutive proteins that fill one row each; a longer one has a row of its own."""
    ends = np.cumsum(num_residues + SPECIAL_TOKENS_PER_SEGMENT)
    start = used = 0
    while start < len(ends):
        stop = max(start + 1, int(ends.searchsorted(used + tokens_per_batch, side="right")))
        yield slice(start, stop)
        start, used = stop, int(ends[stop - 1])


def training_rows(draws: Draws, lengths: np.ndarray, config: DataConfig, first_row: int = 0) -> Iterator[Row]:
    """Yields the endless stream of training rows from row first_row on; the last row of an epoch may be short.

    Args:
        draws: Which record is drawn when.
        lengths: Residues of each record.
        config: How proteins become rows.
        first_row: Number of the first row that is wanted, from 0.
    """
    epoch, row_number = 0, 0
    while True:
        for row in _epoch_rows(draws, lengths, config, epoch):
            if row_number >= first_row:
                yield row
            row_number += 1
        epoch += 1


def epoch_size(draws: Draws, lengths: np.ndarray, config: DataConfig) -> EpochSize:
    """Returns what the first epoch comes to; others may differ a little."""
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


def training_batch(row: Row, proteins: Proteins, config: DataConfig, seed: int, objective: Objective) -> Batch:
    """Returns a planned row: its proteins cropped, hidden and joined as the settings say.

    Args:
        row: One of `training_rows`.
        proteins: The records that were drawn from.
        config: The settings that the row was planned with.
        seed: Seed of the run.
        objective: What is predicted.
    """
    parts = []
    for number, record in enumerate(row.records):
        generator = training_generator(seed, row.first_draw + number)
        tokens = proteins.tokens(int(record))
        reaches_end = True
        if config.mode != "concatenated" and len(tokens) > config.window:
            latest = len(tokens) - config.window
            start = int(generator.integers(latest + 1)) if config.mode == "packed" else 0
            tokens = tokens[start : start + config.window]
            reaches_end = start == latest
        parts.append(_part(tokens, objective, generator, scores_end=objective.causal and reaches_end))
    window_tokens = config.window_tokens if config.mode == "concatenated" else None
    return _batch(parts, row, window_tokens, objective)


def evaluation_batches(
    proteins: Proteins,
    tokens_per_batch: int,
    seed: int,
    objective: Objective,
    *,
    window_tokens: int | None = None,
    max_residues: int | None = None,
) -> Iterator[Batch]:
    """Yields the records in order, each hidden as a function of the seed and its whole sequence; residues are scored.

    Args:
        proteins: The records.
        tokens_per_batch: Budget of a row; a protein or window beyond it has a row of its own.
        seed: With the sequence it decides what is hidden.
        objective: What is predicted.
        window_tokens: Join the proteins and cut them into windows of so many tokens, as in training; default: each is a
            segment of its own.
        max_residues: Cut a longer protein to its first max_residues, after hiding; not together with window_tokens.
    """
    if window_tokens is not None and max_residues is not None:
        raise ValueError(f"max_residues: expected none with window_tokens, which bound a segment, got {max_residues}")
    order = np.arange(len(proteins.lengths))
    if window_tokens is None:
        sizes = proteins.lengths if max_residues is None else np.minimum(proteins.lengths, max_residues)
        rows = _packed_rows(order, sizes, tokens_per_batch, epoch=0)
    else:
        rows = _joined_rows(order, proteins.lengths, tokens_per_batch, window_tokens, epoch=0)
    for row in rows:
        parts = []
        for record in row.records:
            tokens = proteins.tokens(int(record))
            part = _part(tokens, objective, evaluation_generator(seed, tokens), scores_end=False)
            parts.append(part if max_residues is None else part.first(max_residues))
        yield _batch(parts, row, window_tokens, objective)


def pack_row(proteins: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Returns the tokens (int64) and the bounds (int32) of a row of these proteins, `<cls>` and `<eos>` around each."""
    sizes = np.array([len(protein) + 1 for protein in proteins])
    joined = np.concatenate([piece for protein in proteins for piece in (protein, _END)])
    bounds = _bounds(np.cumsum(sizes))
    return torch.from_numpy(_with_cls(joined, bounds)), torch.from_numpy(bounds.astype(np.int32))


def _epoch_rows(draws: Draws, lengths: np.ndarray, config: DataConfig, epoch: int) -> Iterator[Row]:
    order = draws.epoch(epoch)
    if config.mode == "concatenated":
        return _joined_rows(order, lengths[order], config.tokens_per_batch, config.window_tokens, epoch)
    return _packed_rows(order, np.minimum(lengths, config.window)[order], config.tokens_per_batch, epoch)


def _packed_rows(order: np.ndarray, sizes: np.ndarray, tokens_per_batch: int, epoch: int) -> Iterator[Row]:
    for stretch in pack(sizes, tokens_per_batch):
        yield Row(order[stretch], epoch * len(order) + stretch.start, epoch)


def _joined_rows(
    order: np.ndarray, sizes: np.ndarray, tokens_per_batch: int, window_tokens: int, epoch: int
) -> Iterator[Row]:
    """Yields rows of whole windows over all proteins joined; the last window may be short."""
    ends = np.cumsum(sizes + 1)
    num_joined = int(ends[-1])
    per_row = _joined_per_row(tokens_per_batch, window_tokens)
    for start in range(0, num_joined, per_row):
        stop = min(start + per_row, num_joined)
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, stop, side="left"))
        before = int(ends[first - 1]) if first else 0
        yield Row(order[first : last + 1], epoch * len(order) + first, epoch, start - before, stop - start)


def _joined_per_row(tokens_per_batch: int, window_tokens: int) -> int:
    """Returns how many tokens of the joined proteins a row holds; `<cls>` of each window comes on top."""
    return max(1, tokens_per_batch // window_tokens) * (window_tokens - 1)


class _Part(NamedTuple):
    """Residues of one protein: the true ones, the seen ones, which are targets, and whether its `<eos>` is one."""

    tokens: np.ndarray
    seen: np.ndarray
    target_mask: np.ndarray
    scores_end: bool

    def first(self, num_residues: int) -> "_Part":
        """Returns its first residues."""
        kept = slice(num_residues)
        return _Part(self.tokens[kept], self.seen[kept], self.target_mask[kept], self.scores_end)


def _part(tokens: np.ndarray, objective: Objective, generator: np.random.Generator, *, scores_end: bool) -> _Part:
    if objective.causal:
        return _Part(tokens, tokens, np.ones(len(tokens), dtype=bool), scores_end)
    return _Part(tokens, *mask_residues(tokens, objective.rates, generator), scores_end)


def _batch(parts: Sequence[_Part], row: Row, window_tokens: int | None, objective: Objective) -> Batch:
    """Returns the row of these proteins: each a segment of its own, or joined and cut into windows."""
    if not are_residues(np.concatenate([part.tokens for part in parts])):
        raise ShardError("the dataset holds tokens that stand for no residue: a shard is damaged; prepare it again")
    stop = None if row.num_tokens is None else row.first_token + row.num_tokens
    kept = slice(row.first_token, stop)
    true = np.concatenate([piece for part in parts for piece in (part.tokens, _END)])[kept]
    seen = np.concatenate([piece for part in parts for piece in (part.seen, _END)])[kept]
    is_target = np.concatenate(
        [piece for part in parts for piece in (part.target_mask, _SCORED if part.scores_end else _NOT_SCORED)]
    )[kept]
    if window_tokens is None:
        ends = np.cumsum([len(part.tokens) + 1 for part in parts])
    else:
        ends = np.append(np.arange(window_tokens - 1, len(true), window_tokens - 1), len(true))
    bounds = _bounds(ends)
    chosen = is_target.nonzero()[0]
    # Before a target stand those before it, and a `<cls>` for each segment up to its own; causally the prediction is
    # made one token earlier, which may be that `<cls>`.
    positions = chosen + np.searchsorted(ends, chosen, side="right") + (0 if objective.causal else 1)
    return Batch(
        tokens=torch.from_numpy(_with_cls(seen, bounds)),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        target_positions=torch.from_numpy(positions),
        targets=torch.from_numpy(true[chosen].astype(np.int64)),
        epoch=row.epoch,
        num_residues=int(np.count_nonzero(true != EOS)),
    )


def _bounds(ends: np.ndarray) -> np.ndarray:
    """Returns the bounds of segments in a row, from where each ends while its `<cls>` is not counted."""
    return np.concatenate(([0], ends + np.arange(1, len(ends) + 1)))


def _with_cls(joined: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Returns a row, int64: what its segments hold, with `<cls>` before each."""
    row = np.full(bounds[-1], CLS, dtype=np.int64)
    is_cls = np.zeros(len(row), dtype=bool)
    is_cls[bounds[:-1]] = True
    row[~is_cls] = joined
    return row
