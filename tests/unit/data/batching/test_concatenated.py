import numpy as np
import pytest
import torch

from protlm.data.batching.masking import MaskRates, Objective
from protlm.vocabulary import CLS, EOS
from tests.unit.data.batching.batch_cases import (
    CAUSAL,
    LENGTHS,
    MASKED,
    InMemory,
    evaluation_batches,
    joined_epoch,
    rows,
    segments,
    training_batches,
)  # fmt: skip

WINDOW = 33
SETTINGS = {"mode": "concatenated", "window_tokens": WINDOW}
NUM_JOINED = sum(LENGTHS) + len(LENGTHS)


def expected_stream(proteins, records):
    return [token for record in records for token in [*proteins.sequences[record].tolist(), EOS]]


def drawn_in_epoch(epoch, **settings):
    """Returns the records of an epoch in the order in which they are drawn."""
    return [record for row in rows(100, **settings) if row.epoch == epoch for record in row.records.tolist()]


@pytest.mark.parametrize("objective", [MASKED, CAUSAL], ids=["masked", "causal"])
@pytest.mark.parametrize("tokens_per_batch", [33, 100, 1000])
def test_joined_windows_give_back_the_proteins_of_every_epoch(tokens_per_batch, objective):
    proteins = InMemory(*LENGTHS)
    batches = training_batches(80, proteins, objective=objective, tokens_per_batch=tokens_per_batch, **SETTINGS)
    for epoch in range(3):
        true, _, _ = joined_epoch(batches, objective, epoch)
        assert true == expected_stream(proteins, drawn_in_epoch(epoch))


def test_rows_hold_as_many_whole_windows_as_fit_and_only_an_epochs_last_is_short():
    proteins = InMemory(*LENGTHS)
    batches = [batch for batch in training_batches(40, proteins, **SETTINGS) if batch.epoch == 0]
    sizes = [batch.cu_seqlens.diff().tolist() for batch in batches]
    assert all(row == [WINDOW] * 3 for row in sizes[:-1])
    assert all(size == WINDOW for size in sizes[-1][:-1])
    assert sum(map(sum, sizes)) == NUM_JOINED + sum(map(len, sizes))
    for batch in batches:
        assert (batch.tokens[batch.cu_seqlens[:-1].long()] == CLS).all()
        assert (batch.tokens == CLS).sum() == len(batch.cu_seqlens) - 1


@pytest.mark.parametrize(("tokens_per_batch", "window_tokens"), [(100, 33), (3, 3)])
def test_a_row_reads_only_the_proteins_that_it_shows(tokens_per_batch, window_tokens):
    class Watched(InMemory):
        def tokens(self, record):
            read.append(record)
            return super().tokens(record)

    proteins = Watched(*LENGTHS)
    settings = {"mode": "concatenated", "tokens_per_batch": tokens_per_batch, "window_tokens": window_tokens}
    for first_row, row in enumerate(rows(150, **settings)):
        read = []
        (batch,) = training_batches(1, proteins, first_row=first_row, **settings)
        assert read == row.records.tolist()
        # As many proteins show as ends of others stand before them, and one more if the row goes on after the last.
        true = [token for tokens, _, _ in segments(batch) for token in tokens[1:]]
        assert len(read) == true.count(EOS) + (true[-1] != EOS)


def masks_by_draw(batches, proteins, epoch):
    """Returns what is seen of each protein of an epoch, and where its targets are, in the order of the draws."""
    true, seen, places = joined_epoch(batches, epoch=epoch)
    ends = [place for place, token in enumerate(true) if token == EOS]
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [
        (seen[start:end], [place - start for place in places if start <= place < end])
        for start, end in zip(starts, ends, strict=True)
    ]


def test_masks_of_a_draw_are_those_of_packed_rows_wherever_windows_cut():
    proteins = InMemory(*LENGTHS)
    packed = training_batches(20, proteins, tokens_per_batch=400)
    for tokens_per_batch, window_tokens in ((100, 33), (64, 64), (3, 3)):
        batches = training_batches(
            700, proteins, mode="concatenated", tokens_per_batch=tokens_per_batch, window_tokens=window_tokens
        )
        for epoch in (0, 1):
            if batches[-1].epoch > epoch:
                assert masks_by_draw(batches, proteins, epoch) == masks_by_draw(packed, proteins, epoch)
        assert batches[-1].epoch > 0


def test_no_end_is_ever_hidden():
    proteins = InMemory(*LENGTHS)
    for batch in training_batches(30, proteins, objective=Objective(False, MaskRates(1.0)), **SETTINGS):
        for true, seen, places in segments(batch):
            assert places == [place for place, token in enumerate(true) if token not in (CLS, EOS)]
            assert [token == EOS for token in seen] == [token == EOS for token in true]


def test_causally_every_token_of_a_window_is_predicted_and_so_are_the_ends():
    for batch in training_batches(30, InMemory(*LENGTHS), objective=CAUSAL, **SETTINGS):
        assert batch.target_positions.tolist() == [
            place for place in range(len(batch.tokens)) if place + 1 not in batch.cu_seqlens
        ]
        assert torch.equal(batch.targets, batch.tokens[batch.target_positions + 1])


@pytest.mark.parametrize("objective", [MASKED, CAUSAL], ids=["masked", "causal"])
@pytest.mark.parametrize("budget", [10, 64, 10_000])
def test_evaluation_joins_the_records_in_order_with_the_masks_of_each_sequence(objective, budget):
    proteins = InMemory(*LENGTHS)
    joined = joined_epoch(evaluation_batches(proteins, budget, 7, objective, window_tokens=WINDOW), objective)
    assert joined == joined_epoch(evaluation_batches(proteins, 64, 7, objective), objective)
    assert joined[0] == expected_stream(proteins, range(len(LENGTHS)))
    assert not objective.causal or joined[2] == [place for place, token in enumerate(joined[0]) if token != EOS]


def test_a_row_without_a_target_is_legal():
    proteins = InMemory(*LENGTHS)
    rare = Objective(causal=False, rates=MaskRates(1e-9))
    batches = training_batches(100, proteins, objective=rare, mode="concatenated", tokens_per_batch=5, window_tokens=5)
    empty = [batch for batch in batches if not len(batch.targets)]
    assert len(empty) > 50
    for batch in empty:
        assert (batch.targets.dtype, batch.target_positions.dtype) == (torch.int64, torch.int64)
        assert batch.targets.shape == batch.target_positions.shape == (0,)


def test_residues_are_counted_without_ends_and_starts():
    proteins = InMemory(*LENGTHS)
    batches = [batch for batch in training_batches(40, proteins, **SETTINGS) if batch.epoch == 0]
    assert sum(batch.num_residues for batch in batches) == np.sum(LENGTHS)
    for batch in batches:
        true = [token for tokens, _, _ in segments(batch) for token in tokens]
        assert batch.num_residues == sum(token not in (CLS, EOS) for token in true)
