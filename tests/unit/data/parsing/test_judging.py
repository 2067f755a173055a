"""What is no sequence though its letters are residues: both FASTA parsers tell it, with the line and the reason."""

import gzip
import re
from collections import Counter
from pathlib import Path

import pytest

from protlm.data import compiled
from protlm.data.parsing import compiled_fasta, fasta, judging
from protlm.data.parsing.reader import RecordReader, read_records
from protlm.data.records import Record
from protlm.errors import RecordError

CASES = Path(__file__).parents[3] / "data" / "cases"
SEQUENCE = "MADEKLVTGNWRSPQHICFY" * 3


def parsed(text):
    """Returns the sequences and the faults of a text, the same from both parsers."""
    repairs = Counter()
    records = list(fasta.parse_fasta("file", text.encode(), repairs))
    sequences = [record.sequence for record in records if isinstance(record, Record)]
    faults = [(fault.line, fault.record_id, fault.reason) for fault in records if isinstance(fault, RecordError)]
    if compiled.is_available():
        table, bad = compiled_fasta.parse_fasta(text.encode())
        reasons = [compiled_fasta.REASONS[number] for number in bad.reasons]
        assert list(zip(bad.lines.tolist(), bad.ids, reasons, strict=True)) == faults
        assert table.offsets.tolist()[1:] == [sum(map(len, sequences[: n + 1])) for n in range(len(sequences))]
        assert table.repairs == repairs
    return sequences, faults


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("Sequence unavailable", 2),
        ("SEQUENCE UNAVAILABLE", 2),
        ("No sequence", 2),
        ("nan", 2),
        ("None", 2),
        ("NULL", 2),
        ("NA", 2),
        ("N.A.", 2),
        ("todo", 2),
        ("No data", 2),
        ("\nunknown", 3),
        ("see note below", 2),
        ("Not found", 2),
        ("Lysozyme", 2),
        (f"Lysozyme C\n{SEQUENCE}", 2),
        (f"lysozyme\n{SEQUENCE}", 2),
        (f"{SEQUENCE}\nInternal Server Error", 3),
        (f"{SEQUENCE}\nError 503: try it again, or mail help@example.org", 3),
        (f"{SEQUENCE}\nthis part is not yet sure\n{SEQUENCE}", 3),
        (f"{SEQUENCE}\n<html><body>Not found</body></html>", 3),
        (f'{SEQUENCE}\n{{"messages": ["gone"]}}', 3),
        ("MetLysValLeuAlaGly", 2),
        ("Met-Lys-Val-Leu-Ala", 2),
        ("MET LYS VAL LEU", 2),
    ],
)
def test_text_is_no_sequence_and_is_found_on_its_line(body, line):
    assert parsed(f">a\n{body}\n>b\nMKV\n") == (["MKV"], [(line, "a", "text_in_sequence")])


@pytest.mark.parametrize(
    "body",
    [
        SEQUENCE.lower(),
        "MKVlla",
        "mkvllaMKV",
        "MKV LLA\nAG",
        " ".join("mkvlla"),
        "mkvllaaggs mkvllaaggs mkvll",
        "mkvllaaggs mkvll",
        "MKVLLaaggs MKVLLaaggs\nmkv",
        "Mkvllaaggspmkvllaaggspmkvllaaggsp\nmkvllaaggsp",
        "m-k.vLLA-",
        "M\tK",
        "ALAGLY",
        "THESEARERESIDUES",
        "MKV NA",
        "NA--G",
    ],
)
def test_sequences_in_lower_case_in_blocks_and_with_gaps_stay_sequences(body):
    (sequence,), faults = parsed(f">a\n{body}\n")
    assert sequence == "".join(filter(str.isalpha, body)).upper()
    assert not faults


def test_numbers_beside_blocks_of_residues_are_illegal_characters_and_no_text():
    body = "        1 mkvllaaggs mkvllaaggs\n       21 mkvllaaggs"
    assert parsed(f">a\n{body}\n") == ([], [(2, "a", "illegal_character")])


@pytest.mark.parametrize(
    ("text", "sequences", "lost"),
    [
        (">a\nMKV>b\nMKA\n>c\nMK\n", ["MK"], [(2, "a"), (2, "b")]),
        (">a\nMKV*>b some words here\nMKA\n", [], [(2, "a"), (2, "b")]),
        (">a\nMK\nmkv-.*>b\nMKA>c|x d\nMKL>d\n", [], [(3, "a"), (3, "b"), (4, "c|x"), (5, "d")]),
        (">a\nMKV>é x\nMKA\n>c\nMK\n", ["MK"], [(2, "a"), (2, "é")]),
    ],
)
def test_a_header_inside_a_line_takes_both_of_its_records_along(text, sequences, lost):
    assert parsed(text) == (sequences, [(line, name, "missing_line_end") for line, name in lost])


@pytest.mark.parametrize("body", ["MKV> b", "MKV>", "MK1>b", " >b", "->"])
def test_other_marks_inside_a_line_are_illegal_characters(body):
    assert parsed(f">a\n{body}\n") == ([], [(2, "a", "illegal_character")])


