"""One protein in the XML of UniProtKB: which elements of an entry become its record."""

import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from protlm.data.parsing.entries import malformed
from protlm.data.parsing.xml_text import number_of, parse_tree, residues_of, text_of
from protlm.data.records import Record

_FRAGMENTS = {"single": " (Fragment)", "multiple": " (Fragments)"}


def parse_entry(path: str | Path, text: bytes, line: int) -> tuple[Record, Counter[str]]:
    """Returns the protein of a UniProtKB entry, and the repairs of its sequence.

    Args:
        path: The file, for messages.
        text: The entry, from `<entry` to `</entry>`.
        line: Its line in the file.

    Raises:
        RecordError: An entry that is not well-formed, or lacks its accession or sequence.
    """
    entry = parse_tree(path, text, line)
    record_id = text_of(entry, "{*}accession")
    if not record_id:
        raise malformed(path, line, "a UniProtKB entry without <accession>")
    sequence = entry.find("{*}sequence")
    names = ("recommendedName/{*}fullName", "submittedName/{*}fullName", "alternativeName/{*}fullName", "name")
    full_name = next(filter(None, (text_of(entry, f"{{*}}protein/{{*}}{name}") for name in names)), "")
    if sequence is not None:
        full_name += _FRAGMENTS.get(sequence.get("fragment", ""), "")
    organism_name, taxon_id = "", None
    if (organism := entry.find("{*}organism")) is not None:
        organism_name = text_of(organism, "{*}name[@type='scientific']")
        taxon_id = next((number_of(taxon) for taxon in _references(organism, "NCBI Taxonomy")), None)
    families = (family for database in ("Pfam", "InterPro") for family in _references(entry, database))
    description = (
        text_of(entry, "{*}name"), full_name, f"OS={organism_name}" if organism_name else "",
        f"OX={taxon_id}" if taxon_id else "",
    )  # fmt: skip
    residues, repairs = residues_of(path, line, record_id, sequence)
    record = Record(
        id=record_id,
        description=" ".join(filter(None, description)),
        sequence=residues,
        taxon_id=taxon_id,
        line=line,
        families=tuple(dict.fromkeys(filter(None, families))),
    )
    return record, repairs


def _references(element: ET.Element, database: str) -> list[str]:
    """Returns the ids that an element gives for a database, in order; empty where a reference lacks its id."""
    references = element.findall("{*}dbReference")
    return [reference.get("id", "") for reference in references if reference.get("type") == database]
