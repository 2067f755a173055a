"""The reference file of ProteinGym: which protein and function each assay is of."""

import math
from dataclasses import dataclass
from pathlib import Path

from protlm import vocabulary
from protlm.data.parsing.tables import Table
from protlm.data.records import shown
from protlm.errors import RecordError

_FILE, _PROTEIN, _FUNCTION = "DMS_filename", "UniProt_ID", "coarse_selection_type"
_TARGET, _THRESHOLD = "target_seq", "DMS_binarization_cutoff"


@dataclass(frozen=True)
class ReferenceRow:
    """What the reference file says of an assay.

    Attributes:
        protein: Name of the protein, by which assays of one protein are averaged.
        function: The type of function that was measured.
        target: The residues of the wild type; None if it does not say.
        threshold: Measurements above it count as fit; None if it does not say.
    """

    protein: str
    function: str
    target: str | None
    threshold: float | None


def read_reference(path: Path) -> dict[str, ReferenceRow]:
    """Returns the rows of a reference file by the name of the assay's file.

    Raises:
        ProtlmError: A file that cannot be read, lacks a column that the benchmark's rule needs, or has a wrong value.
    """
    table = Table(path)
    file, protein, function = map(table.required, (_FILE, _PROTEIN, _FUNCTION))
    target, threshold = map(table.place, (_TARGET, _THRESHOLD))
    rows: dict[str, ReferenceRow] = {}
    for line, fields in table:
        table.check_width(line, fields)
        if fields[file] in rows:
            raise RecordError(path, line, f"expected each {_FILE} once, got {shown(fields[file])} again")
        if not fields[function].strip() or not fields[protein].strip():
            raise RecordError(path, line, f"expected a {_PROTEIN} and a {_FUNCTION}, got an empty field")
        rows[fields[file]] = ReferenceRow(
            protein=fields[protein].strip(),
            function=fields[function].strip(),
            target=None if target is None else _target(path, line, fields[target]),
            threshold=None if threshold is None else _threshold(path, line, fields[threshold]),
        )
    return rows


def _target(path: Path, line: int, text: str) -> str | None:
    try:
        residues, _ = vocabulary.clean(text.strip().encode())
    except ValueError as error:
        raise RecordError(path, line, f"{_TARGET}: {error}") from None  # now with file and line
    return residues.decode() or None


def _threshold(path: Path, line: int, text: str) -> float | None:
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan  # refused below
    if not math.isfinite(value):
        raise RecordError(path, line, f"{_THRESHOLD}: expected a number, got {shown(text)}")
    return value
