"""Batches from planned rows: hides which tokens of a row are hidden and predicted, and where its segments lie."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from protlm.config import DataConfig
from protlm.data.batching.masking import Objective, evaluation_generator, mask_residues, training_generator
from protlm.data.batching.rows import Row, joined_rows, packed_rows
from protlm.errors import ShardError
from protlm.vocabulary import CLS, EOS, are_residues

_END = np.array([EOS], dtype=np.uint8)
_SCORED, _NOT_SCORED = np.array([True]), np.array([False])


class Proteins(Protocol):
    """Records to make batches of: their lengths in residues and their residue tokens, as a split has them."""

    @property
    def lengths(self) -> np.ndarray:
        """int64, one a record."""

    def tokens(self, record: int) -> np.ndarray:
        """uint8 residue tokens of one record."""


class Batch(NamedTuple):
    """One row of tokens and the targets in it.

    Attributes:
        tokens: int64 (length,), segment after segment, masked targets hidden. A segment is one protein,
            `<cls> residues <eos>`, or a window of concatenated proteins: `<cls>` and a stretch of all proteins joined,
            each with its `<eos>`.
        cu_seqlens: int32 (segments + 1,), the bounds of the segments.
        target_positions: int64 (targets,), positions in the row of the predictions: of the hidden residues, or if
            causal, one token before each target, in its segment. A row may have none.
        targets: int64 (targets,), the true tokens.
        epoch: Number of epochs that the stream completed before this row.
        num_residues: Number of residues in the row.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    target_positions: Tensor
    targets: Tensor
    epoch: int
    num_residues: int


class EvaluationRow(NamedTuple):
    """One row of a split that is scored.

    Attributes:
        batch: The row and its targets.
        records: Number of each target's record in the split, int64 (targets,).
        positions: Position of each target in its protein, from 0, int64 (targets,).
    """

    batch: Batch
    records: np.ndarray
    positions: np.ndarray


def training_batch(row: Row, proteins: Proteins, config: DataConfig, seed: int, objective: Objective) -> Batch:
    """Returns the batch of a planned row: its proteins cropped, masked and joined according to the settings.

    Args:
        row: A row of `training_rows`.
        proteins: The records that were drawn from.
        config: The settings that the row was planned with.
        seed: Seed of the run.
        objective: The training objective.
    """
    stretches = []
    for number, record in enumerate(row.records):
        generator = training_generator(seed, row.first_draw + number)
        tokens = proteins.tokens(int(record))
        reaches_end = True
        if config.mode != "concatenated" and len(tokens) > config.window:
            latest = len(tokens) - config.window
            start = int(generator.integers(latest + 1)) if config.mode == "packed" else 0
            tokens = tokens[start : start + config.window]
            reaches_end = start == latest
        stretches.append(_stretch(tokens, objective, generator, scores_end=objective.causal and reaches_end))
    window_tokens = config.window_tokens if config.mode == "concatenated" else None
    return _batch(stretches, row, window_tokens, objective)[0]


def evaluation_rows(
    proteins: Proteins,
    tokens_per_batch: int,
    seed: int,
    objective: Objective,
    *,
    window_tokens: int | None = None,
    max_residues: int | None = None,
) -> Iterator[EvaluationRow]:
    """Yields the records in order, each masked as a function of the seed and its whole sequence; no `<eos>` is scored.

    Args:
        proteins: The records.
        tokens_per_batch: Budget of a row; a protein or window beyond it has its own row.
        seed: Determines, together with each sequence, which residues are hidden.
        objective: What is predicted, and what is hidden meanwhile.
        window_tokens: Join the proteins and cut them into windows of so many tokens, as in training; default: each
            protein is a segment.
        max_residues: Cut a longer protein to its first max_residues after masking; not together with window_tokens.
    """
    if window_tokens is not None and max_residues is not None:
        raise ValueError(f"max_residues: expected none with window_tokens, which bound a segment, got {max_residues}")
    order = np.arange(len(proteins.lengths))
    if window_tokens is None:
        sizes = proteins.lengths if max_residues is None else np.minimum(proteins.lengths, max_residues)
        rows = packed_rows(order, sizes, tokens_per_batch, epoch=0)
    else:
        rows = joined_rows(order, proteins.lengths, tokens_per_batch, window_tokens, epoch=0)
    for row in rows:
        stretches = []
        for record in row.records:
            tokens = proteins.tokens(int(record))
            stretch = _stretch(tokens, objective, evaluation_generator(seed, tokens), scores_end=False)
            stretches.append(stretch if max_residues is None else stretch.first(max_residues))
        batch, places = _batch(stretches, row, window_tokens, objective)
        # Places count an `<eos>` behind each protein, from the beginning of the first one.
        starts = np.cumsum([0, *(len(stretch.tokens) + 1 for stretch in stretches)])
        members = np.searchsorted(starts, places, side="right") - 1
        yield EvaluationRow(batch, row.records[members], places - starts[members])


