"""From records to packed rows: hides in which order proteins come and how they are put into rows.

A training run is one endless stream of rows that is a function of (seed, lengths, budget): it can start at any row,
which is how a resumed run finds its place.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from protlm.config import SPECIAL_TOKENS_PER_SEGMENT, DataConfig
from protlm.data.masking import evaluation_generator, mask_residues, training_generator
from protlm.errors import ShardError
from protlm.vocabulary import CLS, EOS, are_residues

# Separates the generator of an epoch's order from those of its masks, which have the same key but start at counter 0.
_ORDER_COUNTER = np.array([0, 0, 0, 1], dtype=np.uint64)


class Proteins(Protocol):
    """What a batch needs of a split: lengths in residues, and the residue tokens of each record."""

    @property
    def lengths(self) -> np.ndarray:
        """int64, one a record."""

    def tokens(self, record: int) -> np.ndarray:
        """uint8 residue tokens of one record."""


class Batch(NamedTuple):
    """One packed row and what is scored in it.

    Attributes:
        tokens: int64 (length,), `<cls> residues <eos>` of each protein, targets hidden.
        cu_seqlens: int32 (segments + 1,), the bounds of the proteins.
        target_positions: int64 (targets,), the scored positions of the row.
        targets: int64 (targets,), the true tokens there.
        epoch: Times that the stream has gone through the data before this row.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    target_positions: Tensor
    targets: Tensor
    epoch: int

    @property
    def num_residues(self) -> int:
        """Residues in the row."""
        return len(self.tokens) - SPECIAL_TOKENS_PER_SEGMENT * (len(self.cu_seqlens) - 1)


@dataclass(frozen=True)
class Row:
    """The plan of one training row: which records, and the number of each draw in the whole run."""

    records: np.ndarray
    first_draw: int
    epoch: int


def pack(num_residues: np.ndarray, tokens_per_batch: int) -> Iterator[slice]:
    """Yields the stretches of consecutive proteins that fill one row each; a longer one has a row of its own."""
    ends = np.cumsum(num_residues + SPECIAL_TOKENS_PER_SEGMENT)
    start = 0
    while start < len(ends):
        used = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, used + tokens_per_batch, side="right")))
        yield slice(start, stop)
        start = stop


def training_rows(lengths: np.ndarray, config: DataConfig, seed: int, first_row: int = 0) -> Iterator[Row]:
    """Yields the endless stream of training rows from row first_row on.

    Every epoch goes through all records in another random order; the last row of an epoch may be short.

    Raises:
        ValueError: There is no record.
    """
    if not len(lengths):
        raise ValueError("lengths: expected at least one record, got none")
    sizes = np.minimum(lengths, config.window)
    row_number, epoch = 0, 0
    while True:
        key = np.array([seed, epoch], dtype=np.uint64)
        order = np.random.Generator(np.random.Philox(key=key, counter=_ORDER_COUNTER)).permutation(len(sizes))
        for stretch in pack(sizes[order], config.tokens_per_batch):
            if row_number >= first_row:
                yield Row(order[stretch], epoch * len(sizes) + stretch.start, epoch)
            row_number += 1
        epoch += 1


def training_batch(row: Row, proteins: Proteins, config: DataConfig, seed: int, mask_rate: float) -> Batch:
    """Returns the packed and masked row; of a protein longer than the window a random stretch."""
    originals, seen, masks = [], [], []
    for number, record in enumerate(row.records):
        generator = training_generator(seed, row.first_draw + number)
        tokens = proteins.tokens(int(record))
        if len(tokens) > config.window:
            start = int(generator.integers(len(tokens) - config.window + 1))
            tokens = tokens[start : start + config.window]
        corrupted, target_mask = mask_residues(tokens, mask_rate, generator)
        originals.append(tokens)
        seen.append(corrupted)
        masks.append(target_mask)
    return _packed(originals, seen, masks, row.epoch)


def evaluation_batches(proteins: Proteins, tokens_per_batch: int, seed: int, mask_rate: float) -> Iterator[Batch]:
    """Yields the records in order, whole, each masked as a function of the seed and its sequence."""
    for stretch in pack(proteins.lengths, tokens_per_batch):
        originals = [proteins.tokens(record) for record in range(stretch.start, stretch.stop)]
        masked = [mask_residues(tokens, mask_rate, evaluation_generator(seed, tokens)) for tokens in originals]
        yield _packed(originals, [seen for seen, _ in masked], [mask for _, mask in masked], epoch=0)


def pack_row(proteins: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Returns the tokens (int64) and the bounds (int32) of a row of these proteins, `<cls>` and `<eos>` around each."""
    sizes = np.array([len(protein) + SPECIAL_TOKENS_PER_SEGMENT for protein in proteins])
    bounds = np.concatenate(([0], np.cumsum(sizes)))
    row = np.full(bounds[-1], CLS, dtype=np.int64)
    row[bounds[1:] - 1] = EOS
    row[_residue_positions(bounds)] = np.concatenate(proteins)
    return torch.from_numpy(row), torch.from_numpy(bounds.astype(np.int32))


def _packed(
    originals: Sequence[np.ndarray], seen: Sequence[np.ndarray], masks: Sequence[np.ndarray], epoch: int
) -> Batch:
    residues = np.concatenate(originals)
    if not are_residues(residues):
        raise ShardError("the dataset holds tokens that stand for no residue: a shard is damaged; prepare it again")
    row, bounds = pack_row(seen)
    chosen = np.concatenate(masks).nonzero()[0]
    positions = _residue_positions(bounds.numpy())[chosen]
    targets = residues[chosen].astype(np.int64)
    return Batch(row, bounds, torch.from_numpy(positions), torch.from_numpy(targets), epoch)


def _residue_positions(bounds: np.ndarray) -> np.ndarray:
    """Returns where in a row with these segment bounds the residues stand, in order."""
    is_residue = np.ones(bounds[-1], dtype=bool)
    is_residue[bounds[:-1]] = False
    is_residue[bounds[1:] - 1] = False
    return is_residue.nonzero()[0]
