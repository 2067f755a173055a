from itertools import islice

import numpy as np
import pytest
import torch

from protlm.config import DataConfig
from protlm.data.batches import evaluation_batches, pack, pack_row, training_batch, training_rows
from protlm.data.masking import evaluation_generator, mask_residues, training_generator
from protlm.errors import ShardError
from protlm.vocabulary import CLS, EOS, FIRST_RESIDUE, MASK, NUM_RESIDUES


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


LENGTHS = (5, 1, 30, 12, 98, 300, 7, 7, 44, 60, 2, 19)


def rows(num_rows, *, seed=0, first_row=0, tokens_per_batch=100, max_length=None, lengths=LENGTHS):
    config = DataConfig(tokens_per_batch=tokens_per_batch, max_length=max_length)
    return list(islice(training_rows(np.array(lengths), config, seed, first_row), num_rows))


def members(batch):
    """Returns for each protein of a batch its true residues and the places in it that are scored."""
    true = batch.tokens.clone()
    true[batch.target_positions] = batch.targets
    result = []
    for start, stop in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        inside = batch.target_positions[(batch.target_positions >= start) & (batch.target_positions < stop)]
        seen = tuple(batch.tokens[start + 1 : stop - 1].tolist())
        result.append((tuple(true[start + 1 : stop - 1].tolist()), tuple((inside - start - 1).tolist()), seen))
    return result


def test_a_row_is_cls_residues_eos_back_to_back():
    tokens, bounds = pack_row([np.array([4, 5], dtype=np.uint8), np.array([6], dtype=np.uint8)])
    assert tokens.tolist() == [CLS, 4, 5, EOS, CLS, 6, EOS]
    assert bounds.tolist() == [0, 4, 7]
    assert tokens.dtype == torch.int64
    assert bounds.dtype == torch.int32


@pytest.mark.parametrize(
    ("sizes", "budget", "expected"),
    [
        ([], 10, []),
        ([8], 10, [(0, 1)]),
        ([9], 10, [(0, 1)]),
        ([3, 3], 10, [(0, 2)]),
        ([3, 4], 10, [(0, 1), (1, 2)]),
        ([50, 1, 1, 50], 10, [(0, 1), (1, 3), (3, 4)]),
        ([1] * 7, 9, [(0, 3), (3, 6), (6, 7)]),
    ],
)
def test_consecutive_proteins_share_a_row_while_the_budget_lasts(sizes, budget, expected):
    stretches = list(pack(np.array(sizes, dtype=np.int64), budget))
    assert [(stretch.start, stretch.stop) for stretch in stretches] == expected


def test_every_epoch_has_every_record_once_in_its_own_order():
    epochs = {}
    for row in rows(100):
        epochs.setdefault(row.epoch, []).extend(row.records.tolist())
    assert len(epochs) > 5
    complete = list(epochs.values())[:-1]
    assert all(sorted(order) == list(range(len(LENGTHS))) for order in complete)
    assert len({tuple(order) for order in complete}) == len(complete)


def test_draws_are_numbered_through_the_whole_run():
    number = 0
    for row in rows(60):
        assert row.first_draw == number
        number += len(row.records)


def test_no_row_exceeds_the_budget_and_no_further_protein_would_fit():
    for max_length in (None, 20):
        window = max_length or 98
        stream = rows(100, max_length=max_length)
        sizes = [[min(LENGTHS[record], window) + 2 for record in row.records] for row in stream]
        for index, size in enumerate(sizes):
            assert sum(size) <= 100
            if index + 1 < len(sizes) and stream[index + 1].epoch == stream[index].epoch:
                assert sum(size) + sizes[index + 1][0] > 100


@pytest.mark.parametrize("first_row", [0, 1, 5, 23, 50])
def test_a_stream_can_start_at_any_row(first_row):
    whole, tail = rows(60), rows(60 - first_row, first_row=first_row)
    for a, b in zip(whole[first_row:], tail, strict=True):
        assert np.array_equal(a.records, b.records)
        assert (a.first_draw, a.epoch) == (b.first_draw, b.epoch)


