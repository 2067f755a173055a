"""The compiled FASTA parser against its twin in Python: every column, every repair, every bad record, every digest."""

import ctypes
import dataclasses
import gzip
import hashlib
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from protlm.data import compiled
from protlm.data.parsing import compiled_fasta, fasta
from protlm.data.parsing.compiled_fasta import parse_fasta
from protlm.data.parsing.record_table import RecordTable, table_of
from protlm.data.records import Record
from protlm.data.strings import Strings
from protlm.errors import RecordError

needs_compiled_parser = pytest.mark.skipif(
    not compiled.is_available(), reason=f"the compiled FASTA parser: {compiled.why_not()}"
)

FRAGMENTS = [
    b">", b"\n", b"\n", b"\n>", b"\n>", b"\n>id ", b" ", b"\t", b"\v", b"\f", b"*", b"**", b"-", b".", b"ACDEFGHIKL",
    b"MNPQ", b"lmx", b"J", b"j", b"BXZUO", b"7", b"n=12", b"n=", b" n=123456789 ", b" n=1234567890", b"TaxID=",
    b" TaxID=9606", b"OX=", b" OX=10", b" n=5x", b"=", "é\u00a0".encode(), b"\0", b"\x1c", b"_", b"@", b"[", b"`", b"{",
    b"\n*", b"\n;", b"MK>id ", b"P1;", b" Not found", b"Error", b"\nnan\n", b"\nLysozyme\n", b"MetLysValLeu", b" ALA",
    b"<p", b"{\"", b"mkvllaaggs ", b"W" * 250, b"\xe9", b"\xc3", b"\xa9", b"\xed\xa0\x80",
]  # fmt: skip

HAND_CASES = [
    b">",
    b">\n",
    b">\n>",
    b">a",
    b">a\n",
    b">a\nMK",
    b">a\nMK\n",
    b">a\nMK\n\n\n>b\nM\n",
    b">a\n>b\nM\n>",
    b">a\n\n\n>b\n\nM",
    b"> a b\nM",
    b"> \t\v\f\nM\n>b\nK",
    b">a \t description with a tail \t \nM",
    b">a>b >c\nM>K\n>d\nM",
    b">>a\nM",
    b">a\nMK*>b c\nMKV>d>e\n;x>f\nM\n>g\nM",
    b">a\n;x\nMK\n;y\nV7\n>b\nMK.\n>c\nM.K.\n>d\n;x\n>e\nMK;\n",
    b">P1;a\nM\n>P1\nM\n>N3;\nM\n>XX\nM",
    b">a\nMK\nSequence unavailable\n>b\nnan\n>c\nN.A.\n>d\nnan*\n>e\nLysozyme\nMKVLLAGGTS\n>f\nMet Lys Val\nM\n",
    b">a\nM K\n L\t\v\fM \n",
    b">a\nmkJj-.x*\n",
    b">a\nMK*\n- .\n\n",
    b">a\nM*K\n>b\nMK**\n>c\n*\n>d\n-. \n>e\n*K\n",
    b">a\nMK7\n>b\nM\xc3\xa9\n>c\nM\0K\n>d\nM\n",
    b">a\nM[K\n>b\nM{K\n>c\nM@K\n>d\nM`K\n",
    b">a n=3 n=4 TaxID=5 OX=6\nM",
    b">a OX=6 TaxID=5\nM",
    b">a n=1234567890 n=7\nM",
    b">a n=999999999 OX=000000001\nM",
    b">a n=3x n= xn=4 =n=5 n=-6 n=+7 TaxID= OX=8.\nM",
    b">a\tn=3\vOX=4\f\nM",
    b">n=3 TaxID=x\nM\n>OX=3\nM",
    b">a n=3\nM\n>b\nM\n>c OX=3\nM",
    b">a N=3 taxid=4 ox=5 GN=n=6 TaxIDOX=7\nM",
    "> Ägg\u00a0x beskrivning\u00a0\u2003\nM".encode(),
    b">long\n" + b"ACDEFGHIKLMNPQRSTVWYBXZUO" * 5000,
    b">long\n" + b"ACDEFGHIKL\n" * 5000 + b"*\n",
    b"\n".join(b">r%d d\n%s" % (i, b"ACDEFGHIKLMNPQRSTVWY"[: i % 20] * i) for i in range(300)),
]


def twin(text: bytes) -> tuple[RecordTable, list[tuple[int, RecordError]]]:
    """Parses in Python: the table, and of each bad record how many good ones stand before it and its error."""
    repairs: Counter[str] = Counter()
    records: list[Record] = []
    bad: list[tuple[int, RecordError]] = []
    for record in fasta.parse_fasta("file", text, repairs):
        if isinstance(record, Record):
            records.append(record)
        else:
            bad.append((len(records), record))
    return table_of(records, repairs), bad


def assert_same(actual, expected, name):
    if isinstance(expected, np.ndarray):
        assert actual.dtype == expected.dtype, name
        np.testing.assert_array_equal(actual, expected, err_msg=name)
    elif isinstance(expected, Strings):
        assert_same(actual.text, expected.text, f"{name}.text")
        assert_same(actual.offsets, expected.offsets, f"{name}.offsets")
    else:
        assert actual == expected, name


