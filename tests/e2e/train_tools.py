"""How tests start `protlm train`: in this process, or in processes of their own where several work together."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from protlm.cli.app import main
from tests.e2e.conftest import SMALL
from tests.forked import TIMEOUT_SECONDS, Forked, fork_ranks


def rows(run_dir: Path, name: str = "metrics.csv") -> list[dict[str, str]]:
    with (run_dir / name).open(newline="") as file:
        return list(csv.DictReader(file))


def losses(run_dir: Path) -> list[float]:
    return [float(row["train/loss"]) for row in rows(run_dir)]


def train(dataset: Path, out: Path, *arguments: object) -> int:
    return main(["train", str(dataset), "--out", str(out), "--config", "tiny", *SMALL, *map(str, arguments)])


def start(*arguments: object) -> subprocess.Popen[str]:
    """Starts a command in a new interpreter, as Lightning needs it to start the other processes by the same command."""
    return subprocess.Popen(
        [sys.executable, "-m", "protlm.cli.app", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Returns its status, stdout and stderr."""
    try:
        out, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        process.kill()
    return process.returncode, out, errors


LAUNCHERS = ["torchrun", pytest.param("lightning", marks=pytest.mark.slow)]
"""Who starts the processes of a command on two devices; Lightning takes twelve seconds for it."""


def run_on_two(launcher: str, *arguments: object) -> tuple[int, str, str]:
    """Runs a command on two devices and returns the largest status, stdout and stderr of both processes."""
    if launcher == "lightning":
        return finish(start(*arguments, "--devices", 2))
    return ended(fork_ranks(2, *arguments, "--devices", 2))


def ended(ranks: list[Forked]) -> tuple[int, str, str]:
    """Waits for processes and returns their largest status, and stdout and stderr of all of them."""
    outputs, errors = zip(*(process.communicate() for process in ranks), strict=True)
    return max(process.returncode for process in ranks), "".join(outputs), "".join(errors)


def wait_for_rows(out: Path, number: int) -> None:
    """Returns when a run that goes on beside the test has made so many updates."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline and not ((out / "metrics.csv").exists() and len(rows(out)) >= number):
        time.sleep(0.05)
