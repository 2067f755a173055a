"""prep, train and embed on a file system without locks, which a preloaded library stands for; and beside a reader."""

import os
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest

from protlm import open_embeddings
from protlm.cli.app import main
from tests.e2e.conftest import SMALL

WITHOUT_LOCKS = """
#include <errno.h>
#include <sys/file.h>
int flock(int descriptor, int operation) { errno = ENOLCK; return -1; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("gcc") is None or not sys.platform.startswith("linux"):
        pytest.skip("needs gcc and LD_PRELOAD")
    folder = tmp_path_factory.mktemp("library")
    (folder / "lock.c").write_text(WITHOUT_LOCKS)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "lock.so", folder / "lock.c"], check=True)
    return folder / "lock.so"


@pytest.fixture
def run(library):
    def run(*words):
        """Runs a command that has to succeed and warn in one line, which says where."""
        variables = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "protlm.cli.app", *map(str, words)]
        result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stderr
        warnings = [line for line in result.stderr.splitlines() if "no locks" in line]
        assert warnings, result.stderr
        assert len(set(warnings)) == len(warnings)
        for line in warnings:
            assert line.startswith("warning: /")
            assert "this file system has no locks (No locks available); start no second run here" in line
        assert "UserWarning" not in result.stderr
        return result

    return run


def test_every_command_that_writes_works_and_warns(run, fasta, tmp_path):
    dataset, out, embeddings = tmp_path / "dataset", tmp_path / "run", tmp_path / "embeddings.h5"
    run("prep", fasta, "--out", dataset, "--valid-fraction", "0.1", "--test-fraction", "0.1")
    run("train", dataset, "--out", out, "--config", "tiny", *SMALL, "--max-steps", "2")
    run("embed", out, fasta, "--out", embeddings)
    assert len(open_embeddings(embeddings)) == 120


def test_a_dataset_for_each_protein_is_written_without_locks(run, run_dir, fasta, tmp_path):
    run("embed", run_dir, fasta, "--out", tmp_path / "out.h5", "--layout", "uniprot")
    assert main(["embed", str(run_dir), str(fasta), "--out", str(tmp_path / "same.h5"), "--layout", "uniprot"]) == 0
    with h5py.File(tmp_path / "out.h5") as out, h5py.File(tmp_path / "same.h5") as same:
        assert list(out) == list(same)
        assert dict(out.attrs) == dict(same.attrs)
        for name in out:
            # Another process may have other threads, whose sums differ in the last bit.
            np.testing.assert_allclose(out[name][:], same[name][:], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("layout", ["protlm", "uniprot"])
def test_an_output_that_a_notebook_holds_open_is_read_and_replaced(layout, run_dir, fasta, tmp_path):
    out = tmp_path / "out.h5"
    words = ["embed", str(run_dir), str(fasta), "--out", str(out), "--layout", layout]
    assert main(words) == 0
    before = out.read_bytes()
    with h5py.File(out) as file:
        if layout == "protlm":
            assert len(open_embeddings(out)) == 120
        assert main([*words, "--force", "--truncate", "20"]) == 0
        assert len(file)
    assert out.read_bytes() != before
