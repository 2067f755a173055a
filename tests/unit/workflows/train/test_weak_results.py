import math

import pytest

from protlm.pretrained.model_description import ValidScore
from protlm.workflows.train.weak_results import weak_results


def score(perplexity, targets="hidden"):
    return ValidScore(
        targets=targets, num_targets=900, accuracy=0.1, perplexity=perplexity, empirical_accuracy=0.1,
        empirical_perplexity=17.8,
    )  # fmt: skip


def lines(perplexity=9.5, *, targets="hidden", baselines=None, num_training=1000, num_valid=100, epochs=3):
    return weak_results(
        valid=None if perplexity is None else score(perplexity, targets),
        baselines={"empirical": 17.8, "markov": 16.2, "two_sided": 15.5} if baselines is None else baselines,
        num_training=num_training,
        num_valid=num_valid,
        epochs=epochs,
    )


def test_a_good_result_is_told_nothing():
    assert lines() == []
    assert lines(num_valid=None) == []
    assert lines(epochs=99) == []


@pytest.mark.parametrize(
    ("perplexity", "words"),
    [
        (18.9, "no better than a table of the residues on both sides of each one: perplexity 18.90 against 15.50"),
        (15.9, "no better than a table of the residues on both sides of each one: perplexity 15.90 against 15.50"),
        (math.nan, "perplexity nan against 15.50"),
        (math.inf, "perplexity inf against 15.50"),
    ],
)
def test_a_model_below_a_baseline_is_told_once_with_the_best_of_them(perplexity, words):
    (line,) = lines(perplexity)
    assert words in line


def test_the_name_of_the_only_baseline_is_told():
    (line,) = lines(18.9, baselines={"empirical": 17.8})
    assert "the residue frequencies of the training split: perplexity 18.90 against 17.80" in line


def test_what_is_not_measured_or_measured_otherwise_is_not_compared():
    assert lines(None) == []
    assert lines(18.9, targets="mixture") == []
    assert len(lines(18.9, targets="next-token")) == 1


def test_splits_of_one_protein_and_many_epochs_are_told():
    told = lines(num_training=1, num_valid=1, epochs=312)
    assert [line.split(" is ")[0] for line in told[:2]] == ["the training split", "the valid split"]
    assert "312 epochs, and may know the 1 proteins" in told[2]
    assert len(told) == 3
    assert "100 epochs" in lines(epochs=100)[0]
