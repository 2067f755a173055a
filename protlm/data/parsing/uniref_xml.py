"""The XML of UniRef: the representative of a cluster as a record, or the names of all members for looking them up."""

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.parsers import expat

from protlm.data.parsing.entries import malformed
from protlm.data.parsing.xml_text import definition_fault, number_of, parse_tree, residues_of, text_of
from protlm.data.records import MAX_RECORD_BYTES, Record, shown
from protlm.errors import RecordError

UNIREF_ROOTS = ("UniRef", "UniRef100", "UniRef90", "UniRef50")
"""The root elements of UniRef XML: the first in files of the website, the others in files of a release."""


@dataclass(slots=True)
class UnirefCluster:
    """A cluster of a UniRef file with the names under which its members are looked up.

    Attributes:
        id: Name of the cluster.
        line: Line of its entry in the file.
        num_members: Members, the representative among them.
        names: Names that belong to this cluster alone: its own, and of each member the entry name, the first
            accession, the UniParc id and the UniRef ids of the finer levels.
        secondary: Further accessions of its members; an accession that was split up occurs in several clusters.
    """

    id: str
    line: int
    num_members: int = 0
    names: list[str] = field(default_factory=list)
    secondary: list[str] = field(default_factory=list)


def parse_entry(path: str | Path, text: bytes, line: int) -> tuple[Record, Counter[str]]:
    """Returns the representative of a UniRef cluster as a record named after the cluster, and the repairs.

    Args:
        path: The file, for messages.
        text: The entry, from `<entry` to `</entry>`.
        line: Its line in the file.

    Raises:
        RecordError: An entry that is not well-formed, or lacks its id, representative or sequence.
    """
    entry = parse_tree(path, text, line)
    record_id = entry.get("id", "").strip()
    if not record_id:
        raise malformed(path, line, "a UniRef entry without id")
    representative = entry.find("{*}representativeMember")
    reference = None if representative is None else representative.find("{*}dbReference")
    if representative is None or reference is None:
        raise malformed(path, line, f"entry {shown(record_id)} has no representative member", record_id)
    properties = _properties(entry)
    cluster_size = number_of(properties.get("member count"))
    if cluster_size is None:
        cluster_size = 1 + len(entry.findall("{*}member"))
    taxon, taxon_id = properties.get("common taxon", ""), number_of(properties.get("common taxon ID"))
    name = text_of(entry, "{*}name").removeprefix("Cluster:").strip()
    description = (
        name, f"n={cluster_size}", f"Tax={taxon}" if taxon else "", f"TaxID={taxon_id}" if taxon_id else "",
        f"RepID={member}" if (member := reference.get("id")) else "",
    )  # fmt: skip
    residues, repairs = residues_of(path, line, record_id, representative.find("{*}sequence"))
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


def clusters_of(path: str | Path, blocks: Iterable[bytes]) -> Iterator[UnirefCluster]:
    """Yields the clusters of a UniRef file without their sequences; holds the names of one cluster at a time.

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
            # The parser keeps an unfinished tag in memory until it ends.
            num_bytes = 0 if reader.has_moved() else num_bytes + len(block)
            if num_bytes > MAX_RECORD_BYTES:
                message = f"no tag in {MAX_RECORD_BYTES:,} bytes; is this a UniRef file?"
                raise malformed(path, parser.CurrentLineNumber, message)
            yield from reader.take()
        parser.Parse(b"", True)
    except expat.ExpatError as error:
        message = f"the XML is not well-formed ({expat.ErrorString(error.code)}); copy or download the file again"
        raise RecordError(path, error.lineno, message, reason="malformed_entry") from error
    yield from reader.take()


class _ClusterReader:
    """Builds clusters from the events of a parser; ignores the text between tags."""

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
        """Returns whether tags were read since the last call."""
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
                raise malformed(self._path, line, "a UniRef entry without id")
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
        raise definition_fault(self._path)


def _finer_levels(cluster_id: str) -> tuple[str, ...]:
    """Returns the properties of a member that name clusters inside the given one; coarser ones hold more than it."""
    if cluster_id.startswith("UniRef50_"):
        return ("UniRef100 ID", "UniRef90 ID")
    return ("UniRef100 ID",) if cluster_id.startswith("UniRef90_") else ()


def _properties(element: ET.Element) -> dict[str, str]:
    properties = element.findall("{*}property")
    return {entry.get("type", ""): entry.get("value", "") for entry in properties}
