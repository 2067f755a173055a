"""Runs that an earlier protlm began: they go on, and what was measured otherwise is not compared."""

import pytest
import torch

from protlm.cli.app import main
from protlm.pretrained.model_directory import read_model
from protlm.workflows.train.run_tables import ADDED_METRICS
from tests.e2e.train_tools import losses, rows, train


def without_the_kind_of_measurement(run_dir):
    """Makes last.ckpt one of a protlm that did not write how it had measured; its best value cannot be reached."""
    path = run_dir / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (watch,) = (state for state in checkpoint["callbacks"].values() if "best" in state)
    del watch["best"]["targets"]
    watch["best"]["perplexity"] = 1.5
    torch.save(checkpoint, path)


def resume(dataset, out, steps):
    return main(["train", str(dataset), "--out", str(out), "--resume", "--max-steps", str(steps)])


def test_a_run_without_the_columns_of_today_goes_on_and_counts_what_it_can(dataset, tmp_path):
    out = tmp_path / "run"
    assert train(dataset, out, "--max-steps", 2) == 0
    table = out / "metrics.csv"
    lines = [line.split(",") for line in table.read_text().splitlines()]
    kept = [place for place, column in enumerate(lines[0]) if column not in ADDED_METRICS]
    table.write_text("".join(",".join(line[place] for place in kept) + "\n" for line in lines))
    path = out / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["protlm"]["num_tokens"]
    torch.save(checkpoint, path)
    assert resume(dataset, out, 3) == 0
    assert [row["tokens"] for row in rows(out)] == [""] * 3
    assert [bool(row["muon_lr"]) for row in rows(out)] == [False, False, True]
    whole = tmp_path / "whole"
    assert train(dataset, whole, "--max-steps", 3, "--set", "train.schedule_steps=2") == 0
    assert losses(out) == losses(whole)


def test_exact_attention_of_before_goes_on_with_its_bound_whatever_configuration_is_named(dataset, tmp_path):
    out, own = tmp_path / "run", tmp_path / "own.toml"
    exact = ["--set", "model.attention=softmax", "--set", "model.exact_temperature=0"]
    assert train(dataset, out, "--max-steps", 2, *exact) == 0
    text = (out / "config.toml").read_text()
    new = ("exact_temperature", "local_window", "local_bias", "near_block", "near_map")
    before = "".join(line for line in text.splitlines(keepends=True) if not line.startswith(new))
    for path in (out / "config.toml", own):
        path.write_text(before)
    assert main(["train", str(dataset), "--out", str(out), "--config", str(own), "--resume", "--max-steps", "3"]) == 0
    assert resume(dataset, out, 4) == 0
    whole = tmp_path / "whole"
    assert train(dataset, whole, "--max-steps", 4, "--set", "train.schedule_steps=2", *exact) == 0
    assert losses(out) == losses(whole)


def test_events_go_on_where_they_were(dataset, tmp_path):
    out = tmp_path / "run"
    assert train(dataset, out, "--max-steps", 2) == 0
    for path in (out / "tensorboard" / "run").iterdir():
        path.rename(out / "tensorboard" / path.name)
    (out / "tensorboard" / "run").rmdir()
    assert resume(dataset, out, 3) == 0
    assert [path for path in (out / "tensorboard").rglob("*") if path.is_dir()] == []


def test_a_best_model_that_was_measured_otherwise_is_none(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(dataset, out, "--max-steps", 2) == 0
    without_the_kind_of_measurement(out)
    capsys.readouterr()
    assert resume(dataset, out, 3) == 0
    assert "up to step 2 the valid split was masked as in training" in capsys.readouterr().err
    _, description = read_model(out)
    assert (description.step, description.valid.targets) == (3, "hidden")
    assert description.valid.perplexity > 1.5
    assert resume(dataset, out, 4) == 0
    assert "masked as in training" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings", [["model.causal=true"], ["train.mask_share=1.0", "train.random_share=0.0"]], ids=["causal", "hidden"]
)
def test_a_best_model_that_was_measured_in_the_same_way_stays(settings, dataset, tmp_path, capsys):
    out = tmp_path / "run"
    words = [word for setting in settings for word in ("--set", setting)]
    assert train(dataset, out, "--max-steps", 2, *words) == 0
    without_the_kind_of_measurement(out)
    capsys.readouterr()
    assert resume(dataset, out, 3) == 0
    assert "begins anew" not in capsys.readouterr().err
    assert read_model(out)[1].step == 2
