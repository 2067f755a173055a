"""The FASTA parser in C++: hides how it is called and how its arrays become a table of records."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from protlm import vocabulary
from protlm.data import compiled
from protlm.data.compiled import Integer, Pointer
from protlm.data.parsing.record_table import RecordTable
from protlm.data.records import MAX_RECORD_BYTES
from protlm.data.strings import Strings

REASONS = (
    "empty_id", "header_not_utf8", "oversized", "pir_record", "missing_line_end", "text_in_sequence",
    "illegal_character", "empty_sequence",
)  # fmt: skip
"""The reasons why a record cannot be used, in the order of `Reason` in C++; those of `fasta.parse_fasta`."""
_NOT_UTF8 = (REASONS.index("header_not_utf8"), REASONS.index("missing_line_end"))
_RULES = (*vocabulary.REPAIRS, "comment_line")


class _Sizes(ctypes.Structure):
    """The C++ struct `FastaSizes`."""

    _fields_ = [
        (name, Integer)
        for name in ("num_records", "header_bytes", "longest_record", "num_glued_headers", "glued_header_bytes")
    ]


class _Columns(ctypes.Structure):
    """The C++ struct `FastaColumns`."""

    _fields_ = [
        *((name, Pointer) for name in (
            "letters", "tokens", "offsets", "ids", "id_offsets", "descriptions", "description_offsets",
            "digests", "id_digests", "cluster_size", "taxon_id", "lines", "bad_records",
            "bad_reasons", "bad_ids", "bad_id_offsets",
        )),
        ("repairs", Integer * len(_RULES)),
        ("num_records", Integer),
        ("num_bad_records", Integer),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class BadRecord:
    """The place of a record that cannot be used; `fasta.parse_fasta` gives the error.

    One whose header stands inside the lines of another has the place of that one.

    Attributes:
        start: Its first byte in the text, the `>`.
        end: The byte after its last one; the line end before the next record is left out.
        line: Line of its header in the text, from 1.
        index: Number of good records before it.
    """

    start: int
    end: int
    line: int
    index: int


class BadRecords(Sequence[BadRecord]):
    """Bad records, made on access, because all records of a file may be bad.

    Attributes:
        lines: Line of each fault in the text, from 1, int64.
        reasons: Numbers of `REASONS`, uint8.
        ids: Ids, empty where a record has none; what is not UTF-8 is replaced as Python does it.
    """

    def __init__(self, rows: np.ndarray, reasons: np.ndarray, ids: Strings) -> None:
        self.lines = rows[:, 4]
        self.reasons = reasons
        self.ids = _in_utf8(ids) if np.isin(reasons, _NOT_UTF8).any() else ids
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return BadRecord(*self._rows[index, :4].tolist())


def _in_utf8(ids: Strings) -> Strings:
    return Strings.of(text.decode("utf-8", "replace") for text in ids.encoded())


def parse_fasta(text: bytes) -> tuple[RecordTable, BadRecords]:
    r"""Returns the good records of a text as columns, and the places of the bad ones.

    Args:
        text: Whole records, from a `>` on; `\n` line ends only.

    Raises:
        ValueError: The text does not start with `>`.
        RuntimeError: The compiled parser is not available.
    """
    if not text.startswith(b">"):
        raise ValueError(f"text: expected FASTA from a `>` on, got {text[:20]!r}")
    library = compiled.library()
    sizes = _Sizes()
    library.protlm_measure_fasta(text, len(text), ctypes.byref(sizes))
    arrays = _room_for(sizes, len(text))
    columns = _Columns(**{name: array.ctypes.data for name, array in arrays.items()})
    library.protlm_parse_fasta(text, len(text), MAX_RECORD_BYTES, ctypes.byref(columns))
    return _table(arrays, columns), _bad_records(arrays, columns.num_bad_records)


def _room_for(sizes: _Sizes, num_bytes: int) -> dict[str, np.ndarray]:
    """Returns an array for each pointer of `_Columns`; pages that are never written take no memory."""
    records, header_bytes = sizes.num_records, sizes.header_bytes
    # A header inside a line takes a second record with it.
    bad_records, bad_bytes = records + sizes.num_glued_headers, header_bytes + sizes.glued_header_bytes
    return {
        "letters": np.empty(sizes.longest_record, dtype=np.uint8),
        "tokens": np.empty(num_bytes - header_bytes, dtype=np.uint8),
        "offsets": np.empty(records + 1, dtype=np.int64),
        "ids": np.empty(header_bytes, dtype=np.uint8),
        "id_offsets": np.empty(records + 1, dtype=np.int64),
        "descriptions": np.empty(header_bytes, dtype=np.uint8),
        "description_offsets": np.empty(records + 1, dtype=np.int64),
        "digests": np.empty((records, 2), dtype=np.uint64),
        "id_digests": np.empty((records, 2), dtype=np.uint64),
        "cluster_size": np.empty(records, dtype=np.int32),
        "taxon_id": np.empty(records, dtype=np.int32),
        "lines": np.empty(records, dtype=np.int64),
        "bad_records": np.empty((bad_records, 5), dtype=np.int64),
        "bad_reasons": np.empty(bad_records, dtype=np.uint8),
        "bad_ids": np.empty(bad_bytes, dtype=np.uint8),
        "bad_id_offsets": np.empty(bad_records + 1, dtype=np.int64),
    }


def _bad_records(arrays: dict[str, np.ndarray], number: int) -> BadRecords:
    offsets = arrays["bad_id_offsets"][: number + 1].copy()
    ids = Strings(arrays["bad_ids"][: offsets[-1]].copy(), offsets)
    return BadRecords(arrays["bad_records"][:number].copy(), arrays["bad_reasons"][:number].copy(), ids)


def _table(arrays: dict[str, np.ndarray], columns: _Columns) -> RecordTable:
    rows, bounds = slice(columns.num_records), slice(columns.num_records + 1)
    offsets, ids, descriptions = (arrays[name][bounds] for name in ("offsets", "id_offsets", "description_offsets"))
    return RecordTable(
        tokens=arrays["tokens"][: offsets[-1]],
        offsets=offsets,
        ids=Strings(arrays["ids"][: ids[-1]], ids),
        descriptions=Strings(arrays["descriptions"][: descriptions[-1]], descriptions),
        digests=arrays["digests"][rows],
        id_digests=arrays["id_digests"][rows],
        cluster_size=arrays["cluster_size"][rows],
        taxon_id=arrays["taxon_id"][rows],
        lines=arrays["lines"][rows],
        repairs={rule: count for rule, count in zip(_RULES, columns.repairs, strict=True) if count},
    )
