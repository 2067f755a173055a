"""Several processes embed what one does. They run on the CPU, each with a Lightning of its own."""

import json

import pytest

from protlm.cli.app import main
from tests.e2e.train_tools import finish, start

OPTIONS = ["--tokens-per-batch", 200, "--include", "per-residue", "--include", "mean"]


@pytest.fixture(scope="module")
def one_process(run_dir, fasta, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "e.h5"
    status, _, errors = finish(start("embed", run_dir, fasta, "--out", out, *OPTIONS))
    assert status == 0, errors
    return out.read_bytes()


def embed_on_two(run_dir, fasta, out, *arguments, **variables):
    return start("embed", run_dir, fasta, "--out", out, "--devices", 2, *OPTIONS, *arguments, **variables)


def test_two_processes_give_the_bytes_of_one(run_dir, fasta, one_process, tmp_path):
    out = tmp_path / "e.h5"
    status, shown, errors = finish(embed_on_two(run_dir, fasta, out, "--json"))
    assert status == 0, errors
    # One report, of the first process.
    assert json.loads(shown)["num_records"] == 120
    assert out.read_bytes() == one_process
    assert [path.name for path in tmp_path.iterdir()] == ["e.h5"]


def test_what_goes_wrong_is_told_once_and_the_rest_is_kept(run_dir, fasta, one_process, tmp_path):
    out = tmp_path / "e.h5"
    # A folder where a part of the second process should be.
    (tmp_path / "e.h5.partial").mkdir()
    status, _, errors = finish(embed_on_two(run_dir, fasta, out))
    assert status == 1
    assert errors.count("error: ") == errors.count("\n") == 1, errors
    (tmp_path / "e.h5.partial").rmdir()
    status, _, errors = finish(embed_on_two(run_dir, fasta, out))
    assert status == 0, errors
    assert out.read_bytes() == one_process


def test_a_second_process_alone_makes_nothing(run_dir, fasta, tmp_path, monkeypatch):
    """As under torchrun or SLURM, where all processes start at once and only the first one prepares."""
    from protlm.workflows import embed as workflow

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(workflow, "_join", lambda *_: None)
    assert main(["embed", str(run_dir), str(fasta), "--out", str(tmp_path / "e.h5"), "--devices", "2"]) == 0
    assert list(tmp_path.iterdir()) == []
