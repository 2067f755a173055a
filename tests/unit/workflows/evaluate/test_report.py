import json
import math

import numpy as np
import pytest

from protlm.inference.baselines import UNIFORM
from protlm.inference.metrics import METRICS, NUM_SUMS, MetricSums, replicate_weights
from protlm.workflows.evaluate.report import (
    REPLICATED,
    EvalReport,
    SplitReport,
    difference,
    differences_between_splits,
    exact_row,
    replicates_of,
    score_row,
    verdict_of,
)

NUM_PROTEINS, NUM_TARGETS = 100, 20


def sums_with(perplexity, seed=0, spread=0.1, num_proteins=NUM_PROTEINS, weights_seed=0):
    """Returns sums of proteins whose losses scatter around a mean; the same noise for the same seed."""
    losses = math.log(perplexity) + np.random.default_rng(seed).normal(0, spread, num_proteins)
    terms = np.zeros((num_proteins, 64))
    terms[:, 0] = NUM_TARGETS
    terms[:, 1] = losses * NUM_TARGETS
    terms[:, 2] = NUM_TARGETS / perplexity
    sums = MetricSums()
    sums.add(terms, replicate_weights([b"%d" % number for number in range(num_proteins)], weights_seed))
    return sums


def split_report(sums, **content):
    known = {
        "num_records": NUM_PROTEINS, "num_cut": 0, "num_targets": sums.num_targets, "verdict": "", "calibration": [],
        "pseudo_perplexity": None, "breakdowns": {}, "resampled": "proteins", "scores": {"model": score_row(sums)},
        "replicates": replicates_of(sums),
    }  # fmt: skip
    return SplitReport(**{**known, **content})


def test_a_row_has_each_metric_with_its_uncertainty_beside_it():
    sums = sums_with(10)
    row = score_row(sums)
    assert set(row) == {f"{name}{suffix}" for name in METRICS for suffix in ("", "_stderr", "_low", "_high")}
    for name, estimated in sums.estimates().items():
        assert (row[name], row[f"{name}_stderr"]) == (estimated.value, estimated.stderr)
        assert (row[f"{name}_low"], row[f"{name}_high"]) == (estimated.low, estimated.high)
    exact = exact_row(UNIFORM)
    assert set(exact) == set(row)
    assert {name: exact[name] for name in METRICS} == UNIFORM
    assert {value for name, value in exact.items() if name not in METRICS} == {None}


def test_the_replicates_of_a_report_are_those_of_the_sums_to_seven_digits():
    sums = sums_with(10)
    kept = replicates_of(sums)
    assert set(kept) == set(REPLICATED)
    assert all(len(values) == 1000 for values in kept.values())
    mean_loss = sums.replicates[:, 1] / sums.replicates[:, 0]
    assert kept["bits_per_residue"] == pytest.approx(mean_loss / math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    ("model", "empirical", "markov", "sentence"),
    [
        (9, 18, 17, "beats the Markov baseline on the residues before, the best of the baselines: perplexity 9.00"),
        (9, 17, 18, "the model beats the empirical baseline, the best of the baselines: perplexity 9.00 against 17.00"),
        (17.5, 18.5, 16, "the Markov baseline on the residues before: perplexity 17.50 against 16.00. It knows more"),
        (18.5, 17, 18, "does not beat the empirical baseline: perplexity 18.50 against 17.00. It knows nothing of use"),
        (16.9, 18, 17, "the model cannot be told from the Markov baseline on the residues before"),
        (17.1, 18, 17, "the model cannot be told from the Markov baseline on the residues before"),
    ],
)  # fmt: skip
def test_the_verdict_compares_with_the_better_of_the_baselines(model, empirical, markov, sentence):
    # The noise of each is its own, with a standard error of 1 %.
    sums = {
        name: sums_with(perplexity, seed)
        for seed, (name, perplexity) in enumerate({"model": model, "empirical": empirical, "markov": markov}.items())
    }
    for of_name, perplexity in (("model", model), ("empirical", empirical), ("markov", markov)):
        # The mean of the noise is taken out, so that the figures are exact.
        shift = math.log(perplexity) - math.log(sums[of_name].values()["perplexity"])
        for terms in (sums[of_name].total[None], sums[of_name].replicates):
            terms[:, 1] += shift * terms[:, 0]
    verdict = verdict_of("ood", sums)
    assert verdict.startswith("On ood ")
    assert sentence in verdict
    assert "\n" not in verdict


