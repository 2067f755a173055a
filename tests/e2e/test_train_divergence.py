"""Runs whose numbers become infinite: one line, nothing of them is kept, and the way on from what was good."""

import json

import pytest
import torch

from protlm.cli.app import main
from protlm.workflows.train import divergence
from protlm.workflows.train.optimizer import TrainingOptimizer
from tests.e2e.conftest import SMALL
from tests.e2e.train_tools import losses, rows, run_on_two, train

ONE_BY_ONE = ["--set", "train.checkpoint_every_steps=1", "--set", "train.valid_every_steps=1"]
FAR_TOO_FAST = ["--set", "train.lr=1e30", "--set", "train.optimizer=adamw", "--set", "train.warmup_steps=0"]


def step_of(out, name):
    return torch.load(out / "checkpoints" / name, weights_only=True)["global_step"]


@pytest.mark.parametrize("last", [1, 2, 50])
def test_a_run_that_diverges_keeps_nothing_of_it(last, dataset, tmp_path, failure):
    out = tmp_path / "run"
    message = failure(
        "train", dataset, "--out", out, "--config", "tiny", *SMALL, *ONE_BY_ONE, *FAR_TOO_FAST, "--max-steps", last
    )
    assert "step 1: the loss after the update is not finite" in message
    assert "--set train.lr=" in message
    assert len(rows(out)) == 1
    assert not list((out / "checkpoints").iterdir())
    assert not (out / "model").exists()
    assert json.loads((out / "run.json").read_text())["sessions"][0]["end"]["outcome"] == "failed"


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(dataset, tmp_path, failure):
    message = failure(
        "train", dataset, "--out", tmp_path / "run", "--config", "tiny", *SMALL, *FAR_TOO_FAST, "--max-steps", 50
    )
    assert "step 2: the loss is nan" in message
    assert "train.lr" in message


def spoil_weights(optimizer):
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0][0, 0] = torch.nan


def spoil_state(optimizer):
    next(state for state in optimizer.state.values() if "exp_avg" in state)["exp_avg"].view(-1)[0] = torch.inf


@pytest.mark.parametrize(("spoil", "named"), [(spoil_weights, "the weights"), (spoil_state, "the state of the opt")])
def test_the_last_good_checkpoint_and_model_stay(spoil, named, dataset, tmp_path, failure, monkeypatch):
    out = tmp_path / "run"
    step = TrainingOptimizer.step

    def spoiling(self, *arguments, **named_arguments):
        loss = step(self, *arguments, **named_arguments)
        if self.state[self.param_groups[0]["params"][0]]["step"] == 3:
            spoil(self)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(TrainingOptimizer, "step", spoiling)
        message = failure("train", dataset, "--out", out, "--config", "tiny", *SMALL, *ONE_BY_ONE, "--max-steps", 5)
    assert f"step 3: {named}" in message
    assert "not finite" in message
    assert [row["valid/loss"] != "" for row in rows(out)] == [True, True, False]
    assert (step_of(out, "last.ckpt"), step_of(out, "previous.ckpt")) == (2, 1)
    assert json.loads((out / "model" / "config.json").read_text())["step"] == 2
    # Whatever it was is over.
    assert main(["train", str(dataset), "--out", str(out), "--resume"]) == 0
    assert train(dataset, tmp_path / "whole", *ONE_BY_ONE, "--max-steps", 5) == 0
    assert losses(out) == losses(tmp_path / "whole")


