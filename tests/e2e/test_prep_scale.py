"""The bytes of a dataset depend on neither workers nor parts nor the size of pieces."""

import functools
import gzip
import os
import resource
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from protlm.cli.app import main
from protlm.data.building import selection
from protlm.data.parsing import fasta, text_pieces
from protlm.data.parsing.sources import SourceBlocks
from protlm.errors import UsageError
from protlm.workflows.prep import reading as prep_reading
from protlm.workflows.prep.options import PrepRequest
from protlm.workflows.prep.prepare import prepare
from tests.e2e.prep_tools import (
    SAMPLE,
    SAMPLE_WORDS,
    digests,
    error_line,
    ids,
    prepare_sample,
    run_json,
)
from tests.forked import Forked


def test_the_number_of_workers_changes_no_byte(small_pieces, sample_files, sample_digests, tmp_path):
    for workers in (2, 3):
        prepare_sample(sample_files, tmp_path / "out", workers=workers, force=True)
        assert digests(tmp_path / "out") == sample_digests
    assert len(sample_digests) > 5


def test_the_size_of_pieces_and_of_the_ranges_compared_changes_no_byte(
    sample_files, sample_digests, tmp_path, monkeypatch
):
    monkeypatch.setattr(selection, "_COMPARED_AT_ONCE", 100)
    for piece_bytes in (1, 20_000):
        monkeypatch.setattr(prep_reading, "PIECE_BYTES", piece_bytes)
        monkeypatch.setattr(SourceBlocks, "block_bytes", 3_000)
        prepare_sample(sample_files, tmp_path / "out", force=True)
        assert digests(tmp_path / "out") == sample_digests


def test_the_twin_in_python_makes_the_same_dataset_as_the_compiled_parser(
    sample_files, sample_digests, tmp_path, monkeypatch
):
    monkeypatch.setattr("protlm.data.compiled.is_available", lambda: False)
    prepare_sample(sample_files, tmp_path / "out")
    assert digests(tmp_path / "out") == sample_digests


def test_parts_merged_are_the_dataset_of_one_run(sample_files, sample_digests, tmp_path):
    names = []
    for number in (2, 3, 1):
        names += prepare_sample(sample_files, tmp_path / "out", part=(number, 3)).files
        if number != 1:
            with pytest.raises(Exception, match="not read yet, or changed since"):
                prepare_sample(sample_files, tmp_path / "out", merge=True)
    assert sorted(names) == sorted(map(str, sample_files))
    prepare_sample(sample_files, tmp_path / "out", merge=True)
    assert digests(tmp_path / "out") == sample_digests
    assert not (tmp_path / "out.partial").exists()


def test_parts_by_the_command(sample_files, sample_digests, tmp_path, capsys):
    options = (*SAMPLE_WORDS, "--on-bad-record", "skip", "--min-length", "2")
    command = ("prep", *sample_files, "--out", tmp_path / "out", *options)
    assert run_json(capsys, *command, "--part", "1/2")["num_records"] > 0
    assert "are missing" in error_line(capsys, *command, "--merge")
    assert main([*map(str, command), "--part", "2/2"]) == 0
    assert "records     " in capsys.readouterr().out
    assert main([*map(str, command), "--merge"]) == 0
    assert digests(tmp_path / "out") == sample_digests
    assert main([*map(str, command), "--part", "4/4"]) == 0
    assert "this part has no file" in capsys.readouterr().err


def test_many_small_files_and_shards_want_few_files_open(tmp_path):
    records = gzip.decompress(SAMPLE.read_bytes()).removeprefix(b">").rstrip(b"\n").split(b"\n>")[:100]
    folder = tmp_path / "in"
    folder.mkdir()
    for number, record in enumerate(records):
        (folder / f"{number:04d}.fasta").write_bytes(b">" + record + b"\n")
    options = ("--shard-residues", 500, "--valid-fraction", 0.3, "--test-fraction", 0.3)
    few = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (50, 50))
    process = Forked("prep", folder, "--out", tmp_path / "out", *options, prepare=few)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert len(list((tmp_path / "out").glob("*.h5"))) > 60


def test_parts_that_begin_at_once_share_one_folder(sample_files, sample_digests, tmp_path):
    out = tmp_path / "out"
    barrier = threading.Barrier(3)

    def read(number):
        barrier.wait()
        prepare_sample(sample_files, out, part=(number, 3))

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(read, (1, 2, 3)))
    prepare_sample(sample_files, out, merge=True)
    assert digests(out) == sample_digests


