import math

import numpy as np
import pytest

from protlm.data.batching.masking import MaskRates, evaluation_generator, mask_residues
from protlm.inference.metrics import (
    METRICS,
    MetricSums,
    confidence_bins,
    estimate,
    metric_values,
    replicate_weights,
    sums_by_protein,
)
from protlm.inference.residue_scores import ResidueScores
from protlm.vocabulary import VOCABULARY_SIZE
from tests.unit.workflows.evaluate.eval_cases import random_scores

RIGHT, WRONG = 0.8, 0.3
"""Probability of the true residue where a simulated model is right, and where it prefers another."""


def slow_metrics(scores):
    """Every metric by its definition, one residue after the other."""
    size, nll, correct, top = len(scores), 0.0, 0, 0
    bins = {}
    for row, target in zip(scores.log_probabilities.astype(np.float64), scores.targets.tolist(), strict=True):
        nll -= row[target]
        ordered = sorted(range(VOCABULARY_SIZE), key=lambda token, row=row: (-row[token], token))
        is_correct = ordered[0] == target
        correct += is_correct
        top += target in ordered[:5]
        confidence = math.exp(max(row))
        members = bins.setdefault(min(int(confidence * 20), 19), [])
        members.append((confidence, is_correct))
    gaps = [abs(sum(c for c, _ in members) - sum(hit for _, hit in members)) for members in bins.values()]
    return {
        "accuracy": correct / size,
        "top5_accuracy": top / size,
        "perplexity": math.exp(nll / size),
        "bits_per_residue": nll / size / math.log(2),
        "calibration_error": sum(gaps) / size,
    }, bins


def some_scores(num_proteins=12, seed=0):
    generator = np.random.default_rng(seed)
    records = np.sort(generator.integers(0, num_proteins, 300))
    return random_scores(records, np.arange(300), generator.integers(4, 29, 300), seed=seed)


def summed(scores, keys=None, seed=0, num_replicates=1000):
    records, terms = sums_by_protein(scores)
    keys = [b"%d" % record for record in records] if keys is None else keys
    sums = MetricSums(num_replicates)
    sums.add(terms, replicate_weights(keys, seed, num_replicates))
    return sums


def taken(scores, chosen):
    return ResidueScores(
        scores.records[chosen], scores.positions[chosen], scores.targets[chosen], scores.log_probabilities[chosen]
    )


def test_every_metric_is_what_its_definition_gives_residue_by_residue():
    scores = some_scores()
    sums = summed(scores)
    expected, bins = slow_metrics(scores)
    assert sums.values() == pytest.approx(expected, rel=1e-12)
    assert set(expected) == set(METRICS)
    assert sums.num_targets == 300
    curve = confidence_bins(sums.total)
    assert [round(row["low"] * 20) for row in curve] == sorted(bins)
    for row in curve:
        members = bins[round(row["low"] * 20)]
        assert row["num_targets"] == len(members)
        assert row["confidence"] == pytest.approx(sum(confidence for confidence, _ in members) / len(members))
        assert row["accuracy"] == sum(hit for _, hit in members) / len(members)


def test_a_certain_prediction_falls_into_the_last_bin():
    log_probabilities = np.full((2, VOCABULARY_SIZE), -np.inf)
    log_probabilities[:, 4] = 0
    sums = summed(ResidueScores(np.arange(2), np.arange(2), np.array([4, 4]), log_probabilities))
    assert confidence_bins(sums.total) == [{"low": 0.95, "num_targets": 2, "confidence": 1.0, "accuracy": 1.0}]


def test_the_sums_of_rows_are_those_of_the_whole():
    scores = some_scores()
    whole, rows = summed(scores), MetricSums()
    for chosen in np.array_split(np.arange(300), 7):
        records, terms = sums_by_protein(taken(scores, chosen))
        rows.add(terms, replicate_weights([b"%d" % record for record in records], 0))
    assert rows.values() == pytest.approx(whole.values(), rel=1e-12)
    for name, estimated in rows.estimates().items():
        assert vars(estimated) == pytest.approx(vars(whole.estimates()[name]), rel=1e-9)


def test_a_replicate_is_the_metric_of_the_proteins_as_often_as_they_were_drawn():
    scores = some_scores()
    sums = summed(scores, num_replicates=3)
    weights = replicate_weights([b"%d" % record for record in range(12)], 0, 3)
    for replicate in range(3):
        drawn = [np.flatnonzero(scores.records == r) for r in range(12) for _ in range(int(weights[r, replicate]))]
        expected, _ = slow_metrics(taken(scores, np.concatenate(drawn)))
        got = {name: column[replicate] for name, column in metric_values(sums.replicates).items()}
        assert got == pytest.approx(expected, rel=1e-12)


