"""The reports of a run on itself: before it starts, while it goes on, and when it ends."""

import errno
import itertools
import json
import math
import os
import resource
import signal

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from protlm.cli.app import main
from protlm.config_files import load_config
from protlm.data.batching.draws import Draws
from protlm.data.batching.rows import training_rows
from protlm.data.storage.dataset import open_dataset
from protlm.data.storage.mixture import Mixture
from protlm.inference.metrics import NUM_SUMS, MetricSums
from protlm.pretrained.model_directory import read_model
from protlm.workflows.train import callbacks
from protlm.workflows.train.request import TrainRequest
from protlm.workflows.train.run_log import RunLog
from protlm.workflows.train.start import prepare_start
from tests.e2e.conftest import SMALL
from tests.e2e.train_tools import losses, rows, train, wait_for_rows
from tests.forked import Forked


def test_a_run_explains_itself(run_dir, dataset):
    description = json.loads((run_dir / "run.json").read_text())
    (session,) = description["sessions"]
    assert description["datasets"][0]["name"] == dataset.name
    assert session["versions"]["torch"] == torch.__version__
    assert str(run_dir) not in (run_dir / "run.json").read_text()
    end = session["end"]
    assert (end["outcome"], end["last_step"]) == ("finished", 9)
    assert end["seconds"] > sum(float(row["seconds"]) for row in rows(run_dir, "speed.csv"))
    assert end["valid"] == json.loads((run_dir / "model" / "config.json").read_text())["valid"]
    speed = rows(run_dir, "speed.csv")
    assert [row["step"] for row in speed] == [row["step"] for row in rows(run_dir)]
    assert all(float(row["seconds"]) > 0 and float(row["residues_per_second"]) > 0 for row in speed)
    assert all(0 <= float(row["data_wait_fraction"]) < 1 for row in speed)


def ends(run_dir):
    """Returns outcome and last step of each session of a run, None for one that has no end."""
    sessions = json.loads((run_dir / "run.json").read_text())["sessions"]
    return [end and (end["outcome"], end["last_step"]) for end in (session["end"] for session in sessions)]


def test_a_run_that_fails_has_an_end_and_one_that_is_killed_has_none(dataset, tmp_path, failure, monkeypatch):
    out = tmp_path / "run"
    settings = ["--set", "train.lr=1e30", "--set", "train.optimizer=adamw", "--set", "train.warmup_steps=0"]
    assert "the loss is" in failure("train", dataset, "--out", out, "--config", "tiny", *SMALL, *settings)
    ((outcome, last_step),) = ends(out)
    assert (outcome, last_step) == ("failed", len(rows(out)))
    process = Forked("train", dataset, "--out", out, "--force", "--config", "tiny", *SMALL, "--max-steps", 100_000)
    wait_for_rows(out, last_step + 3)
    process.kill()
    process.communicate()
    assert ends(out) == [None]


