"""Rows in which one residue of a protein is hidden at a time: pseudo-perplexity, exact and expensive.

The pseudo-perplexity of a protein is exp(−1/L Σ_i log P(x_i | x without x_i)) (Salazar et al., arXiv 1910.14659). It
takes a forward pass of the protein for each of its residues, so it is measured on a sample of a split.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import xxhash

from protlm.config import SPECIAL_TOKENS_PER_SEGMENT
from protlm.data.batching.batches import Batch, EvaluationRow, Proteins, pack_row
from protlm.vocabulary import MASK


def sample_of(proteins: Proteins, num_proteins: int, seed: int, max_residues: int | None = None) -> list[int]:
    """Returns the numbers of some proteins, rising: those with the smallest hash of seed and sequence.

    Args:
        proteins: The split.
        num_proteins: How many to take, of those that are short enough.
        seed: Of the sample.
        max_residues: Length of the longest protein to take; None: any.
    """
    is_short = np.full(len(proteins.lengths), True) if max_residues is None else proteins.lengths <= max_residues
    records = np.flatnonzero(is_short)
    hashes = [xxhash.xxh3_64_intdigest(proteins.tokens(record).tobytes(), seed=seed) for record in records.tolist()]
    chosen = np.argsort(np.array(hashes, dtype=np.uint64), kind="stable")[:num_proteins]
    return sorted(records[chosen].tolist())


def single_residue_rows(proteins: Proteins, records: Sequence[int], tokens_per_batch: int) -> Iterator[EvaluationRow]:
    """Yields rows of copies of each protein, one for each of its residues, which alone is hidden in it.

    Args:
        proteins: The split.
        records: Numbers of the proteins to take.
        tokens_per_batch: Budget of a row; one copy of a longer protein has a row of its own.
    """
    for record in records:
        tokens = np.asarray(proteins.tokens(record))
        size = len(tokens) + SPECIAL_TOKENS_PER_SEGMENT
        per_row = max(1, tokens_per_batch // size)
        for start in range(0, len(tokens), per_row):
            positions = np.arange(start, min(start + per_row, len(tokens)))
            copies = np.repeat(tokens[None], len(positions), axis=0)
            copies[np.arange(len(positions)), positions] = MASK
            row, bounds = pack_row(list(copies))
            batch = Batch(
                tokens=row,
                cu_seqlens=bounds,
                # One `<cls>` stands before each copy.
                target_positions=torch.from_numpy(np.arange(len(positions)) * size + positions + 1),
                targets=torch.from_numpy(tokens[positions].astype(np.int64)),
                epoch=0,
                num_residues=copies.size,
            )
            yield EvaluationRow(batch, np.full(len(positions), record, dtype=np.int64), positions)