def test_the_estimate_is_the_spread_of_the_replicates():
    replicates = np.random.default_rng(0).normal(3, 2, 1000)
    estimated = estimate(3.5, np.append(replicates, np.nan))
    assert estimated.value == 3.5
    assert estimated.stderr == pytest.approx(math.sqrt(((replicates - replicates.mean()) ** 2).sum() / 999))
    ordered = np.sort(replicates)
    assert ordered[24] <= estimated.low <= ordered[25]
    assert ordered[974] <= estimated.high <= ordered[975]


def test_a_protein_is_drawn_as_often_as_the_poisson_distribution_says():
    weights = replicate_weights([b"%d" % number for number in range(200)], 0).ravel()
    # 200,000 draws: four standard errors of each share.
    for count in range(5):
        expected = math.exp(-1) / math.factorial(count)
        assert abs((weights == count).mean() - expected) < 4 * math.sqrt(expected / len(weights))
    assert weights.dtype == np.float64


def test_the_weights_are_a_function_of_key_and_seed():
    first = replicate_weights([b"a", b"b", b"a"], 0)
    assert (first[0] == first[2]).all()
    assert (first[0] != first[1]).any()
    assert (replicate_weights([b"b"], 0)[0] == first[1]).all()
    assert (replicate_weights([b"a"], 1)[0] != first[0]).any()


def test_the_weights_do_not_depend_on_which_residues_are_hidden():
    # Both are functions of the seed and the sequence. Of one generator, a protein whose first residue is hidden would
    # have weight 0 in the first replicate.
    draw = np.random.default_rng(0)
    proteins = [draw.integers(4, 24, 30, dtype=np.uint8) for _ in range(3000)]
    hidden = np.array(
        [mask_residues(tokens, MaskRates(0.3), evaluation_generator(0, tokens))[1] for tokens in proteins]
    )
    weights = replicate_weights([tokens.tobytes() for tokens in proteins], 0, 20)
    correlations = np.corrcoef(hidden.T, weights.T)[:30, 30:]
    # 600 coefficients, each with a standard error of 1/√3000.
    assert np.abs(correlations).max() < 4.5 / math.sqrt(3000)


def simulated_split(generator, members=1):
    """Returns scores on 60 clusters whose accuracy varies, and the cluster of each protein."""
    hits, records, clusters = [], [], []
    for cluster in range(60):
        # Mean 0.4, standard deviation 0.24.
        share = generator.beta(1.2, 1.8)
        for _ in range(members):
            size = generator.integers(5, 31)
            records += [len(clusters)] * size
            hits += (generator.random(size) < share).tolist()
            clusters.append(cluster)
    log_probabilities = np.full((len(hits), 33), -np.inf)
    log_probabilities[:, 4] = np.log(np.where(hits, RIGHT, WRONG))
    log_probabilities[:, 5] = np.log(1 - np.exp(log_probabilities[:, 4]))
    records = np.array(records)
    return ResidueScores(records, np.arange(len(hits)), np.full(len(hits), 4), log_probabilities), clusters


TRUE_VALUES = {
    "accuracy": 0.4,
    "perplexity": math.exp(-0.4 * math.log(RIGHT) - 0.6 * math.log(WRONG)),
}
NUM_SIMULATIONS = 400
COVERAGE_ERROR = math.sqrt(0.95 * 0.05 / NUM_SIMULATIONS)
RATIO_ERROR = 1 / math.sqrt(2 * NUM_SIMULATIONS)
"""Standard error of a spread of so many values, relative to it."""


def simulate(keys_of, members=1, num_simulations=NUM_SIMULATIONS):
    """Returns for each metric how often its interval covers the true value, and its standard error over its spread."""
    generator = np.random.default_rng(20)
    estimates = []
    for number in range(num_simulations):
        scores, clusters = simulated_split(generator, members)
        _, terms = sums_by_protein(scores)
        keys, places = np.unique(keys_of(clusters), return_inverse=True)
        weights = replicate_weights([b"%d of %d" % (key, number) for key in keys], 0, num_replicates=200)
        sums = MetricSums(200)
        sums.add(terms, weights[places])
        estimates.append(sums.estimates())
    coverage, ratio = {}, {}
    for name, true in TRUE_VALUES.items():
        of_metric = [each[name] for each in estimates]
        coverage[name] = np.mean([each.low <= true <= each.high for each in of_metric])
        spread = np.std([each.value for each in of_metric], ddof=1)
        ratio[name] = np.mean([each.stderr for each in of_metric]) / spread
    return coverage, ratio


