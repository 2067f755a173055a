"""Metrics of assays against scipy, scikit-learn and the benchmark's formulas on plain lists."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from protlm.inference.assay_metrics import AssayValue, benchmark_mean, fit_by_median, measure
from protlm.inference.blosum import compare_with_blosum62
from protlm.inference.correlation import pearson, ranks, spearman


def assay(size, seed=0, *, ties=False, noise=1.0):
    generator = np.random.default_rng(seed)
    measured = generator.standard_normal(size)
    scores = measured + noise * generator.standard_normal(size)
    if ties:
        measured, scores = np.round(measured, 1), np.round(scores)
    return measured, fit_by_median(measured), scores


def ndcg(measured, scores):
    """By the words of the definition, variant by variant; those of one score have their mean gain."""
    low, high = min(measured), max(measured)
    gains = [(value - low) / (high - low) for value in measured]
    top = math.floor(len(measured) * 0.1)
    by_score = sorted(range(len(scores)), key=lambda place: -scores[place])[:top]
    best = sorted(gains, reverse=True)[:top]
    shared = {score: np.mean([gains[n] for n in range(len(scores)) if scores[n] == score]) for score in set(scores)}
    found = sum(shared[scores[place]] / math.log2(rank + 1) for rank, place in enumerate(by_score, start=1))
    return found / sum(gain / math.log2(rank + 1) for rank, gain in enumerate(best, start=1))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", [10, 11, 57, 1000])
def test_values_are_those_of_well_known_programs(size, ties):
    measured, is_fit, scores = assay(size, ties=ties)
    metrics = {
        name: each.value for name, each in measure(measured, is_fit, {"model": scores}, 0, 5).metrics["model"].items()
    }
    assert metrics["spearman"] == pytest.approx(scipy.stats.spearmanr(measured, scores)[0])
    assert metrics["auc"] == pytest.approx(sklearn.metrics.roc_auc_score(is_fit, scores))
    upper = scores >= np.median(scores)
    assert metrics["mcc"] == pytest.approx(sklearn.metrics.matthews_corrcoef(is_fit, upper))
    assert metrics["ndcg"] == pytest.approx(ndcg(measured, scores))


def test_the_order_of_the_rows_changes_no_metric():
    measured, is_fit, scores = assay(200, ties=True)
    orders = [
        measure(measured[order], is_fit[order], {"model": scores[order]}, 0, 5).metrics["model"]
        for order in (np.arange(200), np.arange(200)[::-1], np.random.default_rng(0).permutation(200))
    ]
    for other in orders[1:]:
        assert [other[name].value for name in other] == pytest.approx([orders[0][name].value for name in other])


def test_a_known_function_of_the_measurement_has_the_known_spearman():
    measured, is_fit, _ = assay(200)
    predictions = {"rising": np.exp(measured), "falling": -(measured**3), "constant": np.ones(200)}
    found = measure(measured, is_fit, predictions, 0, 20)
    assert [found.metrics[name]["spearman"].value for name in ("rising", "falling")] == pytest.approx([1, -1])
    assert found.metrics["rising"]["auc"].value == found.metrics["rising"]["mcc"].value == 1
    assert found.metrics["rising"]["ndcg"].value == pytest.approx(1)
    assert math.isnan(found.metrics["constant"]["spearman"].value)
    assert (found.metrics["constant"]["auc"].value, found.metrics["constant"]["mcc"].value) == (0.5, 0)
    assert found.gains["falling"].value == pytest.approx(2)


def test_a_replicate_has_the_metrics_of_the_drawn_variants():
    """The spread by draws of indices and scipy is that of the weighted formulas on the same draws."""
    measured, is_fit, scores = assay(40, ties=True)
    found = measure(measured, is_fit, {"model": scores}, 7, 50).metrics["model"]
    generator = np.random.Generator(np.random.Philox(key=7, counter=np.array([0, 0, 0, 4], np.uint64)))
    drawn = [generator.integers(40, size=40) for _ in range(50)]
    for metric, of in {
        "spearman": lambda index: scipy.stats.spearmanr(measured[index], scores[index])[0],
        "auc": lambda index: sklearn.metrics.roc_auc_score(is_fit[index], scores[index]),
        "mcc": lambda index: sklearn.metrics.matthews_corrcoef(
            is_fit[index], scores[index] >= np.median(scores[index])
        ),
        # Of equal scores the earlier variant comes first, as often as it is drawn.
        "ndcg": lambda index: ndcg(measured[np.sort(index)], scores[np.sort(index)]),
    }.items():
        low, high = np.percentile([of(index) for index in drawn], [2.5, 97.5])
        assert (found[metric].low, found[metric].high) == pytest.approx((low, high)), metric


def test_the_interval_covers_the_true_value_about_as_often_as_it_says():
    covered = []
    for seed in range(60):
        measured, is_fit, scores = assay(80, seed=seed)
        estimate = measure(measured, is_fit, {"model": scores}, seed, 200).metrics["model"]["spearman"]
        # Two normal variables with correlation 1/√2.
        covered.append(estimate.low <= 6 / math.pi * math.asin(math.sqrt(0.5) / 2) <= estimate.high)
    # 57 expected, with a standard deviation of 1.7.
    assert sum(covered) >= 51


def test_few_variants_have_no_interval_and_one_class_no_auc():
    measured, is_fit, scores = assay(9)
    few = measure(measured, is_fit, {"model": scores}, 0).metrics["model"]
    assert few["spearman"].low is None
    assert math.isnan(few["ndcg"].value)
    measured, _, scores = assay(50)
    assert math.isnan(measure(measured, np.ones(50, dtype=bool), {"model": scores}, 0, 5).metrics["model"]["auc"].value)


def test_gains_are_paired():
    measured, is_fit, scores = assay(300, noise=1.0)
    nearly = scores + 0.01 * np.random.default_rng(5).standard_normal(300)
    found = measure(measured, is_fit, {"model": scores, "nearly": nearly}, 0, 100)
    apart = found.metrics["model"]["spearman"].stderr
    assert found.gains["nearly"].stderr < apart / 10
    again = measure(measured, is_fit, {"model": scores, "nearly": nearly}, 0, 100)
    assert again == found
    assert measure(measured, is_fit, {"model": scores, "nearly": nearly}, 1, 100) != found


def test_a_benchmark_is_the_mean_over_types_of_the_means_over_proteins():
    rows = [("A", "Stability", 0.9), ("A", "Stability", 0.7), ("B", "Stability", 0.2), ("A", "Binding", 0.4)]
    by_function, mean = benchmark_mean([AssayValue(protein=p, function=f, value=v) for p, f, v in rows], 0)
    assert by_function == pytest.approx({"Stability": (0.8 + 0.2) / 2, "Binding": 0.4})
    assert mean.value == pytest.approx((0.5 + 0.4) / 2)
    assert mean.low is None
    many = [
        AssayValue(protein=str(number), function=function, value=number / 20)
        for number, function in itertools.product(range(20), ("Stability", "Binding"))
    ]
    _, mean = benchmark_mean([*many, AssayValue(protein="x", function="Binding", value=math.nan)], 0)
    assert mean.low < mean.value < mean.high
    # The single protein of a type would seem to be certain.
    _, mean = benchmark_mean([*many, AssayValue(protein="x", function="Activity", value=0.5)], 0)
    assert mean.low is None


def test_correlations_are_those_of_scipy():
    generator = np.random.default_rng(0)
    x, y = generator.integers(5, size=30).astype(float), generator.integers(5, size=30).astype(float)
    assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y)[0])
    assert pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y)[0])
    np.testing.assert_array_equal(ranks(x), scipy.stats.rankdata(x))
    assert spearman(x, np.ones(30)) is None
    assert spearman(x[:2], y[:2]) is None
    assert compare_with_blosum62(np.full((20, 20), np.nan)).spearman is None
