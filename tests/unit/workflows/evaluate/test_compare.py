import json
import os

import numpy as np
import pytest

from protlm.cli.app import main
from protlm.errors import ProtlmError, UsageError
from protlm.workflows.evaluate.compare import compare
from protlm.workflows.evaluate.evaluate import evaluate
from protlm.workflows.evaluate.saved_report import read_report
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
    assert written["verdicts"] == compared.verdicts
    assert [model["name"] for model in written["models"]] == ["good", "poor"]


def test_models_are_evaluated_first_and_give_what_their_reports_give(folder, tmp_path):
    compared = compare([folder / "good", folder / "poor", folder / "dataset"], tmp_path / "out", evaluate_on())
    reports = [folder / "report-good", folder / "report-poor"]
    from_reports = compare(reports, tmp_path / "other", evaluate_on())
    assert compared.differences == [row for row in from_reports.differences if row["split"] == "test"]
    assert (tmp_path / "out" / "model-1" / "report.html").exists()


def test_the_same_command_gives_the_same_bytes(folder, tmp_path):
    reports = [folder / "report-good", folder / "report-poor"]
    for out in ("a", "b"):
        compare(reports, tmp_path / out, evaluate_on())
    for name in ("comparison.json", "comparison.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("name", ["comparison.json", "comparison.html"])
def test_an_existing_comparison_is_replaced_only_by_force(folder, tmp_path, name):
    items = [folder / "report-good", folder / "report-poor"]
    (tmp_path / name).write_text("mine")
    with pytest.raises(ProtlmError, match=f"{name}: exists already"):
        compare(items, tmp_path, evaluate_on())
    assert (tmp_path / name).read_text() == "mine"
    compare(items, tmp_path, evaluate_on(), force=True)
    assert (tmp_path / name).read_text() != "mine"


def test_a_folder_of_something_else_is_refused(folder, tmp_path):
    items = [folder / "report-good", folder / "report-poor"]
    for out in (folder / "dataset", folder / "good"):
        with pytest.raises(ProtlmError, match="no folder for a report"):
            compare(items, out, evaluate_on(), force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ProtlmError, match="expected a folder"):
        compare(items, tmp_path / "file", evaluate_on(), force=True)


def test_the_json_comes_last(folder, tmp_path, monkeypatch):
    names, replace = [], os.replace
    monkeypatch.setattr("protlm.files.os.replace", lambda old, new: (names.append(new.name), replace(old, new)))
    compare([folder / "report-good", folder / "report-poor"], tmp_path / "out", evaluate_on())
    assert names == ["comparison.html", "comparison.json"]


def test_a_comparison_that_fails_leaves_no_folder(folder, tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("protlm.workflows.evaluate.comparison.Comparison.to_json", interrupt)
    items = [folder / "report-good", folder / "report-poor"]
    with pytest.raises(KeyboardInterrupt):
        compare(items, tmp_path / "new" / "out", evaluate_on())
    assert not (tmp_path / "new").exists()


def test_the_reports_of_an_interrupted_comparison_stay_and_can_be_used(folder, tmp_path):
    def interrupted(model, dataset, out):
        if model.name == "poor":
            raise KeyboardInterrupt
        evaluate_on()(model, dataset, out)

    items, out = [folder / "good", folder / "poor", folder / "dataset"], tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compare(items, out, interrupted)
    assert [path.name for path in out.iterdir()] == ["model-1"]
    before = (out / "model-1" / "report.json").stat().st_mtime_ns
    with pytest.raises(ProtlmError, match=r"pass .*model-1 in place of .*good"):
        compare(items, out, evaluate_on())
    resumed = compare([out / "model-1", *items[1:]], out, evaluate_on())
    assert (out / "model-1" / "report.json").stat().st_mtime_ns == before
    again = compare(items, out, evaluate_on(force=True), force=True)
    assert (out / "model-1" / "report.json").stat().st_mtime_ns > before
    assert again.to_json() == resumed.to_json()


def test_an_interrupted_comparison_leaves_nothing_that_was_not_there_before(folder, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("protlm.workflows.evaluate.evaluate.measure_split", interrupt)
    items = [str(folder / name) for name in ("good", "poor", "dataset")]
    assert main(["eval", "--compare", *items, "--out", str(tmp_path / "new" / "out")]) == 130
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("bad", ["missing", "damaged", "unrelated"])
def test_what_can_be_refused_is_refused_before_a_model_is_evaluated(folder, tmp_path, bad):
    def evaluate_never(*arguments):
        raise AssertionError

    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "report.json").write_text("{}")
    evaluate(request(folder / "poor", folder / "dataset", tmp_path / "unrelated", seed=1))
    items = [folder / "good", folder / "report-good", tmp_path / bad, folder / "dataset"]
    with pytest.raises(ProtlmError, match=r"missing: .*no such directory|not a report|seed is 1"):
        compare(items, tmp_path / "out", evaluate_never)
    assert not (tmp_path / "out").exists()


def test_a_report_that_is_compared_is_not_overwritten(folder, tmp_path):
    out = tmp_path / "out"
    evaluate(request(folder / "good", folder / "dataset", out / "model-2"))
    with pytest.raises(ProtlmError, match=r"model-2: compared here, and where the report of .*poor goes"):
        compare([out / "model-2", folder / "poor", folder / "dataset"], out, evaluate_on(force=True), force=True)


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
        ('{"splits": {"test": {}}, "format_version": "' + "x" * 1000 + '"}', r"expected 2, got 'x{98}; evaluate again"),
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
    assert "On test good is better than poor by 0.263 bits per residue" in printed
    assert printed.splitlines()[-1].split() == ["page", str(tmp_path / "out" / "comparison.html")]
    assert main(["eval", "--compare", *reports, "--out", str(tmp_path / "out")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["eval", "--compare", reports[0], "--out", str(tmp_path / "out2")]) == 2
    assert main(["eval", str(folder / "good"), "--out", str(tmp_path / "out2")]) == 2


def test_a_report_that_is_no_regular_file_or_too_large_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate((64 << 20) + 1)
    for path, reason in (("pipe", "expected a regular file"), ("large", "expected at most 67,108,864 bytes")):
        with pytest.raises(ProtlmError, match=f"{path}: cannot be read: {reason}"):
            read_report(tmp_path / path)
