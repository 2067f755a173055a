"""`--cluster-with mmseqs`: what MMseqs2 is given, and how its clusters come back; no id is lost or shared."""

import bz2
import gzip
import lzma
import os
import stat
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from protlm.cli.app import main
from protlm.data.storage.dataset import open_dataset
from tests.e2e.prep_tools import error_line, run_json, sequences
from tests.e2e.test_prep_splits import random_sequences, write_fasta

CASES = Path(__file__).parents[1] / "data" / "cases"

# Joins a sequence to the first representative with which it shares most letters. As MMseqs2 does, it writes the ids of
# what it read: of the first word of a header, and of ids with bars only a part.
PROGRAM = """#!{python}
import os, sys

assert sys.argv[1] == "easy-linclust", sys.argv
fasta, result = sys.argv[2:4]
if "MMSEQS_FAILS" in os.environ:
    print("no such thing", file=sys.stderr)
    sys.exit(3)
if "MMSEQS_WRITES" in os.environ:
    open(result + "_cluster.tsv", "w").write(os.environ["MMSEQS_WRITES"])
    sys.exit(0)
representatives = []
with open(result + "_cluster.tsv", "w") as table:
    for record in open(fasta).read().split(">")[1:]:
        header, sequence = record.split("\\n", 1)
        sequence = "".join(sequence.split())
        name = header.split()[0].strip("|").split("|")[-1]
        for other, representative in representatives:
            same = sum(a == b for a, b in zip(sequence, other))
            if same > 0.5 * min(len(sequence), len(other)):
                break
        else:
            representative = name
            representatives.append((sequence, name))
        table.write(f"{{representative}}\\t{{name}}\\n")
"""