def test_the_interval_covers_the_truth_at_its_rate_and_the_standard_error_is_the_true_spread():
    coverage, ratio = simulate(one_by_one)
    for name in TRUE_VALUES:
        assert abs(coverage[name] - 0.95) < 3 * COVERAGE_ERROR, coverage
        assert abs(ratio[name] - 1) < 3 * RATIO_ERROR, ratio


def one_by_one(clusters):
    return range(len(clusters))


def test_relatives_are_resampled_together_and_apart_their_interval_would_be_too_short():
    together, ratio = simulate(list, members=3)
    apart, too_small = simulate(one_by_one, members=3, num_simulations=100)
    for name in TRUE_VALUES:
        assert abs(together[name] - 0.95) < 3 * COVERAGE_ERROR, together
        assert abs(ratio[name] - 1) < 3 * RATIO_ERROR, ratio
        assert apart[name] < 0.85, apart
        assert too_small[name] < 0.75, too_small


def test_the_difference_of_two_models_on_the_same_proteins_is_paired():
    # Both models fail on the same proteins; the second one is a little better on each.
    generator = np.random.default_rng(1)
    accuracies = generator.beta(1.2, 1.8, 200)
    hits = [generator.binomial(1000, np.clip(accuracies + lead, 0, 1)) / 1000 for lead in (0, 0.02)]
    terms = [np.zeros((200, 64)) for _ in hits]
    for of_model, share in zip(terms, hits, strict=True):
        of_model[:, 0], of_model[:, 2] = 1000, 1000 * share
    keys = [b"%d" % number for number in range(200)]
    values = {}
    for name, of_model, seed in (("first", terms[0], 0), ("second", terms[1], 0), ("apart", terms[1], 1)):
        sums = MetricSums()
        sums.add(of_model, replicate_weights(keys, seed))
        values[name] = metric_values(sums.replicates)["accuracy"]
    lead = hits[1].mean() - hits[0].mean()
    paired, unpaired = (estimate(lead, values[name] - values["first"]) for name in ("second", "apart"))
    assert paired.low < lead < paired.high
    assert paired.low > 0
    assert unpaired.low < 0
    assert paired.stderr < unpaired.stderr / 5
    # As of the differences protein by protein.
    assert paired.stderr == pytest.approx((hits[1] - hits[0]).std(ddof=1) / math.sqrt(200), rel=0.1)


def test_one_protein_or_one_cluster_has_no_interval():
    alone = some_scores(num_proteins=1)
    family = some_scores(num_proteins=8)
    for scores, keys in ((alone, [b"x"]), (family, [b"x"] * 8)):
        for estimated in summed(scores, keys).estimates().values():
            assert (estimated.stderr, estimated.low, estimated.high) == (None, None, None)
            assert math.isfinite(estimated.value)


def test_replicates_that_draw_no_protein_are_left_out():
    scores = some_scores(num_proteins=2)
    sums = summed(scores)
    num_empty = int((sums.replicates[:, 0] == 0).sum())
    # Both weights are 0 in e⁻² of the replicates.
    assert num_empty == pytest.approx(1000 * math.exp(-2), abs=40)
    assert np.isnan(metric_values(sums.replicates)["accuracy"]).sum() == num_empty
    assert all(math.isfinite(estimated.stderr) for estimated in sums.estimates().values())


def test_a_perplexity_beyond_what_exp_can_hold_is_infinite_and_has_no_interval():
    scores = some_scores()
    scores.log_probabilities[:] = -1e6
    estimates = summed(scores).estimates()
    assert estimates["perplexity"].value == math.inf
    assert estimates["perplexity"].stderr is None
    assert estimates["bits_per_residue"].value == pytest.approx(1e6 / math.log(2))


def test_predictions_that_are_no_numbers_make_no_score_but_a_nan():
    scores = some_scores()
    scores.log_probabilities[5] = np.nan
    sums = summed(scores)
    assert math.isnan(sums.values()["perplexity"])
    others = taken(scores, np.delete(np.arange(300), 5))
    assert sums.values()["accuracy"] == pytest.approx(slow_metrics(others)[0]["accuracy"] * 299 / 300)
    assert sums.estimates()["accuracy"].stderr > 0
