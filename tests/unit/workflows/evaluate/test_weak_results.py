import math

import pytest

from protlm.workflows.evaluate.report import score_row
from protlm.workflows.evaluate.weak_results import lost_comparisons, single_proteins
from tests.unit.workflows.evaluate.test_report import report_of, split_report, sums_with


def split(model, num_records=100, **others):
    """Returns the report of a split with these perplexities."""
    rows = {name: score_row(sums_with(value)) for name, value in {"model": model, **others}.items()}
    return split_report(sums_with(model), num_records=num_records, scores=rows, verdict=f"verdict {model}")


@pytest.mark.parametrize(
    ("perplexities", "is_told"),
    [
        ({"model": 9, "empirical": 17}, False),
        ({"model": 18, "empirical": 17}, True),
        ({"model": 16, "empirical": 17, "markov": 15}, True),
        ({"model": 16, "empirical": 17, "two_sided": 15.9}, True),
        # Rows that are no baselines to beat.
        ({"model": 9, "empirical": 17, "model_as_trained": 8, "copies": 5, "random_weights": 8}, False),
    ],
)
def test_a_model_below_a_baseline_is_told_by_its_verdict(perplexities, is_told):
    report = report_of({"test": split(**perplexities), "valid": split(9, empirical=17)})
    assert list(lost_comparisons(report)) == ([f"verdict {perplexities['model']}"] if is_told else [])


def test_a_table_of_the_training_split_is_no_measure_on_it():
    assert list(lost_comparisons(report_of({"train": split(9, empirical=17, markov=2)}))) == []
    assert list(lost_comparisons(report_of({"train": split(18, empirical=17, markov=2)}))) == ["verdict 18"]


@pytest.mark.parametrize("bits", [None, math.nan, math.inf])
def test_a_model_without_a_number_is_told(bits):
    scored = split(9, empirical=17)
    scored.scores["model"]["bits_per_residue"] = bits
    assert list(lost_comparisons(report_of({"test": scored}))) == ["verdict 9"]


def test_a_split_of_one_protein_is_told():
    report = report_of({"test": split(9, num_records=1, empirical=17), "ood": split(9, num_records=2, empirical=17)})
    (line,) = single_proteins(report)
    assert line.startswith("split 'test' is a single protein")
