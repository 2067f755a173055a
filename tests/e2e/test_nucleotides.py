"""Nucleic acids among proteins: told, counted, and left out or kept as the user says; the same in prep and embed."""

import gzip
import json
from pathlib import Path

import pytest

from protlm.cli.app import main
from protlm.data.embeddings.reader import open_embeddings
from protlm.data.storage.dataset import open_dataset
from tests.e2e.prep_tools import error_line, ids, run_json

CASES = Path(__file__).parents[1] / "data" / "cases"
# File, records, nucleic acids among them, the first of these and its line.
FILES = [
    ("mixed_dna.fasta", 10, 5, "n0", 26),
    ("pdb_seqres_clean.txt", 5, 2, "9bbb_C", 5),
    ("dna.fna", 2, 2, "c1", 1),
    ("rna.fna", 1, 1, "c1", 1),
]
ALL = ("--valid-fraction", "0", "--test-fraction", "0")


def records_of(name):
    return [line[1:].split()[0] for line in (CASES / name).read_text().splitlines() if line.startswith(">")]


@pytest.mark.parametrize(("name", "num_records", "num_nucleic_acids", "first", "line"), FILES)
def test_prep_stops_at_a_nucleic_acid_and_skips_or_keeps_all_of_them(
    name, num_records, num_nucleic_acids, first, line, tmp_path, capsys
):
    arguments = ("prep", CASES / name, "--out", tmp_path / "out", *ALL)
    for options in ((), ("--on-bad-record", "skip"), ("--dry-run",)):
        message = error_line(capsys, *arguments, "--nucleotides", "error", *options)
        assert f"record {first!r} is a nucleic acid" in message
        assert "--nucleotides skip" in message
        assert line is None or f"{name}:{line}: " in message
    kept = run_json(capsys, *arguments)
    assert (kept["splits"]["train"]["num_records"], kept["nucleic_acids"]) == (num_records, num_nucleic_acids)
    assert main([*map(str, arguments), "--nucleotides", "keep", "--force"]) == 0
    assert f"warning: {num_nucleic_acids:,} records are nucleic acids" in capsys.readouterr().err
    if num_nucleic_acids == num_records:
        message = error_line(capsys, *arguments, "--nucleotides", "skip", "--force")
        assert f"no record is left; rejected: {num_nucleic_acids} nucleotides" in message
        return
    for options in ((), ("--on-bad-record", "skip"), ("--workers", "2")):
        assert main([*map(str, arguments), "--nucleotides", "skip", *options, "--force"]) == 0
        assert (
            f"warning: {num_nucleic_acids} records rejected: {num_nucleic_acids} nucleotides" in capsys.readouterr().err
        )
        manifest = open_dataset(tmp_path / "out").manifest
        assert manifest.rejects == {"nucleotides": num_nucleic_acids}
        assert manifest.nucleic_acids == 0
        assert len(ids(tmp_path / "out", "train")) == num_records - num_nucleic_acids
        listed = (tmp_path / "out" / "rejects.tsv").read_text().splitlines()[1:]
        assert len(listed) == num_nucleic_acids
        assert listed[0].split("\t")[2:] == [first, "nucleotides"]


@pytest.mark.parametrize(("name", "num_records", "num_nucleic_acids", "first", "line"), FILES)
def test_embed_does_the_same(run_dir, name, num_records, num_nucleic_acids, first, line, tmp_path, capsys):
    out = tmp_path / "out.h5"
    arguments = ["embed", run_dir, CASES / name, "--out", out]
    for options in ((), ("--on-bad-record", "skip"), ("--dry-run",)):
        message = error_line(capsys, *arguments, "--nucleotides", "error", *options)
        assert f"record {first!r} is a nucleic acid" in message
        assert line is None or f"{name}:{line}: " in message
    assert not out.exists()
    assert main([*map(str, arguments), "--json"]) == 0
    told = capsys.readouterr()
    assert f"warning: {num_nucleic_acids:,} records are nucleic acids" in told.err
    report = json.loads(told.out)
    assert (report["num_records"], report["num_nucleotides"]) == (num_records, num_nucleic_acids)
    if num_nucleic_acids == num_records:
        assert "no usable record" in error_line(capsys, *arguments, "--nucleotides", "skip", "--force")
        return
    assert main([*map(str, arguments), "--nucleotides", "skip", "--force"]) == 0
    assert f"warning: skipped {num_nucleic_acids} records (nucleotides)" in capsys.readouterr().err
    embeddings = open_embeddings(out)
    assert len(embeddings) == num_records - num_nucleic_acids
    assert first not in list(embeddings)


def test_the_file_and_line_of_a_later_file_are_told(run_dir, tmp_path, capsys):
    first, second = tmp_path / "a.fasta", tmp_path / "b.fasta.gz"
    first.write_text(">a\nMKVLAAGIV\n")
    second.write_bytes(gzip.compress(b">b\nMKVLWWGIV\n\n>gene\n" + b"ATGCCGATTA\n" * 9))
    options = ("--nucleotides", "error")
    message = error_line(capsys, "embed", run_dir, first, second, "--out", tmp_path / "out.h5", *options)
    assert f"{second}:4: record 'gene' is a nucleic acid" in message
    assert f"{second}:4: record 'gene'" in error_line(
        capsys, "prep", first, second, "--out", tmp_path / "out", *options
    )


def test_the_earlier_of_a_bad_record_and_a_nucleic_acid_is_told(tmp_path, capsys):
    fasta = tmp_path / "a.fasta"
    bad, gene = ">bad\nMK7\n", ">gene\n" + "ATGCCGATTA" * 9 + "\n"
    for text, expected in ((bad + gene, ":2: record 'bad'"), (gene + bad, ":1: record 'gene'")):
        fasta.write_text(text)
        assert expected in error_line(capsys, "prep", fasta, "--out", tmp_path / "out", "--nucleotides", "error")


def test_what_was_read_before_is_judged_by_the_rules_of_now(tmp_path, capsys):
    out, fasta = tmp_path / "out", CASES / "mixed_dna.fasta"
    parts = ("prep", fasta, "--out", out, *ALL)
    assert main([*map(str, parts), "--part", "1/1", "--nucleotides", "skip"]) == 0
    capsys.readouterr()
    assert "is a nucleic acid" in error_line(capsys, *parts, "--merge", "--nucleotides", "error")
    assert run_json(capsys, *parts, "--merge", "--nucleotides", "keep")["nucleic_acids"] == 5