def test_a_file_that_changes_while_workers_read_it_is_an_error(sample_files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prep_reading, "_read_range", lambda path, start, num_bytes: b">" + b"M" * (num_bytes - 1))
    # The only one, so that all workers read it.
    message = error_line(capsys, "prep", sample_files[0], "--out", tmp_path / "out", "--workers", "2")
    assert f"{sample_files[0]}: changed while it was read" in message


def test_an_error_in_a_worker_names_the_line_of_the_whole_file(small_pieces, tmp_path, capsys):
    path = tmp_path / "long.fasta"
    text = gzip.decompress(SAMPLE.read_bytes())
    line = text.count(b"\n") + 2
    path.write_bytes(text + b">bad\nM7\n")
    for workers in ("1", "2"):
        message = error_line(capsys, "prep", path, "--out", tmp_path / "out", "--workers", workers)
        assert f"{path}:{line}: record 'bad': illegal character '7'" in message


def test_a_record_beyond_the_bound_is_an_error_in_bounded_memory_and_can_be_skipped(tmp_path, capsys, monkeypatch):
    for module in (fasta, text_pieces):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 3000)
    monkeypatch.setattr("protlm.data.parsing.compiled_fasta.MAX_RECORD_BYTES", 3000)
    monkeypatch.setattr(prep_reading, "PIECE_BYTES", 100)
    monkeypatch.setattr(SourceBlocks, "block_bytes", 512)
    monkeypatch.setattr("protlm.data.parsing.text_pieces._HEAD_BYTES", 1024)
    path = tmp_path / "a.fasta"
    path.write_bytes(b">a\nMKV\n>huge one\n" + b"M" * 20_000 + b"\nMK\n>b\nMKW\n>c\nM1\n")
    message = error_line(capsys, "prep", path, "--out", tmp_path / "out")
    assert f"{path}:3: record 'huge' is longer than 3,000 bytes" in message
    arguments = ("prep", path, "--out", tmp_path / "out", "--on-bad-record", "skip")
    report = run_json(capsys, *arguments, "--valid-fraction", "0", "--test-fraction", "0")
    assert report["rejects"] == {"illegal_character": 1, "oversized": 1}
    assert ids(tmp_path / "out", "train") == ["a", "b"]
    rows = (tmp_path / "out" / "rejects.tsv").read_text().splitlines()
    assert rows == ["source\tline\tid\treason", "a.fasta\t3\thuge\toversized", "a.fasta\t9\tc\tillegal_character"]


def test_a_dry_run_makes_nothing_and_comes_close(tmp_path, capsys):
    estimate = run_json(capsys, "prep", SAMPLE, "--out", tmp_path / "out", "--dry-run")
    assert os.listdir(tmp_path) == []
    assert abs(estimate["num_records"] - 2500) < 25
    prepare(PrepRequest(inputs=[SAMPLE], out=tmp_path / "out"))
    assert estimate["num_residues"] == pytest.approx(1_160_000, rel=0.2)
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.h5"))
    assert estimate["dataset_bytes"] == pytest.approx(size, rel=0.3)
    assert estimate["free_bytes"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert main(["prep", str(SAMPLE), "--out", str(tmp_path / "new"), "--dry-run"]) == 0
    assert "seconds, about" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dry_run": True, "split": "file"}, "split_file: wanted with split 'file'"),
        ({"dry_run": True, "part": (9, 2)}, "got 9/2"),
        ({"resume": True, "merge": True}, "only one of them"),
        ({"part": (0, 2)}, "expected i/n with i from 1 to n, got 0/2"),
        ({"part": (3, 2)}, "got 3/2"),
        ({"workers": 0}, "workers: expected 1 to"),
        ({"workers": 100_000}, "on this machine, got 100000"),
    ],
)
def test_options_of_scale_that_contradict_each_other_are_wrong_usage(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        prepare(PrepRequest(inputs=[SAMPLE], out=tmp_path / "out", **options))
    assert not Path(f"{tmp_path}/out.partial").exists()


@pytest.mark.parametrize("part", ["2", "a/b", "1/2/3", "-1/2"])
def test_a_part_of_another_form_is_wrong_usage(tmp_path, capsys, part):
    assert main(["prep", str(SAMPLE), "--out", str(tmp_path / "out"), f"--part={part}"]) == 2
    assert "expected i/n" in capsys.readouterr().err
