"""Label files whose ids are not those of the records: told with an id of each side and the likely cause."""

import json
import shutil
from pathlib import Path

import pytest

from protlm.cli.app import main
from tests.e2e.prep_tools import error_line

CASES = Path(__file__).parents[1] / "data" / "cases"


@pytest.mark.parametrize(
    ("fasta", "table", "message"),
    [
        (
            "cdhit_trunc.fasta",
            "cdhit_trunc.clstr",
            "gives no record a cluster: the record 'AFDB:AF-A0A009IHW0-F1' is not in it, and it has "
            "'AFDB:AF-A0A009IHW0-': CD-HIT cuts names at 19 letters; run it again with `-d 0`",
        ),
        (
            "cdhit_collide.fasta",
            "cdhit_collide.clstr",
            "but only 1 different representatives, such as 'NODE_20793_length_1'; CD-HIT cuts names at 19 letters "
            "unless it runs with `-d 0`",
        ),
        (
            "proteins.fasta",
            "mmseqs_fullheader.tsv",
            """it has '"clu1_rep some description"': its ids are quoted; write them without quotes""",
        ),
    ],
)
def test_clusters_of_other_ids_are_told_with_their_cause(tmp_path, capsys, fasta, table, message):
    inputs = CASES / fasta
    if table == "mmseqs_fullheader.tsv":
        inputs = tmp_path / fasta
        inputs.write_text(">clu1_rep some description\nMEVLFVYKD\n>clu1_mem\nMKVPTLFFW\n>clu2_rep\nMIVAKSRA\n")
    for split in ("cluster", "random"):
        arguments = ("prep", inputs, "--out", tmp_path / "out", "--clusters", CASES / table, "--split", split)
        assert message in error_line(capsys, *arguments)


def test_clusters_that_fit_only_some_records_are_an_error_or_a_warning(tmp_path, capsys):
    cause = "the record 'gi|66816243|ref|XP_642131.1|' is not in it, and it has 'XP_642131.1': it has only a part"
    arguments = [
        "prep",
        CASES / "mmseqs_ncbi.fasta",
        "--out",
        tmp_path / "out",
        "--clusters",
        CASES / "mmseqs_ncbi.tsv",
    ]
    message = error_line(capsys, *arguments, "--split", "cluster")
    assert "10 of 12 records are in no cluster" in message
    assert cause in message
    assert main([*map(str, arguments)]) == 0
    told = capsys.readouterr().err
    assert "warning: mmseqs_ncbi.tsv: 10 of 12 records have no cluster" in told
    assert cause in told


CAUSES = [
    ("AFDB:AF-A0A009IHW0-F1", "AFDB:AF-A0A009IHW0-", "run it again with `-d 0`"),
    ("p1", "'p1'", "its ids are quoted"),
    ("p1", ">p1", "its ids begin with `>`"),
    ("p1", "p1 kinase", "it has whole headers"),
    ("p1", "17", "its ids are numbers"),
    ("gb|AAA00001.1|", "AAA00001.1", "it has only a part of that id"),
    ("AAA00001.1", "gb|AAA00001.1|", "the records have only a part of that id"),
    ("NP_000001.1", "NP_000001", "they differ by their version"),
    ("P00001", "P00001.2", "they differ by their version"),
    ("q9x", "Q9X", "they differ by upper and lower case"),
    ("p1", "else", "is it the file of these proteins?"),
]


@pytest.mark.parametrize(("record_id", "label_id", "cause"), CAUSES)
@pytest.mark.parametrize("kind", ["families", "clusters"])
def test_each_known_cause_is_told(tmp_path, capsys, kind, record_id, label_id, cause):
    fasta, table = tmp_path / "a.fasta", tmp_path / "labels.tsv"
    fasta.write_text(f">{record_id} of a lab\nMKVLAAGIV\n>known\nMKVWWWGIV\n")
    table.write_text(f"{label_id}\tc1\n" if kind == "families" else f"c1\t{label_id}\n")
    arguments = ["prep", fasta, "--out", tmp_path / "out", f"--{kind}", table]
    message = error_line(capsys, *arguments)
    assert repr(record_id) in message
    assert repr(label_id) in message
    assert cause in message
    if label_id == "17":
        # Numbers that are ids of other records are no cause.
        return
    # Some records are labelled: a warning, and the dataset is made.
    table.write_text(table.read_text() + ("known\tc2\n" if kind == "families" else "c2\tknown\n"))
    assert main([*map(str, arguments), "--valid-fraction", "0", "--test-fraction", "0"]) == 0
    told = capsys.readouterr().err
    assert "warning: labels.tsv: 1 of 2 records have no " in told
    assert repr(label_id) in told
    assert (cause in told) == (label_id != "else")
    shutil.rmtree(tmp_path / "out")


def test_swapped_columns_are_told(tmp_path, capsys):
    fasta, table = tmp_path / "a.fasta", tmp_path / "families.tsv"
    fasta.write_text(">p1\nMKVLAAGIV\n>p2\nMKVWWWGIV\n")
    table.write_text("PF00001\tp1\nPF00002\tp2\n")
    message = error_line(capsys, "prep", fasta, "--out", tmp_path / "out", "--families", table)
    assert "the record 'p1' is not in it, and it has 'PF00001': that record stands in the column of labels" in message


def test_a_split_file_that_lists_no_record_says_so(tmp_path, capsys):
    fasta, table = tmp_path / "a.fasta", tmp_path / "splits.tsv"
    fasta.write_text(">gb|p1|\nMKVLAAGIV\n>gb|p2|\nMKVWWWGIV\n")
    table.write_text("p1\ttrain\np2\ttest\n")
    arguments = ("prep", fasta, "--out", tmp_path / "out", "--split", "file", "--split-file", table)
    assert "splits.tsv: gives no record a split: the record 'gb|p1|' is not in it" in error_line(capsys, *arguments)


def test_names_cut_by_cd_hit_that_stand_in_two_clusters_are_told(tmp_path, capsys):
    fasta, table = tmp_path / "a.fasta", tmp_path / "a.clstr"
    fasta.write_text(">NODE_20793_length_1_2\nMKVLAAGIV\n")
    table.write_text(
        ">Cluster 0\n0\t9aa, >x... *\n1\t9aa, >NODE_20793_length_1... at 98%\n"
        ">Cluster 1\n0\t9aa, >y... *\n1\t9aa, >NODE_20793_length_1... at 98%\n"
    )
    message = error_line(capsys, "prep", fasta, "--out", tmp_path / "out", "--clusters", table)
    assert f"{table}:6: this id is in cluster 'y', and by line 3 in cluster 'x'" in message
    assert "CD-HIT cuts names at 19 letters unless it runs with `-d 0`" in message


def test_the_byte_order_marks_of_label_files_are_counted_with_those_of_records(tmp_path, capsys):
    mark = "\ufeff"
    fasta, families = tmp_path / "a.fasta", tmp_path / "families.tsv"
    fasta.write_text(f"{mark}>a\nMKV\n>b\nMKL\n", encoding="utf-8")
    families.write_text(f"{mark}a\tF\n{mark}b\tF\n", encoding="utf-8")
    words = ["prep", str(fasta), "--out", str(tmp_path / "out"), "--families", str(families), "--valid-fraction", "0"]
    assert main([*words, "--test-fraction", "0"]) == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["repairs"] == {"byte_order_mark": 3}
    assert "byte_order_mark" in capsys.readouterr().out