def test_the_order_is_a_function_of_the_seed():
    orders = [[row.records.tolist() for row in rows(20, seed=seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def training_batches(num_rows, proteins, *, tokens_per_batch=100, max_length=20, seed=0):
    config = DataConfig(tokens_per_batch=tokens_per_batch, max_length=max_length)
    stream = islice(training_rows(proteins.lengths, config, seed), num_rows)
    return [training_batch(row, proteins, config, seed, 0.15) for row in stream]


def test_a_training_draw_does_not_depend_on_how_rows_are_packed():
    proteins = InMemory(*LENGTHS)
    narrow, wide = (
        [member for batch in training_batches(90, proteins, tokens_per_batch=budget) for member in members(batch)][:100]
        for budget in (30, 500)
    )
    assert narrow == wide
    assert len(narrow) == 100


def test_a_batch_hides_targets_only_and_never_a_special():
    proteins = InMemory(*LENGTHS)
    for batch in training_batches(30, proteins):
        starts, stops = batch.cu_seqlens[:-1].long(), batch.cu_seqlens[1:].long()
        assert (batch.tokens[starts] == CLS).all()
        assert (batch.tokens[stops - 1] == EOS).all()
        assert not set(batch.target_positions.tolist()) & {*starts.tolist(), *(stops - 1).tolist()}
        hidden = (batch.tokens == MASK).nonzero().squeeze(1)
        assert set(hidden.tolist()) <= set(batch.target_positions.tolist())
        assert (batch.targets >= FIRST_RESIDUE).all()
        assert (batch.targets < FIRST_RESIDUE + NUM_RESIDUES).all()
        assert all(positions for _, positions, _ in members(batch)), "a target in every protein"
        assert batch.num_residues == len(batch.tokens) - 2 * len(starts)
        assert (batch.tokens.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int32)
        assert (batch.target_positions.dtype, batch.targets.dtype) == (torch.int64, torch.int64)


def test_a_long_protein_gives_another_window_at_every_draw_and_ends_are_reached():
    proteins = InMemory(30)
    sequence = tuple(proteins.tokens(0).tolist())
    starts = []
    for batch in training_batches(300, proteins, tokens_per_batch=22):
        ((window, _, _),) = members(batch)
        assert len(window) == 20
        starts.append(next(s for s in range(11) if sequence[s : s + 20] == window))
    counts = np.bincount(starts, minlength=11)
    assert (counts > 300 / 11 / 3).all(), "every window, the first and the last too, comes about equally often"


def test_a_protein_that_fits_is_whole():
    proteins = InMemory(20, 5)
    whole = {tuple(sequence.tolist()) for sequence in proteins.sequences}
    for batch in training_batches(5, proteins):
        assert {window for window, _, _ in members(batch)} <= whole


def test_evaluation_keeps_order_and_whole_proteins():
    proteins = InMemory(*LENGTHS)
    found = [member for batch in evaluation_batches(proteins, 64, 0, 0.15) for member in members(batch)]
    assert [list(sequence) for sequence, _, _ in found] == [sequence.tolist() for sequence in proteins.sequences]


def test_an_evaluation_draw_depends_on_seed_and_sequence_alone():
    proteins = InMemory(*LENGTHS)
    by_budget = [
        [member for batch in evaluation_batches(proteins, budget, 7, 0.15) for member in members(batch)]
        for budget in (1, 50, 10_000)
    ]
    assert by_budget[0] == by_budget[1] == by_budget[2]
    other_seed = [member for batch in evaluation_batches(proteins, 50, 8, 0.15) for member in members(batch)]
    assert other_seed != by_budget[0]
    backwards = InMemory()
    backwards.sequences = proteins.sequences[::-1]
    reversed_order = [member for batch in evaluation_batches(backwards, 50, 7, 0.15) for member in members(batch)]
    assert reversed_order[::-1] == by_budget[0]
    for sequence, positions, seen in by_budget[0]:
        tokens = np.array(sequence, dtype=np.uint8)
        expected, target_mask = mask_residues(tokens, 0.15, evaluation_generator(7, tokens))
        assert seen == tuple(expected.tolist())
        assert positions == tuple(target_mask.nonzero()[0].tolist())


@pytest.mark.parametrize("token", [CLS, EOS, MASK, FIRST_RESIDUE + NUM_RESIDUES, 255])
def test_a_token_that_is_no_residue_is_a_shard_error(token):
    proteins = InMemory(10, 10)
    proteins.sequences[1][9] = token
    with pytest.raises(ShardError, match="no residue"):
        list(evaluation_batches(proteins, 100, 0, 0.15))
    with pytest.raises(ShardError, match="no residue"):
        training_batches(1, proteins)


def test_the_order_of_an_epoch_shares_no_random_numbers_with_the_masks():
    orders = {}
    for row in rows(30):
        orders.setdefault(row.epoch, []).extend(row.records.tolist())
    for epoch in range(3):
        assert orders[epoch] != training_generator(0, epoch).permutation(len(LENGTHS)).tolist()


def test_a_stream_of_no_records_is_refused_rather_than_endless():
    with pytest.raises(ValueError, match="at least one record"):
        next(training_rows(np.array([], dtype=np.int64), DataConfig(), seed=0))