def assert_as_twin(text):
    table, bad_records = parse_fasta(text)
    expected_table, expected_bad = twin(text)
    for field in dataclasses.fields(RecordTable):
        assert_same(getattr(table, field.name), getattr(expected_table, field.name), field.name)
    assert [bad.index for bad in bad_records] == [index for index, _ in expected_bad]
    for bad, (_, error) in zip(bad_records, expected_bad, strict=True):
        # More than one where the headers of others stand inside its lines.
        explained = fasta.parse_fasta("file", text[bad.start : bad.end], Counter())
        moved = [one.moved(bad.line - 1) for one in explained]
        assert (str(error), error.reason, error.record_id) in [(str(m), m.reason, m.record_id) for m in moved]
    expected = [(error.line, error.reason, error.record_id) for _, error in expected_bad]
    reasons = [compiled_fasta.REASONS[code] for code in bad_records.reasons]
    assert list(zip(bad_records.lines, reasons, bad_records.ids, strict=True)) == expected


@needs_compiled_parser
@pytest.mark.parametrize("text", HAND_CASES, ids=lambda text: repr(text[:40]))
def test_a_text_by_hand_gives_what_the_twin_gives(text):
    assert_as_twin(text)


@needs_compiled_parser
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=40).map(lambda parts: b">" + b"".join(parts)))
@example(b">a\nM\n>b\nK")
def test_any_text_gives_what_the_twin_gives(text):
    assert_as_twin(text)


@needs_compiled_parser
@given(st.lists(st.text(alphabet=[chr(c) for c in range(128) if c != 13], max_size=60), min_size=1, max_size=6))
def test_any_ascii_records_give_what_the_twin_gives(parts):
    assert_as_twin(b">" + "\n>id ".join(parts).encode())


@needs_compiled_parser
@pytest.mark.parametrize("byte", [byte for byte in range(256) if byte not in b"\r\n"])
def test_every_byte_in_a_sequence_is_treated_as_by_the_twin(byte):
    letter = bytes([byte])
    assert_as_twin(b">a\nMK" + letter + b"L\n>b\n" + letter + b"\n>c\nMK" + letter + b"\n")


@needs_compiled_parser
def test_a_header_is_utf8_where_python_says_so():
    edges = [0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE,
             0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF]  # fmt: skip
    endings = [bytes(tail) for size in range(4) for tail in product(edges, repeat=size)]
    assert_as_twin(
        b"".join(b">a %c%s\nM\n" % (first, ending) for first in (0x61, *range(0xC0, 0x100)) for ending in endings[:700])
    )
    assert_as_twin(
        b"".join(b">a" + bytes([first]) + ending + b"\nM\n" for first in (0xE0, 0xED, 0xF0, 0xF4) for ending in endings)
    )


@needs_compiled_parser
@pytest.mark.parametrize(
    "name",
    [
        "swissprot_sample.fasta.gz",
        "pfam_sample.fasta.gz",
        "families/train.fasta.gz",
        "swissprot/test_random_5k.fasta.gz",
        "swissprot/ood_pfam24.fasta.gz",
        "uniref/uniref100_sample14k.fasta.gz",
        "uniref/uniref90_jackhmmer_hits.fasta.gz",
    ],
)
def test_real_files_give_what_the_twin_gives(protein_file, name):
    text = gzip.decompress(protein_file(name).read_bytes())
    assert_as_twin(text)
    assert len(parse_fasta(text)[0]) == text.count(b"\n>") + 1


@needs_compiled_parser
def test_a_record_that_is_too_long_is_left_to_the_twin(monkeypatch):
    for module in (fasta, compiled_fasta):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 20)
    assert_as_twin(b">a\n" + b"M" * 18 + b"\n>b\n" + b"M" * 19 + b"\n>c\n" + b"M" * 17 + b"\n")
    assert len(parse_fasta(b">a\n" + b"M" * 19 + b"\n>b\nM")[1]) == 1


@needs_compiled_parser
def test_repairs_of_a_bad_record_are_not_counted():
    table, bad_records = parse_fasta(b">a\nmk7-j*\n>b\nmk-\n")
    assert len(bad_records) == 1
    assert table.repairs == {"lower_case": 2, "gap": 1}


@needs_compiled_parser
def test_a_bad_record_is_pointed_at_without_the_line_end_before_the_next_one():
    text = b">a\nM\n>b\nM7\n\n>c\nM\n>d"
    _, bad_records = parse_fasta(text)
    assert [text[bad.start : bad.end] for bad in bad_records] == [b">b\nM7\n", b">d"]
    assert [(bad.line, bad.index) for bad in bad_records] == [(3, 1), (8, 2)]


@needs_compiled_parser
def test_a_digest_is_that_of_xxhash_at_every_length_and_alignment():
    digest = compiled.library().protlm_digest
    digest.restype, digest.argtypes = None, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    content = np.random.default_rng(0).integers(0, 256, size=(1 << 20) + 64, dtype=np.uint8)
    halves = np.zeros(2, dtype=np.uint64)
    for length in (*range(1101), 2047, 2048, 2049, 3073, 65536, (1 << 20) - 1, 1 << 20):
        for start in range(9):
            digest(content.ctypes.data + start, length, halves.ctypes.data)
            expected = xxhash.xxh3_128_intdigest(content[start : start + length].tobytes())
            assert (int(halves[0]) << 64) | int(halves[1]) == expected, (length, start)


def test_the_header_of_xxhash_is_the_released_one():
    content = (Path(fasta.__file__).parent / "xxhash.h").read_bytes()
    # As in version 0.8.2, tag v0.8.2 of its repository.
    assert hashlib.sha256(content).hexdigest() == "be275e9db21a503c37f24683cdb4908f2370a3e35ab96e02c4ea73dc8e399c43"


@needs_compiled_parser
def test_a_text_that_is_no_fasta_breaks_the_contract():
    for text in (b"", b"MK\n>a\nM", b"\n>a\nM"):
        with pytest.raises(ValueError, match="text: expected FASTA"):
            parse_fasta(text)
