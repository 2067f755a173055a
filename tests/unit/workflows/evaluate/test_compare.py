import json

import numpy as np
import pytest

from protlm.cli.app import main
from protlm.errors import ProtlmError, UsageError
from protlm.workflows.evaluate.compare import compare, read_report
from protlm.workflows.evaluate.evaluate import evaluate
from tests.unit.workflows.evaluate.eval_cases import (
    predict_always,
    prepare,
    random_sequences,
    request,
    save_new_model,
)

pytestmark = pytest.mark.usefixtures("quick_pictures")

LETTERS = "ACDEFGHIKL"


def evaluate_on(*splits, **options):
    """Returns how a comparison evaluates models."""
    return lambda model, dataset, out: evaluate(request(model, dataset, out, splits or ("test",), **options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset, two models, and their reports on its test split."""
    folder = tmp_path_factory.mktemp("compare")
    splits = {
        name: [(f"{name}{number}", sequence) for number, sequence in
               enumerate(random_sequences(size, seed=seed, letters=LETTERS))]
        for seed, (name, size) in enumerate({"train": 20, "test": 40, "ood": 10}.items())
    }  # fmt: skip
    dataset = prepare(folder, splits)
    save_new_model(folder / "good", weights=lambda model: predict_always(model, dict.fromkeys(LETTERS, 0.1)))
    save_new_model(folder / "poor", weights=lambda model: predict_always(model, dict.fromkeys(LETTERS + "MN", 1 / 12)))
    for name in ("good", "poor"):
        evaluate(request(folder / name, dataset, folder / f"report-{name}", ("test", "ood")))
    return folder


def test_paired_differences_are_those_of_the_scores_with_an_interval_that_pairing_makes_narrow(folder, tmp_path):
    items = [folder / "report-good", folder / "report-poor" / "report.json"]
    compared = compare(items, tmp_path / "out", evaluate_on())
    (bits,) = [row for row in compared.differences if (row["split"], row["metric"]) == ("test", "bits_per_residue")]
    # log2(10) − log2(12) at every residue: no resampling of proteins changes it.
    assert bits["difference"] == pytest.approx(np.log2(10 / 12), abs=1e-5)
    assert bits["low"] is None or bits["high"] - bits["low"] < 1e-5
    assert compared.names == ["good", "poor"]
    assert set(compared.scores["test"]) == {"good", "poor"}
    assert set(compared.baselines["test"]) == {"empirical", "markov", "two_sided", "uniform"}
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written["differences"] == compared.differences
    assert [model["name"] for model in written["models"]] == ["good", "poor"]


def test_models_are_evaluated_first_and_give_what_their_reports_give(folder, tmp_path):
    compared = compare([folder / "good", folder / "poor", folder / "dataset"], tmp_path / "out", evaluate_on())
    reports = [folder / "report-good", folder / "report-poor"]
    from_reports = compare(reports, tmp_path / "other", evaluate_on())
    assert compared.differences == [row for row in from_reports.differences if row["split"] == "test"]
    assert (tmp_path / "out" / "model-1" / "report.html").exists()


def test_the_same_model_twice_does_not_differ(folder, tmp_path):
    compared = compare([folder / "report-good"] * 2, tmp_path / "out", evaluate_on())
    assert compared.names == ["good", "good (2)"]
    assert {row["difference"] for row in compared.differences} == {0.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"seed": 1}, "seed is 1"), ({"mask_rate": 0.3}, "mask_rate is 0.3"), ({"num_masks": 2}, "num_masks is 2")],
)
def test_reports_of_other_masks_are_refused(folder, tmp_path, options, message):
    evaluate(request(folder / "poor", folder / "dataset", tmp_path / "other", **options))
    with pytest.raises(ProtlmError, match=message):
        compare([folder / "report-good", tmp_path / "other"], tmp_path / "out", evaluate_on())
    assert not (tmp_path / "out").exists()


def test_reports_of_other_datasets_are_refused(folder, tmp_path):
    splits = {"test": [(f"x{number}", sequence) for number, sequence in enumerate(random_sequences(5, seed=9))]}
    dataset = prepare(tmp_path, splits)
    evaluate(request(folder / "poor", dataset, tmp_path / "other"))
    with pytest.raises(ProtlmError, match="dataset_hash"):
        compare([folder / "report-good", tmp_path / "other"], tmp_path / "out", evaluate_on())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "cannot be read"),
        ("[]", "not a report"),
        ('{"splits": {}}', "not a report"),
        ('{"splits": {"test": {}}, "format_version": 1}', "expected 2, got 1"),
        ('{"splits": {"test": {}}, "format_version": 2}', "damaged: dataset_hash"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_what_is_no_report_is_one_line(tmp_path, content, message):
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(ProtlmError, match=message):
        read_report(path)


def test_a_report_with_damaged_replicates_is_refused(folder, tmp_path):
    report = json.loads((folder / "report-good" / "report.json").read_text())
    report["splits"]["test"]["replicates"]["accuracy"].pop()
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    with pytest.raises(ProtlmError, match=r"damaged: .*replicates"):
        read_report(path)


def test_too_few_and_datasets_that_are_missing_are_wrong_usage(folder, tmp_path):
    with pytest.raises(UsageError, match="at least two"):
        compare([folder / "report-good"], tmp_path / "out", evaluate_on())
    with pytest.raises(UsageError, match="one DATASET"):
        compare([folder / "report-good", folder / "poor"], tmp_path / "out", evaluate_on())


def test_the_command_prints_the_models_and_their_differences(folder, tmp_path, capsys):
    reports = [str(folder / "report-good"), str(folder / "report-poor")]
    assert main(["eval", "--compare", *reports, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "good − poor (test)" in printed
    assert main(["eval", "--compare", *reports, "--out", str(tmp_path / "out")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["eval", "--compare", reports[0], "--out", str(tmp_path / "out2")]) == 2
    assert main(["eval", str(folder / "good"), "--out", str(tmp_path / "out2")]) == 2
