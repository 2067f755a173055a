"""Whatever people download: formats, compression, folders, patterns, the standard input; and files that are damaged."""

import bz2
import gzip
import io
import lzma
import os
import sys
import threading

import pytest

from protlm.cli.app import main
from protlm.data import compiled
from protlm.data.parsing.compression import zstd
from protlm.data.storage.dataset import open_dataset
from protlm.errors import ProtlmError
from protlm.workflows.prep import reading as prep_reading
from protlm.workflows.prep.options import PrepRequest
from protlm.workflows.prep.prepare import prepare
from tests.e2e.prep_tools import SAMPLE, digests, error_line, ids, run_json, sequences

ALL_TRAIN = {"valid_fraction": 0, "test_fraction": 0}
TEXT = b">a one\nMKV\nLA\n>b two\nWWW\n"
PACK = {
    "plain": lambda text: text,
    "gz": gzip.compress,
    "gz members": lambda text: gzip.compress(text[:7], mtime=0) + gzip.compress(text[7:], mtime=0),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd.compress,
}


@pytest.mark.parametrize("kind", PACK)
def test_compression_is_told_by_content_and_changes_no_record(tmp_path, kind):
    path = tmp_path / "proteins.txt"
    path.write_bytes(PACK[kind](TEXT))
    prepare(PrepRequest(inputs=[path], out=tmp_path / "out", **ALL_TRAIN))
    assert sequences(tmp_path / "out", "train") == ["MKVLA", "WWW"]
    assert open_dataset(tmp_path / "out").manifest.sources[0].name == "proteins.txt"


@pytest.mark.parametrize(
    ("name", "file_format", "num_records"),
    [
        ("swissprot_sample.fasta.gz", "fasta", 63),
        ("made_up_uniref.fasta", "fasta", 6),
        ("made_up_uniref50.xml", "uniref-xml", 2),
        ("made_up_uniprot.xml", "uniprot-xml", 2),
        ("made_up.dat", "flatfile", 6),
        ("uniprot/ecoli_UP000000625_83333.fasta.gz", "fasta", 4402),
        ("uniref/uniref100_sample14k.fasta.gz", "fasta", 14205),
        ("uniref/uniref90_jackhmmer_hits.fasta.gz", "fasta", 3675),
        ("uniref/50_Q9EPS7_Q95604.xml.gz", "uniref-xml", 2),
        ("uniref/UniRef90_P99999.xml", "uniref-xml", 1),
        ("flatfile/Q13639.xml", "uniprot-xml", 1),
        ("long/proteins_gt8000aa.fasta.gz", "fasta", 27),
    ],
)
def test_files_of_each_kind_are_read_whole(protein_file, tmp_path, name, file_format, num_records):
    report = prepare(PrepRequest(inputs=[protein_file(name)], out=tmp_path / "out", **ALL_TRAIN))
    (source,) = report.manifest.sources
    assert (source.format, source.num_records) == (file_format, num_records)
    kept = report.manifest.splits["train"].num_records
    assert kept + report.manifest.duplicates_removed.within_split == num_records
    assert report.manifest.rejects == {}


def test_an_alignment_gives_its_proteins_without_gaps_and_without_its_annotation(tmp_path, capsys):
    path = tmp_path / "a.a3m"
    path.write_text(">ss_pred PSIPRED\nCCHHHE\n>ss_conf\n998\n>query\nMKVLA-\n>hit\nM-klVLA.\n")
    report = run_json(capsys, "prep", path, "--out", tmp_path / "out", "--valid-fraction", "0", "--test-fraction", "0")
    assert sequences(tmp_path / "out", "train") == ["MKVLA", "MKLVLA"]
    assert report["rejects"] == {"alignment_annotation": 2}
    assert report["repairs"] == {"gap": 3, "lower_case": 2}
    assert report["sources"][0]["format"] == "a3m"


def test_comment_lines_above_the_first_record_are_no_fault(tmp_path):
    path = tmp_path / "a.a3m"
    path.write_text("#A3M#\n# from somewhere\n>query\nMKV\n")
    prepare(PrepRequest(inputs=[path], out=tmp_path / "out", **ALL_TRAIN))
    assert sequences(tmp_path / "out", "train") == ["MKV"]