def test_an_end_that_cannot_be_written_is_a_warning(dataset, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    update = RunLog.update

    def damaging(log, step, *arguments):
        update(log, step, *arguments)
        (out / "run.json").write_text("{")

    monkeypatch.setattr(RunLog, "update", damaging)
    assert train(dataset, out, "--max-steps", 1) == 0
    assert "the end of this session is not in run.json" in capsys.readouterr().err


def test_the_health_of_every_layer_is_measured(dataset, tmp_path):
    out = tmp_path / "run"
    assert train(dataset, out, "--max-steps", 4, "--set", "train.health_every_steps=2") == 0
    health = rows(out, "health.csv")
    assert [(row["step"], row["layer"]) for row in health] == [(step, layer) for step in "24" for layer in "123"]
    for row in health:
        # Local layers have no features. Of the temperatures, that of FAVOR starts at three quarters of its bound.
        is_local = row["layer"] in "13"
        assert row["effective_features"] == "" if is_local else 1 <= float(row["effective_features"]) <= 16
        assert float(row["q_norm"]) == pytest.approx(6 if is_local else 1.5, rel=0.13)


def test_health_and_loggers_change_no_loss(dataset, run_dir, tmp_path):
    assert train(dataset, tmp_path / "run", "--max-steps", 9, "--set", "train.health_every_steps=1") == 0
    assert rows(tmp_path / "run") == rows(run_dir)


def test_tensorboard_reads_what_the_run_wrote(dataset, tmp_path):
    out = tmp_path / "my run"
    assert train(dataset, out, "--max-steps", 4, "--set", "train.health_every_steps=2") == 0
    # A run that is renamed goes on in the same place.
    out = out.rename(tmp_path / "renamed")
    assert main(["train", str(dataset), "--out", str(out), "--resume", "--max-steps", "6"]) == 0
    assert [path.name for path in (out / "tensorboard").iterdir()] == ["my run"]
    events = EventAccumulator(str(out / "tensorboard" / "my run"))
    events.Reload()
    loss = events.Scalars("loss/train")
    assert [event.step for event in loss] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in loss] == pytest.approx(losses(out), rel=1e-6)
    table = rows(out)
    for tag, column in (("optimizer/adamw_lr", "lr"), ("optimizer/muon_lr", "muon_lr"), ("progress/tokens", "tokens")):
        expected = [float(row[column]) for row in table]
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(expected, rel=1e-6), tag
    assert [event.step for event in events.Scalars("loss/valid")] == [4, 6]
    tags = events.Tags()["scalars"]
    assert min(tags).startswith("loss/")
    assert {tag.partition("/")[0] for tag in tags} == {
        "loss", "optimizer", "progress", "scores", "self_attention", "speed",
    }  # fmt: skip


def test_the_tokens_and_both_learning_rates_of_every_update_are_counted(dataset, tmp_path):
    out = tmp_path / "run"
    assert train(dataset, out, "--max-steps", 3, "--set", "train.accumulate=2") == 0
    config = load_config(out / "config.toml")
    split = Mixture([open_dataset(dataset).split("train")])
    planned = training_rows(Draws.of(split, config.data, config.train.seed), split.lengths, config.data)
    sizes = [int(split.lengths[row.records].sum()) + 2 * len(row.records) for row in itertools.islice(planned, 6)]
    assert [int(row["tokens"]) for row in rows(out)] == [sum(sizes[:count]) for count in (2, 4, 6)]
    for row in rows(out):
        assert float(row["muon_lr"]) == pytest.approx(float(row["lr"]) * config.train.muon_lr / config.train.lr)
    adamw = tmp_path / "adamw"
    assert train(dataset, adamw, "--max-steps", 1, "--set", "train.optimizer=adamw") == 0
    assert rows(adamw)[0]["muon_lr"] == ""
    assert "optimizer/muon_lr" not in EventAccumulator(str(adamw / "tensorboard" / "adamw")).Reload().Tags()["scalars"]


