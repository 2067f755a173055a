"""The compiled FASTA parser: hides whether it was built, and how a text crosses into C++ and comes back as columns."""

import ctypes
import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from protlm import vocabulary
from protlm.data.parsing.record_table import RecordTable, Strings
from protlm.data.records import MAX_RECORD_BYTES

_EXTENSION = "protlm.data.parsing._fasta_parser"
# As in fasta_parser.cpp: after an update, a library of before may still lie there.
_VERSION = 1
_COUNTED_TOKENS = 1 << 20

_Pointer = ctypes.c_void_p
_Integer = ctypes.c_int64


class _Sizes(ctypes.Structure):
    """What `FastaSizes` is in C++."""

    _fields_ = [(name, _Integer) for name in ("num_records", "header_bytes", "longest_record")]


class _Columns(ctypes.Structure):
    """What `FastaColumns` is in C++."""

    _fields_ = [
        *((name, _Pointer) for name in (
            "letters", "tokens", "offsets", "ids", "id_offsets", "descriptions", "description_offsets",
            "digests", "id_digests", "cluster_size", "taxon_id", "lines", "bad_records",
        )),
        ("repairs", _Integer * len(vocabulary.REPAIRS)),
        ("num_records", _Integer),
        ("num_bad_records", _Integer),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be used; `fasta.parse_fasta` says why.

    Attributes:
        start: Its first byte in the text, the `>`.
        end: The byte after its last, which leaves out the line end before the next record.
        line: Line of its header in the text, from 1.
        index: Number of good records before it.
    """

    start: int
    end: int
    line: int
    index: int


class BadRecords(Sequence[BadRecord]):
    """Bad records, each made when it is asked for: a bad file may be all of them."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return BadRecord(*self._rows[index].tolist())


def is_available() -> bool:
    """Says whether the compiled parser was built and can be loaded."""
    return why_not() is None


def why_not() -> str | None:
    """Returns why the compiled parser cannot be used, None if it can."""
    found = _load()
    return found if isinstance(found, str) else None


def parse_fasta(text: bytes) -> tuple[RecordTable, BadRecords]:
    r"""Returns the good records of a text as columns, and where the bad ones stand.

    Args:
        text: Whole records, from a `>` on; `\n` line ends only, and headers in UTF-8.

    Raises:
        ValueError: The text does not start with `>`.
        RuntimeError: The compiled parser is not available.
    """
    if not text.startswith(b">"):
        raise ValueError(f"text: expected FASTA from a `>` on, got {text[:20]!r}")
    library = _library()
    sizes = _Sizes()
    library.protlm_measure_fasta(text, len(text), ctypes.byref(sizes))
    arrays = _room_for(sizes, len(text))
    columns = _Columns(**{name: array.ctypes.data for name, array in arrays.items()})
    library.protlm_parse_fasta(text, len(text), MAX_RECORD_BYTES, ctypes.byref(columns))
    bad_records = arrays["bad_records"][: columns.num_bad_records].copy()
    return _table(arrays, columns), BadRecords(bad_records)


def count_residues(tokens: np.ndarray) -> np.ndarray:
    """Returns how often each residue occurs, in token order, int64 of shape (25,); other tokens are not counted.

    Args:
        tokens: Tokens, uint8 of one axis.

    Raises:
        ValueError: An array of another type or rank.
    """
    if tokens.dtype != np.uint8 or tokens.ndim != 1:
        raise ValueError(f"tokens: expected uint8 of one axis, got {tokens.dtype} of shape {tokens.shape}")
    counts = np.zeros(vocabulary.NUM_RESIDUES, dtype=np.int64)
    library = _load()
    if isinstance(library, str):
        residues = slice(vocabulary.FIRST_RESIDUE, vocabulary.FIRST_RESIDUE + vocabulary.NUM_RESIDUES)
        # In pieces, because bincount makes eight bytes of each token.
        for start in range(0, len(tokens), _COUNTED_TOKENS):
            counts += np.bincount(tokens[start : start + _COUNTED_TOKENS], minlength=residues.stop)[residues]
    else:
        tokens = np.ascontiguousarray(tokens)
        library.protlm_count_residues(tokens.ctypes.data, len(tokens), counts.ctypes.data)
    return counts


def _room_for(sizes: _Sizes, num_bytes: int) -> dict[str, np.ndarray]:
    """Returns an array for each pointer of `_Columns`; pages of it that nothing is written to take no memory."""
    records, header_bytes = sizes.num_records, sizes.header_bytes
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
        "bad_records": np.empty((records, 4), dtype=np.int64),
    }


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
        repairs={rule: count for rule, count in zip(vocabulary.REPAIRS, columns.repairs, strict=True) if count},
    )


def _library() -> ctypes.CDLL:
    found = _load()
    if isinstance(found, str):
        raise RuntimeError(f"the compiled FASTA parser is not available: {found}")
    return found


@functools.cache
def _load() -> ctypes.CDLL | str:
    """Returns the library, or why there is none."""
    spec = importlib.util.find_spec(_EXTENSION)
    if spec is None or spec.origin is None:
        return "it was not built; install a C++17 compiler such as g++, then install protlm again"
    try:
        library = ctypes.CDLL(spec.origin)
        version = _function(library, "protlm_fasta_version", _Integer)()
        if version != _VERSION:
            return f"{spec.origin} is of version {version}, not {_VERSION}; install protlm again"
        _function(library, "protlm_measure_fasta", None, ctypes.c_char_p, _Integer, _Pointer)
        _function(library, "protlm_parse_fasta", None, ctypes.c_char_p, _Integer, _Integer, _Pointer)
        _function(library, "protlm_count_residues", None, _Pointer, _Integer, _Pointer)
    except (OSError, AttributeError) as error:
        return f"{spec.origin} cannot be loaded ({error}); install protlm again"
    return library


def _function(library: ctypes.CDLL, name: str, returned: type | None, *arguments: type) -> Callable[..., int]:
    function = getattr(library, name)
    function.restype, function.argtypes = returned, arguments
    return function  # type: ignore[no-any-return]