@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_bad_record_may_have_an_id_of_any_length(tmp_path, capsys, monkeypatch, is_compiled):
    # The line end after the header is missing, as if someone had joined the lines of titin.
    monkeypatch.setattr(compiled, "is_available", lambda: is_compiled)
    name = "titin" + "MTTQAPTFTQPLQSVVVLEGSTATFEAHISGFP" * 40_000
    (tmp_path / "a.fasta").write_text(f">a\nMKV\n>{name}\n>b\nMKL\n>c\nM1\n")
    arguments = ["prep", str(tmp_path / "a.fasta"), "--out", str(tmp_path / "out")]
    line = error_line(capsys, *arguments)
    assert "a.fasta:3: record 'titinMTTQAPTFTQPLQSVVVLEGSTATFEAHISGFPMTTQAPTFTQPLQSVVVLEGST…' has no sequence" in line
    assert len(line) < 500
    assert main([*arguments, "--on-bad-record", "skip", "--valid-fraction", "0", "--test-fraction", "0"]) == 0
    assert ids(tmp_path / "out", "train") == ["a", "b"]
    rows = (tmp_path / "out" / "rejects.tsv").read_text().splitlines()[1:]
    assert rows == [f"a.fasta\t3\t{name}\tempty_sequence", "a.fasta\t7\tc\tillegal_character"]


def test_rejects_are_listed_by_line_whatever_they_were_rejected_for(tmp_path, monkeypatch):
    monkeypatch.setattr(prep_reading, "PIECE_BYTES", 20)
    texts = [
        ">a\nMKV",
        ">short1\nM",
        ">bad1\n1",
        ">long\nMKVVVV",
        ">\nM",
        ">short2\nM",
        ">b\nMKL",
        ">bad2",
        ">short3\nM",
    ]
    (tmp_path / "a.fasta").write_text("\n".join(texts) + "\n")
    report = prepare(PrepRequest(inputs=[tmp_path / "a.fasta"], out=tmp_path / "out", min_length=2, max_length=5,
                                 on_bad_record="skip", **ALL_TRAIN))  # fmt: skip
    rows = [row.split("\t")[1:] for row in (tmp_path / "out" / "rejects.tsv").read_text().splitlines()[1:]]
    assert rows == [
        ["3", "short1", "too_short"], ["6", "bad1", "illegal_character"], ["7", "long", "too_long"],
        ["9", "", "empty_id"], ["11", "short2", "too_short"], ["15", "bad2", "empty_sequence"],
        ["16", "short3", "too_short"],
    ]  # fmt: skip
    assert report.manifest.rejects == {
        "empty_id": 1, "empty_sequence": 1, "illegal_character": 1, "too_long": 1, "too_short": 3,
    }  # fmt: skip


def test_folders_and_patterns_stand_for_their_protein_files_in_order(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, text in (("b.fa", ">b\nMKV\n"), ("a.fa", ">a\nMKW\n"), ("README", "hello\n"), (".hidden", ">h\nM\n")):
        (folder / name).write_text(text)
    for given in (folder, folder / "*"):
        arguments = ["prep", str(given), "--out", str(tmp_path / "out"), "--force", "--valid-fraction", "0"]
        if given == folder:
            assert main([*arguments, "--test-fraction", "0"]) == 0
            assert "README: text that begins with 'hello'; no protein file, left out" in capsys.readouterr().err
            assert ids(tmp_path / "out", "train") == ["a", "b"]
        else:
            assert "README:1: expected FASTA" in error_line(capsys, *arguments)
    assert main(["prep", str(folder / "*.fa"), "--out", str(tmp_path / "out2"), "--valid-fraction", "0",
                 "--test-fraction", "0"]) == 0  # fmt: skip
    assert ids(tmp_path / "out2", "train") == ["a", "b"]


def test_the_standard_input_is_an_input(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(TEXT, mtime=0))))
    assert main(["prep", "-", "--out", str(tmp_path / "out"), "--valid-fraction", "0", "--test-fraction", "0"]) == 0
    assert ids(tmp_path / "out", "train") == ["a", "b"]
    assert open_dataset(tmp_path / "out").manifest.sources[0].name == "-"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_pipe_is_an_input_and_is_read_again_on_resume(tmp_path, workers):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def feed(content):
        writer = threading.Thread(target=pipe.write_bytes, args=(content,))
        writer.start()
        return writer

    writer = feed(TEXT)
    # Of a run that fails when it has read everything, because the disk is full, all that was read is kept.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "protlm.workflows.prep.prepare.build_dataset", lambda *_, **__: (_ for _ in ()).throw(OSError("full"))
        )
        with pytest.raises(ProtlmError, match="full; what is finished is kept"):
            prepare(PrepRequest(inputs=[pipe], out=tmp_path / "out", workers=workers, **ALL_TRAIN))
    writer.join()
    writer = feed(TEXT.replace(b"WWW", b"WWC"))
    prepare(PrepRequest(inputs=[pipe], out=tmp_path / "out", workers=workers, resume=True, **ALL_TRAIN))
    writer.join()
    assert sequences(tmp_path / "out", "train") == ["MKVLA", "WWC"]


