"""Files that change under a command at work end it with one line, and no process is left behind."""

import os
import shutil
import time

import pytest

from protlm.cli.app import main
from protlm.data.parsing.sources import SourceBlocks
from protlm.workflows.prep import reading as prep_reading
from tests.e2e.conftest import SMALL
from tests.e2e.prep_tools import error_line
from tests.e2e.train_tools import finish, start


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_cut_short_under_a_run_ends_it_with_one_line(dataset, tmp_path, workers):
    copy, run_dir = tmp_path / "dataset", tmp_path / "run"
    shutil.copytree(dataset, copy)
    arguments = ["train", copy, "--out", run_dir, "--config", "tiny", *SMALL, "--max-steps", "100000"]
    process = start(*arguments, "--set", f"data.num_workers={workers}")
    metrics = run_dir / "metrics.csv"
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 2):
        time.sleep(0.1)
    os.truncate(copy / "train-00000.h5", 2000)
    status, _, errors = finish(process)
    assert (status, errors.count("\n")) == (1, 1), errors
    assert errors.startswith(f"error: {copy / 'train-00000.h5'}: cut short while it was in use, from ")


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("change", ["grow", "shrink", "replace"])
def test_an_input_that_changes_under_prep_ends_it_with_one_line(tmp_path, capsys, monkeypatch, workers, change):
    path = tmp_path / "a.fasta"
    path.write_bytes(b"".join(b">p%d\nMKV\n" % number for number in range(3000)))
    monkeypatch.setattr(SourceBlocks, "block_bytes", 1000)
    monkeypatch.setattr(prep_reading, "PIECE_BYTES", 3000)
    raw_blocks, waiting = SourceBlocks._raw_blocks, [change]

    def changing_blocks(self, file, update):
        for number, block in enumerate(raw_blocks(self, file, update)):
            yield block
            if number == 7 and waiting:
                waiting.clear()
                if change == "replace":
                    (tmp_path / "other").write_bytes(path.read_bytes().replace(b"M", b"W"))
                    os.replace(tmp_path / "other", path)
                else:
                    os.truncate(path, 50_000 if change == "grow" else 10_000)

    monkeypatch.setattr(SourceBlocks, "_raw_blocks", changing_blocks)
    line = error_line(capsys, "prep", path, "--out", tmp_path / "out", "--workers", workers, "--on-bad-record", "skip")
    assert "a.fasta: changed while it was read" in line or "a.fasta: not read yet, or changed since" in line
    assert not (tmp_path / "out").exists()
    assert main(["prep", str(path), "--out", str(tmp_path / "out"), "--on-bad-record", "skip"]) == 0
