"""A run that is stopped, by its time or by a signal, leaves a model, and goes on as if it had not been stopped."""

import json
import math
import os
import signal

import pytest

from protlm.cli.app import main
from protlm.pretrained.model_files import read_description
from protlm.workflows.train import callbacks
from protlm.workflows.train import train as train_module
from protlm.workflows.train.run_log import RunLog
from tests.e2e.conftest import SMALL
from tests.e2e.test_train_watching import scores_of
from tests.e2e.train_tools import losses, rows, train

NEVER = ["--set", "train.valid_every_steps=1000"]


@pytest.fixture
def stopped(dataset, tmp_path, monkeypatch):
    """Trains until a signal comes in a step, and returns the run, the last step, and the description of its model."""

    def run(step, *options, data=dataset):
        update = RunLog.update

        def signalled(log, number, *arguments):
            update(log, number, *arguments)
            if number == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(RunLog, "update", signalled)
            assert train(data, tmp_path / "run", *options) == 130
        assert len(rows(tmp_path / "run")) == step
        return tmp_path / "run", read_description(tmp_path / "run" / "model")

    return run


@pytest.fixture
def no_time(monkeypatch):
    """There is no time to measure."""
    monkeypatch.setattr(callbacks, "_SECONDS_TO_MEASURE", -1.0)


def no_baselines(*_):
    """A stand-in for `baseline_perplexities`, which may take as long as the split is large."""
    raise AssertionError("a stopped run measures no baselines")


def end_of(run_dir):
    return json.loads((run_dir / "run.json").read_text())["sessions"][-1]["end"]


def test_a_run_whose_time_is_over_measures_the_model_that_it_leaves(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(dataset, out, *NEVER, "--max-steps", 100_000, "--max-time", "00:00:01") == 0
    told = capsys.readouterr().out
    assert "valid split" in told
    assert "unmeasured" not in told
    description = read_description(out / "model")
    assert (description.step, description.unmeasured) == (len(rows(out)), False)
    end = end_of(out)
    assert (end["model"], end["valid"]["perplexity"]) == ("measured", description.valid.perplexity)
    assert not any(row["valid/perplexity"] for row in rows(out))


def test_a_model_that_there_is_no_time_to_measure_is_left_and_marked_everywhere(stopped, no_time, fasta, capsys):
    out, description = stopped(3, *NEVER, "--json")
    assert json.loads(capsys.readouterr().out)["unmeasured"] is True
    assert (description.step, description.valid, description.unmeasured) == (3, None, True)
    assert "unmeasured" in (out / "model" / "README.md").read_text()
    assert (end_of(out)["model"], end_of(out)["valid"]) == ("unmeasured", None)
    assert main(["inspect", str(out)]) == 0
    assert "unmeasured" in capsys.readouterr().out
    assert main(["embed", str(out), str(fasta), "--out", str(out.parent / "e.h5")]) == 0


def test_it_is_there_before_it_is_measured_and_stays_if_the_measurement_is_interrupted(stopped, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(callbacks, "score_split", interrupt)
    _, description = stopped(2, *NEVER)
    assert (description.step, description.unmeasured) == (2, True)


def test_a_measured_model_stays_the_best(stopped):
    out, description = stopped(3, "--set", "train.valid_every_steps=2")
    assert (description.step, description.unmeasured) == (2, False)
    assert end_of(out)["model"] == "measured"


@pytest.mark.parametrize(("perplexities", "step"), [((15.0, 14.0), 5), ((15.0, 16.0), 3)], ids=["better", "worse"])
def test_of_the_models_of_two_stops_the_better_one_stays(perplexities, step, stopped, monkeypatch):
    monkeypatch.setattr(callbacks, "score_split", scores_of(perplexities))
    stopped(3, *NEVER)
    _, description = stopped(5, *NEVER, "--resume")
    assert description.step == step
    assert description.valid.perplexity == pytest.approx(min(perplexities))


def test_an_unmeasured_model_takes_the_place_of_no_measured_one_but_of_an_unmeasured_one(stopped, monkeypatch):
    stopped(2, *NEVER)
    monkeypatch.setattr(callbacks, "_SECONDS_TO_MEASURE", -1.0)
    _, description = stopped(4, *NEVER, "--resume")
    assert (description.step, description.unmeasured) == (2, False)
    _, description = stopped(2, *NEVER, "--force")
    assert (description.step, description.unmeasured) == (2, True)
    _, description = stopped(4, *NEVER, "--resume")
    assert (description.step, description.unmeasured) == (4, True)


def test_a_stopped_run_spends_no_time_on_baselines(stopped, monkeypatch):
    monkeypatch.setattr(train_module, "baseline_perplexities", no_baselines)
    _, description = stopped(3, *NEVER, "--set", "train.checkpoint_every_steps=1000")
    assert description.step == 3


def test_without_a_valid_split_the_latest_model_is_left(fasta, tmp_path, stopped):
    alone = tmp_path / "alone"
    assert main(["prep", str(fasta), "--out", str(alone), "--valid-fraction", "0"]) == 0
    out, description = stopped(3, "--set", "train.valid_every_steps=2", data=alone)
    assert (description.step, description.unmeasured) == (3, False)
    assert end_of(out)["model"] == "without valid split"


@pytest.mark.parametrize("every", [3, 1000])
def test_a_run_that_was_stopped_twice_ends_with_the_bytes_of_one_that_was_not(
    every, dataset, tmp_path, stopped, monkeypatch
):
    settings = ["--set", f"train.valid_every_steps={every}", "--max-steps", 8]
    stopped(2, *settings)
    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "_SECONDS_TO_MEASURE", -1.0)
        stopped(5, *settings, "--resume")
    out, whole = tmp_path / "run", tmp_path / "whole"
    assert train(dataset, out, *settings, "--resume") == 0
    assert train(dataset, whole, *settings) == 0
    for name in ("metrics.csv", "model/config.json", "model/model.safetensors", "model/README.md"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert losses(out) == losses(whole)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_whose_measurement_is_not_finite_ends_the_run_with_an_error(
    value, dataset, tmp_path, monkeypatch, failure
):
    monkeypatch.setattr(callbacks, "score_split", scores_of([value]))
    out = tmp_path / "run"
    words = ["--config", "tiny", *SMALL, *NEVER, "--max-time", "00:00:00"]
    message = failure("train", dataset, "--out", out, *words)
    assert f"the perplexity on valid is {value}, and so the exported model is of no use" in message
    assert read_description(out / "model").unmeasured
