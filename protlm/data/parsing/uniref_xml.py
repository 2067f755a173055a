"""How proteins are written in the XML of UniProtKB and of UniRef; a document type definition is never read."""

import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.parsers import expat

from protlm import vocabulary
from protlm.data.records import MAX_RECORD_BYTES, Record, shown
from protlm.errors import ProtlmError, RecordError

UNIREF_ROOTS = ("UniRef", "UniRef100", "UniRef90", "UniRef50")
"""The root elements of UniRef XML: that of the website's files, and those of the release's."""

_PROLOG_PART = re.compile(rb"\s+|<\?.*?\?>|<!--.*?-->", re.DOTALL)
_ROOT = re.compile(rb"<(?:!DOCTYPE\s+)?([A-Za-z_:][^\s/>\[]*)")
_ENCODING = re.compile(rb"""<\?xml\s[^>]*?\bencoding\s*=\s*["']([^"']*)["']""")
# The files of a UniRef release say ISO-8859-1 and hold ASCII; a letter beyond that makes a bad entry.
_ENCODINGS = ("utf-8", "utf8", "us-ascii", "ascii", "iso-8859-1")
_DEFINITIONS = (b"<!DOCTYPE", b"<!ENTITY")
_NUMBER = re.compile(r"[0-9]{1,9}")
_FRAGMENTS = {"single": " (Fragment)", "multiple": " (Fragments)"}


@dataclass(slots=True)
class UnirefCluster:
    """A cluster of a UniRef file by the names of its members, for looking them up.

    Attributes:
        id: Name of the cluster.
        line: Line of its entry in the file.
        num_members: Members, the representative among them.
        names: Names that belong to this cluster alone: its own, and of each member the entry name, the first
            accession, the UniParc id and the UniRef ids of the finer levels.
        secondary: Further accessions of its members; one that was split up stands in several clusters.
    """

    id: str
    line: int
    num_members: int = 0
    names: list[str] = field(default_factory=list)
    secondary: list[str] = field(default_factory=list)


def root_name(head: bytes) -> str:
    """Returns the name of the root element of an XML text, or that in its document type; empty if there is none."""
    found = _ROOT.match(head, _prolog_end(head))
    return found[1].decode("utf-8", "replace") if found else ""


def check_prolog(path: str | Path, head: bytes) -> None:
    """Refuses an XML text for what stands before its root element.

    Args:
        path: The file, for messages.
        head: The first 64 KiB of the text.

    Raises:
        ProtlmError: A document type definition, or an encoding that is neither UTF-8 nor ASCII.
    """
    end = _prolog_end(head)
    if head.startswith(_DEFINITIONS, end):
        raise _definition(path)
    declared = _ENCODING.search(head, 0, end)
    if declared and declared[1].decode("ascii", "replace").lower() not in _ENCODINGS:
        encoding = declared[1].decode("ascii", "replace")
        raise ProtlmError(f"{path}: XML in the encoding {shown(encoding)}; convert the file to UTF-8")


def parse_uniprot_entry(path: str | Path, text: bytes, line: int) -> tuple[Record, Counter[str]]:
    """Returns the protein of a UniProtKB entry, and the repairs of its sequence.

    Args:
        path: The file, for messages.
        text: The entry, from `<entry` to `</entry>`.
        line: Its line in the file.

    Raises:
        RecordError: An entry that is not well-formed, or lacks its accession or sequence.
    """
    entry = _parse(path, text, line)
    record_id = _text(entry, "{*}accession")
    if not record_id:
        raise _malformed(path, line, "a UniProtKB entry without <accession>", "")
    sequence = entry.find("{*}sequence")
    names = ("recommendedName/{*}fullName", "submittedName/{*}fullName", "alternativeName/{*}fullName", "name")
    full_name = next(filter(None, (_text(entry, f"{{*}}protein/{{*}}{name}") for name in names)), "")
    if sequence is not None:
        full_name += _FRAGMENTS.get(sequence.get("fragment", ""), "")
    organism, taxon_id = "", None
    if (found := entry.find("{*}organism")) is not None:
        organism = _text(found, "{*}name[@type='scientific']")
        taxon_id = next((_number(r.get("id")) for r in _references(found) if r.get("type") == "NCBI Taxonomy"), None)
    families = (
        reference.get("id", "")
        for database in ("Pfam", "InterPro")
        for reference in _references(entry)
        if reference.get("type") == database
    )
    description = (
        _text(entry, "{*}name"), full_name, f"OS={organism}" if organism else "", f"OX={taxon_id}" if taxon_id else "",
    )  # fmt: skip
    residues, repairs = _residues(path, line, record_id, sequence)
    record = Record(
        id=record_id,
        description=" ".join(filter(None, description)),
        sequence=residues,
        taxon_id=taxon_id,
        line=line,
        families=tuple(dict.fromkeys(filter(None, families))),
    )
    return record, repairs


