"""How a protein is written in the flat file of UniProtKB; Biopython reads those lines of an entry that are used."""

import io
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from protlm.data.parsing.uniref_xml import clean_entry
from protlm.data.records import Record, shown
from protlm.errors import RecordError

# Nine tenths of an entry. Their content changes with the releases, and no record depends on it.
_UNUSED_LINES = re.compile(rb"^(?:DT|GN|OG|OC|OH|R[NPCXGATL]|CC|KW|FT|\*\*|PE)(?: .*)?\n", re.MULTILINE)
_ACCESSION = re.compile(rb"^AC   ([^;\s]+)", re.MULTILINE)
_FULL_NAME = re.compile(r"(?:RecName|SubName): Full=(.*?)(?: \{[^{}]*\})?;")
_FRAGMENT = re.compile(r"Flags: [^=]*?\b(Fragments?);")
_TAXON_ID = re.compile(r"[0-9]{1,9}")
# What Biopython's reader raises for a line it does not understand; its own errors are ValueErrors.
_BIOPYTHON_ERRORS = (ValueError, AssertionError, IndexError, KeyError)


def parse_entry(path: str | Path, text: bytes, line: int) -> tuple[Record, Counter[str]]:
    r"""Returns the protein of an entry, and the repairs of its sequence.

    Args:
        path: The file, for messages.
        text: The entry, from `ID` to `//`, with `\n` line ends.
        line: Its line in the file.

    Raises:
        RecordError: An entry that cannot be understood, lacks its accession or sequence, or was cut.
    """
    # Only here, because it takes a third as long to load as all else that reads FASTA.
    from Bio import SwissProt

    found_id = _ACCESSION.search(text)
    record_id = found_id[1].decode("utf-8", "replace") if found_id else ""
    name = f"entry {shown(record_id)}" if record_id else "an entry without accession"
    try:
        used = _UNUSED_LINES.sub(b"", text).decode()
    except UnicodeDecodeError as error:
        message = f"{name} is not UTF-8 text; convert the file"
        raise RecordError(path, line, message, reason="header_not_utf8", record_id=record_id) from error
    try:
        entry: Any = SwissProt.read(io.StringIO(used))  # type: ignore[no-untyped-call]
    except _BIOPYTHON_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        message = f"{name} cannot be read as a UniProtKB flat file ({reason})"
        raise _malformed(path, line, message, record_id) from error
    if not record_id:
        raise _malformed(path, line, name, "")
    if entry.seqinfo is None:
        raise _malformed(path, line, f"{name} has no SQ line", record_id)
    num_residues = len(entry.sequence)
    if entry.sequence:
        for where, declared in (("ID", entry.sequence_length), ("SQ", entry.seqinfo[0])):
            if declared != num_residues:
                message = f"{name}: its sequence has {num_residues} residues, and {declared} by its {where} line"
                raise _malformed(path, line, message, record_id)
    residues, repairs = clean_entry(path, line, record_id, entry.sequence)
    taxon_id = next((int(found) for found in entry.taxonomy_id if _TAXON_ID.fullmatch(found)), None)
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
    names = _FULL_NAME.search(entry.description)
    # Before 2008 the name was free text.
    full_name = names[1] if names else entry.description.rstrip(".")
    if names and (fragment := _FRAGMENT.search(entry.description)):
        full_name += f" ({fragment[1]})"
    organism = entry.organism.rstrip(".")
    parts = (
        entry.entry_name, full_name, f"OS={organism}" if organism else "", f"OX={taxon_id}" if taxon_id else "",
    )  # fmt: skip
    return " ".join(filter(None, parts))


def _families(references: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    found = [
        reference[1]
        for database in ("Pfam", "InterPro")
        for reference in references
        if len(reference) > 1 and reference[0] == database
    ]
    return tuple(dict.fromkeys(found))


def _malformed(path: str | Path, line: int, message: str, record_id: str) -> RecordError:
    return RecordError(path, line, message, reason="malformed_entry", record_id=record_id)
