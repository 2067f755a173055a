import numpy as np
import pytest

from protlm.data.batching.batches import evaluation_rows
from protlm.data.batching.masking import MaskRates, Objective, evaluation_generator, mask_residues
from protlm.vocabulary import CLS, EOS, MASK, are_residues
from tests.unit.data.batching.batch_cases import LENGTHS, InMemory

HIDDEN = Objective(causal=False, rates=MaskRates(0.3)).hiding_all()
NEXT_TOKEN = Objective(causal=True, rates=MaskRates(0.3))
BUDGETS = (1, 40, 100, 16_384)
SHAPES = [{}, {"max_residues": 20}, {"max_residues": 1}, {"window_tokens": 7}, {"window_tokens": 64}]


def ids_of(shape):
    return "-".join(f"{name} {value}" for name, value in shape.items()) or "whole"


def expected_targets(proteins, objective, limit=None):
    """The record and position of every target of a split, protein by protein."""
    targets = []
    for record, tokens in enumerate(proteins.sequences):
        target_mask = np.ones(len(tokens), dtype=bool)
        if not objective.causal:
            _, target_mask = mask_residues(tokens, objective.rates, evaluation_generator(3, tokens))
        targets += [(record, place) for place in np.flatnonzero(target_mask[:limit]).tolist()]
    return targets


def places_in_rows(proteins, row, shape, following):
    """The record and position of every token of a row, (None, None) for specials; `following` is the stream of them."""
    places = []
    for token in row.batch.tokens.tolist():
        if token == CLS:
            places.append((None, None))
        else:
            places.append(next(following))
            assert (token == EOS) == (places[-1] == (None, None))
    return places


def stream_of(proteins, limit=None):
    for record, tokens in enumerate(proteins.sequences):
        yield from ((record, place) for place in range(len(tokens[:limit])))
        yield (None, None)


@pytest.mark.parametrize("objective", [HIDDEN, NEXT_TOKEN], ids=["hidden", "next"])
@pytest.mark.parametrize("shape", SHAPES, ids=ids_of)
@pytest.mark.parametrize("tokens_per_batch", BUDGETS)
def test_records_and_positions_are_those_of_the_tokens_at_the_targets(objective, shape, tokens_per_batch):
    proteins = InMemory(*LENGTHS)
    limit = shape.get("max_residues")
    following = stream_of(proteins, limit)
    targets = []
    for row in evaluation_rows(proteins, tokens_per_batch, 3, objective, **shape):
        places = places_in_rows(proteins, row, shape, following)
        at_targets = row.batch.target_positions + (1 if objective.causal else 0)
        scored = list(zip(row.records.tolist(), row.positions.tolist(), strict=True))
        assert scored == [places[place] for place in at_targets.tolist()]
        assert row.batch.targets.tolist() == [int(proteins.sequences[record][place]) for record, place in scored]
        assert row.records.dtype == row.positions.dtype == np.int64
        targets += scored
    assert next(following, None) is None, "every token of the split is in a row"
    assert targets == expected_targets(proteins, objective, limit)


@pytest.mark.parametrize("shape", SHAPES, ids=ids_of)
@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
def test_every_target_is_hidden_and_nothing_else_is(shape, rate):
    proteins = InMemory(*LENGTHS)
    objective = Objective(causal=False, rates=MaskRates(rate)).hiding_all()
    for row in evaluation_rows(proteins, 100, 0, objective, **shape):
        hidden = (row.batch.tokens == MASK).nonzero().squeeze(1)
        assert hidden.tolist() == row.batch.target_positions.tolist()
        assert are_residues(row.batch.targets.numpy())


def test_hiding_all_changes_the_sight_of_the_targets_and_not_which_they_are():
    proteins = InMemory(*LENGTHS)
    mixture = Objective(causal=False, rates=MaskRates(0.3))
    assert mixture.hiding_all().rates == MaskRates(0.3, mask_share=1.0, random_share=0.0)
    num_visible = 0
    for trained, hidden in zip(
        evaluation_rows(proteins, 100, 0, mixture), evaluation_rows(proteins, 100, 0, mixture.hiding_all()), strict=True
    ):
        assert trained.records.tolist() == hidden.records.tolist()
        assert trained.positions.tolist() == hidden.positions.tolist()
        assert trained.batch.targets.equal(hidden.batch.targets)
        num_visible += int((trained.batch.tokens[trained.batch.target_positions] != MASK).sum())
    assert num_visible > 10
    assert NEXT_TOKEN.hiding_all().causal


def test_a_row_of_windows_may_have_no_target_and_says_so():
    proteins = InMemory(30, 30)
    objective = Objective(causal=False, rates=MaskRates(0.01)).hiding_all()
    rows = list(evaluation_rows(proteins, 8, 0, objective, window_tokens=8))
    empty = [row for row in rows if not len(row.records)]
    assert empty
    assert all(len(row.positions) == len(row.batch.targets) == 0 for row in empty)
