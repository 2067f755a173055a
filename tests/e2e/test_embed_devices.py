"""Several processes embed what one does. They run on the CPU, each with a Lightning of its own."""

import json
import os
import subprocess
import sys

import pytest

from protlm.cli.app import main
from tests.e2e.train_tools import finish, start
from tests.forked import fork_ranks

OPTIONS = ["--tokens-per-batch", 100, "--include", "per-residue", "--include", "mean"]


@pytest.fixture(scope="module")
def one_process(run_dir, fasta, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "e.h5"
    assert main(["embed", str(run_dir), str(fasta), "--out", str(out), *map(str, OPTIONS)]) == 0
    return out.read_bytes()


def embed_on_two(run_dir, fasta, out, *arguments, **variables):
    return start("embed", run_dir, fasta, "--out", out, "--devices", 2, *OPTIONS, *arguments, **variables)


def test_two_processes_give_the_bytes_of_one(run_dir, fasta, one_process, tmp_path):
    out = tmp_path / "e.h5"
    ranks = fork_ranks(2, "embed", run_dir, fasta, "--out", out, "--devices", 2, *OPTIONS, "--json")
    (shown, errors), second = (process.communicate() for process in ranks)
    assert [process.returncode for process in ranks] == [0, 0], (errors, second)
    # One report, of the first process.
    assert (json.loads(shown)["num_records"], second[0]) == (120, "")
    assert out.read_bytes() == one_process
    assert [path.name for path in tmp_path.iterdir()] == ["e.h5"]


# Lightning starts the other processes with the same script.
FULL_DISK = """
import os, sys
from protlm.cli.app import main
from protlm.workflows.embed import portions as embed_portions

def full(*_):
    raise OSError(28, "No space left on device", "a disk")

if os.environ.get("LOCAL_RANK", "0") == os.environ["WITH_FULL_DISK"]:
    embed_portions.PortionWriter._write = full
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("rank", "resuming_devices"),
    [pytest.param(0, 1, marks=pytest.mark.slow), pytest.param(1, 2, marks=pytest.mark.slow), (1, 1)],
)
def test_a_process_that_fails_ends_the_run_and_the_rest_is_kept(
    rank, resuming_devices, run_dir, fasta, one_process, tmp_path
):
    script, out = tmp_path / "full_disk.py", tmp_path / "out" / "e.h5"
    script.write_text(FULL_DISK)
    words = map(str, ["embed", run_dir, fasta, "--out", out, "--devices", 2, *OPTIONS])
    process = subprocess.Popen(
        [sys.executable, script, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "WITH_FULL_DISK": str(rank)},
    )  # fmt: skip
    status, shown, errors = finish(process)
    assert (status, shown) == (1, "")
    lines = errors.splitlines()
    assert all(line.startswith("error: ") for line in lines), errors
    # Who fails says what is wrong; another one may say that somebody failed.
    assert 1 <= len(lines) <= 2
    assert "No space left on device" in errors
    if resuming_devices == 1:
        assert main(["embed", str(run_dir), str(fasta), "--out", str(out), *map(str, OPTIONS), "--resume"]) == 0
    else:
        status, _, errors = finish(embed_on_two(run_dir, fasta, out, "--resume"))
        assert status == 0, errors
    assert out.read_bytes() == one_process
    assert [path.name for path in out.parent.iterdir()] == ["e.h5"]


def test_a_second_process_alone_makes_nothing(run_dir, fasta, tmp_path, monkeypatch):
    """As under torchrun or SLURM, where all processes start at once and only the first one prepares."""
    from protlm.workflows.embed import embed as workflow

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(workflow, "_join", lambda *_: None)
    assert main(["embed", str(run_dir), str(fasta), "--out", str(tmp_path / "e.h5"), "--devices", "2"]) == 0
    assert list(tmp_path.iterdir()) == []
