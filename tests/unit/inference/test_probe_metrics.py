"""Metrics of probes, against scikit-learn and SciPy, and their intervals against closed forms."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from protlm.inference import probe_metrics
from protlm.inference.linear_probe import Fold, StoredFeatures, fit_probe
from protlm.inference.probe_metrics import CLASS_METRICS, VALUE_METRICS, measure_probes

SIZE = 400


def keys(size: int) -> list[bytes]:
    return [str(number).encode() for number in range(size)]


def measured(truth, predicted, units=None, *, is_regression=False, seeds=1):
    units = np.arange(len(truth)) if units is None else units
    predictions = {name: [values] * seeds for name, values in predicted.items()}
    return measure_probes(truth, predictions, units, keys(int(units.max()) + 1), 0, is_regression=is_regression)


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_metrics_of_classes_are_those_of_scikit_learn(random):
    truth = random.integers(0, 5, SIZE)
    predicted = np.where(random.random(SIZE) < 0.6, truth, random.integers(0, 6, SIZE))
    values = {name: each.value for name, each in measured(truth, {"a": predicted}).metrics["a"].items()}
    assert tuple(values) == CLASS_METRICS
    assert values["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(truth, predicted))
    assert values["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(truth, predicted, average="macro"))
    assert values["mcc"] == pytest.approx(sklearn.metrics.matthews_corrcoef(truth, predicted))


def test_metrics_of_values_are_those_of_scikit_learn_and_scipy(random):
    truth = np.round(random.normal(size=SIZE), 1)
    predicted = np.round(truth + random.normal(size=SIZE), 1)
    values = {name: each.value for name, each in
              measured(truth, {"a": predicted}, is_regression=True).metrics["a"].items()}  # fmt: skip
    assert tuple(values) == VALUE_METRICS
    assert values["spearman"] == pytest.approx(scipy.stats.spearmanr(truth, predicted).statistic)
    assert values["r2"] == pytest.approx(sklearn.metrics.r2_score(truth, predicted))
    assert values["mae"] == pytest.approx(sklearn.metrics.mean_absolute_error(truth, predicted))


def test_a_constant_prediction_has_no_correlation():
    truth = np.arange(20)
    values = measured(truth.astype(float), {"a": np.full(20, 9.5)}, is_regression=True).metrics["a"]
    assert values["spearman"].value == 0
    assert values["r2"].value == pytest.approx(0)
    assert measured(truth % 2, {"a": np.zeros(20, dtype=np.int64)}).metrics["a"]["mcc"].value == 0


def test_the_standard_error_is_that_of_a_share(random):
    truth = np.zeros(SIZE, dtype=np.int64)
    predicted = (random.random(SIZE) < 0.3).astype(np.int64)
    accuracy = measured(truth, {"a": predicted}).metrics["a"]["accuracy"]
    expected = np.sqrt(accuracy.value * (1 - accuracy.value) / SIZE)
    assert accuracy.stderr == pytest.approx(expected, rel=0.1)
    assert accuracy.low < accuracy.value < accuracy.high


def test_rows_of_a_unit_are_drawn_together(random):
    truth = np.zeros(SIZE, dtype=np.int64)
    units = np.arange(SIZE) // 10
    predicted = (random.random(SIZE // 10) < 0.3)[units].astype(np.int64)
    alone = measured(truth, {"a": predicted}).metrics["a"]["accuracy"]
    together = measured(truth, {"a": predicted}, units).metrics["a"]["accuracy"]
    assert together.value == alone.value
    # Ten equal rows are one: the error is √10 times as large.
    assert together.stderr == pytest.approx(alone.stderr * np.sqrt(10), rel=0.25)


def test_differences_are_paired(random):
    truth = random.integers(0, 2, SIZE)
    first = np.where(random.random(SIZE) < 0.2, 1 - truth, truth)
    # Wrong at a few more places than the first.
    second = np.where(np.arange(SIZE) % 50 == 0, 1 - truth, first)
    scores = measured(truth, {"a": first, "b": second, "c": first})
    assert set(scores.gains) == {"b", "c"}
    gain = scores.gains["b"]
    assert gain.value == pytest.approx((first == truth).mean() - (second == truth).mean())
    assert gain.low > 0
    assert gain.stderr < 0.5 * scores.metrics["a"]["accuracy"].stderr
    assert scores.gains["c"].value == 0


def test_a_score_is_the_mean_over_the_seeds(random):
    truth = random.integers(0, 2, SIZE)
    scores = measure_probes(
        truth, {"a": [truth, 1 - truth]}, np.arange(SIZE), keys(SIZE), 0, is_regression=False
    )  # fmt: skip
    accuracy = scores.metrics["a"]["accuracy"]
    assert accuracy.value == 0.5
    # Right in the one where it is wrong in the other: no spread at all.
    assert accuracy.stderr is None or accuracy.stderr < 1e-9


def test_few_units_have_no_interval():
    truth = np.arange(9) % 2
    accuracy = measured(truth, {"a": truth}).metrics["a"]["accuracy"]
    assert (accuracy.value, accuracy.stderr, accuracy.low) == (1, None, None)


def test_in_several_folds_ranks_are_compared_within_each(random):
    folds = np.arange(SIZE) % 5
    truth = random.normal(size=SIZE)
    # What knows nothing but the mean of the other folds is wrong everywhere between them.
    means = np.array([truth[folds != number].mean() for number in range(5)])
    predicted = means[folds] + random.normal(scale=1e-6, size=SIZE)

    def spearman(numbers):
        scores = measure_probes(
            truth, {"a": [predicted]}, np.arange(SIZE), keys(SIZE), 0, is_regression=True, folds=numbers
        )
        return scores.metrics["a"]["spearman"].value

    within = [
        scipy.stats.spearmanr(truth[folds == number], predicted[folds == number]).statistic for number in range(5)
    ]
    # Folds of one size count alike.
    assert spearman([folds]) == pytest.approx(np.mean(within))
    assert spearman([folds]) > spearman(None) + 0.05


@pytest.mark.parametrize(("size", "num_folds"), [(12, 5), (30, 5), (60, 20), (100, 5)])
def test_a_perfect_prediction_is_perfect_in_every_draw(random, size, num_folds):
    truth, folds = random.normal(size=size), np.arange(size) % num_folds
    scores = measure_probes(
        truth, {"a": [truth * 2], "b": [np.zeros(size)]}, np.arange(size), keys(size), 0, is_regression=True,
        folds=[folds],
    )  # fmt: skip
    spearman = scores.metrics["a"]["spearman"]
    assert (spearman.value, spearman.low) == (pytest.approx(1), None)
    assert scores.metrics["b"]["spearman"].value == 0
    assert scores.gains["b"].value == pytest.approx(1)


def test_noise_is_no_worse_than_a_constant(random):
    """Over many sets of noise, the mean of Spearman's correlation is 0 within its error."""
    values = []
    for _ in range(40):
        rows, truth = random.normal(size=(60, 8)), random.normal(size=60)
        folds = random.permutation(np.arange(60) % 5)
        predicted = np.empty(60)
        for number in range(5):
            parts = [np.flatnonzero(folds == (number + step) % 5) for step in range(5)]
            fold = Fold(np.sort(np.concatenate(parts[2:])), parts[1], parts[0])
            predicted[parts[0]] = fit_probe(StoredFeatures(rows), truth, fold, is_regression=True).predicted
        scores = measure_probes(
            truth, {"a": [predicted]}, np.arange(60), keys(60), 0, is_regression=True, folds=[folds]
        )
        values.append(scores.metrics["a"]["spearman"].value)
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_a_draw_without_differences_counts_for_nothing():
    truth = np.array([1.0] * 30 + [2.0])
    scores = measure_probes(truth, {"a": [truth + 0.1]}, np.arange(31), keys(31), 0, is_regression=True)
    r2 = scores.metrics["a"]["r2"]
    assert r2.stderr is not None
    assert r2.stderr < 10


def test_many_units_have_fewer_replicates(monkeypatch):
    counts = []
    real = probe_metrics.replicate_weights
    monkeypatch.setattr(probe_metrics, "replicate_weights", lambda *rest: counts.append(rest[2]) or real(*rest))
    monkeypatch.setattr(probe_metrics, "_MANY_UNITS", 20)
    for size in (20, 21):
        truth = np.arange(size) % 2
        assert measured(truth, {"a": truth}).metrics["a"]["accuracy"].value == 1
    assert counts == [1000, 200]
