"""Several processes embed what one does. They run on the CPU, each with a Lightning of its own."""

import functools
import json
import os
import subprocess
import sys

import pytest

from protlm.cli.app import main
from protlm.workflows.embed import portions as embed_portions
from tests.e2e.train_tools import LAUNCHERS, ended, finish, run_on_two
from tests.forked import fork_ranks

OPTIONS = ["--tokens-per-batch", 100, "--include", "per-residue", "--include", "mean"]


@pytest.fixture(scope="module")
def one_process(run_dir, fasta, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "e.h5"
    assert main(["embed", str(run_dir), str(fasta), "--out", str(out), *map(str, OPTIONS)]) == 0
    return out.read_bytes()


def test_two_processes_give_the_bytes_of_one(run_dir, fasta, one_process, tmp_path):
    out = tmp_path / "e.h5"
    status, shown, errors = run_on_two("torchrun", "embed", run_dir, fasta, "--out", out, *OPTIONS, "--json")
    assert status == 0, errors
    # One report, of the first process.
    assert json.loads(shown)["num_records"] == 120
    assert out.read_bytes() == one_process
    assert [path.name for path in tmp_path.iterdir()] == ["e.h5"]


def fill_disk_of(rank):
    """Makes writing fail in one of the processes."""

    def full(*_):
        raise OSError(28, "No space left on device", "a disk")

    if int(os.environ.get("LOCAL_RANK", "0")) == rank:
        embed_portions.PortionWriter._write = full


# Lightning starts the other processes with the same script.
FULL_DISK = """
import os, sys
from protlm.cli.app import main
from tests.e2e.test_embed_devices import fill_disk_of

fill_disk_of(int(os.environ["WITH_FULL_DISK"]))
sys.exit(main(sys.argv[1:]))
"""


def embed_with_a_full_disk(rank, launcher, folder, *arguments):
    """Returns status, stdout and stderr of a run on two devices."""
    if launcher == "lightning":
        script = folder / "full_disk.py"
        script.write_text(FULL_DISK)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "WITH_FULL_DISK": str(rank)}
        return finish(subprocess.Popen(
            [sys.executable, script, "embed", *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        ))  # fmt: skip
    return ended(fork_ranks(2, "embed", *arguments, prepare=functools.partial(fill_disk_of, rank)))


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(("rank", "resuming_devices"), [(0, 1), (1, 2), (1, 1)])
def test_a_process_that_fails_ends_the_run_and_the_rest_is_kept(
    rank, resuming_devices, launcher, run_dir, fasta, one_process, tmp_path
):
    out = tmp_path / "out" / "e.h5"
    words = [run_dir, fasta, "--out", out, *OPTIONS]
    status, shown, errors = embed_with_a_full_disk(rank, launcher, tmp_path, *words, "--devices", 2)
    assert (status, shown) == (1, "")
    lines = errors.splitlines()
    assert all(line.startswith("error: ") for line in lines), errors
    # Who fails says what is wrong; another one may say that somebody failed.
    assert 1 <= len(lines) <= 2
    assert "No space left on device" in errors
    if resuming_devices == 1:
        assert main(["embed", *map(str, words), "--resume"]) == 0
    else:
        status, _, errors = run_on_two(launcher, "embed", *words, "--resume")
        assert status == 0, errors
    assert out.read_bytes() == one_process
    assert [path.name for path in out.parent.iterdir()] == ["e.h5"]


def test_a_second_process_alone_makes_nothing(run_dir, fasta, tmp_path, monkeypatch):
    """As under torchrun or SLURM, where all processes start at once and only the first one prepares."""
    from protlm.workflows.embed import embed as workflow

    for name, value in {"TORCHELASTIC_RUN_ID": "tests", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(workflow, "_join", lambda *_: None)
    assert main(["embed", str(run_dir), str(fasta), "--out", str(tmp_path / "e.h5"), "--devices", "2"]) == 0
    assert list(tmp_path.iterdir()) == []


TASK = {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "77", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}


@pytest.mark.parametrize(
    "variables",
    [
        TASK, {**TASK, "SLURM_NTASKS_PER_NODE": "4"}, {**TASK, "SLURM_STEP_NUM_TASKS": "4"},
        {"RANK": "1", "WORLD_SIZE": "4"}, {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "gone"},
    ],
    ids=str,
)  # fmt: skip
def test_every_rank_of_something_else_embeds_into_a_file_of_its_own(
    variables, run_dir, fasta, one_process, tmp_path, monkeypatch
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["embed", str(run_dir), str(fasta), "--out", str(tmp_path / "e.h5"), *map(str, OPTIONS)]) == 0
    assert (tmp_path / "e.h5").read_bytes() == one_process


def test_processes_that_do_not_fit_the_devices_write_nothing(run_dir, fasta, tmp_path):
    for process in fork_ranks(2, "embed", run_dir, fasta, "--out", tmp_path / "e.h5"):
        shown, errors = process.communicate()
        assert (process.returncode, shown) == (1, "")
        (line,) = errors.splitlines()
        assert "torchrun started 2 processes" in line
    assert list(tmp_path.iterdir()) == []
