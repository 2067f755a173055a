"""The linear probe finds what is linear, and nothing where nothing is."""

import numpy as np
import pytest

from protlm.inference import linear_probe
from protlm.inference.linear_probe import (
    CLASSIFICATION_STRENGTHS,
    REGRESSION_STRENGTHS,
    Fold,
    StoredFeatures,
    fit_probe,
    predict_constant,
)

FOLD = Fold(np.arange(0, 240), np.arange(240, 320), np.arange(320, 480))


def features(dim: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(480, dim))


def classes(rows: np.ndarray, num_classes: int = 3) -> np.ndarray:
    """Classes that a linear model can tell apart."""
    weights = np.random.default_rng(1).normal(size=(rows.shape[1], num_classes))
    return (rows @ weights).argmax(axis=1)


def fitted(rows, targets, fold=FOLD, *, is_regression=False):
    return fit_probe(StoredFeatures(rows), targets, fold, is_regression=is_regression)


def test_classes_that_are_linear_are_found():
    rows = features()
    targets = classes(rows)
    fit = fitted(rows, targets)
    assert (fit.predicted == targets[FOLD.test]).mean() > 0.93
    assert fit.is_converged
    assert fit.valid_score > 0.9


def test_values_that_are_linear_are_found():
    rows = features()
    targets = rows @ np.arange(12.0) + 100
    fit = fitted(rows, targets, is_regression=True)
    assert np.abs(fit.predicted - targets[FOLD.test]).max() < 0.2
    assert fit.valid_score > 0.999
    assert fit.strength in REGRESSION_STRENGTHS[-2:]


def test_noise_is_not_learned_and_gets_the_strongest_penalty_of_a_ridge():
    rows, targets = features(60), np.random.default_rng(2).normal(size=480)
    fit = fitted(rows, targets, is_regression=True)
    assert fit.strength >= 1e3
    assert np.abs(np.corrcoef(fit.predicted, targets[FOLD.test])[0, 1]) < 0.25
    chance = fitted(rows, np.random.default_rng(3).integers(0, 2, 480))
    assert 0.38 < (chance.predicted == np.random.default_rng(3).integers(0, 2, 480)[FOLD.test]).mean() < 0.62


@pytest.mark.parametrize("is_regression", [False, True])
def test_the_unit_of_a_feature_changes_nothing(is_regression):
    rows = features()
    targets = rows.sum(axis=1) if is_regression else classes(rows)
    scaled = rows * np.geomspace(1e-3, 1e3, 12) + 5
    first, second = (fitted(each, targets, is_regression=is_regression) for each in (rows, scaled))
    assert np.allclose(first.predicted, second.predicted, atol=1e-6)


@pytest.mark.parametrize("is_regression", [False, True])
def test_a_test_row_depends_on_no_other_test_row_and_on_no_test_label(is_regression):
    rows = features()
    noise = np.random.default_rng(5).normal(scale=2.0, size=480)
    targets = rows.sum(axis=1) + noise
    if not is_regression:
        targets = (targets > 0).astype(np.int64)
    expected = fitted(rows, targets, is_regression=is_regression).predicted
    # All others far away: what a scaler or a fit would make of them shows in every prediction.
    changed = rows.copy()
    changed[FOLD.test[40:]] = changed[FOLD.test[40:]] * 1000 + 77
    targets = targets.copy()
    targets[FOLD.test] = 0
    got = fitted(changed, targets, is_regression=is_regression).predicted
    assert np.array_equal(got[:40], expected[:40])
    assert not np.array_equal(got[40:], expected[40:])


def test_the_labels_to_choose_by_are_fitted_in_the_end():
    rows = features(2)
    targets = (rows[:, 0] > 0).astype(np.int64)
    # The rows to fit alone do not know class 2.
    apart = np.concatenate([FOLD.valid[::2], FOLD.test])
    targets[apart] = 2
    rows[apart] += 50
    assert (fitted(rows, targets).predicted == 2).all()


def test_a_rare_class_is_not_given_up_where_the_strongest_penalties_see_the_frequent_one_alone():
    rows = features()
    targets = (rows[:, 0] > 1.6).astype(np.int64)
    fit = fitted(rows, targets)
    assert fit.strength <= 1e2
    assert (fit.predicted == targets[FOLD.test]).mean() > 0.97 > 1 - targets[FOLD.test].mean()


def test_features_without_differences_are_no_harm():
    rows = np.hstack([features(), np.full((480, 3), 7.0)])
    targets = classes(features())
    assert (fitted(rows, targets).predicted == fitted(features(), targets).predicted).all()
    constant = fitted(np.full((480, 2), 0.1), targets)
    assert len(set(constant.predicted.tolist())) == 1


def test_weaker_penalties_are_left_out_once_they_are_no_better(monkeypatch):
    tried = []
    real = linear_probe._fit
    monkeypatch.setattr(linear_probe, "_fit", lambda model, *rest: tried.append(rest[2]) or real(model, *rest))
    # A class that lies apart: the first penalty that sees it is as good as any.
    rows = features()
    targets = (np.arange(480) % 10 == 0).astype(np.int64)
    rows[targets == 1] += 3
    fitted(rows, targets)
    *search, chosen = tried
    assert search == list(CLASSIFICATION_STRENGTHS[: len(search)])
    assert 0 < search.index(chosen) == len(search) - 3


def test_rows_are_predicted_in_pieces_without_a_difference(monkeypatch):
    rows = features()
    targets = classes(rows)
    expected = fitted(rows, targets)
    monkeypatch.setattr(linear_probe, "_ROWS_AT_ONCE", 7)
    assert (fitted(rows, targets).predicted == expected.predicted).all()


def test_a_fit_that_does_not_end_is_told(monkeypatch):
    monkeypatch.setattr(linear_probe, "_MOST_ITERATIONS", 1)
    assert not fitted(features(), classes(features())).is_converged


def test_the_constant_prediction_is_of_the_rows_that_are_not_tested_or_of_all():
    targets = np.array([0, 1, 1, 2, 2, 2])
    fold = Fold(np.array([0, 1]), np.array([2]), np.array([3, 4, 5]))
    for is_known, most, mean in ((False, 1, 2 / 3), (True, 2, 8 / 6)):
        assert predict_constant(targets, fold, is_regression=False, is_known=is_known).tolist() == [most] * 3
        values = predict_constant(targets.astype(float), fold, is_regression=True, is_known=is_known)
        assert values.tolist() == [mean] * 3


def test_folds_are_equal_by_their_rows():
    same = Fold(*(rows.copy() for rows in (FOLD.train, FOLD.valid, FOLD.test)))
    assert same == FOLD
    assert Fold(FOLD.train[1:], FOLD.valid, FOLD.test) != FOLD
    assert FOLD != 1
