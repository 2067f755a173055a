"""Several processes train what one does. They run on the CPU, joined by gloo, each with a Lightning of its own."""

import json
import os
import signal
import socket

import pytest
import torch
from lightning_fabric.utilities.rank_zero import rank_zero_only

from protlm.cli.app import main
from protlm.pretrained.model_directory import read_description
from protlm.workflows.train import callbacks
from tests.e2e.conftest import SMALL
from tests.e2e.train_tools import LAUNCHERS, ended, finish, losses, rows, run_on_two, start, train, wait_for_rows
from tests.forked import Forked, fork_ranks

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
    # They measure the model together only because they are stopped.
    settings += ["--set", "train.valid_every_steps=100000"]
    process = start("train", dataset, "--out", out, "--devices", 2, *settings)
    wait_for_rows(out, 3)
    os.kill(process.pid, signal.SIGTERM)
    status, _, errors = finish(process)
    assert status == 130, errors
    assert "Traceback" not in errors
    assert "--resume" in errors
    saved = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == len(rows(out)) > 2
    description = read_description(out / "model")
    assert (description.step, description.unmeasured) == (len(rows(out)), False)
    assert description.valid.num_targets > 0


def no_time_on_the_second():
    """The second process finds that there is no time to measure; all others have enough."""
    if os.environ["RANK"] == "1":
        callbacks._SECONDS_TO_MEASURE = -1.0


def test_processes_give_up_a_measurement_together(dataset, tmp_path):
    out = tmp_path / "run"
    words = ["--config", "tiny", *SMALL, *SHARED, "--set", "train.valid_every_steps=1000", "--max-time", "00:00:00"]
    ranks = fork_ranks(2, "train", dataset, "--out", out, *words, "--devices", 2, prepare=no_time_on_the_second)
    status, _, errors = ended(ranks)
    assert status == 0, errors
    assert read_description(out / "model").unmeasured


def test_rows_that_cannot_be_shared_out_are_refused_with_a_number_that_can(dataset, tmp_path, failure):
    message = failure("train", dataset, "--out", tmp_path / "run", "--devices", 2)
    assert "train.accumulate=2" in message
    assert not (tmp_path / "run").exists()


def test_a_second_process_changes_nothing_in_the_run(dataset, tmp_path, monkeypatch):
    """As under torchrun or SLURM, where all processes start at once and only the first may replace a run."""
    out = tmp_path / "run"
    assert train(dataset, out, "--max-steps", 1, "--set", "train.accumulate=2") == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    from protlm.workflows.train import train as workflow

    second = {"TORCHELASTIC_RUN_ID": "tests", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    with monkeypatch.context() as patch:
        for name, value in second.items():
            patch.setenv(name, value)
        patch.setattr(workflow, "_fit", lambda *_: None)
        on_two = ["--devices", 2, "--set", "train.accumulate=2"]
        assert train(dataset, out, "--max-steps", 3, "--force", *on_two) == 0
    # A finished run has nothing to train, for none of them: nobody waits for the others.
    for name, value in second.items():
        monkeypatch.setenv(name, value)
    assert main(["train", str(dataset), "--out", str(out), "--resume", "--devices", "2"]) == 0
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


IN_A_JOB = {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "myjob"}
A_TASK = {**IN_A_JOB, "SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
LEFT_OVER = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "no.such.machine", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("variables", "options"),
    [
        (IN_A_JOB, []), (A_TASK, []), ({**A_TASK, "SLURM_STEP_NUM_TASKS": "4"}, []), (LEFT_OVER, []),
        ({**A_TASK, **LEFT_OVER}, ["--strategy", "fsdp"]),
    ],
    ids=["shell in a job", "task", "task of srun", "left over", "both, fsdp"],
)  # fmt: skip
def test_one_device_is_one_process_whatever_the_environment_says(variables, options, dataset, tmp_path, run_dir):
    out = tmp_path / "run"
    words = ["--config", "tiny", *SMALL, "--max-steps", 9, *options]
    process = Forked("train", dataset, "--out", out, *words, variables=variables)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert losses(out) == pytest.approx(losses(run_dir), **CLOSE)
    assert (out / "model" / "config.json").exists()
    assert list((out / "tensorboard").rglob("events.out.tfevents.*"))


def test_lightning_that_was_imported_as_another_rank_logs_the_run_all_the_same(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert train(dataset, tmp_path / "run", "--max-steps", 1) == 0
    assert list((tmp_path / "run" / "tensorboard").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("options", [[], ["--devices", 3], ["--devices", 2, "--num-nodes", 2]], ids=str)
def test_processes_that_do_not_fit_the_devices_end_before_anything_is_written(options, dataset, tmp_path):
    words = ["--config", "tiny", *SMALL, "--set", "train.accumulate=12", "--max-steps", 1, *options]
    ranks = fork_ranks(2, "train", dataset, "--out", tmp_path / "run", *words)
    for process in ranks:
        _, errors = process.communicate()
        assert process.returncode == 1
        (line,) = errors.splitlines()
        assert line.startswith("error: --devices")
        assert "torchrun started 2 processes" in line
    assert list(tmp_path.iterdir()) == []


def test_the_tasks_of_srun_train_what_one_process_does(dataset, one_process, tmp_path):
    """With the variables that srun sets, and without the one that Lightning wants of --ntasks-per-node."""
    out = tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    job = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0",
           "SLURM_JOB_NAME": "interactive", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    words = ["--config", "tiny", *SMALL, *SHARED, "--set", "model.dropout=0.1", "--devices", 2]
    ranks = [
        Forked("train", dataset, "--out", out, *words, variables={**job, "SLURM_PROCID": rank, "SLURM_LOCALID": rank})
        for rank in ("0", "1")
    ]
    status, _, errors = ended(ranks)
    assert status == 0, errors
    assert losses(out) == pytest.approx(losses(one_process), **CLOSE)
