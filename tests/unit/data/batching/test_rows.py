import itertools

import numpy as np
import pytest

from protlm.config import DataConfig
from protlm.data.batching import rows as row_plans
from protlm.data.batching.draws import Draws
from protlm.data.batching.rows import EpochSize, epoch_size, pack, portion_bounds
from tests.unit.data.batching.batch_cases import LENGTHS, InMemory, rows, training_batches


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


MODES = {
    "packed": {"max_length": 20},
    "clipped": {"mode": "clipped", "max_length": 20},
    "concatenated": {"mode": "concatenated", "window_tokens": 20},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first_row", [1, 5, 23, 50])
def test_a_stream_can_start_at_any_row(mode, first_row):
    whole, tail = rows(60, **MODES[mode]), rows(60 - first_row, first_row=first_row, **MODES[mode])
    for a, b in zip(whole[first_row:], tail, strict=True):
        assert np.array_equal(a.records, b.records)
        assert (a.first_draw, a.epoch, a.first_token, a.num_tokens) == (
            b.first_draw,
            b.epoch,
            b.first_token,
            b.num_tokens,
        )


def test_the_order_is_a_function_of_the_seed():
    orders = [[row.records.tolist() for row in rows(20, seed=seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_clipped_rows_are_planned_like_packed_ones():
    for packed, clipped in zip(rows(50, max_length=20), rows(50, mode="clipped", max_length=20), strict=True):
        assert np.array_equal(packed.records, clipped.records)
        assert packed.first_draw == clipped.first_draw


def test_an_epochs_size_is_that_of_its_rows():
    proteins = InMemory(*LENGTHS)
    for settings in (*MODES.values(), {}):
        batches = [b for b in training_batches(60, proteins, seed=5, **settings) if b.epoch == 0]
        config = DataConfig(tokens_per_batch=100, **settings)
        assert epoch_size(Draws([len(LENGTHS)], 5), proteins.lengths, config) == EpochSize(
            num_rows=len(batches),
            num_tokens=sum(len(batch.tokens) for batch in batches),
            num_residues=sum(batch.num_residues for batch in batches),
        )


@pytest.mark.parametrize("budget", [1, 7, 30, 1000])
def test_portions_are_as_long_as_their_budget_and_most_records_allow(budget, monkeypatch):
    monkeypatch.setattr(row_plans, "_MOST_PORTION_RECORDS", 9)
    generator = np.random.default_rng(budget)
    costs, counts = generator.integers(0, 12, 40), generator.integers(0, 6, 40)
    each = np.repeat(costs, counts)
    bounds = portion_bounds(each, budget).tolist()
    assert (bounds[0], bounds[-1]) == (0, len(each))
    for start, stop in itertools.pairwise(bounds):
        assert 1 <= stop - start <= 9
        assert stop - start == 1 or each[start:stop].sum() <= budget
        # Nothing more would fit.
        assert stop == len(each) or stop - start == 9 or each[start : stop + 1].sum() > budget
    # Runs of equal costs are counted, and not written out.
    assert portion_bounds(costs, budget, counts).tolist() == bounds


def test_portions_of_nothing_are_none():
    assert portion_bounds(np.zeros(0, dtype=np.int64), 10).tolist() == [0]