@pytest.mark.parametrize(
    ("body", "sequence", "repairs"),
    [
        (";by hand\nMKV\n;more\nLLA", "MKVLLA", {"comment_line": 2}),
        (";\nmkv*\n;end", "MKV", {"comment_line": 2, "lower_case": 3, "trailing_stop": 1}),
        ("MKV.", "MKV", {"trailing_stop": 1}),
        ("MKV\n.\n", "MKV", {"trailing_stop": 1}),
        ("MK.V.", "MKV", {"gap": 2}),
        ("MKV.*", "MKV", {"gap": 1, "trailing_stop": 1}),
        ("MKV-", "MKV", {"gap": 1}),
    ],
)
def test_comment_lines_and_a_point_as_a_stop_are_dropped_and_counted(tmp_path, body, sequence, repairs):
    assert parsed(f">a\n{body}\n") == ([sequence], [])
    (tmp_path / "a").write_text(f">a\n{body}\n")
    reader = RecordReader([tmp_path / "a"])
    assert [record.sequence for record in reader] == [sequence]
    assert reader.repairs == repairs


@pytest.mark.parametrize("record_id", ["P1;AAA", "F1;x", "DL;x"])
def test_records_of_pir_are_refused_by_the_name_of_their_format(record_id):
    _, faults = parsed(f">{record_id}\nlysozyme\n{SEQUENCE}*\n>P1\nMKV\n>P1:x;y\nMKV\n")
    assert faults == [(1, record_id, "pir_record")]


def fault(path):
    with pytest.raises(RecordError) as caught:
        list(read_records(path))
    return caught.value


def test_a_download_that_ends_in_a_sentence_is_told_as_cut():
    error = fault(CASES / "uniprot_stream_error.fasta")
    assert (error.line, error.reason, error.record_id) == (8, "text_in_sequence", "sp|P00002|B_TEST")
    assert "ends in the text 'Error encountered when streaming data. Please try again late" in str(error)
    assert "the file is cut short; download it again" in str(error)


@pytest.mark.parametrize(
    ("name", "line", "told"),
    [
        ("pir_two.pir", 1, "record 'P1;AAA' is of the PIR format"),
        ("glued_star.fasta", 2, "the header of 'EP2_P000001' stands inside its line"),
        ("no_final_newline_cat.fasta", 2, "a line end is missing before `>`"),
    ],
)
def test_each_case_is_told_by_what_it_is(name, line, told):
    error = fault(CASES / name)
    assert error.line == line
    assert told in str(error)


@pytest.mark.parametrize(
    ("name", "kept", "rejects"),
    [
        ("uniprot_stream_error.fasta", 1, {"text_in_sequence": 1}),
        ("pir_two.pir", 0, {"pir_record": 2}),
        ("glued_star.fasta", 1, {"missing_line_end": 2}),
        ("no_final_newline_cat.fasta", 0, {"missing_line_end": 2}),
    ],
)
def test_what_is_skipped_is_counted_by_what_it_is(name, kept, rejects):
    reader = RecordReader([CASES / name], on_bad_record="skip")
    assert len(list(reader)) == kept
    assert reader.rejects == rejects


def test_a_lone_stop_is_told(tmp_path):
    (tmp_path / "a").write_text(">a\n*\n")
    assert "record 'a' has only a stop, and no sequence" in str(fault(tmp_path / "a"))


def test_both_parsers_know_the_same_words():
    """Every list of words is in Python and in C++, and each word is seen by both."""
    header = (Path(judging.__file__).parent / "judging.h").read_text()
    for name, words in (
        ("kPlaceholders", judging.PLACEHOLDERS),
        ("kTellingWords", judging._TELLING_WORDS),
        ("kResidueNames", judging._RESIDUE_NAMES),
    ):
        listed = re.search(rf"{name}\[\] =(.*?);", header, re.DOTALL)[1]
        assert {word.encode() for word in re.findall("[A-Z]+", listed)} == words
    for word in judging.PLACEHOLDERS:
        assert parsed(f">a\n{word.decode().lower()}\n") == ([], [(2, "a", "text_in_sequence")])
    for word in judging._TELLING_WORDS:
        assert parsed(f">a\nMKV\nMKV {word.decode()}\n") == ([], [(3, "a", "text_in_sequence")])


def test_no_real_protein_is_taken_for_text(protein_file):
    """The same with its letters in lower case and in blocks of ten."""
    for name in ("swissprot_sample.fasta.gz", "pfam_sample.fasta.gz"):
        text = gzip.decompress(protein_file(name).read_bytes()).decode()
        for record in text.split(">")[1:]:
            header, *lines = record.split("\n")
            sequence = "".join(lines)
            blocks = " ".join(sequence[start : start + 10] for start in range(0, len(sequence), 10))
            for body in (sequence, sequence.lower(), blocks, blocks.lower(), sequence[:9] + sequence[9:].lower()):
                assert not parsed(f">{header}\n{body}\n")[1]
