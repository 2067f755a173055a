import numpy as np
import pytest

from protlm.inference.residue_scores import ResidueScores
from protlm.vocabulary import FIRST_RESIDUE, NUM_RESIDUES, RESIDUES, VOCABULARY_SIZE


def scores_of(targets, log_probabilities):
    size = len(targets)
    return ResidueScores(np.zeros(size, np.int64), np.arange(size), np.asarray(targets), log_probabilities)


def slow_ranks(scores):
    """The place of each true residue in a sorted list: by falling probability, then by token."""
    ranks = []
    for target, row in zip(scores.targets.tolist(), scores.log_probabilities.tolist(), strict=True):
        ordered = sorted(range(len(row)), key=lambda token, row=row: (-row[token], token))
        ranks.append(ordered.index(target))
    return ranks


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_the_rank_is_the_place_in_the_sorted_predictions_also_among_equal_ones(levels, dtype):
    generator = np.random.default_rng(levels)
    targets = generator.integers(FIRST_RESIDUE, FIRST_RESIDUE + NUM_RESIDUES, 500)
    scores = scores_of(targets, -generator.integers(0, levels, (500, VOCABULARY_SIZE)).astype(dtype))
    assert scores.ranks().tolist() == slow_ranks(scores)
    assert ((scores.ranks() == 0) == (scores.log_probabilities.argmax(axis=1) == targets)).all()
    assert scores.ranks().dtype == np.int64


def test_of_equal_predictions_the_lower_token_is_first_and_impossible_ones_are_last():
    log_probabilities = np.zeros((3, VOCABULARY_SIZE))
    log_probabilities[1, :] = -np.inf
    log_probabilities[2, :FIRST_RESIDUE] = -np.inf
    scores = scores_of([FIRST_RESIDUE] * 3, log_probabilities)
    assert scores.ranks().tolist() == slow_ranks(scores) == [4, 4, 0]


def test_a_prediction_that_is_not_a_number_ranks_last():
    log_probabilities = np.log(np.full((3, VOCABULARY_SIZE), 1 / VOCABULARY_SIZE))
    log_probabilities[0] = np.nan
    log_probabilities[1, 9] = np.nan
    # NaN elsewhere is not ahead of a number.
    log_probabilities[2, 4] = np.nan
    assert scores_of([9, 9, 9], log_probabilities).ranks().tolist() == [32, 32, 8]


def test_the_log_probability_of_the_true_residue_is_its_own():
    generator = np.random.default_rng(0)
    targets = generator.integers(FIRST_RESIDUE, FIRST_RESIDUE + NUM_RESIDUES, 50)
    scores = scores_of(targets, generator.normal(size=(50, VOCABULARY_SIZE)).astype(np.float32))
    expected = [float(row[target]) for row, target in zip(scores.log_probabilities, targets, strict=True)]
    assert scores.true_log_probabilities().tolist() == expected
    assert scores.true_log_probabilities().dtype == np.float64
    assert [RESIDUES[place] for place in scores_of([4, 5, 28], np.zeros((3, 33))).residues] == list("LAO")
    assert len(scores) == 50


def test_a_row_may_have_no_targets():
    scores = scores_of(np.zeros(0, np.int64), np.zeros((0, VOCABULARY_SIZE), np.float32))
    assert len(scores) == len(scores.ranks()) == len(scores.true_log_probabilities()) == 0