def test_the_verdict_pairs_model_and_baseline_protein_by_protein():
    # A lead of about 1 % on each protein, far below the spread between proteins.
    sums = {"model": sums_with(9.9, spread=1), "empirical": sums_with(10, spread=1.001)}
    assert "the model beats the empirical baseline" in verdict_of("test", sums)
    sums["model"] = sums_with(9.9, spread=1, weights_seed=1)
    assert "cannot be told from the empirical baseline" in verdict_of("test", sums)


def test_on_one_protein_a_lead_is_not_beyond_the_uncertainty():
    sums = {"model": sums_with(9, num_proteins=1), "empirical": sums_with(17, num_proteins=1)}
    assert "too few proteins" in verdict_of("test", sums)


def test_the_difference_of_splits_has_the_uncertainty_of_both():
    first, second = sums_with(10, seed=1), sums_with(12, seed=2, weights_seed=1)
    rows = differences_between_splits({"test": split_report(first), "ood": split_report(second)})
    assert [row["metric"] for row in rows] == list(REPLICATED)
    assert {(row["first"], row["second"]) for row in rows} == {("test", "ood")}
    of_bits = next(row for row in rows if row["metric"] == "bits_per_residue")
    values = [sums.values()["bits_per_residue"] for sums in (first, second)]
    assert of_bits["difference"] == values[0] - values[1]
    spreads = [sums.estimates()["bits_per_residue"].stderr for sums in (first, second)]
    assert of_bits["stderr"] == pytest.approx(math.hypot(*spreads), rel=0.08)
    assert of_bits["low"] < of_bits["difference"] < of_bits["high"]
    assert differences_between_splits({"test": split_report(first)}) == []


def test_replicates_without_proteins_are_null_in_json_and_left_out_of_differences():
    few, other = sums_with(10, num_proteins=2), sums_with(12, num_proteins=2, seed=1)
    reports = {"test": split_report(few), "ood": split_report(other)}
    assert any(math.isnan(value) for value in reports["test"].replicates["accuracy"])
    written = json.loads(json.dumps(report_of(reports).to_json(), allow_nan=False))
    replicates = [written["splits"][name]["replicates"] for name in reports]
    assert replicates[0]["accuracy"].count(None) == sum(map(math.isnan, reports["test"].replicates["accuracy"]))
    for of_two in (replicates, [report.replicates for report in reports.values()]):
        assert math.isfinite(difference(*of_two, "bits_per_residue", 0.5)["stderr"])


def test_an_infinite_perplexity_is_null_in_json():
    reports = {"test": split_report(sums_with(10), scores={"model": {"perplexity": math.inf, "accuracy": 0.5}})}
    written = json.loads(json.dumps(report_of(reports).to_json(), allow_nan=False))
    assert written["splits"]["test"]["scores"]["model"] == {"perplexity": None, "accuracy": 0.5}


def report_of(splits):
    return EvalReport(
        split="test", seed=0, objective="masked", targets="hidden", mask_rate=0.15, num_masks=1, num_records=2,
        num_cut=0, num_targets=40, model={}, empirical={}, verdict="", splits=splits, markov=None, model_name="",
        num_parameters=0, attention="favor", weights_hash="", dataset_hash="", training_dataset_hash="",
        projection="fixed",
    )  # fmt: skip


def test_the_verdict_of_a_diverged_model_and_of_training_proteins():
    sums = {"model": sums_with(9), "empirical": sums_with(17, 1), "markov": sums_with(3, 2)}
    assert "does not beat the Markov baseline" in verdict_of("test", sums)
    assert "beats the empirical baseline: " in verdict_of("train", sums)
    sums["model"].total[1] = math.nan
    assert "has diverged" in verdict_of("test", sums)


def test_from_few_proteins_there_is_no_interval_and_no_verdict():
    sums = {"model": sums_with(9), "empirical": sums_with(17, 1)}
    for of_name in sums.values():
        of_name.add(np.zeros((1, NUM_SUMS)), np.ones((1, 1000)), [b"one protein"])
    assert "too few proteins" in verdict_of("test", sums)
    assert score_row(sums["model"])["perplexity_low"] is None
    for of_name in sums.values():
        of_name.add(np.zeros((9, NUM_SUMS)), np.ones((9, 1000)), [bytes([number]) for number in range(9)])
    assert "beats the empirical baseline" in verdict_of("test", sums)
    assert score_row(sums["model"])["perplexity_low"] is not None