def parse_uniref_entry(path: str | Path, text: bytes, line: int) -> tuple[Record, Counter[str]]:
    """Returns the representative of a UniRef cluster as a record named like the cluster, and the repairs.

    Args:
        path: The file, for messages.
        text: The entry, from `<entry` to `</entry>`.
        line: Its line in the file.

    Raises:
        RecordError: An entry that is not well-formed, or lacks its id, representative or sequence.
    """
    entry = _parse(path, text, line)
    record_id = entry.get("id", "").strip()
    if not record_id:
        raise _malformed(path, line, "a UniRef entry without id", "")
    representative = entry.find("{*}representativeMember")
    reference = None if representative is None else representative.find("{*}dbReference")
    if representative is None or reference is None:
        raise _malformed(path, line, f"entry {shown(record_id)} has no representative member", record_id)
    properties = _properties(entry)
    cluster_size = _number(properties.get("member count"))
    if cluster_size is None:
        cluster_size = 1 + len(entry.findall("{*}member"))
    taxon, taxon_id = properties.get("common taxon", ""), _number(properties.get("common taxon ID"))
    name = _text(entry, "{*}name").removeprefix("Cluster:").strip()
    description = (
        name, f"n={cluster_size}", f"Tax={taxon}" if taxon else "", f"TaxID={taxon_id}" if taxon_id else "",
        f"RepID={found}" if (found := reference.get("id")) else "",
    )  # fmt: skip
    residues, repairs = _residues(path, line, record_id, representative.find("{*}sequence"))
    own_id = record_id if record_id.startswith("UniRef50_") else ""
    record = Record(
        id=record_id,
        description=" ".join(filter(None, description)),
        sequence=residues,
        cluster_size=cluster_size,
        taxon_id=taxon_id,
        line=line,
        cluster_id=_properties(reference).get("UniRef50 ID", own_id),
    )
    return record, repairs


def uniref_clusters(path: str | Path, blocks: Iterable[bytes]) -> Iterator[UnirefCluster]:
    """Yields the clusters of a UniRef file, sequences left aside; holds the names of one cluster at a time.

    Args:
        path: The file, for messages.
        blocks: Its uncompressed text.

    Raises:
        RecordError: XML that is not well-formed, with its line; a cluster without id.
        ProtlmError: A document type definition.
    """
    reader = _ClusterReader(path)
    parser = reader.parser
    num_bytes = 0
    try:
        for block in blocks:
            parser.Parse(block, False)
            # The parser holds a tag until it ends.
            num_bytes = 0 if reader.has_moved() else num_bytes + len(block)
            if num_bytes > MAX_RECORD_BYTES:
                message = f"no tag in {MAX_RECORD_BYTES:,} bytes; is this a UniRef file?"
                raise _malformed(path, parser.CurrentLineNumber, message, "")
            yield from reader.take()
        parser.Parse(b"", True)
    except expat.ExpatError as error:
        message = f"the XML is not well-formed ({expat.ErrorString(error.code)}); copy or download the file again"
        raise RecordError(path, error.lineno, message, reason="malformed_entry") from error
    yield from reader.take()


class _ClusterReader:
    """Gathers clusters from the events of a parser; text between tags is not looked at."""

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._done: list[UnirefCluster] = []
        self._cluster: UnirefCluster | None = None
        self._num_accessions = 0
        self._num_tags = 0
        self.parser = expat.ParserCreate(namespace_separator=" ")
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.StartDoctypeDeclHandler = self._refuse

    def has_moved(self) -> bool:
        """Says whether tags were read since the last call."""
        num_tags, self._num_tags = self._num_tags, 0
        return num_tags > 0

    def take(self) -> list[UnirefCluster]:
        """Returns the clusters that ended since the last call."""
        done, self._done = self._done, []
        return done

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self._num_tags += 1
        name = tag.rpartition(" ")[2]
        cluster = self._cluster
        if name == "entry":
            line = self.parser.CurrentLineNumber
            if not (cluster_id := attributes.get("id", "").strip()):
                raise _malformed(self._path, line, "a UniRef entry without id", "")
            self._cluster = UnirefCluster(cluster_id, line, names=[cluster_id])
        elif cluster is not None and name == "dbReference":
            cluster.num_members += 1
            self._num_accessions = 0
            self._add(attributes.get("id", ""))
        elif cluster is not None and name == "property":
            self._property(cluster, attributes.get("type", ""), attributes.get("value", ""))

    def _property(self, cluster: UnirefCluster, kind: str, value: str) -> None:
        if kind == "UniProtKB accession":
            if self._num_accessions:
                cluster.secondary.append(value)
            else:
                self._add(value)
            self._num_accessions += 1
        elif kind == "UniParc ID" or kind in _finer_levels(cluster.id):
            self._add(value)

    def _add(self, name: str) -> None:
        if name and self._cluster is not None:
            self._cluster.names.append(name)

    def _end(self, tag: str) -> None:
        if self._cluster is not None and tag.rpartition(" ")[2] == "entry":
            self._cluster.names = list(dict.fromkeys(self._cluster.names))
            self._done.append(self._cluster)
            self._cluster = None

    def _refuse(self, *_: Any) -> None:
        raise _definition(self._path)