@pytest.mark.parametrize("launcher", ["torchrun"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_of_two_processes_one_tells_and_none_keeps_anything(strategy, launcher, dataset, tmp_path):
    out = tmp_path / "run"
    settings = ["--set", "train.accumulate=2", "--max-steps", 4, "--strategy", strategy]
    status, _, errors = run_on_two(
        launcher, "train", dataset, "--out", out, "--config", "tiny", *SMALL, *ONE_BY_ONE, *FAR_TOO_FAST, *settings
    )
    assert status == 1
    assert errors.count("\n") == 1, errors
    assert "step 1: the loss after the update is not finite" in errors
    assert not list((out / "checkpoints").iterdir())
    assert not (out / "model").exists()


def test_a_resumed_run_may_lower_its_rates_and_says_so(dataset, tmp_path, failure):
    out = tmp_path / "run"
    assert train(dataset, out, "--max-steps", 2, "--set", "train.schedule_steps=6") == 0
    resume = ["train", dataset, "--out", out, "--resume"]
    assert "become lower" in failure(*resume, "--max-steps", 4, "--set", "train.lr=0.1")
    lower = ["--set", "train.lr=1e-5", "--set", "train.muon_lr=2e-5"]
    assert main([*map(str, resume), "--max-steps", "4", *lower]) == 0
    assert main([*map(str, resume), "--max-steps", "6"]) == 0
    # The warm-up takes 40 steps.
    for column, peaks in (("lr", (2e-3, 1e-5)), ("muon_lr", (0.04, 2e-5))):
        expected = [peaks[step > 2] * step / 40 for step in range(1, 7)]
        assert [float(row[column]) for row in rows(out)] == pytest.approx(expected)
    groups = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert {group["peak_lr"] for group in groups} == {1e-5, 2e-5}
    sessions = json.loads((out / "run.json").read_text())["sessions"]
    assert [(session["lr"], session["muon_lr"]) for session in sessions] == [(2e-3, 0.04), (1e-5, 2e-5), (1e-5, 2e-5)]
    assert "become lower" in failure(*resume, "--max-steps", 8, "--set", "train.lr=0.002")


def test_lower_rates_reach_a_model_in_shards(dataset, tmp_path):
    """Its optimizer takes all that a checkpoint holds, the rates of back then too."""
    out = tmp_path / "run"
    accumulate = ["--set", "train.accumulate=2"]
    assert train(dataset, out, *accumulate, "--max-steps", 2, "--set", "train.schedule_steps=4") == 0
    resume = ["train", dataset, "--out", out, "--resume", "--max-steps", 3, "--set", "train.lr=1e-5"]
    status, _, errors = run_on_two("torchrun", *resume, "--strategy", "fsdp")
    assert status == 0, errors
    groups = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert {group["peak_lr"] for group in groups if group["rule"] == "adamw"} == {1e-5}


@pytest.mark.parametrize(
    "setting", ["lr=1e300", "muon_lr=1e300", "eps=1e300", "weight_decay=1e300", "lr=inf", "lr=nan", "clip_norm=inf"]
)
def test_rates_beyond_all_measure_are_one_line(setting, dataset, tmp_path, failure):
    message = failure("train", dataset, "--out", tmp_path / "run", "--set", f"train.{setting}")
    assert f"train.{setting.partition('=')[0]}" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_largest_rates_that_are_taken_end_in_one_line(optimizer, dataset, tmp_path, failure):
    largest = ["lr=1e30", "muon_lr=1e30", "weight_decay=1e6", "clip_norm=1e30", "warmup_steps=0"]
    settings = [word for setting in [*largest, f"optimizer={optimizer}"] for word in ("--set", f"train.{setting}")]
    start = ["train", dataset, "--out", tmp_path / "run", "--config", "tiny", *SMALL, "--max-steps", 3]
    assert "expected finite numbers" in failure(*start, *settings)


def test_the_look_at_a_row_changes_nothing(dataset, tmp_path, monkeypatch):
    settings = ["--set", "model.dropout=0.1", "--set", "train.checkpoint_every_steps=1", "--max-steps", 4]
    assert train(dataset, tmp_path / "looked", *settings) == 0
    seen = []
    monkeypatch.setattr(divergence, "_is_loss_finite", lambda model, batch: seen.append(model.training) or True)
    assert train(dataset, tmp_path / "not", *settings) == 0
    assert seen == [True] * 4
    assert losses(tmp_path / "looked") == losses(tmp_path / "not")
