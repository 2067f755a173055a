import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protlm.data.batching.batches import evaluation_rows
from protlm.data.batching.masking import MaskRates, Objective
from protlm.inference import markov
from protlm.inference.markov import MarkovCounts, MarkovModel
from protlm.vocabulary import FIRST_RESIDUE, MASK, NUM_RESIDUES, RESIDUES, encode
from tests.unit.data.batching.batch_cases import InMemory

objectives = st.builds(
    lambda causal, rate: Objective(causal, MaskRates(rate)).hiding_all(), st.booleans(), st.floats(0.01, 1)
)
shapes = st.one_of(
    st.just({}),
    st.builds(lambda residues: {"max_residues": residues}, st.integers(1, 60)),
    st.builds(lambda tokens: {"window_tokens": tokens}, st.integers(3, 60)),
)
sequences = st.lists(st.text("LAXB", min_size=1, max_size=30), min_size=1, max_size=6)


@pytest.fixture(scope="module", autouse=True)
def _short_contexts():
    # A table of 25⁵ counts for each example would take seconds.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(markov, "MAX_ORDER", 2)
        yield


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=10), st.integers(0, 99), objectives, shapes, st.integers(1, 300)
)
def test_each_target_is_the_residue_at_its_place_and_unseen_whatever_the_rows(lengths, seed, objective, shape, budget):
    proteins, places = InMemory(*lengths, seed=seed), []
    for row in evaluation_rows(proteins, budget, seed, objective, **shape):
        of_row = list(zip(row.records.tolist(), row.positions.tolist(), strict=True))
        assert row.batch.targets.tolist() == [int(proteins.tokens(record)[place]) for record, place in of_row]
        if not objective.causal:
            assert (row.batch.tokens[row.batch.target_positions] == MASK).all()
        places += of_row
    assert places == sorted(set(places)), "every residue at most once, in the order of the split"
    others = evaluation_rows(proteins, 10_000, seed, objective, max_residues=shape.get("max_residues"))
    assert places == [pair for row in others for pair in zip(row.records, row.positions, strict=True)]


@settings(deadline=None)
@given(sequences, st.text("LAXBM", min_size=3, max_size=20))
def test_a_count_table_predicts_residues_with_probabilities_that_sum_to_one(training, scored):
    counts = MarkovCounts(2)
    counts.add(encode(sequence.encode()) for sequence in training)
    row = encode(scored.encode()).astype(np.int64)
    for order in range(3):
        predicted = np.exp(MarkovModel(counts, order).log_probabilities(row, np.arange(len(row))), dtype=np.float64)
        assert predicted[:, FIRST_RESIDUE : FIRST_RESIDUE + NUM_RESIDUES].sum(axis=1) == pytest.approx(1)
        assert (predicted[:, [RESIDUES.index(letter) + FIRST_RESIDUE for letter in "LAXBM"]] > 0).all()
        # What stands at or behind a position, or before its context, has no say.
        for position in range(len(row)):
            alone = row[max(0, position - order) : position]
            (of_context,) = MarkovModel(counts, order).log_probabilities(np.append(alone, MASK), np.array([len(alone)]))
            assert np.exp(of_context) == pytest.approx(predicted[position], rel=1e-6)
