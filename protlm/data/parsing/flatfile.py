"""One protein in the flat file of UniProtKB; Biopython parses only those lines of an entry that a record needs."""

import io
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from protlm.data.parsing.entries import clean_entry, malformed
from protlm.data.records import Record, shown
from protlm.errors import RecordError

# Nine tenths of an entry. Their content changes from release to release, and no record depends on it. Of a line
# Biopython looks at the first two letters alone, and some of these it joins in quadratic time.
_UNUSED_LINES = re.compile(rb"^(?:DT|GN|OG|OC|OH|R[NPCXGATL]|CC|KW|FT|\*\*|PE)[^\n]*\n", re.MULTILINE)
_ACCESSION = re.compile(rb"^AC   ([^;\s]+)", re.MULTILINE)
# An entry may have MAX_RECORD_BYTES: where these begin and end is sought once, one after the other, never together.
_NAME_START = re.compile(r"(?:RecName|SubName): Full=")
_NAME_END = re.compile(r"(?: \{[^{}]*+\})?;")
_FLAGS = "Flags: "
_FRAGMENT = re.compile(r"\b(Fragments?);")
_TAXON_ID = re.compile(r"[0-9]{1,9}")
# Biopython raises any of these for a line that it does not understand; its own errors are ValueErrors.
_SHOWN_LETTERS = 200
_BIOPYTHON_ERRORS = (ValueError, AssertionError, IndexError, KeyError)


def parse_entry(path: str | Path, text: bytes, line: int) -> tuple[Record, Counter[str]]:
    r"""Returns the protein of an entry, and the repairs of its sequence.

    Args:
        path: The file, for messages.
        text: The entry, from `ID` to `//`, with `\n` line ends.
        line: Its line in the file.

    Raises:
        RecordError: An entry that cannot be parsed, lacks its accession or sequence, or is cut short.
    """
    # Imported here, because loading it takes a third as long as everything that reads FASTA.
    from Bio import SwissProt

    accession = _ACCESSION.search(text)
    record_id = accession[1].decode("utf-8", "replace") if accession else ""
    name = f"entry {shown(record_id)}" if record_id else "an entry without accession"
    try:
        used = _UNUSED_LINES.sub(b"", text).decode()
    except UnicodeDecodeError as error:
        message = f"{name} is not UTF-8 text; convert the file"
        raise RecordError(path, line, message, reason="header_not_utf8", record_id=record_id) from error
    try:
        entry: Any = SwissProt.read(io.StringIO(used))  # type: ignore[no-untyped-call]
    except _BIOPYTHON_ERRORS as error:
        # Some messages hold the whole line.
        reason = " ".join(str(error)[:_SHOWN_LETTERS].split()) or type(error).__name__
        message = f"{name} cannot be read as a UniProtKB flat file ({reason})"
        raise malformed(path, line, message, record_id) from error
    if not record_id:
        raise malformed(path, line, name)
    if entry.seqinfo is None:
        raise malformed(path, line, f"{name} has no SQ line", record_id)
    num_residues = len(entry.sequence)
    if entry.sequence:
        for where, declared in (("ID", entry.sequence_length), ("SQ", entry.seqinfo[0])):
            if declared != num_residues:
                message = f"{name}: its sequence has {num_residues} residues, and {declared} by its {where} line"
                raise malformed(path, line, message, record_id)
    residues, repairs = clean_entry(path, line, record_id, entry.sequence)
    taxon_id = next((int(taxon) for taxon in entry.taxonomy_id if _TAXON_ID.fullmatch(taxon)), None)
    record = Record(
        id=record_id,
        description=_description(entry, taxon_id),
        sequence=residues,
        taxon_id=taxon_id,
        line=line,
        families=_families(entry.cross_references),
    )
    return record, repairs


def _description(entry: Any, taxon_id: int | None) -> str:
    # Before 2008 the name was free text.
    full_name = entry.description.rstrip(".")
    start = _NAME_START.search(entry.description)
    if start and (end := _NAME_END.search(entry.description, start.end())):
        full_name = entry.description[start.end() : end.start()] + _fragment(entry.description)
    organism = entry.organism.rstrip(".")
    words = (
        entry.entry_name, full_name, f"OS={organism}" if organism else "", f"OX={taxon_id}" if taxon_id else "",
    )  # fmt: skip
    return " ".join(filter(None, words))


def _fragment(description: str) -> str:
    """Returns the flag of a fragment in brackets, empty for a whole protein; flags stand behind all that has a `=`."""
    for part in description.split("="):
        _, _, flags = part.partition(_FLAGS)
        if flags and (fragment := _FRAGMENT.search(flags)):
            return f" ({fragment[1]})"
    return ""


def _families(references: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    families = [
        reference[1]
        for database in ("Pfam", "InterPro")
        for reference in references
        if len(reference) > 1 and reference[0] == database
    ]
    return tuple(dict.fromkeys(families))