def _finer_levels(cluster_id: str) -> tuple[str, ...]:
    """Returns the properties of a member that name clusters within the given one; coarser ones hold others too."""
    if cluster_id.startswith("UniRef50_"):
        return ("UniRef100 ID", "UniRef90 ID")
    return ("UniRef100 ID",) if cluster_id.startswith("UniRef90_") else ()


def _prolog_end(head: bytes) -> int:
    end = 0
    while found := _PROLOG_PART.match(head, end):
        end = found.end()
    return end


def _parse(path: str | Path, text: bytes, line: int) -> ET.Element:
    if any(mark in text for mark in _DEFINITIONS):
        raise _malformed(path, line, "an entry with a document type definition, which protlm does not read", "")
    try:
        return ET.fromstring(text)
    except ET.ParseError as error:
        at, column = error.position
        reason = str(error).split(":")[0]
        message = f"the entry is not well-formed XML ({reason}, in column {column + 1})"
        raise _malformed(path, line + at - 1, message, "") from error


def _residues(path: str | Path, line: int, record_id: str, sequence: ET.Element | None) -> tuple[str, Counter[str]]:
    # White space is layout here, and no repair.
    text = "" if sequence is None or sequence.text is None else "".join(sequence.text.split())
    if sequence is None or not text:
        message = f"entry {shown(record_id)} has no sequence"
        raise RecordError(path, line, message, reason="empty_sequence", record_id=record_id)
    declared = _number(sequence.get("length"))
    if declared is not None and declared != len(text):
        message = f"entry {shown(record_id)}: its sequence has {len(text)} residues, and should have {declared}"
        raise _malformed(path, line, message, record_id)
    return clean_entry(path, line, record_id, text)


def clean_entry(path: str | Path, line: int, record_id: str, text: str) -> tuple[str, Counter[str]]:
    """Returns the residues of an entry and the repairs.

    Args:
        path: The file, for messages.
        line: Line of the entry.
        record_id: Its id.
        text: Its sequence without layout.

    Raises:
        RecordError: An illegal character; no residue at all.
    """
    try:
        residues, repairs = vocabulary.clean(text.encode())
    except vocabulary.IllegalLetterError as error:
        message = f"entry {shown(record_id)}: illegal character {error.letter!r} as residue {error.offset + 1}"
        raise RecordError(path, line, message, reason="illegal_character", record_id=record_id) from error
    if not residues:
        message = f"entry {shown(record_id)} has no sequence"
        raise RecordError(path, line, message, reason="empty_sequence", record_id=record_id)
    return residues.decode(), repairs


def _references(element: ET.Element) -> list[ET.Element]:
    return element.findall("{*}dbReference")


def _properties(element: ET.Element) -> dict[str, str]:
    return {found.get("type", ""): found.get("value", "") for found in element.findall("{*}property")}


def _text(element: ET.Element, path: str) -> str:
    """Returns the text of a descendant in one line; empty if it is not there."""
    found = element.findtext(path)
    return " ".join(found.split()) if found else ""


def _number(text: str | None) -> int | None:
    # Nine digits always fit the int32 columns; whatever is longer is no count and no taxon.
    return int(text) if text and _NUMBER.fullmatch(text) else None


def _definition(path: str | Path) -> ProtlmError:
    return ProtlmError(f"{path}: XML with a document type definition, which protlm does not read: remove it")


def _malformed(path: str | Path, line: int, message: str, record_id: str) -> RecordError:
    return RecordError(path, line, message, reason="malformed_entry", record_id=record_id)
