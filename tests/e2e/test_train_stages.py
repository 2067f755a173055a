"""A converted model recovers: the stages with a teacher, and layers that are converted one after another."""

import json
import shutil

import pytest
import torch

from protlm.cli.app import main
from protlm.data.batching.batches import pack_row
from protlm.data.storage.dataset import open_dataset
from protlm.pretrained.model_directory import read_description, read_model, save_model
from protlm.workflows.train.row_losses import kl_divergence
from tests.e2e.converted_models import convert, train_exact
from tests.e2e.train_tools import LAUNCHERS, rows, run_on_two
from tests.foreign_checkpoint import write_checkpoint

SMALL_ROWS = ["--set", "data.tokens_per_batch=1024", "--set", "data.max_length=500"]
STAGES = ("transfer", "distill")


def sets(*settings):
    return [word for setting in settings for word in ("--set", setting)]


@pytest.fixture(scope="module")
def exact(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("exact") / "run"
    train_exact(dataset, out)
    return out


@pytest.fixture(scope="module")
def converted(dataset, exact, tmp_path_factory):
    return convert(exact, tmp_path_factory.mktemp("converted") / "model", dataset)


@pytest.fixture
def recover(dataset, exact, converted):
    """Runs a stage, or without one trains on; returns the words of the command."""

    def run(out, stage, *arguments, teacher=exact):
        words = ["train", dataset, "--out", out, "--init", converted, *SMALL_ROWS]
        words += [] if stage is None else ["--stage", stage, "--teacher", teacher]
        words = [str(word) for word in (*words, *arguments)]
        assert main(words) == 0
        return words

    return run


def stage_losses(run, stage):
    return [float(row[f"train/{stage}_loss"]) for row in rows(run)]


def last_weights(run):
    """Returns the weights of the last checkpoint of a run."""
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def changed(before, after):
    """Returns the names of the tensors that differ between two models."""
    first, second = (read_model(path)[0].state_dict() for path in (before, after))
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


def of_layers(*names):
    return {f"layers.{layer}.attention.{name}" for layer in (0, 2) for name in names}


LEARNED = of_layers("query.weight", "query.bias", "key.weight", "key.bias", "log_temperature")
FEATURES = of_layers("projection", "feature_bias")


@pytest.mark.parametrize(("learns", "share", "moved"), [("true", 0.4, LEARNED | FEATURES), ("false", 0.7, LEARNED)])
def test_transfer_brings_each_attention_to_its_teachers_and_changes_nothing_else(
    learns, share, moved, converted, recover, tmp_path
):
    recover(tmp_path / "run", "transfer", *sets(f"train.transfer_features={learns}"))
    losses = stage_losses(tmp_path / "run", "transfer")
    assert len(losses) == 100
    assert sum(losses[-10:]) < share * sum(losses[:10])
    assert changed(converted, tmp_path / "run") == moved
    assert {row["train/loss"] for row in rows(tmp_path / "run")} == {""}
    description, before = (read_description(path) for path in (tmp_path / "run" / "model", converted))
    assert description.model == before.model
    assert description.trained_residues is None


def divergence(student, teacher, dataset):
    """Returns the mean divergence of a model from its teacher on proteins that neither was trained on."""
    models = [read_model(path)[0] for path in (teacher, student)]
    split = open_dataset(dataset).split("valid")
    tokens, cu_seqlens = pack_row([split.tokens(number) for number in range(len(split))])
    with torch.no_grad():
        return kl_divergence(*(model(tokens, cu_seqlens) for model in models)).mean().item()


def test_distillation_brings_predictions_to_the_teachers(dataset, exact, converted, recover, tmp_path):
    recover(tmp_path / "run", "distill", "--max-steps", 60, *sets("train.lr=1e-3"))
    losses = stage_losses(tmp_path / "run", "distill")
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert divergence(tmp_path / "run", exact, dataset) < 0.5 * divergence(converted, exact, dataset)
    # All weights learn; what is drawn or balanced stays.
    fixed = of_layers("projection", "feature_bias", "feature_shift", "query_balance", "key_balance")
    assert changed(converted, tmp_path / "run") == read_model(converted)[0].state_dict().keys() - fixed
    assert all(float(row["train/perplexity"]) > 1 for row in rows(tmp_path / "run"))


def test_a_stage_brings_its_defaults_and_whoever_sets_something_gets_it(recover, tmp_path):
    recover(tmp_path / "run", "transfer", "--max-steps", 2, "--set", "train.lr=0.003", "--dry-run")
    recover(tmp_path / "run", "transfer", "--max-steps", 2, "--set", "train.lr=0.003")
    text = (tmp_path / "run" / "config.toml").read_text()
    for line in ('stage = "transfer"', 'optimizer = "adamw"', "lr = 0.003", "weight_decay = 0.0", "warmup_steps = 10"):
        assert f"\n{line}\n" in text


GRADUAL = ["train.convert_layers=2", "train.health_every_steps=1"]


@pytest.mark.parametrize("stage", ["distill", None])
def test_layers_are_converted_one_after_another_and_only_whole_models_are_kept(stage, recover, tmp_path):
    recover(tmp_path / "run", stage, "--max-steps", 4, *sets(*GRADUAL, "train.valid_every_steps=1"))
    has_features = [
        (int(row["step"]), int(row["layer"]))
        for row in rows(tmp_path / "run", "health.csv")
        if row["effective_features"]
    ]
    assert has_features == [(1, 1), (2, 1), (3, 1), (3, 3), (4, 1), (4, 3)]
    assert [bool(row["valid/loss"]) for row in rows(tmp_path / "run")] == [True] * 4
    assert read_description(tmp_path / "run" / "model").step > 2


@pytest.mark.parametrize("every", [1, 100])
def test_a_run_that_is_stopped_between_two_conversions_leaves_a_model_with_its_own_scores(
    every, dataset, recover, tmp_path
):
    run = tmp_path / "run"
    recover(
        run, "distill", "--max-time", "00:00:00", *sets("train.convert_layers=5", f"train.valid_every_steps={every}")
    )
    assert len(rows(run)) == 1
    valid = read_description(run / "model").valid
    assert main(["eval", str(run), str(dataset), "--split", "valid", "--out", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert valid.perplexity == pytest.approx(report["model"]["perplexity"], rel=1e-5)
    # The table has the scores of the model of that step, one layer of which was exact.
    if every == 1:
        assert float(rows(run)[0]["valid/perplexity"]) != pytest.approx(valid.perplexity, rel=1e-7)


SAVED = ["train.checkpoint_every_steps=3", "train.valid_every_steps=3", "train.schedule_steps=6"]


@pytest.mark.parametrize(
    ("stage", "settings"),
    [("transfer", []), ("distill", []), ("distill", ["train.convert_layers=4"]), (None, ["train.convert_layers=3"])],
)
def test_a_resumed_stage_gives_the_bytes_of_an_uninterrupted_one(stage, settings, dataset, recover, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = sets(*SAVED, *settings)
    recover(whole, stage, "--max-steps", 6, *words)
    recover(parts, stage, "--max-time", "00:00:00", "--max-steps", 6, *words)
    assert len(rows(parts)) == 1
    # The teacher is known from the run.
    assert main(["train", str(dataset), "--out", str(parts), "--resume"]) == 0
    assert len(rows(parts)) == 6
    for name in ("metrics.csv", "model/model.safetensors"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    last, expected = last_weights(parts), last_weights(whole)
    assert last.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(last[name], tensor), name


def test_recomputed_activations_change_no_bit(recover, tmp_path):
    for stage in STAGES:
        for name, setting in (("kept", "false"), ("recomputed", "true")):
            words = sets(f"train.activation_checkpointing={setting}")
            recover(tmp_path / f"{stage}-{name}", stage, "--max-steps", 3, *words)
        kept, recomputed = (stage_losses(tmp_path / f"{stage}-{name}", stage) for name in ("kept", "recomputed"))
        assert kept == recomputed


@pytest.fixture(scope="module")
def on_one(dataset, exact, converted, tmp_path_factory):
    """A run of each stage on one device, and the words that started it."""
    runs = {}
    for stage in STAGES:
        out = tmp_path_factory.mktemp("one") / stage
        words = ["train", dataset, "--init", converted, "--stage", stage, "--teacher", exact, *SMALL_ROWS]
        words += ["--max-steps", 4, *sets("train.accumulate=2", "train.checkpoint_every_steps=2")]
        assert main([str(word) for word in (*words, "--out", out)]) == 0
        runs[stage] = out, words
    return runs


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_recover_as_one_does(stage, strategy, launcher, dataset, on_one, tmp_path):
    one, words = on_one[stage]
    out = tmp_path / "run"
    on_two = ["--out", out, "--strategy", strategy]
    status, _, errors = run_on_two(launcher, *words, *on_two, "--max-steps", 3, *sets("train.schedule_steps=4"))
    assert status == 0, errors
    assert main(["train", str(dataset), "--out", str(out), "--resume", "--max-steps", "4"]) == 0
    assert stage_losses(out, stage) == pytest.approx(stage_losses(one, stage), rel=2e-5)
    last, expected = last_weights(out), last_weights(one)
    assert last.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(last[name], tensor, atol=2e-4), name


def test_a_run_goes_on_with_its_own_teacher_only(dataset, exact, converted, recover, tmp_path, failure):
    run, copy, other = tmp_path / "run", tmp_path / "copy", tmp_path / "other"
    shutil.copytree(exact / "model", copy)
    recover(run, "transfer", "--max-steps", 2, teacher=copy)
    recovery = json.loads((run / "run.json").read_text())["recovery"]
    assert recovery == {
        "stage": "transfer", "teacher": "copy", "teacher_hash": read_description(copy).weights_hash,
    }  # fmt: skip
    assert str(tmp_path) not in (run / "run.json").read_text()
    network, description = read_model(copy)
    with torch.no_grad():
        network.head.bias.add_(1)
    resumed = ["train", dataset, "--out", run, "--resume", "--max-steps", 3]
    save_model(copy, network, description)
    assert "its weights are" in failure(*resumed)
    copy.rename(other)
    assert "its teacher cannot be read" in failure(*resumed)
    assert "give the same model" in failure(*resumed, "--teacher", other)
    assert "train.stage is 'transfer' in this run" in failure(*resumed, "--stage", "distill")
    assert len(rows(run)) == 2
    # Another path to the same weights is no other teacher, and from then on the one that is known.
    assert main([str(word) for word in (*resumed, "--teacher", exact)]) == 0
    assert main([str(word) for word in (*resumed[:-1], 4)]) == 0
    assert len(rows(run)) == 4


def test_a_model_of_another_program_is_a_teacher_too(dataset, tmp_path):
    source = write_checkpoint(tmp_path / "source")
    model = convert(source, tmp_path / "model", dataset, near_block=8)
    losses = []
    for stage in STAGES:
        out = tmp_path / stage
        words = ["train", dataset, "--out", out, "--init", model, "--teacher", source, "--stage", stage, *SMALL_ROWS]
        words += ["--max-steps", 2, *sets("train.convert_layers=1" if stage == "distill" else "train.warmup_steps=0")]
        assert main([str(word) for word in words]) == 0
        losses += stage_losses(out, stage)
        assert main(["train", str(dataset), "--out", str(out), "--resume", "--max-steps", "3"]) == 0
        assert read_description(out / "model").fine_tuned_from.source == "source"
    assert all(loss > 0 for loss in losses)


def test_a_dry_run_counts_the_teacher(recover, tmp_path, capsys):
    for stage in (*STAGES, None):
        capsys.readouterr()
        recover(tmp_path / "run", stage, "--dry-run", "--json")
        report = json.loads(capsys.readouterr().out)
        weights = report["memory"]["weights_bytes"]
        assert (report["memory"]["teacher_bytes"] > 0.9 * weights) == (stage is not None)
        assert report["memory_bytes"] > report["memory"]["teacher_bytes"]
        assert report["seconds_from"] == "measured"
    assert not (tmp_path / "run").exists()
