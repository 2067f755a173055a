"""Several processes train what one does. They run on the CPU, joined by gloo, each with a Lightning of its own."""

import json
import os
import signal

import pytest
import torch

from protlm.cli.app import main
from tests.e2e.conftest import SMALL
from tests.e2e.train_tools import LAUNCHERS, ended, finish, losses, rows, run_on_two, start, train, wait_for_rows
from tests.forked import fork_ranks

# Ranks add in another order.
CLOSE = {"rel": 2e-5}
SHARED = ["--set", "train.accumulate=2", "--max-steps", "6"]


@pytest.fixture(scope="module")
def one_process(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    assert train(dataset, out, *SHARED, "--set", "model.dropout=0.1") == 0
    return out


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_give_the_losses_of_one_and_their_checkpoint_goes_on_anywhere(
    strategy, launcher, dataset, one_process, tmp_path
):
    out = tmp_path / "run"
    on_two = [launcher, "train", dataset, "--out", out, "--strategy", strategy]
    settings = ["--config", "tiny", *SMALL, *SHARED, "--set", "model.dropout=0.1", "--set", "train.schedule_steps=6"]
    status, shown, errors = run_on_two(*on_two, *settings, "--max-steps", 4, "--json")
    assert status == 0, errors
    # One report, of the first process.
    assert json.loads(shown)["step"] == 4
    assert losses(out) == pytest.approx(losses(one_process)[:4], **CLOSE)
    valid = [row["valid/loss"] for row in rows(out)]
    assert float(valid[3]) == pytest.approx(float(rows(one_process)[3]["valid/loss"]), **CLOSE)
    # One process goes on from the checkpoint of two, and two from that of one.
    assert main(["train", str(dataset), "--out", str(out), "--resume", "--max-steps", "5"]) == 0
    status, _, errors = run_on_two(*on_two, "--resume", "--max-steps", 6)
    assert status == 0, errors
    assert losses(out) == pytest.approx(losses(one_process), **CLOSE)
    weights, expected = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (out, one_process)
    )
    assert weights["state_dict"].keys() == expected["state_dict"].keys()
    for name, tensor in expected["state_dict"].items():
        assert torch.allclose(weights["state_dict"][name], tensor, atol=2e-4), name
    description = json.loads((out / "run.json").read_text())
    assert [session["devices"] for session in description["sessions"]] == [2, 1, 2]


@pytest.mark.parametrize(
    ("rank", "num_rows"),
    [
        pytest.param(rank, number, marks=[] if (rank, number) == (1, 3) else pytest.mark.slow)
        for rank in (0, 1)
        for number in (0, 1, 3, 5)
    ],
)
def test_a_process_that_is_killed_ends_the_other_and_the_run_goes_on_from_its_checkpoint(
    rank, num_rows, dataset, one_process, tmp_path
):
    out = tmp_path / "run"
    words = ["--config", "tiny", *SMALL, *SHARED, "--set", "model.dropout=0.1"]
    ranks = fork_ranks(2, "train", dataset, "--out", out, *words, "--devices", 2)
    wait_for_rows(out, num_rows)
    ranks[rank].kill()
    for process in ranks:
        _, errors = process.communicate()
        assert process is ranks[rank] or process.returncode in (0, 1), errors
        assert "Traceback" not in errors
    status, _, errors = ended(fork_ranks(2, "train", dataset, "--out", out, *words, "--devices", 2, "--resume"))
    assert status == 0, errors
    assert losses(out) == pytest.approx(losses(one_process), **CLOSE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_signal_to_one_process_stops_both_in_the_same_update(dataset, tmp_path):
    """Lightning starts the processes, as for every user without torchrun or SLURM."""
    out = tmp_path / "run"
    settings = ["--config", "tiny", *SMALL, "--set", "train.accumulate=2", "--max-steps", 100_000]
    process = start("train", dataset, "--out", out, "--devices", 2, *settings)
    wait_for_rows(out, 3)
    os.kill(process.pid, signal.SIGTERM)
    status, _, errors = finish(process)
    assert status == 130, errors
    assert "Traceback" not in errors
    assert "--resume" in errors
    saved = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == len(rows(out)) > 2


def test_rows_that_cannot_be_shared_out_are_refused_with_a_number_that_can(dataset, tmp_path, failure):
    message = failure("train", dataset, "--out", tmp_path / "run", "--devices", 2)
    assert "train.accumulate=2" in message
    assert not (tmp_path / "run").exists()


def test_a_second_process_changes_nothing_in_the_run(dataset, tmp_path, monkeypatch):
    """As under torchrun or SLURM, where all processes start at once and only the first may replace a run."""
    out = tmp_path / "run"
    assert train(dataset, out, "--max-steps", 1) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    from protlm.workflows.train import train as workflow

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(workflow, "_fit", lambda *_: None)
    assert train(dataset, out, "--max-steps", 3, "--force") == 0
    # A finished run has nothing to train, for none of them: nobody waits for the others.
    monkeypatch.undo()
    monkeypatch.setenv("RANK", "1")
    assert main(["train", str(dataset), "--out", str(out), "--resume"]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_what_goes_wrong_in_the_first_process_is_told_once(launcher, dataset, tmp_path):
    out = tmp_path / "run"
    assert train(dataset, out, "--max-steps", 2, "--set", "train.accumulate=2") == 0
    (out / "metrics.csv").write_text("garbage\n")
    status, _, errors = run_on_two(launcher, "train", dataset, "--out", out, "--resume", "--max-steps", 4)
    assert status == 1
    assert [line for line in errors.splitlines() if line.startswith("error: ")] == errors.splitlines(), errors
    assert errors.count("\n") == 1