@pytest.fixture
def mmseqs(tmp_path, monkeypatch):
    """A program of that name that clusters by equal letters."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "mmseqs"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def placed(out):
    """Returns for each sequence of a dataset its split and its cluster."""
    dataset = open_dataset(out)
    return {
        sequence: (split, dataset.split(split).labels(index).clusters)
        for split, summary in dataset.manifest.splits.items()
        if summary.num_records
        for index, sequence in enumerate(sequences(out, split))
    }


def are_relatives(first, second):
    return sum(a == b for a, b in zip(first, second, strict=False)) > 0.5 * min(len(first), len(second))


@pytest.mark.parametrize("name", ["mm_mixed", "mm_pdb", "mm_dupid", "mm_spacefirst"])
@pytest.mark.parametrize("pack", [None, gzip.compress, bz2.compress, lzma.compress])
def test_relatives_stay_together_whatever_their_ids_and_the_compression(mmseqs, tmp_path, capsys, name, pack):
    fasta = CASES / f"{name}.fasta"
    if pack is not None:
        packed = tmp_path / "proteins"
        packed.write_bytes(pack(fasta.read_bytes()))
    arguments = ["prep", fasta if pack is None else packed, "--out", tmp_path / "out", "--split", "cluster"]
    arguments += ["--cluster-with", "mmseqs", "--valid-fraction", "0.3", "--test-fraction", "0.3"]
    assert main([*map(str, arguments)]) == 0
    assert "cluster" not in capsys.readouterr().err
    records = placed(tmp_path / "out")
    assert len(records) == fasta.read_text().count(">")
    assert len({split for split, _ in records.values()}) > 1
    members = defaultdict(list)
    for sequence, (split, clusters) in records.items():
        assert len(clusters) == 1
        members[clusters].append((sequence, split))
    # A family is a cluster of its own, with a name that no other has.
    for cluster in members.values():
        assert len({split for _, split in cluster}) == 1
        assert all(are_relatives(cluster[0][0], sequence) for sequence, _ in cluster)
    firsts = [cluster[0][0] for cluster in members.values()]
    assert not any(are_relatives(a, b) for a in firsts for b in firsts if a != b)


@pytest.mark.parametrize(
    "names",
    [
        ["gi|1|gb|AAA1.1|", "gi|2|gb|AAA1.1|", "gi|3|gb|AAA1.1|", "gi|4|gb|AAA1.1|"],
        ["Homo sapiens 1", "Homo sapiens 2", "Homo#2", "Homo sapiens 3"],
        ["1", "0", "3", "2"],
        ["tr|A0A1|A_B", "UniRef50_A0A1", "lcl|A0A1", '"A0A1"'],
    ],
)
def test_no_id_is_shared_or_lost(mmseqs, tmp_path, names):
    first, second = random_sequences(2)
    texts = [first, second, first[:-1] + "W", second[:-1] + "W"]
    fasta = write_fasta(tmp_path / "a.fasta", names, [first, second, texts[2].lower() + "*", texts[3]])
    arguments = ["prep", fasta, "--out", tmp_path / "out", "--cluster-with", "mmseqs", "--valid-fraction", "0"]
    assert main([*map(str, arguments), "--test-fraction", "0"]) == 0
    clusters = {sequence: cluster for sequence, (_, cluster) in placed(tmp_path / "out").items()}
    assert clusters[texts[0]] == clusters[texts[2]] != clusters[texts[1]] == clusters[texts[3]]
    assert clusters[first] == (names[0].split()[0],)
    assert (open_dataset(tmp_path / "out").split("train").shard(0).cluster_size == 2).all()


def test_mmseqs_gets_each_sequence_once_and_only_those_that_are_kept(mmseqs, tmp_path, monkeypatch):
    (protein, other) = random_sequences(2)
    gene = "ATGCCGATTA" * 9
    fasta = write_fasta(tmp_path / "a.fasta", "abcde", [protein, protein, "MKV", gene, other])
    # With another number the program would be told that it is no MMseqs2.
    monkeypatch.setenv("MMSEQS_WRITES", "0\t0\n0\t1\n")
    arguments = ["prep", fasta, "--out", tmp_path / "out", "--cluster-with", "mmseqs", "--split", "cluster"]
    arguments += ["--min-length", "10", "--nucleotides", "skip"]
    assert main([*map(str, arguments)]) == 0
    assert Counter(cluster for _, cluster in placed(tmp_path / "out").values()) == {("a",): 2}


def test_sequences_that_mmseqs_leaves_out_are_unclustered(mmseqs, tmp_path, capsys, monkeypatch):
    fasta = write_fasta(tmp_path / "a.fasta", "abc", random_sequences(3))
    monkeypatch.setenv("MMSEQS_WRITES", "2\t2\n2\t0\n")
    arguments = ("prep", fasta, "--out", tmp_path / "out", "--cluster-with", "mmseqs", "--split", "cluster")
    assert "1 of 3 records are in no cluster, such as 'b'" in error_line(capsys, *arguments)
    run_json(capsys, *arguments, "--unclustered", "train")


@pytest.mark.parametrize("written", ["", "a\tb\n", "0\t1\n1\n", "0\t3\n", "-1\t0\n"])
def test_a_program_that_is_not_mmseqs_is_told(mmseqs, tmp_path, capsys, monkeypatch, written):
    fasta = write_fasta(tmp_path / "a.fasta", "abc", random_sequences(3))
    monkeypatch.setenv("MMSEQS_WRITES", written)
    arguments = ("prep", fasta, "--out", tmp_path / "out", "--cluster-with", "mmseqs")
    assert "mmseqs: wrote no clusters of the sequences it was given" in error_line(capsys, *arguments)


def test_a_program_that_fails_is_one_line(mmseqs, tmp_path, capsys, monkeypatch):
    fasta = write_fasta(tmp_path / "a.fasta", "abc", random_sequences(3))
    monkeypatch.setenv("MMSEQS_FAILS", "1")
    arguments = ("prep", fasta, "--out", tmp_path / "out", "--cluster-with", "mmseqs")
    assert "mmseqs: ended with status 3: no such thing" in error_line(capsys, *arguments)


def test_a_program_that_is_not_installed_is_one_line(tmp_path, capsys, monkeypatch):
    fasta = write_fasta(tmp_path / "a.fasta", "abc", random_sequences(3))
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ("prep", fasta, "--out", tmp_path / "out", "--split", "cluster", "--cluster-with", "mmseqs")
    message = error_line(capsys, *arguments)
    assert "mmseqs: not installed; install MMseqs2, or give its clusters with --clusters" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [(">a\nMKV\n\n>b\nMK7\n", ":5: record 'b': illegal character '7'"),
     (">a\nMKV\n>b\n" + "ACGT" * 9, ":3: record 'b' is a nucleic acid")],
)  # fmt: skip
def test_a_bad_record_is_told_before_anything_is_clustered(mmseqs, tmp_path, capsys, monkeypatch, text, message):
    monkeypatch.setenv("MMSEQS_FAILS", "1")
    fasta = tmp_path / "a.fasta"
    fasta.write_text(text)
    assert message in error_line(
        capsys, "prep", fasta, "--out", tmp_path / "out", "--cluster-with", "mmseqs", "--nucleotides", "error"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--cluster-identity", "0.5"), "cluster_identity: only with cluster_with"),
        (("--cluster-with", "mmseqs", "--clusters", "x.tsv"), "clusters and cluster_with: only one of them"),
    ],
)
def test_options_of_clustering_that_contradict_each_other_are_wrong_usage(tmp_path, capsys, options, message):
    fasta = write_fasta(tmp_path / "a.fasta", "abc", random_sequences(3))
    assert main(["prep", str(fasta), "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err


def test_ready_made_splits_are_clustered_too_so_that_relatives_across_them_are_told(mmseqs, tmp_path, capsys):
    first, second, third = random_sequences(3)
    train = write_fasta(tmp_path / "train.fasta", "ab", [first, second])
    test = write_fasta(tmp_path / "test.fasta", "cd", [first[:-1] + "W", third])
    report = run_json(
        capsys, "prep", train, "--test-input", test, "--out", tmp_path / "out", "--cluster-with", "mmseqs"
    )
    pairs = {(pair["first"], pair["second"]): pair["num_labels"] for pair in report["leakage"]["clusters"]}
    assert pairs == {("train", "test"): 1}


def test_a_pipe_cannot_be_clustered(mmseqs, tmp_path, capsys):
    assert main(["prep", "-", "--out", str(tmp_path / "out"), "--cluster-with", "mmseqs"]) == 2
    assert "cluster_with: the standard input and other pipes can be read only once" in capsys.readouterr().err
