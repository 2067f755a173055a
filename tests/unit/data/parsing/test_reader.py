import gzip
import hashlib
import inspect

import pytest

from protlm import read_records
from protlm.data import compiled
from protlm.data.parsing import fasta
from protlm.data.parsing.reader import RecordReader, parse_piece
from protlm.data.parsing.sources import SourceBlocks
from protlm.data.parsing.text_pieces import TextPiece
from protlm.data.records import Record
from protlm.errors import ProtlmError, RecordError


@pytest.fixture
def write(tmp_path):
    def write(content, name="a.fasta"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def pairs(path):
    return [(record.id, record.sequence) for record in read_records(path)]


def fault(path):
    with pytest.raises(RecordError) as caught:
        list(read_records(path))
    return caught.value


def test_reads_ids_descriptions_and_multi_line_sequences_in_order(write):
    path = write(">a first one \nMKV\nLA\n\n>b\nAC\n>c\tx\nW")
    assert list(read_records(path)) == [
        Record("a", "first one", "MKVLA", line=1),
        Record("b", "", "AC", line=5),
        Record("c", "x", "W", line=7),
    ]


def test_reads_several_files_one_after_the_other(write):
    first, second = write(">a\nM\n", "1"), write(">b\nK\n", "2")
    assert [record.id for record in read_records(first, second)] == ["a", "b"]


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("block_bytes", [1, 2, 3, 1 << 20])
def test_every_line_end_and_block_bound_gives_the_same_records(write, monkeypatch, line_end, block_bytes):
    monkeypatch.setattr(SourceBlocks, "block_bytes", block_bytes)
    path = write("\n>a x\nMK\nVL\n>b\nAC\n\n".replace("\n", line_end))
    assert list(read_records(path)) == [Record("a", "x", "MKVL", line=2), Record("b", "", "AC", line=5)]


@pytest.mark.parametrize("block_bytes", [2, 7, 1 << 20])
def test_gzip_is_told_by_content_not_by_name(write, monkeypatch, block_bytes):
    monkeypatch.setattr(SourceBlocks, "block_bytes", block_bytes)
    assert pairs(write(gzip.compress(b">a\nMKV\n", mtime=0))) == [("a", "MKV")]
    assert pairs(write(b">a\nMKV\n", "plain.gz")) == [("a", "MKV")]


@pytest.mark.parametrize("block_bytes", [2, 1 << 20])
def test_gzip_members_are_joined_and_zero_padding_is_ignored(write, monkeypatch, block_bytes):
    monkeypatch.setattr(SourceBlocks, "block_bytes", block_bytes)
    assert pairs(write(gzip.compress(b">a\nMK", mtime=0) + gzip.compress(b"V\n>b\nA\n", mtime=0) + b"\0" * 9)) == [
        ("a", "MKV"),
        ("b", "A"),
    ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-12], "end too early"),
        (lambda data: data[:5], "end too early"),
        (lambda data: data[:-8] + b"\0\0\0\0" + data[-4:], "damaged gzip"),
        (lambda data: data + b"rubbish", "bytes after the end of the gzip data"),
    ],
)
def test_damaged_gzip_is_an_error_even_when_bad_records_are_skipped(write, damage, message):
    path = write(damage(gzip.compress(b">a\nMKVLAAGIVGLP\n>b\nMKW\n", mtime=0)))
    with pytest.raises(ProtlmError, match=message) as caught:
        list(read_records(path, on_bad_record="skip"))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("header", "cluster_size", "taxon_id"),
    [
        ("UniRef100_A0A132N4N1 Protein n=2 Tax=Bacteria TaxID=562 RepID=A_B", 2, 562),
        ("sp|P0A7B8|HSLV_ECOLI ATP OS=Escherichia coli OX=83333 GN=hslV PE=1 SV=2", None, 83333),
        ("tr|W0FSK4|W0FSK4_9FLAV Genome OS=Dengue virus 3 PE=4 SV=1 Split=0 ", None, None),
        ("a n=3", 3, None),
        ("n=3", None, None),
        ("a xn=3 n=3x n= TaxID=", None, None),
        ("a n=99999999999", None, None),
    ],
)
def test_cluster_size_and_taxon_come_from_the_header(write, header, cluster_size, taxon_id):
    (record,) = read_records(write(f">{header}\nM\n"))
    assert (record.cluster_size, record.taxon_id) == (cluster_size, taxon_id)
    assert record.id == header.split()[0]


def test_repairs_are_made_and_counted(write):
    reader = RecordReader([write(">a\nmkv*\n>b\nMJ-A. C\n>c\nMM\n")])
    assert [record.sequence for record in reader] == ["MKV", "MXAC", "MM"]
    assert reader.repairs == {"lower_case": 3, "trailing_stop": 1, "j_to_x": 1, "gap": 2, "white_space": 1}


def test_sources_are_hashed_as_they_lie_on_disk_once_read_to_the_end(write):
    content = gzip.compress(b">a\nMKV\n", mtime=0)
    reader = RecordReader([write(content, "x.gz")])
    assert reader.sources == []
    list(reader)
    assert [(source.name, source.sha256) for source in reader.sources] == [
        ("x.gz", hashlib.sha256(content).hexdigest())
    ]