def test_a_run_without_progress_ends_early_and_keeps_its_best_checkpoint(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    settings = ["train.valid_every_steps=1", "train.patience=2", "train.lr=1e-12", "train.muon_lr=1e-12",
                "train.keep_every_steps=2", "train.warmup_steps=0"]  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    assert train(dataset, out, "--max-steps", 50, *words) == 0
    assert len(rows(out)) < 50
    assert "no lower perplexity on valid in 2 measurements" in capsys.readouterr().err
    assert ends(out) == [("out of patience", len(rows(out)))]
    valid = [float(row["valid/perplexity"]) for row in rows(out)]
    best = torch.load(out / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 1 + valid.index(min(valid)) == len(valid) - 2
    kept = sorted(path.name for path in (out / "checkpoints").glob("step-*.ckpt"))
    assert kept == [f"step-{step:08d}.ckpt" for step in range(2, len(valid) + 1, 2)]
    assert torch.load(out / "checkpoints" / kept[0], weights_only=True)["global_step"] == 2


def scores_of(perplexities):
    """A stand-in for `score_split` whose measurements have these perplexities, one after the other."""
    remaining = iter(perplexities)

    def score_split(*_, **__):
        totals = {"model": np.zeros(NUM_SUMS), "empirical": np.zeros(NUM_SUMS)}
        for total, perplexity in zip(totals.values(), (next(remaining), 18.0), strict=True):
            # Targets and their negative log likelihood.
            total[:2] = 7, 7 * math.log(perplexity)
        return {name: MetricSums.of(total) for name, total in totals.items()}

    return score_split


@pytest.mark.parametrize(
    ("perplexities", "best_step"),
    [([9.0, math.nan, math.inf], 1), ([math.nan, 9.0, math.nan], 2), ([math.inf, 9.0, 10.0], 2)],
)
def test_a_measurement_that_is_not_finite_is_never_the_best(perplexities, best_step, dataset, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(callbacks, "score_split", scores_of(perplexities))
    assert train(dataset, out, "--max-steps", 3, "--set", "train.valid_every_steps=1") == 0
    _, description = read_model(out)
    assert description.step == best_step
    assert description.valid.perplexity == pytest.approx(perplexities[best_step - 1])
    assert torch.load(out / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] == best_step


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_measurements_that_are_not_finite_use_up_the_patience_and_export_nothing(
    value, dataset, tmp_path, monkeypatch, failure
):
    out = tmp_path / "run"
    monkeypatch.setattr(callbacks, "score_split", scores_of([value] * 50))
    settings = ["--config", "tiny", *SMALL, "--set", "train.valid_every_steps=1", "--set", "train.patience=2"]
    message = failure("train", dataset, "--out", out, *settings)
    assert f"the perplexity on valid is {value}" in message
    assert len(rows(out)) == 2
    assert not (out / "model").exists()
    # Its weights are finite, and so it can go on.
    assert torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_time_ends_a_run_with_a_checkpoint_and_status_0(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(dataset, out, "--max-steps", 100_000, "--max-time", "00:00:02") == 0
    assert "its time is over" in capsys.readouterr().err
    steps = len(rows(out))
    assert torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == steps
    assert ends(out) == [("out of time", steps)]
    for text in ("2h", "²:00:00", "00:60:00"):
        assert train(dataset, out, "--max-time", text) == 2


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_ends_a_run_between_two_updates_and_it_resumes(name, dataset, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    update = RunLog.update

    def signalled(log, step, *arguments):
        update(log, step, *arguments)
        if step == 3:
            os.kill(os.getpid(), getattr(signal, name))

    monkeypatch.setattr(RunLog, "update", signalled)
    before = signal.getsignal(getattr(signal, name))
    # Settings that would save nothing at this step by themselves.
    assert train(dataset, out, "--set", "train.checkpoint_every_steps=1000", "--max-steps", 1000) == 130
    assert signal.getsignal(getattr(signal, name)) == before
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert "--resume" in errors
    steps = len(rows(out))
    # The update that was under way may be finished.
    assert steps in (3, 4)
    assert torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == steps
    monkeypatch.undo()
    assert main(["train", str(dataset), "--out", str(out), "--resume", "--max-steps", str(steps + 1)]) == 0
    assert ends(out) == [("interrupted", steps), ("finished", steps + 1)]


def test_a_signal_to_a_whole_job_reaches_the_workers_that_prepare_rows_too(dataset, tmp_path):
    out = tmp_path / "run"
    endless = ["--set", "data.num_workers=2", "--max-steps", 100_000]
    process = Forked("train", dataset, "--out", out, "--config", "tiny", *SMALL, *endless, prepare=os.setsid)
    wait_for_rows(out, 3)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    saved = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == len(rows(out))


def test_patience_is_asked_at_measurements_only(dataset, tmp_path):
    out = tmp_path / "run"
    settings = ["train.valid_every_steps=3", "train.patience=1", "train.lr=1e-12", "train.muon_lr=1e-12"]
    words = [word for setting in settings for word in ("--set", setting)]
    assert train(dataset, out, "--max-steps", 50, *words) == 0
    ended = len(rows(out))
    assert ended < 50
    assert main(["train", str(dataset), "--out", str(out), "--resume"]) == 0
    assert len(rows(out)) == ended + 3


def test_what_a_kill_left_half_is_taken_away_and_what_is_gone_is_told(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(dataset, out, "--max-steps", 2) == 0
    leftover = out / "checkpoints" / ".last.ckpt.0123abcd.partial"
    leftover.write_bytes(b"half")
    (out / "metrics.csv").unlink()
    assert main(["train", str(dataset), "--out", str(out), "--resume", "--max-steps", "3"]) == 0
    assert not leftover.exists()
    assert "the rows of steps 1 to 2 are gone" in capsys.readouterr().err
    assert [row["step"] for row in rows(out)] == ["3"]


def test_a_run_that_cannot_start_leaves_an_old_one(dataset, fasta, tmp_path, failure):
    out = tmp_path / "run"
    assert train(dataset, out, "--max-steps", 1) == 0
    before = sorted(out.rglob("*"))
    assert "wandb" in failure("train", dataset, "--out", out, "--force", "--wandb", "mine")
    alone = tmp_path / "alone"
    assert main(["prep", str(fasta), "--out", str(alone), "--valid-fraction", "0"]) == 0
    assert "train.patience" in failure("train", alone, "--out", out, "--force", "--set", "train.patience=2")
    assert sorted(out.rglob("*")) == before


def test_a_full_disk_leaves_the_last_checkpoint_whole(dataset, tmp_path, failure):
    out = tmp_path / "run"
    assert train(dataset, out, "--max-steps", 2) == 0
    checkpoint = out / "checkpoints" / "last.ckpt"
    before = checkpoint.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Files of this process cannot grow beyond this: enough for everything but a checkpoint.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        message = failure("train", dataset, "--out", out, "--resume", "--max-steps", 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.strerror(errno.EFBIG) in message
    assert checkpoint.read_bytes() == before
    assert not list(out.rglob("*.partial"))
    assert main(["train", str(dataset), "--out", str(out), "--resume", "--max-steps", "4"]) == 0


def test_a_dry_run_tells_what_a_run_would_be_and_writes_nothing(dataset, tmp_path, capsys, failure):
    out = tmp_path / "run"
    assert train(dataset, out, "--dry-run", "--json", "--max-steps", 12) == 0
    report = json.loads(capsys.readouterr().out)
    assert not out.exists()
    assert train(dataset, out, "--max-steps", 1, "--json") == 0
    assert report["num_parameters"] == json.loads(capsys.readouterr().out)["num_parameters"]
    manifest = json.loads((dataset / "manifest.json").read_text())["splits"]["train"]
    assert report["residues_per_epoch"] == manifest["num_residues"]
    assert report["tokens_per_epoch"] == manifest["num_residues"] + 2 * manifest["num_records"]
    assert report["epochs"] == pytest.approx(12 / report["rows_per_epoch"])
    assert 0 < report["seconds_per_step"] < 60
    assert train(dataset, out, "--dry-run", "--resume") == 0
    shown = capsys.readouterr().out
    for word in ("parameters", "memory", "steps", "epoch"):
        assert word in shown
    assert "exists already" in failure("train", dataset, "--out", out, "--dry-run")
    (out / "checkpoints" / "last.ckpt").write_bytes(b"half")
    assert "damaged" in failure("train", dataset, "--out", out, "--dry-run", "--resume")


def test_a_step_that_would_take_too_long_is_estimated_and_called_so(dataset, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert train(dataset, out, "--dry-run", "--json") == 0
    measured = json.loads(capsys.readouterr().out)
    monkeypatch.setattr("protlm.workflows.train.dry_run._seconds_per_step", lambda *_: pytest.fail("a step was made"))
    assert train(dataset, out, "--dry-run", "--json", "--timing-seconds", 0) == 0
    estimated = json.loads(capsys.readouterr().out)
    assert (measured["seconds_from"], estimated["seconds_from"]) == ("measured", "estimated")
    # So small a model takes longer than its operations; nothing else is compared.
    assert 0 < estimated["seconds_per_step"] < 20 * measured["seconds_per_step"]
    assert estimated["seconds"] == pytest.approx(estimated["seconds_per_step"] * estimated["steps"])
    assert train(dataset, out, "--dry-run", "--timing-seconds", 0) == 0
    assert "by estimate, not timed" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tiny", "small", "base", "paper-trembl-1024", "paper-concat-8192"])
def test_a_dry_run_of_every_shipped_configuration(name, dataset, tmp_path, capsys, monkeypatch):
    from protlm.workflows.train import dry_run as train_dry_run

    # The step itself would take minutes for the large ones.
    monkeypatch.setattr(train_dry_run, "_seconds_per_step", lambda *_: 1.0)
    assert main(["train", str(dataset), "--out", str(tmp_path / "run"), "--config", name, "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["memory_bytes"] > 12 * report["num_parameters"]


def test_the_search_for_the_largest_row_needs_a_gpu(dataset, tmp_path, failure):
    message = failure("train", dataset, "--out", tmp_path / "run", "--dry-run", "--find-batch")
    assert "GPU" in message
    for words in (["--find-batch"], ["--timing-seconds", "5"], ["--dry-run", "--for", "h100", "--timing-seconds", "5"]):
        assert main(["train", str(dataset), "--out", str(tmp_path / "run"), *words]) == 2


def test_a_model_that_cannot_fit_is_refused_before_anything_is_written(dataset, tmp_path, failure):
    message = failure(
        "train", dataset, "--out", tmp_path / "run", "--set", "model.num_layers=50", "--set", "model.model_dim=65536"
    )
    assert "memory" in message
    assert "model.num_layers" in message
    assert not (tmp_path / "run").exists()


def test_the_search_finds_the_largest_row_that_does_not_run_out_of_memory(dataset, tmp_path, monkeypatch):
    """There is no GPU here: the model runs out of memory where the test says so."""
    from protlm.model.performer import Performer
    from protlm.workflows.train import dry_run as train_dry_run

    largest, tried = 900, []
    forward = Performer.forward

    def with_little_memory(self, tokens, *arguments):
        tried.append(len(tokens))
        if len(tokens) > largest:
            raise RuntimeError("CUDA out of memory. Tried to allocate more than there is")
        return forward(self, tokens, *arguments)

    monkeypatch.setattr(Performer, "forward", with_little_memory)
    monkeypatch.setattr(train_dry_run, "best_device", lambda: torch.device("cuda"))
    # Whose time is that of all the objects of the tests, for each size that is tried.
    monkeypatch.setattr("pytorch_lightning.tuner.batch_size_scaling.garbage_collection_cuda", lambda: None)
    settings = ["data.tokens_per_batch=256", "model.num_layers=1", "model.model_dim=32"]
    request = TrainRequest(dataset_paths=[dataset], run_dir=tmp_path / "run", config="tiny", overrides=settings)
    budget = train_dry_run._largest_budget(prepare_start(request))
    # The search leaves some room, and rows are not filled to the last token.
    assert 0.7 * largest < budget <= 1.3 * largest
    assert max(tried) > largest


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's compiler uses it itself
def test_a_dry_run_makes_its_step_in_the_way_of_the_run(dataset, tmp_path, monkeypatch):
    from protlm.workflows.train import dry_run as train_dry_run

    seen = []
    monkeypatch.setattr(train_dry_run, "_seconds_per_step", lambda start, *_: seen.append(start.model) or 1.0)
    assert train(dataset, tmp_path / "run", "--dry-run", "--set", "train.activation_checkpointing=true") == 0
    assert train(dataset, tmp_path / "run", "--dry-run", "--set", "train.compile=true") == 0
    assert [model.checkpoint_activations for model in seen] == [True, False]
    assert [model.layers[0]._compiled_call_impl is not None for model in seen] == [False, True]
