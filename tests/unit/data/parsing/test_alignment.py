"""Alignments in A3M as programs write them: columns are counted, insertions left out, memory bounded."""

import gzip
import tracemalloc

import pytest

from protlm.data.parsing import alignment
from protlm.data.parsing.alignment import count_alignment
from protlm.errors import ProtlmError
from protlm.vocabulary import RESIDUES


def written(path, content):
    path.write_bytes(content)
    return path


def counted(path):
    """Returns the counts of each column as a mapping."""
    result = count_alignment(path, most_columns=1000)
    return result.query, [
        {letter: int(count) for letter, count in zip(RESIDUES, column, strict=False) if count}
        for column in result.counts
    ]


@pytest.mark.parametrize(
    "content",
    [
        b">q\nMKV\n>a\nM-V\n>b\nXkkKW\n",
        b"\xef\xbb\xbf#A3M#\r\n>q\r\nMK\r\nV\r\n\r\n>a\r\nM-V\r\n>b\r\nX..KW\r\n",
        gzip.compress(b">q\nMKV\n>a\nM-V\n>b\nXKW"),
    ],
    ids=["A3M", "byte order mark, CRLF and folded lines", "gzip"],
)
def test_columns_are_counted_as_they_are_written(content, tmp_path):
    query, columns = counted(written(tmp_path / "a.a3m", content))
    assert query == "MKV"
    assert columns == [{"M": 2}, {"K": 2}, {"V": 2, "W": 1}]


def test_columns_that_the_first_sequence_lacks_are_left_out(tmp_path):
    assert counted(written(tmp_path / "a.fasta", b">q\nM-V\n>a\nMKV\n")) == ("MV", [{"M": 2}, {"V": 2}])


def test_a_sequence_of_many_short_lines_takes_the_memory_of_its_letters(tmp_path):
    content = gzip.compress(b">q\n" + b"AC\n" * 1_000_000)
    path = written(tmp_path / "a.a3m.gz", content)
    tracemalloc.start()
    try:
        assert len(count_alignment(path, most_columns=2_000_000).query) == 2_000_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The counts take 168 bytes a letter.
    assert peak < 2_000_000 * 500


def test_a_first_sequence_longer_than_the_protein_is_refused_before_anything_is_counted(tmp_path):
    path = written(tmp_path / "a.a3m", b">q\nMKV\n>b\nMK\n")
    with pytest.raises(ProtlmError, match=r"a\.a3m:1: the first sequence has 3 residues, and the protein 2"):
        count_alignment(path, most_columns=2)


def test_a_sequence_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(alignment, "_MOST_SEQUENCE_BYTES", 1000)
    for content, message in (
        (b">q\n" + b"A\n" * 1001, "1: a sequence of more than 1,000 bytes"),
        (b">q\n" + b"A" * 1001, "2: a line of more than 1,000 bytes"),
    ):
        with pytest.raises(ProtlmError, match=rf"a\.a3m:{message}"):
            count_alignment(written(tmp_path / "a.a3m", content), most_columns=2000)
