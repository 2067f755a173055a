import json
import os
import shutil
import signal
import time
import tomllib

import pytest
import torch

from protlm.cli.app import main
from tests.e2e.conftest import SMALL, write_fasta
from tests.e2e.train_tools import rows, train, wait_for_rows
from tests.forked import Forked
from tests.hdf5_edits import edit


def test_a_run_leaves_what_the_contract_names(run_dir):
    assert {path.name for path in run_dir.iterdir()} == {
        "config.toml", "run.json", "metrics.csv", "speed.csv", "health.csv", "curves.png", "checkpoints", "model",
        "tensorboard",
    }  # fmt: skip
    assert {path.name for path in (run_dir / "model").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert [row["step"] for row in rows(run_dir)] == [str(step) for step in range(1, 10)]
    assert [row["step"] for row in rows(run_dir) if row["valid/loss"]] == ["4", "8", "9"]
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert tomllib.loads((run_dir / "config.toml").read_text())["train"]["schedule_steps"] == 9


def test_the_loss_falls(dataset, tmp_path):
    assert train(dataset, tmp_path / "run", "--max-steps", "40", "--set", "train.warmup_steps=5") == 0
    losses = [float(row["train/loss"]) for row in rows(tmp_path / "run")]
    assert sum(losses[-5:]) / 5 < losses[0] - 0.3


@pytest.mark.parametrize("settings", [(), ("train.redraw_every_steps=3", "model.dropout=0.1", "train.accumulate=2")])
def test_resuming_in_pieces_equals_an_uninterrupted_run(dataset, tmp_path, settings):
    settings = [word for setting in settings for word in ("--set", setting)]
    assert train(dataset, tmp_path / "whole", "--max-steps", 9, *settings) == 0
    # The horizon of the schedule is that of the whole run.
    settings += ["--set", "train.schedule_steps=9"]
    assert train(dataset, tmp_path / "parts", "--max-steps", 5, *settings) == 0
    assert main(["train", str(dataset), "--out", str(tmp_path / "parts"), "--resume", "--max-steps", "9"]) == 0
    # The first part measured the valid split at its own end, step 5; all else must be the same.
    kept = [key for key in rows(tmp_path / "whole")[0] if not key.startswith("valid/")]
    whole, parts = ([[row[key] for key in kept] for row in rows(tmp_path / name)] for name in ("whole", "parts"))
    assert whole == parts
    assert rows(tmp_path / "whole")[-1] == rows(tmp_path / "parts")[-1]


def test_a_run_killed_at_any_moment_resumes_to_the_same_losses(dataset, run_dir, tmp_path):
    out = tmp_path / "run"
    process = Forked("train", dataset, "--out", out, "--config", "tiny", *SMALL, "--max-steps", 9)
    deadline = time.monotonic() + 60
    while not (out / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    _, errors = process.communicate()
    assert (out / "checkpoints" / "last.ckpt").exists(), errors
    assert main(["train", str(dataset), "--out", str(out), "--resume"]) == 0
    assert (out / "metrics.csv").read_text() == (run_dir / "metrics.csv").read_text()
    assert (out / "model" / "model.safetensors").read_bytes() == (run_dir / "model" / "model.safetensors").read_bytes()


def test_a_finished_run_resumes_to_itself(dataset, tmp_path, failure):
    out = tmp_path / "run"
    assert train(dataset, out, "--max-steps", 3) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.suffix != ".png"}
    assert main(["train", str(dataset), "--out", str(out), "--resume"]) == 0
    assert "step 3" in failure("train", dataset, "--out", out, "--resume", "--max-steps", 2)
    assert before == {
        path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.suffix != ".png"
    }


def test_ctrl_c_stops_between_updates_and_leaves_a_usable_checkpoint(dataset, tmp_path):
    out = tmp_path / "run"
    settings = [*SMALL, "--set", "train.checkpoint_every_steps=100000", "--max-steps", 100_000]
    process = Forked("train", dataset, "--out", out, "--config", "tiny", *settings)
    wait_for_rows(out, 4)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    steps = len(rows(out))
    saved = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == steps
    assert main(["train", str(dataset), "--out", str(out), "--resume", "--max-steps", str(steps + 2)]) == 0
    assert len(rows(out)) == steps + 2


def test_workers_change_no_loss(dataset, run_dir, tmp_path):
    assert train(dataset, tmp_path / "run", "--max-steps", 9, "--set", "data.num_workers=2") == 0
    assert rows(tmp_path / "run") == rows(run_dir)


def test_accumulated_rows_are_weighted_by_their_targets(dataset, tmp_path):
    # Without clipping and noise, one update over two rows equals the update over their targets together: the loss of
    # step 1 is the mean over both rows, which a mean of means would miss.
    from protlm.config_files import load_config
    from protlm.data.batching.batches import training_batch
    from protlm.data.batching.draws import Draws
    from protlm.data.batching.masking import MaskRates, Objective
    from protlm.data.batching.rows import training_rows
    from protlm.data.storage.dataset import open_dataset
    from protlm.data.storage.mixture import Mixture
    from protlm.model.performer import Performer

    assert train(dataset, tmp_path / "run", "--max-steps", 1, "--set", "train.accumulate=2") == 0
    config = load_config(tmp_path / "run" / "config.toml")
    split = open_dataset(dataset).split("train")
    model = Performer(config.model)
    model.reset(config.train.seed)
    proteins = Mixture([split])
    stream = training_rows(Draws.of(proteins, config.data, config.train.seed), split.lengths, config.data)
    objective = Objective(causal=False, rates=MaskRates(0.15))
    batches = [training_batch(next(stream), split, config.data, config.train.seed, objective) for _ in range(2)]
    nll = sum(
        torch.nn.functional.cross_entropy(
            model(batch.tokens, batch.cu_seqlens, batch.target_positions), batch.targets, reduction="sum"
        )
        for batch in batches
    )
    expected = nll.item() / sum(len(batch.targets) for batch in batches)
    assert float(rows(tmp_path / "run")[0]["train/loss"]) == pytest.approx(expected, rel=1e-6)


def test_a_dataset_without_a_valid_split_trains(tmp_path, fasta):
    out = tmp_path / "dataset"
    assert main(["prep", str(fasta), "--out", str(out), "--valid-fraction", "0", "--test-fraction", "0"]) == 0
    assert train(out, tmp_path / "run", "--max-steps", 2) == 0
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    assert all(row["valid/loss"] == "" for row in rows(tmp_path / "run"))


def test_bad_input_gives_one_line(dataset, run_dir, tmp_path, failure, fasta):
    def start(*arguments):
        return failure("train", *arguments)

    assert "no such configuration" in start(dataset, "--out", tmp_path / "a", "--config", "tinny")
    assert "unknown key" in start(dataset, "--out", tmp_path / "a", "--set", "train.rate=1")
    assert "exists already" in start(dataset, "--out", run_dir)
    assert str(tmp_path / "nowhere") in start(tmp_path / "nowhere", "--out", tmp_path / "a")
    assert "cannot become" in start(dataset, "--out", run_dir, "--resume", "--set", "train.lr=0.1")
    assert not (tmp_path / "a").exists()


def test_resuming_on_another_dataset_is_refused(run_dir, tmp_path, failure, proteins):
    other = write_fasta(tmp_path / "other.fasta", proteins[:50])
    assert main(["prep", str(other), "--out", str(tmp_path / "d")]) == 0
    before = (run_dir / "metrics.csv").read_text()
    assert "another dataset" in failure("train", tmp_path / "d", "--out", run_dir, "--resume", "--max-steps", 12)
    assert (run_dir / "metrics.csv").read_text() == before


def test_force_replaces_a_run_and_nothing_else(dataset, tmp_path, failure):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("mine")
    message = failure("train", dataset, "--out", tmp_path / "thesis", "--force")
    assert "is no run" in message
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "mine"
    assert train(dataset, tmp_path / "run", "--max-steps", 1) == 0
    assert train(dataset, tmp_path / "run", "--max-steps", 2, "--force") == 0
    assert len(rows(tmp_path / "run")) == 2


def test_wrong_usage_exits_with_2(dataset, tmp_path, capsys):
    assert main(["train", str(dataset)]) == 2
    assert main(["train", str(dataset), "--out", str(tmp_path / "r"), "--resume", "--force"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_report_is_json_all_the_way_down(dataset, tmp_path, capsys):
    assert train(dataset, tmp_path / "run", "--max-steps", 1, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert isinstance(report["valid"]["accuracy"], float)
    assert report["model"] == str(tmp_path / "run" / "model")


def test_force_never_takes_a_folder_that_holds_anything_else(dataset, tmp_path, failure):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "config.toml").write_text("x = 1\n")
    assert "unknown key" in failure("train", dataset, "--out", folder, "--force")
    (folder / "config.toml").write_text("")
    (folder / "thesis.txt").write_text("precious")
    assert "thesis.txt" in failure("train", dataset, "--out", folder, "--force")
    assert (folder / "thesis.txt").read_text() == "precious"


def test_a_run_and_its_dataset_never_lie_inside_each_other(dataset, tmp_path, failure):
    assert train(dataset, tmp_path / "run", "--max-steps", 1) == 0
    inside = tmp_path / "run" / "dataset"
    shutil.copytree(dataset, inside)
    assert "inside each other" in failure("train", inside, "--out", tmp_path / "run", "--force")
    assert (inside / "manifest.json").is_file()
    assert "inside each other" in failure("train", dataset, "--out", dataset / "run")


def test_a_start_that_cannot_succeed_leaves_the_old_run(dataset, tmp_path, failure):
    out = tmp_path / "run"
    assert train(dataset, out, "--max-steps", 1) == 0
    before = sorted(path.name for path in out.rglob("*"))
    damaged = tmp_path / "damaged"
    shutil.copytree(dataset, damaged)
    (damaged / "valid-00000.h5").unlink()
    assert "valid-00000.h5" in failure("train", damaged, "--out", out, "--force")
    assert "betas" in failure("train", dataset, "--out", out, "--force", "--set", "train.betas=[0.9, 1.0]")
    huge = [
        "--set",
        "model.num_features=1048576",
        "--set",
        "model.model_dim=65536",
        "--set",
        "model.attention=positive",
    ]
    assert "its weights need 1,048.8 GB" in failure("train", dataset, "--out", out, "--force", *huge)
    assert sorted(path.name for path in out.rglob("*")) == before


def test_an_edited_config_is_not_resumed_from(dataset, tmp_path, failure):
    out = tmp_path / "run"
    assert train(dataset, out, "--max-steps", 2) == 0
    config = (out / "config.toml").read_text()
    (out / "config.toml").write_text(config.replace("lr = 0.002", "lr = 0.5"))
    assert "train.lr" in failure("train", dataset, "--out", out, "--resume", "--max-steps", 4)
    (out / "config.toml").write_text(config)
    assert main(["train", str(dataset), "--out", str(out), "--resume", "--set", "train.max_steps = 3"]) == 0
    assert len(rows(out)) == 3


@pytest.mark.parametrize("content", [b"\xff\xfe\x00binary\n", b"a,b\n1,2\n"])
def test_a_metrics_file_that_is_none_is_one_line(dataset, tmp_path, failure, content):
    out = tmp_path / "run"
    assert train(dataset, out, "--max-steps", 2) == 0
    (out / "metrics.csv").write_bytes(content)
    assert "metrics.csv" in failure("train", dataset, "--out", out, "--resume", "--max-steps", 4)


def test_a_large_seed_is_taken(dataset, tmp_path):
    assert train(dataset, tmp_path / "run", "--max-steps", 1, "--seed", 5_000_000_000) == 0


def test_an_empty_record_is_refused_by_all_who_read(dataset, run_dir, tmp_path, failure):
    damaged = tmp_path / "damaged"
    shutil.copytree(dataset, damaged)

    def move_bound(file):
        file["offsets"][1] = 0

    for split in ("train", "valid"):
        edit(damaged / f"{split}-00000.h5", move_bound)
    commands = [
        ["train", damaged, "--out", tmp_path / "run"],
        ["train", damaged, "--out", tmp_path / "run", "--dry-run"],
        ["eval", run_dir, damaged, "--split", "valid", "--out", tmp_path / "eval"],
        ["embed", run_dir, damaged, "--split", "valid", "--out", tmp_path / "e.h5"],
        ["inspect", damaged, "--verify"],
    ]
    for command in commands:
        assert "got an empty one" in failure(*command), command
