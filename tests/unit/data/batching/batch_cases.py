"""Proteins in memory, and short ways to the rows and batches that are made of them."""

from itertools import islice, pairwise

import numpy as np

from protlm.config import DataConfig
from protlm.data.batching.batches import evaluation_rows, training_batch
from protlm.data.batching.draws import Draws
from protlm.data.batching.masking import MaskRates, Objective
from protlm.data.batching.rows import training_rows
from protlm.vocabulary import CLS, FIRST_RESIDUE, NUM_RESIDUES


class InMemory:
    """Proteins that lie in memory."""

    def __init__(self, *lengths, seed=0):
        generator = np.random.default_rng(seed)
        self.sequences = [
            generator.integers(FIRST_RESIDUE, FIRST_RESIDUE + NUM_RESIDUES, length, dtype=np.uint8)
            for length in lengths
        ]

    @property
    def lengths(self):
        return np.array([len(sequence) for sequence in self.sequences], dtype=np.int64)

    def tokens(self, record):
        return self.sequences[record]


MASKED = Objective(causal=False, rates=MaskRates(0.15))
CAUSAL = Objective(causal=True, rates=MaskRates(0.15))
LENGTHS = (5, 1, 30, 12, 98, 300, 7, 7, 44, 60, 2, 19)


def rows(num_rows, *, seed=0, first_row=0, lengths=LENGTHS, tokens_per_batch=100, **settings):
    config = DataConfig(tokens_per_batch=tokens_per_batch, **settings)
    stream = training_rows(Draws([len(lengths)], seed), np.array(lengths), config, first_row)
    return list(islice(stream, num_rows))


def training_batches(num_rows, proteins, *, objective=MASKED, seed=0, first_row=0, tokens_per_batch=100, **settings):
    config = DataConfig(tokens_per_batch=tokens_per_batch, **settings)
    stream = training_rows(Draws([len(proteins.lengths)], seed), proteins.lengths, config, first_row)
    return [training_batch(row, proteins, config, seed, objective) for row in islice(stream, num_rows)]


def segments(batch, objective=MASKED):
    """Returns for each segment of a batch its true tokens, those that are seen, and the places in it of the targets."""
    shift = 1 if objective.causal else 0
    true = batch.tokens.clone()
    true[batch.target_positions + shift] = batch.targets
    result = []
    for start, stop in pairwise(batch.cu_seqlens.tolist()):
        inside = [place for place in batch.target_positions.tolist() if start <= place < stop]
        assert all(place + shift < stop for place in inside), "a target in another segment than its prediction"
        places = [place + shift - start for place in inside]
        result.append((true[start:stop].tolist(), batch.tokens[start:stop].tolist(), places))
    return result


def joined_epoch(batches, objective=MASKED, epoch=0):
    """Returns an epoch's segments without `<cls>`, end to end: true tokens, seen ones, and the places of targets."""
    true, seen, places = [], [], []
    for batch in batches:
        if batch.epoch == epoch:
            for true_segment, seen_segment, inside in segments(batch, objective):
                assert true_segment[0] == seen_segment[0] == CLS
                places += [len(true) + place - 1 for place in inside]
                true += true_segment[1:]
                seen += seen_segment[1:]
    return true, seen, places


def evaluation_batches(*arguments, **options):
    """Returns the batches of the rows that evaluation scores."""
    return [row.batch for row in evaluation_rows(*arguments, **options)]
