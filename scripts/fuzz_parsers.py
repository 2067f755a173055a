"""Feeds the parsers texts that a fuzzer makes up, for a given time; run by hand, after `pip install atheris`.

From any text a parser may only return records with an id and clean residues, or raise an error of its own; and the
compiled FASTA parser must return the records of its twin in Python. A text that breaks this is written to `crash-…`.

    python scripts/fuzz_parsers.py --seconds 60
"""

import argparse
import contextlib
import dataclasses
import sys
from collections import Counter
from pathlib import Path

import atheris

# Run as a file, Python looks for imports beside it, not in the folder that holds the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

with atheris.instrument_imports(include=["protlm"]):
    import numpy as np

    from protlm import vocabulary
    from protlm.data import compiled
    from protlm.data.parsing import compiled_fasta, fasta, reader, text_pieces
    from protlm.data.parsing.marks import without_marks
    from protlm.data.parsing.record_table import RecordTable, table_of
    from protlm.errors import ProtlmError, RecordError

SEEDS = (
    b">sp|P1|A_B name n=2 OX=9606\nMKVLA-a*\n>b\nMJ.X\n",
    b"\xef\xbb\xbf;top\n>a\nMKV>b c\nNot found here\n\xef\xbb\xbf>P1;d\nMK.\n;x\n\x1a\n>e\nMet Lys Val\n>f\nnan\n",
    b"#A3M#\n>ss_pred\nCCH\n>q\nMK-v\n",
    b"ID   A_B  Reviewed;  3 AA.\nAC   P1;\nDE   RecName: Full=X;\nOX   NCBI_TaxID=1;\nDR   Pfam; PF00001; 7tm; 1.\n"
    b"SQ   SEQUENCE   3 AA;  390 MW;  0000000000000000 CRC64;\n     MKV\n//\n",
    b"<uniprot><entry><accession>P1</accession><name>A</name><sequence>MKV</sequence></entry></uniprot>",
    b'<UniRef><entry id="UniRef50_A"><representativeMember><sequence length="3">MKV</sequence></representativeMember>'
    b"</entry></UniRef>",
)
"""Texts to begin with, one of each format."""


def try_one(data: bytes) -> None:
    """Reads a text in small pieces, and as one by both FASTA parsers."""
    half = len(data) // 2
    with contextlib.suppress(ProtlmError):
        for piece in text_pieces.cut_into_pieces("fuzz", iter((data[:half], data[half:])), piece_bytes=64):
            parsed = reader.parse_piece("fuzz", piece)
            check(parsed.table)
            assert all(1 <= line <= parsed.num_lines + 1 for line in parsed.faults.lines)
    text = without_marks(data, Counter())
    if text.startswith(b">") and compiled.is_available() and is_utf8(text):
        compare(text)


def check(table: RecordTable) -> None:
    """Checks the properties of every table."""
    lengths = np.diff(table.offsets)
    assert (lengths > 0).all()
    assert vocabulary.are_residues(table.tokens)
    assert all(table.ids.to_list())


def compare(text: bytes) -> None:
    """Compares the compiled parser with its twin."""
    table, bad_records = compiled_fasta.parse_fasta(text)
    repairs: Counter[str] = Counter()
    records = list(fasta.parse_fasta("fuzz", text, repairs))
    twin = table_of([record for record in records if not isinstance(record, RecordError)], repairs)
    assert len(bad_records) == len(records) - len(twin)
    for field in dataclasses.fields(RecordTable):
        got, expected = getattr(table, field.name), getattr(twin, field.name)
        if isinstance(expected, np.ndarray):
            assert np.array_equal(got, expected), field.name
        elif hasattr(expected, "text"):
            assert got.to_list() == expected.to_list(), field.name
        else:
            assert got == expected, field.name


def is_utf8(text: bytes) -> bool:
    """Returns whether a text is UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def main() -> None:
    """Fuzzes until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, default=Path("fuzz-corpus"), help="folder of texts to begin with")
    arguments = parser.parse_args()
    arguments.corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(SEEDS):
        (arguments.corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup(
        [sys.argv[0], str(arguments.corpus), f"-max_total_time={arguments.seconds}", "-max_len=2000"], try_one
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