def pack_row(proteins: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Returns the tokens (int64) and the bounds (int32) of a row of these proteins, `<cls>` and `<eos>` around each."""
    sizes = np.array([len(protein) + 1 for protein in proteins])
    joined = np.concatenate([tokens for protein in proteins for tokens in (protein, _END)])
    bounds = _bounds(np.cumsum(sizes))
    return torch.from_numpy(_with_cls(joined, bounds)), torch.from_numpy(bounds.astype(np.int32))


class _Stretch(NamedTuple):
    """Consecutive residues of one protein: true tokens, seen tokens, the targets, and whether `<eos>` is one too."""

    tokens: np.ndarray
    seen: np.ndarray
    target_mask: np.ndarray
    scores_end: bool

    def first(self, num_residues: int) -> "_Stretch":
        """Returns its first residues."""
        kept = slice(num_residues)
        return _Stretch(self.tokens[kept], self.seen[kept], self.target_mask[kept], self.scores_end)


def _stretch(tokens: np.ndarray, objective: Objective, generator: np.random.Generator, *, scores_end: bool) -> _Stretch:
    if objective.causal:
        return _Stretch(tokens, tokens, np.ones(len(tokens), dtype=bool), scores_end)
    return _Stretch(tokens, *mask_residues(tokens, objective.rates, generator), scores_end)


def _batch(
    stretches: Sequence[_Stretch], row: Row, window_tokens: int | None, objective: Objective
) -> tuple[Batch, np.ndarray]:
    """Returns the batch of these proteins: each a segment, or joined and cut into windows, which are the segments.

    With it come the places of the targets, int64 (targets,), among the tokens of all stretches joined, with an `<eos>`
    behind each stretch.
    """
    if not are_residues(np.concatenate([stretch.tokens for stretch in stretches])):
        raise ShardError("the dataset holds tokens that stand for no residue: a shard is damaged; prepare it again")
    stop = None if row.num_tokens is None else row.first_token + row.num_tokens
    kept = slice(row.first_token, stop)
    true = np.concatenate([tokens for stretch in stretches for tokens in (stretch.tokens, _END)])[kept]
    seen = np.concatenate([tokens for stretch in stretches for tokens in (stretch.seen, _END)])[kept]
    end_masks = [_SCORED if stretch.scores_end else _NOT_SCORED for stretch in stretches]
    is_target = np.concatenate(
        [mask for stretch, end in zip(stretches, end_masks, strict=True) for mask in (stretch.target_mask, end)]
    )[kept]
    if window_tokens is None:
        ends = np.cumsum([len(stretch.tokens) + 1 for stretch in stretches])
    else:
        ends = np.append(np.arange(window_tokens - 1, len(true), window_tokens - 1), len(true))
    bounds = _bounds(ends)
    chosen = is_target.nonzero()[0]
    # A target is preceded in its row by the tokens before it and one `<cls>` for each segment up to its own; a causal
    # prediction is made one token earlier, which may be that `<cls>`.
    positions = chosen + np.searchsorted(ends, chosen, side="right") + (0 if objective.causal else 1)
    batch = Batch(
        tokens=torch.from_numpy(_with_cls(seen, bounds)),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        target_positions=torch.from_numpy(positions),
        targets=torch.from_numpy(true[chosen].astype(np.int64)),
        epoch=row.epoch,
        num_residues=int(np.count_nonzero(true != EOS)),
    )
    return batch, chosen + row.first_token


def _bounds(ends: np.ndarray) -> np.ndarray:
    """Returns the bounds of segments in a row, given their ends without counting `<cls>`."""
    return np.concatenate(([0], ends + np.arange(1, len(ends) + 1)))


def _with_cls(joined: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Returns a row, int64: the joined tokens of its segments with `<cls>` before each segment."""
    row = np.full(bounds[-1], CLS, dtype=np.int64)
    is_cls = np.zeros(len(row), dtype=bool)
    is_cls[bounds[:-1]] = True
    row[~is_cls] = joined
    return row
