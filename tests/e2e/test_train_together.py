"""Several trains on one RUN at the same time: one of them works, the others say who does, and nothing is lost."""

import os
import signal
import time

import pytest

from protlm.runtime import locks
from tests.e2e.conftest import SMALL
from tests.e2e.train_tools import rows
from tests.forked import Forked

WORDS = ["--config", "tiny", *SMALL]
STEPS = 12


def start(dataset, out, *options):
    return Forked("train", dataset, "--out", out, *WORDS, "--max-steps", STEPS, *options)


def ended(processes):
    """Returns the (status, stderr) of each process."""
    errors = [process.communicate()[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, errors, strict=True)]


@pytest.fixture(scope="module")
def expected(dataset, tmp_path_factory):
    """The losses of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert ended([start(dataset, out)])[0][0] == 0
    return [row["train/loss"] for row in rows(out)]


def check_together(dataset, tmp_path, expected, options, number, delay):
    """Starts trains together, and then one alone, which finishes what is left."""
    out = tmp_path / "run"
    processes = []
    for _ in range(number):
        processes.append(start(dataset, out, *options))
        time.sleep(delay)
    outcomes = ended(processes)
    for status, errors in outcomes:
        assert status in (0, 1), errors
        assert "Traceback" not in errors
        if status:
            (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
            assert "another run" in line or "exists already" in line, line
    assert any(status == 0 for status, _ in outcomes)
    assert ended([start(dataset, out, "--resume")])[0][0] == 0
    assert [row["step"] for row in rows(out)] == [str(step) for step in range(1, STEPS + 1)]
    assert [row["train/loss"] for row in rows(out)] == expected
    assert sorted(os.listdir(tmp_path)) == ["run"]
    assert not [name for name in os.listdir(out) if name.startswith(".")]


CASES = [([], 2), (["--resume"], 3), (["--force"], 3)]


@pytest.mark.parametrize(("options", "number"), CASES)
def test_trains_on_one_run_lose_nothing(dataset, tmp_path, expected, options, number):
    check_together(dataset, tmp_path, expected, options, number, 0)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0])
@pytest.mark.parametrize(("options", "number"), CASES)
def test_trains_that_follow_each_other_on_one_run_lose_nothing(dataset, tmp_path, expected, options, number, delay):
    check_together(dataset, tmp_path, expected, options, number, delay)


def test_a_run_at_work_is_neither_resumed_nor_replaced(dataset, tmp_path, expected, failure, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0.1)
    out = tmp_path / "run"
    assert ended([start(dataset, out)])[0][0] == 0
    with locks.locked(out):
        for option in ("--resume", "--force"):
            message = failure("train", dataset, "--out", out, *WORDS, "--max-steps", STEPS, option)
            assert f"another run is at work here (process {os.getpid()} on " in message
    assert [row["train/loss"] for row in rows(out)] == expected


def test_a_log_in_a_run_hinders_no_resume_and_is_never_removed(dataset, tmp_path, failure):
    out = tmp_path / "run"
    assert ended([start(dataset, out)])[0][0] == 0
    (out / "slurm-1.out").write_text("step 12")
    assert ended([Forked("train", dataset, "--out", out, "--resume", "--max-steps", STEPS + 2)])[0][0] == 0
    assert len(rows(out)) == STEPS + 2
    assert "slurm-1.out" in failure("train", dataset, "--out", out, *WORDS, "--force")
    (out / "slurm-1.out").unlink()
    for folder in ("model", "checkpoints"):
        (out / folder / "notes.txt").write_text("mine")
        assert "notes.txt" in failure("train", dataset, "--out", out, *WORDS, "--force")
        (out / folder / "notes.txt").unlink()


def test_a_folder_with_nothing_but_the_beginning_of_a_killed_run_takes_a_new_one(dataset, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".config.toml.01234567.partial").write_text("[mo")
    assert ended([start(dataset, out, "--resume")])[0][0] == 0
    assert len(rows(out)) == STEPS
    assert not [name for name in os.listdir(out) if name.startswith(".")]


def test_a_finished_run_is_rid_of_what_a_kill_left(dataset, tmp_path):
    out = tmp_path / "run"
    assert ended([start(dataset, out)])[0][0] == 0
    for folder in (out, out / "checkpoints"):
        (folder / ".curves.png.01234567.partial").write_bytes(b"half")
    assert ended([start(dataset, out, "--resume")])[0][0] == 0
    assert not list(out.rglob("*.partial"))


def test_a_run_that_was_killed_while_locked_is_free_at_once(dataset, tmp_path, expected):
    out = tmp_path / "run"
    process = start(dataset, out)
    while not (out / "metrics.csv").exists():
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (out / ".lock").exists()
    assert ended([start(dataset, out, "--resume")])[0][0] == 0
    assert [row["train/loss"] for row in rows(out)] == expected