@pytest.mark.parametrize("root", ["UniRef", "UniRef50", "UniRef90", "UniRef100"])
def test_uniref_xml_of_any_level_is_read_to_its_end(tmp_path, root):
    path = tmp_path / "a.xml"
    entry = (
        '<entry id="UniRef50_A"><name>Cluster: A</name><representativeMember>'
        '<dbReference type="UniProtKB ID" id="A_B"/><sequence length="3">MKV</sequence></representativeMember></entry>'
    )
    path.write_text(f"<?xml version='1.0' encoding='UTF-8'?>\n<{root}>\n{entry}\n</{root}>\n")
    prepare(PrepRequest(inputs=[path], out=tmp_path / "out", **ALL_TRAIN))
    assert ids(tmp_path / "out", "train") == ["UniRef50_A"]


def test_ids_are_kept_as_they_are(tmp_path):
    names = ["a/b/../c", "'q\"", "é中", "x" * 10_000, "a#2", "a", "a", "a"]
    path = tmp_path / "a.fasta"
    path.write_text("".join(f">{name} n=3\nMKV{'A' * number}\n" for number, name in enumerate(names)))
    prepare(PrepRequest(inputs=[path], out=tmp_path / "out", **ALL_TRAIN))
    # A user's own id goes before one that prep would have made.
    assert ids(tmp_path / "out", "train") == [*names[:6], "a#3", "a#4"]


def test_only_numbers_as_prep_writes_them_are_taken(tmp_path):
    names = ["a#" + "9" * 5000, "a#02", "a", "a"]
    path = tmp_path / "a.fasta"
    path.write_text("".join(f">{name}\nMKV{'A' * number}\n" for number, name in enumerate(names)))
    prepare(PrepRequest(inputs=[path], out=tmp_path / "out", **ALL_TRAIN))
    assert ids(tmp_path / "out", "train") == [*names[:3], "a#2"]


def test_ten_thousand_equal_ids_are_told_apart(tmp_path):
    path = tmp_path / "a.fasta"
    path.write_text("".join(f">a\nM{'ACDEFGHIKL'[n % 10]}{'V' * (n // 10)}\n" for n in range(10_000)))
    prepare(PrepRequest(inputs=[path], out=tmp_path / "out", **ALL_TRAIN))
    assert ids(tmp_path / "out", "train") == ["a", *(f"a#{number}" for number in range(2, 10_001))]


def test_white_space_inside_sequences_is_removed_and_counted(tmp_path, capsys):
    path = tmp_path / "a.fasta"
    path.write_bytes(b">a\r\nMK V\tL\r\n>b\r\nMM \r\n")
    report = run_json(capsys, "prep", path, "--out", tmp_path / "out", "--valid-fraction", "0", "--test-fraction", "0")
    assert report["repairs"] == {"white_space": 3}
    assert sequences(tmp_path / "out", "train") == ["MKVL", "MM"]


