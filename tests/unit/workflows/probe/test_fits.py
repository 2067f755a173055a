"""Which fits are made: layers are chosen without the tested rows, and seeds differ where they should."""

import numpy as np
import pytest

from protlm.inference.linear_probe import Fold, StoredFeatures
from protlm.runtime.progress import no_progress
from protlm.workflows.probe import fits as fits_module
from protlm.workflows.probe.fits import Fits, _Run
from protlm.workflows.probe.request import ProbeRequest
from protlm.workflows.probe.targets import Targets

FOLD = Fold(np.arange(0, 60), np.arange(60, 90), np.arange(90, 120))
OTHER = Fold(np.arange(30, 90), np.arange(0, 30), np.arange(90, 120))


@pytest.fixture
def targets():
    values = np.random.default_rng(0).integers(0, 2, 120)
    return Targets("classification", ("a", "b"), values, np.arange(120), np.arange(120), {})


def run_of(targets, folds):
    fits = Fits(description=None, num_parameters=1, layers=(0, 1), tested=FOLD.test)
    return _Run(ProbeRequest(model="m", labels="l"), None, targets, folds, None, no_progress, fits)


def telling(values, rows):
    """Features that tell the label of some rows, and the wrong one of all others."""
    sign = np.where(np.isin(np.arange(len(values)), rows), 1.0, -1.0)
    noise = np.random.default_rng(1).normal(scale=0.1, size=len(values))
    return StoredFeatures(((2 * values - 1) * sign + noise)[:, None])


def test_the_layer_is_chosen_by_the_rows_that_are_not_tested(targets):
    run = run_of(targets, [[FOLD]])
    good_on_valid = telling(targets.values, np.concatenate([FOLD.train, FOLD.valid]))
    good_on_test = telling(targets.values, np.concatenate([FOLD.train, FOLD.test]))
    run.fit_model({0: good_on_test, 1: good_on_valid})
    assert run.fits.chosen == {1: 1}
    (predicted,) = run.fits.predictions["model"]
    assert (predicted == targets.values[FOLD.test]).mean() == 0
    (by_test,) = run.fits.predictions["layer_0"]
    assert np.array_equal(predicted, run.fits.predictions["layer_1"][0])
    assert not np.array_equal(by_test, predicted)


@pytest.mark.parametrize(("second", "num_fits"), [(FOLD, 1), (OTHER, 2)])
def test_a_fold_that_the_first_seed_has_too_is_fitted_once(targets, second, num_fits, monkeypatch):
    made = []
    real = fits_module.fit_probe
    monkeypatch.setattr(
        fits_module, "fit_probe", lambda *rest, **options: made.append(rest[2]) or real(*rest, **options)
    )
    run = run_of(targets, [[FOLD], [second]])
    run.fit_model({0: telling(targets.values, FOLD.train)})
    assert len(made) == num_fits
    assert len(run.fits.predictions["model"]) == 2
    assert run.fits.chosen == {0: 2}


def test_random_weights_are_fitted_anew_for_each_seed(targets):
    run = run_of(targets, [[FOLD], [FOLD]])
    for number, rows in enumerate((np.arange(120), FOLD.train)):
        run.fit_random_weights({0: telling(targets.values, rows)}, number)
    first, second = run.fits.predictions["random_weights"]
    assert (first == targets.values[FOLD.test]).mean() == 1
    assert (second == targets.values[FOLD.test]).mean() < 1


def test_predictions_of_several_folds_stand_in_the_order_of_the_rows(targets):
    parts = [np.arange(start, 120, 3) for start in range(3)]
    folds = [Fold(parts[(n + 1) % 3], parts[(n + 2) % 3], parts[n]) for n in range(3)]
    run = run_of(targets, [folds])
    run.fits.tested = np.arange(120)
    run.fit_model({0: telling(targets.values, np.arange(120))})
    assert np.array_equal(run.fits.predictions["model"][0], targets.values)
    assert run.fits.fold_numbers[0].tolist() == [0, 1, 2] * 40


def test_features_are_those_of_the_rows_that_have_a_target(targets):
    features = fits_module.RowsWithTarget(StoredFeatures(np.arange(10.0)[:, None]), np.array([2, 5, 9]))
    assert features.rows(np.array([2, 0])).ravel().tolist() == [9, 2]