def test_progress_adds_up_to_the_bytes_on_disk(write, monkeypatch):
    monkeypatch.setattr(SourceBlocks, "block_bytes", 7)
    path = write(">a\nMKVLA\n>b\nMKVLA\n")
    seen = []
    list(RecordReader([path], advance=seen.append))
    assert sum(seen) == path.stat().st_size
    assert len(seen) > 1


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_an_illegal_character_is_placed_by_line_column_and_record(write, line_end):
    path = write("\n>ok\nMK\n>bad one\nMK\nV1L\n>c\nM\n".replace("\n", line_end))
    error = fault(path)
    assert (error.path, error.line, error.reason) == (str(path), 6, "illegal_character")
    assert str(error) == f"{path}:6: record 'bad': illegal character '1' in column 2"


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ("\n\nMKV\n>a\nM\n", 3, "text_above_first_header"),
        ("MKV\n", 1, "text_above_first_header"),
        (">a\nM\n".encode("utf-16"), 1, "text_above_first_header"),
        (b"\x7fELF\x00\x01\n\n", 1, "text_above_first_header"),
        (">a\nM\n>\nM\n", 3, "empty_id"),
        (">a\nM\n> \t\nM\n", 3, "empty_id"),
        (">a\n>b\nM\n", 1, "empty_sequence"),
        (">a\nM\n>b", 3, "empty_sequence"),
        (">a\nM\n>b\n--*\n", 3, "empty_sequence"),
        (b">a caf\xe9\nM\n", 1, "header_not_utf8"),
        (">a\nM*K\n", 2, "illegal_character"),
        (b">a\nM\0K\n", 2, "illegal_character"),
        (">a\nM\nMé\n", 3, "illegal_character"),
    ],
)
@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_a_bad_record_is_an_error_at_its_line(write, monkeypatch, content, line, reason, block_bytes):
    monkeypatch.setattr(SourceBlocks, "block_bytes", block_bytes)
    error = fault(write(content))
    assert (error.line, error.reason) == (line, reason)
    assert "\n" not in str(error)


@pytest.mark.parametrize("content", ["", "\n\n", gzip.compress(b"", mtime=0)])
@pytest.mark.parametrize("on_bad_record", ["error", "skip"])
def test_a_file_without_records_is_an_error(write, content, on_bad_record):
    with pytest.raises(RecordError, match="no records"):
        list(read_records(write(content), on_bad_record=on_bad_record))


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_skipping_leaves_out_bad_records_and_counts_them_by_reason(write, monkeypatch, block_bytes):
    monkeypatch.setattr(SourceBlocks, "block_bytes", block_bytes)
    reader = RecordReader([write("rubbish\nmore\n>a\nM\n>b\nM1\n>c\n>d\nK\n>\nM\n>e\nM2")], on_bad_record="skip")
    assert [(record.id, record.line) for record in reader] == [("a", 3), ("d", 8)]
    assert reader.rejects == {
        "text_above_first_header": 1,
        "illegal_character": 2,
        "empty_sequence": 1,
        "empty_id": 1,
    }
    assert not reader.repairs


def test_a_long_id_is_shown_cut_and_without_control_characters(write):
    message = str(fault(write(">" + "\x1b[31m" + "x" * 10_000 + "\nM1\n")))
    assert len(message) < 500
    assert "\x1b" not in message


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ProtlmError, match=r"absent\.fasta: no such file"):
        list(read_records(tmp_path / "absent.fasta"))


def test_an_unknown_policy_is_refused():
    # Past the type check that only tests have.
    with pytest.raises(ValueError, match="on_bad_record: expected"):
        inspect.unwrap(RecordReader.__init__)(object.__new__(RecordReader), [], on_bad_record="ignore")


@pytest.mark.skipif(not compiled.is_available(), reason=f"the compiled FASTA parser: {compiled.why_not()}")
def test_of_a_thousand_bad_records_only_the_first_takes_python(monkeypatch):
    texts, parse_in_python = [], fasta.parse_fasta
    monkeypatch.setattr(
        fasta, "parse_fasta", lambda path, text, repairs: (texts.append(text), parse_in_python(path, text, repairs))[1]
    )
    bad = b"".join(b">\n>b%d\n>c\n1\n>d \xe9\nM\n" % number for number in range(1000))
    parsed = parse_piece("file", TextPiece("fasta", b"above\n>a\nM\n" + bad, 0, True, True))
    assert texts == [b">"]
    assert parsed.faults.counts == {
        "text_above_first_header": 1, "empty_id": 1000, "empty_sequence": 1000, "illegal_character": 1000,
        "header_not_utf8": 1000,
    }  # fmt: skip
    assert list(parsed.faults.ids)[:7] == ["", "", "b0", "c", "d", "", "b1"]
    assert list(parsed.faults.lines)[:7] == [1, 4, 5, 7, 8, 10, 11]
    assert (str(parsed.faults.first), parsed.faults.first_place) == (
        "file:1: expected FASTA, a line that starts with `>`, got 'above'", 0
    )  # fmt: skip