def test_nucleotides_are_warned_of(tmp_path, capsys):
    path = tmp_path / "a.fasta"
    path.write_text("".join(f">a{n}\n{'ACGT' * 100}{'GATTACA' * n}\n" for n in range(40)))
    assert main(["prep", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "looks like DNA" in capsys.readouterr().err


BOMB = b'<?xml version="1.0"?>\n<!DOCTYPE lolz [<!ENTITY lol "lol"><!ENTITY lol2 "&lol;&lol;">]>\n<uniprot/>\n'
OUTSIDE = b'<?xml version="1.0"?>\n<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>\n<uniprot/>\n'
GOOD = b">a\nMKVLAAGIV\n" * 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ":1: no records"),
        (b"hello\n", ":1: expected FASTA"),
        (b"\x00\x01\x02binary\n", ":1: a binary file"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 600, "an HDF5 file"),
        (b"PK\x03\x04" + b"\0" * 600, "a zip archive"),
        (gzip.compress(GOOD, mtime=0)[:-20], "the gzip data end too early"),
        (zstd.compress(GOOD)[:-5], "the zstd data end too early"),
        (lzma.compress(GOOD)[:-20], "the xz data end too early"),
        (bz2.compress(GOOD)[:-5], "the bzip2 data end too early"),
        (">a\nMKV\n".encode("utf-16"), ":1: UTF-16 text"),
        (b">a\nMK\x00V\n", ":2: record 'a': illegal character '\\x00'"),
        (b">a\n>b\nMKV\n", ":1: record 'a' has no sequence"),
        (b">a\nMKV\n>b\nM4V\n", ":4: record 'b': illegal character '4' in column 2"),
        (b">a\nMK*V\n", ":2: record 'a': illegal character '*' in column 3"),
        (BOMB, "document type definition"),
        (OUTSIDE, "document type definition"),
        (b"<?xml version='1.0'?>\n<html><p/></html>\n", "a web page (HTML)"),
        (b"ID   A_B   Reviewed;   3 AA.\nAC   P1;\nSQ   SEQUENCE   3 AA;\n     MKV\n", ":1:"),
        (b"<uniprot>\n<entry><accession>P1</accession>\n", ":2: the entry does not end"),
    ],
)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_bad_file_is_one_line_and_no_dataset(tmp_path, capsys, content, message, workers):
    path = tmp_path / "bad"
    path.write_bytes(content)
    told = error_line(capsys, "prep", path, "--out", tmp_path / "out", "--workers", workers)
    assert told.startswith(f"error: {path}:")
    assert message in told
    assert [file.name for file in tmp_path.iterdir()] == ["bad"]


def test_what_is_skipped_is_listed_with_its_place(tmp_path, capsys):
    first, second = tmp_path / "1.fasta", tmp_path / "2.fasta.gz"
    first.write_bytes(b"rubbish\n>a\nMKVA\n>b\nM1\n>c\nMK\n")
    second.write_bytes(gzip.compress(b">\nMKVL\n>d\n\n>e\nMKVW\n", mtime=0))
    report = run_json(
        capsys, "prep", first, second, "--out", tmp_path / "out", "--on-bad-record", "skip", "--min-length", "3",
        "--valid-fraction", "0", "--test-fraction", "0",
    )  # fmt: skip
    assert (tmp_path / "out" / "rejects.tsv").read_text().splitlines() == [
        "source\tline\tid\treason",
        "1.fasta\t1\t\ttext_above_first_header",
        "1.fasta\t5\tb\tillegal_character",
        "1.fasta\t6\tc\ttoo_short",
        "2.fasta.gz\t1\t\tempty_id",
        "2.fasta.gz\t3\td\tempty_sequence",
    ]
    assert sum(report["rejects"].values()) == 5
    assert ids(tmp_path / "out", "train") == ["a", "e"]


@pytest.mark.parametrize("change", ["link", "unreadable output"])
def test_links_that_lead_nowhere_and_outputs_that_cannot_be_made_are_one_line(tmp_path, capsys, change):
    if change == "link":
        path = tmp_path / "dangling"
        path.symlink_to("absent")
        assert "a link to absent, which does not exist" in error_line(capsys, "prep", path, "--out", tmp_path / "out")
    else:
        (tmp_path / "file").write_text("")
        message = error_line(capsys, "prep", SAMPLE, "--out", tmp_path / "file" / "out")
        assert str(tmp_path / "file") in message


def test_every_output_file_is_made_again_to_the_byte(tmp_path):
    for name in ("one", "two"):
        prepare(PrepRequest(inputs=[SAMPLE], out=tmp_path / name, min_length=100))
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert {"manifest.json", "report.html", "protlm_prep_mqc.json", "rejects.tsv"} < digests(tmp_path / "one").keys()
