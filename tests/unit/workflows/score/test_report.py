"""The sentence on a model and its baselines, for each way in which they may compare."""

from array import array

import numpy as np
import pytest

from protlm.workflows.score import assembly
from protlm.workflows.score.assembly import AssayScores
from protlm.workflows.score.inputs import Assay, Variant
from protlm.workflows.score.report import assay_report

SIZE = 200
GENERATOR = np.random.default_rng(5)
MEASURED = GENERATOR.standard_normal(SIZE)
NOISE = GENERATOR.standard_normal(SIZE)
OTHER_NOISE = GENERATOR.standard_normal(SIZE)
CLOSE, FAR = MEASURED + 0.3 * NOISE, MEASURED + 3 * NOISE


def verdict(model, measured=MEASURED, **baselines):
    scores = AssayScores(
        Assay("", ["mutant"]),
        num_variants=len(measured),
        scores=array("d", model),
        measured=array("d", measured),
        is_fit=array("b", [-1] * len(measured)),
        baselines={name: array("d", values) for name, values in baselines.items()},
    )
    return assay_report(scores, "wt", 28, seed=0)


@pytest.mark.parametrize(
    ("model", "baselines", "begins"),
    [
        (CLOSE, {"blosum62": FAR, "site_frequencies": OTHER_NOISE}, "better than the best baseline: a Spearman of 0.9"),
        (FAR, {"blosum62": CLOSE, "site_frequencies": OTHER_NOISE}, "worse than BLOSUM62 does: a Spearman of 0."),
        (FAR, {"blosum62": OTHER_NOISE, "site_frequencies": CLOSE}, "worse than site frequencies does: a Spearman of"),
        (
            CLOSE,
            {"blosum62": MEASURED + 0.3 * OTHER_NOISE},
            "not shown to be better than the best baseline: a Spearman",
        ),
    ],
)
def test_the_model_is_compared_with_the_best_baseline(model, baselines, begins):
    report = verdict(model, **baselines)
    assert begins in report.verdict
    best = max(report.metrics[name]["spearman"]["value"] for name in baselines)
    assert f" {best:.3f} (difference " in report.verdict
    of_model = report.metrics["model"]["spearman"]["value"]
    assert f"a Spearman of {of_model:.3f}," in report.verdict
    for name, gain in report.gains.items():
        assert gain["value"] == pytest.approx(of_model - report.metrics[name]["spearman"]["value"])


def test_of_rows_without_a_measurement_only_the_first_are_kept(monkeypatch):
    monkeypatch.setattr(assembly, "_MOST_UNMEASURED", 3)
    scores = AssayScores(Assay("", ["mutant"]), baselines={"blosum62": array("d")})
    for number in range(8):
        variant = Variant(0, 0, "M1A", None, 0.5 if number == 6 else None, None, ["M1A"])
        scores.add(variant, (), float(number), {"blosum62": -float(number)})
    assert scores.num_variants == 8
    assert list(scores.scores) == [0, 1, 2, 6]
    assert list(scores.baselines["blosum62"]) == [0, -1, -2, -6]
    report = assay_report(scores, "wt", 28, seed=0)
    assert (report.num_variants, report.num_measured) == (8, 1)


def test_what_cannot_be_compared_is_said():
    few = slice(0, 9)
    for model, measured, baselines, expected in (
        (CLOSE[few], MEASURED[few], {"blosum62": FAR[few]}, "there are too few variants to tell which is better"),
        (CLOSE, MEASURED, {"blosum62": [np.nan] * SIZE}, "no baseline scores all of these variants"),
        (CLOSE, MEASURED, {"blosum62": [1.0] * SIZE}, "the baselines score all of these variants alike"),
        ([1.0] * SIZE, MEASURED, {"blosum62": FAR}, "There is no Spearman correlation"),
    ):
        assert expected in verdict(model, measured, **baselines).verdict
