"""Proteins of a split whose residues are hidden one at a time: pseudo-perplexity, exact and expensive.

The pseudo-perplexity of a protein is exp(−1/L Σ_i log P(x_i | x without x_i)) (Salazar et al., arXiv 1910.14659). It
takes a forward pass of the protein for each of its residues, so it is measured on a sample of a split.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import xxhash

from protlm.data.batching.batches import EvaluationRow, Proteins
from protlm.inference.long_proteins import Cut
from protlm.inference.marginals import packed_passes, passes_of, row_of


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
        passes = passes_of(record, tokens, np.arange(len(tokens)), "masked", Cut())
        yield from map(row_of, packed_passes(passes, tokens_per_batch))
