from collections import Counter
from pathlib import Path

import pytest

from protlm.data.parsing.marks import without_marks
from protlm.data.parsing.reader import RecordReader, parse_piece, read_records
from protlm.data.parsing.sources import SourceBlocks
from protlm.data.parsing.text_pieces import cut_into_pieces
from protlm.errors import ProtlmError

CASES = Path(__file__).parents[3] / "data" / "cases"
MARK = b"\xef\xbb\xbf"


def read(path, on_bad_record="error"):
    """Returns the ids, lines, repairs and rejects of a file, the same one record at a time and in columns."""
    reader = RecordReader([path], on_bad_record=on_bad_record)
    found = [(record.id, record.line) for record in reader]
    repairs, rejects, in_columns = Counter(), Counter(), []
    for piece in cut_into_pieces(path, SourceBlocks(path)):
        parsed = parse_piece(path, piece)
        in_columns += zip(parsed.table.ids, parsed.table.lines.tolist(), strict=True)
        repairs.update(parsed.table.repairs)
        rejects.update(parsed.faults.counts)
    assert (in_columns, repairs, rejects) == (found, reader.repairs, reader.rejects)
    return found, dict(repairs), dict(rejects)


@pytest.mark.parametrize("on_bad_record", ["error", "skip"])
@pytest.mark.parametrize(
    ("name", "found", "repairs"),
    [
        ("bom_crlf.fasta", [("p1", 1), ("p2", 3)], {"byte_order_mark": 1}),
        ("folder_bom/b.fasta", [("p2", 1)], {"byte_order_mark": 1}),
        ("ctrl_z.fasta", [("p1", 1), ("p2", 3)], {"end_mark": 1}),
        ("semicolon_top.fasta", [("p1", 3)], {"comment_line": 2}),
    ],
)
def test_each_case_loses_no_protein_and_counts_its_mark(name, found, repairs, on_bad_record):
    assert read(CASES / name, on_bad_record) == (found, repairs, {})


@pytest.mark.parametrize(
    ("content", "found", "repairs"),
    [
        (b">a\nMK\n" + MARK + b">b\nMK\n", [("a", 1), ("b", 3)], {"byte_order_mark": 1}),
        (MARK + b";x\r\n>a\r\nMK\r\n" + MARK + b">b\r\nMK\r\n", [("a", 2), ("b", 4)],
         {"byte_order_mark": 2, "comment_line": 1}),
        (MARK + b"\n>a\nMK\n", [("a", 2)], {"byte_order_mark": 1}),
        (MARK + b"#A3M#\n>ss_pred\nCC\n>a\nMK\n", [("a", 4)], {"byte_order_mark": 1}),
        (b">a\nMK\n\x1a>b\nMK\n\x1a\x1a\n\n", [("a", 1), ("b", 3)], {"end_mark": 2}),
        (b">a\nMK\x1a\n>b\nMK\x1a", [("a", 1), ("b", 3)], {"end_mark": 2}),
    ],
)  # fmt: skip
def test_marks_of_joined_files_are_dropped_and_lines_stay(tmp_path, content, found, repairs):
    (tmp_path / "a").write_bytes(content)
    got, made, rejects = read(tmp_path / "a", "skip")
    assert (got, made) == (found, repairs)
    assert set(rejects) <= {"alignment_annotation"}


def test_a_mark_before_a_flat_file_and_before_xml_is_dropped(tmp_path):
    for name in ("made_up.dat", "made_up_uniprot.xml", "made_up_uniref50.xml"):
        data = (CASES.parent / name).read_bytes()
        (tmp_path / name).write_bytes(MARK + data)
        assert list(read_records(tmp_path / name)) == list(read_records(CASES.parent / name))


def test_a_mark_between_files_without_a_final_line_end_does_not_hide_the_loss(tmp_path):
    (tmp_path / "a").write_bytes(b">a\nMK" + MARK + b">b\nMK\n")
    assert read(tmp_path / "a", "skip")[2] == {"missing_line_end": 2}


@pytest.mark.parametrize("text", [b">a\nM\x1aK\n", b">a" + MARK + b"b\nMK\n", b">a\nM" + MARK + b"K\n"])
def test_marks_elsewhere_are_left_to_the_parser(text):
    repairs = Counter()
    assert without_marks(text, repairs) == text
    assert not repairs


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ((CASES / "mmseqs_all_seqs.fasta").read_bytes(), "MMseqs2's FASTA of clusters"),
        (MARK + b">a x\r\n>a y\r\nMK\r\n", "MMseqs2's FASTA of clusters"),
        (b"#58,60\t1,1\n>101\t102\nMKVMKV\n", "an A3M file of several chains"),
        ((CASES / "html_instead.fasta").read_bytes(), "a web page (HTML)"),
        (MARK + b"<!doctype html>\n>a\nMK\n", "a web page (HTML)"),
    ],
)
@pytest.mark.parametrize("on_bad_record", ["error", "skip"])
def test_relatives_of_fasta_are_refused_by_name(tmp_path, content, told, on_bad_record):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ProtlmError, match="a: ") as caught:
        list(read_records(tmp_path / "a", on_bad_record=on_bad_record))
    assert told in str(caught.value)


@pytest.mark.parametrize("content", [b"#58\t1\n>101\nMK\n", b">a\n>b\nMK\n", b">a\n\nMK\n>a\nMK\n"])
def test_a_single_chain_and_an_empty_record_are_no_reason_to_refuse_a_file(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    assert list(read_records(tmp_path / "a", on_bad_record="skip"))
