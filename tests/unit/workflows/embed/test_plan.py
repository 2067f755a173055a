import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protlm.inference.long_proteins import Cut
from protlm.workflows.embed.plan import Plan

WHOLE = Cut()


def plan_of(sequences, *, cut=WHOLE, tokens_per_batch=64, bytes_per_residue=4):
    """A plan for proteins given as numbers: equal numbers are equal sequences, of that many residues."""
    lengths = np.array(sequences, dtype=np.int64)
    first = np.array([sequences.index(sequence) for sequence in sequences], dtype=np.int64)
    return Plan(lengths, first, cut, tokens_per_batch, bytes_per_residue)


PROTEINS = st.lists(st.integers(1, 300), min_size=1, max_size=120)


@given(sequences=PROTEINS, tokens_per_batch=st.sampled_from([3, 20, 64, 500]))
def test_every_sequence_is_computed_once_where_it_comes_first(sequences, tokens_per_batch):
    plan = plan_of(sequences, tokens_per_batch=tokens_per_batch)
    assert [record for portion in range(plan.num_portions) for record in plan.records(portion)] == list(
        range(len(sequences))
    )
    computed = [record for portion in range(plan.num_portions) for record in plan.computed(portion)]
    assert computed == sorted({sequences.index(sequence) for sequence in sequences})
    for portion in range(plan.num_portions):
        assert set(plan.computed(portion)) <= set(plan.records(portion))
        assert {plan.portion_of(record) for record in plan.records(portion)} == {portion}
        assert sorted(s.record for row in plan.rows(portion) for s in row) == plan.computed(portion)
        assert plan.num_residues(portion) == sum(sequences[record] for record in plan.computed(portion))


@given(sequences=PROTEINS, window=st.none() | st.integers(2, 100))
def test_rows_stay_within_the_budget_unless_one_protein_fills_them(sequences, window):
    plan = plan_of(sequences, cut=Cut(window=window), tokens_per_batch=64)
    for portion in range(plan.num_portions):
        rows = list(plan.rows(portion))
        sizes = [window.stop - window.start for row in rows for window in row]
        assert sizes == sorted(sizes, reverse=True)
        for row in rows:
            assert len(row) == 1 or sum(s.stop - s.start + 2 for s in row) <= 64


@given(sequences=PROTEINS)
def test_a_portion_is_used_until_the_last_record_with_a_sequence_of_it(sequences):
    plan = plan_of(sequences, tokens_per_batch=3)
    last_use = plan.last_use()
    for portion in range(plan.num_portions):
        firsts = set(plan.computed(portion))
        users = [plan.portion_of(n) for n, s in enumerate(sequences) if sequences.index(s) in firsts]
        assert last_use[portion] == max(users, default=portion)


def test_a_portion_holds_several_rows_but_no_more_than_memory_may():
    sequences = list(range(1, 200))
    many = plan_of(sequences, tokens_per_batch=250)
    rows = [len(list(many.rows(portion))) for portion in range(many.num_portions)]
    # Of long proteins one alone may fill a row.
    assert 16 <= max(rows) <= 32
    large = plan_of(sequences, tokens_per_batch=250, bytes_per_residue=1 << 20)
    assert max(len(list(large.rows(portion))) for portion in range(large.num_portions)) <= 3


def test_records_without_anything_to_compute_do_not_make_a_portion_endless():
    plan = plan_of([5] * 200_000, tokens_per_batch=64)
    assert plan.num_portions == pytest.approx(200_000 / 65_536, abs=1)
