"""Metrics of probes, against scikit-learn and SciPy, and their intervals against closed forms."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

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
