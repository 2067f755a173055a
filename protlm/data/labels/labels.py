"""Labels of ids from files: their cluster, families or split. Hides the file formats and how an id is looked up.

Ids are not kept, only their digests, in sorted NumPy columns: 20 bytes a row, and each label's name once. During
reading a row takes some 60 bytes, and 200 if ids have several families in ever new combinations.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protlm.data.digests import digests_of
from protlm.data.labels import rows as label_rows
from protlm.data.labels.index import UNLABELLED, Index, sorted_columns
from protlm.data.numbered_ids import NumberedIds, number_suffix, numbered_id
from protlm.data.parsing.reader import Source
from protlm.data.parsing.record_table import RecordTable
from protlm.data.parsing.sources import SourceBlocks, sniff_format
from protlm.data.parsing.uniref_xml import clusters_of
from protlm.data.parsing.xml_text import check_prolog
from protlm.data.records import shown
from protlm.data.strings import Strings, bounds_of
from protlm.errors import ProtlmError, RecordError

_BATCH_ROWS = 1 << 17
_EXAMPLES = 1000
_CD_HIT_HINT = "; CD-HIT cuts names at 19 letters unless it runs with `-d 0`"
_BAR = ord("|")


class Labels:
    """The labels of ids.

    Attributes:
        file_name: Base name of the file.
        sha256: Hash of the bytes of the file on disk.
        sizes: Number of ids with each label, int64 (labels); for UniRef XML the number of members of each cluster.
        examples: The first ids of the file, each with its label.
        by_sequence: Whether records are found by their sequences, and not by their ids.
        num_marks: Byte order marks in the file, which are no part of it.
    """

    def __init__(
        self,
        source: SourceBlocks | Source,
        index: Index,
        names: Strings,
        sizes: np.ndarray,
        examples: Sequence[tuple[str, str]],
        *,
        by_sequence: bool = False,
        num_marks: int = 0,
    ) -> None:
        self.file_name, self.sha256, self.sizes = source.name, source.sha256, sizes
        self.examples, self.by_sequence, self.num_marks = examples, by_sequence, num_marks
        self._index, self._names = index, names

    def __len__(self) -> int:
        return len(self._names)

    def of_records(self, table: RecordTable) -> np.ndarray:
        """Returns the number of each record's label, int64 (records), `UNLABELLED` for one without."""
        if self.by_sequence:
            return self._index.find(table.digests[:, 0], table.digests[:, 1])
        return self.lookup(table.ids, table.id_digests)

    def lookup(self, ids: Strings, id_digests: np.ndarray) -> np.ndarray:
        """Returns the number of each id's label.

        A UniProtKB id such as `sp|P69905|HBA_HUMAN` that has no label itself is looked up by its accession, then by its
        entry name.

        Args:
            ids: The ids.
            id_digests: xxh3-128 of each, uint64 (ids, 2), high half first.

        Returns:
            int64 (ids), `UNLABELLED` for an id without label.
        """
        numbers = self._index.find(id_digests[:, 0], id_digests[:, 1])
        missing = np.flatnonzero(numbers == UNLABELLED)
        if not len(missing) or not (ids.text == _BAR).any():
            return numbers
        text, places, names = ids.text.tobytes(), [], []
        bounds = zip(ids.offsets[missing].tolist(), ids.offsets[missing + 1].tolist(), strict=True)
        for place, (start, end) in zip(missing.tolist(), bounds, strict=True):
            fields = text[start:end].split(b"|")
            if len(fields) == 3 and fields[0] in (b"sp", b"tr"):
                places.append(place)
                names += fields[1:]
        digests = digests_of(names)
        by_accession, by_entry_name = self._index.find(digests[:, 0], digests[:, 1]).reshape(-1, 2).T
        numbers[places] = np.where(by_accession == UNLABELLED, by_entry_name, by_accession)
        return numbers

    def names(self, numbers: np.ndarray) -> Strings:
        """Returns the names of labels by their numbers, empty for `UNLABELLED`."""
        if not len(self):
            return Strings.of([""] * len(numbers))
        starts = self._names.offsets[numbers]
        lengths = np.where(numbers == UNLABELLED, 0, self._names.offsets[numbers + 1] - starts)
        offsets = bounds_of(lengths)
        places = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Strings(self._names.text[places], offsets)

    def name(self, number: int) -> str:
        """Returns the name of one label."""
        (name,) = self.names(np.array([number])).to_list()
        return name


def read_clusters(path: str | Path) -> Labels:
    r"""Returns the cluster of each id, from a file of one of three formats, recognised by its content.

    Args:
        path: MMseqs2's TSV (`cluster<TAB>member`), CD-HIT's .clstr (a cluster is named by its representative), or
            UniRef XML (an id is any name of a member or of the cluster); may be compressed.

    Raises:
        RecordError: A malformed line, or an id in two clusters.
        ProtlmError: A file that is missing, damaged, or of another format.
    """
    text = label_rows.LabelText(path)
    if text.start.startswith(b"<"):
        if sniff_format(text.start, path) != "uniref-xml":
            raise ProtlmError(f"{path}: expected clusters, got UniProtKB XML, which has none")
        check_prolog(path, text.start)
        return _read_uniref(text)
    if text.start.startswith(label_rows.CD_HIT_CLUSTER):
        return _read_cd_hit(text)
    if text.start.startswith(b">"):
        raise ProtlmError(f"{path}: expected clusters, rows of `cluster<TAB>member`, got FASTA")
    rows = label_rows.tsv_rows(text, "cluster<TAB>member")
    return _label(text, (label_rows.Rows(r.labels, r.ids, r.lines) for r in rows), "cluster")


def clusters_of_sequences(program: str, digests: np.ndarray, representatives: np.ndarray, ids: Sequence[str]) -> Labels:
    """Returns clusters that a program made of different sequences; each is named by the id of its representative.

    Args:
        program: Name of the program, which stands for the name of a file.
        digests: xxh3-128 of each sequence, uint64 (sequences, 2), high half first; all different.
        representatives: The number of each sequence's representative, -1 for a sequence without cluster, int64.
        ids: The id of each sequence; if several representatives share one, the later ones get `#2`, `#3`, …
    """
    clustered = np.flatnonzero(representatives >= 0)
    chosen, numbers = np.unique(representatives[clustered], return_inverse=True)
    names = _distinct([ids[number] for number in chosen.tolist()])
    high, low, labels = sorted_columns([digests[clustered, 0], digests[clustered, 1], numbers.astype(np.int32)])
    content = hashlib.sha256()
    for part in (high.tobytes(), low.tobytes(), labels.tobytes(), "\n".join(names).encode()):
        content.update(part)
    source = Source(program, content.hexdigest())
    return Labels(source, Index(high, low, labels), Strings.of(names), np.bincount(labels), (), by_sequence=True)


def _distinct(ids: Sequence[str]) -> list[str]:
    taken = NumberedIds()
    for numbered in map(numbered_id, ids):
        if numbered is not None:
            taken.add(*numbered)
    names: list[str] = []
    seen: set[str] = set()
    for name in ids:
        names.append(name + number_suffix(taken.next_free(name)) if name in seen else name)
        seen.add(name)
    return names


def read_splits(path: str | Path) -> Labels:
    r"""Returns the split of each id, from rows of `id<TAB>split`; raises as `read_clusters` does."""
    text = label_rows.LabelText(path)
    return _label(text, label_rows.split_rows(text), "split")


def read_families(path: str | Path) -> Labels:
    r"""Returns the families of each id, from rows of `id<TAB>family`; several of one id are one label, joined by `;`.

    Args:
        path: The file; may be compressed.

    Raises:
        RecordError: A malformed line.
        ProtlmError: A file that is missing or damaged.
    """
    text = label_rows.LabelText(path)
    rows = _collect(path, label_rows.tsv_rows(text, "id<TAB>family"))
    is_first = rows.is_first()
    starts = np.append(np.flatnonzero(is_first), len(is_first))
    numbers = _joined(rows.labels, starts, rows.names)
    index, names = Index(rows.high[is_first], rows.low[is_first], numbers), rows.names.to_strings()
    sizes = np.bincount(numbers, minlength=len(names))
    return Labels(text.source, index, names, sizes, rows.examples, num_marks=text.num_marks)


class _Names:
    """Names numbered in the order of their first appearance, each kept once."""

    def __init__(self) -> None:
        self._indices: list[Index] = []
        self._texts: list[bytes] = []
        self._lengths: list[np.ndarray] = []
        self.count = 0

    def numbers_of(self, names: Iterable[bytes]) -> np.ndarray:
        """Returns the numbers of names, int32; new names get the next ones."""
        codes: dict[bytes, int] = {}
        which = np.fromiter((codes.setdefault(name, len(codes)) for name in names), dtype=np.int32)
        high, low = digests_of(codes).T
        numbers = np.full(len(codes), UNLABELLED, dtype=np.int32)
        for index in self._indices:
            missing = np.flatnonzero(numbers == UNLABELLED)
            numbers[missing] = index.find(high[missing], low[missing])
        if len(missing := np.flatnonzero(numbers == UNLABELLED)):
            numbers[missing] = np.arange(self.count, self.count + len(missing))
            distinct = list(codes)
            new = [distinct[place] for place in missing.tolist()]
            self.count += len(new)
            self._texts.append(b"".join(new))
            self._lengths.append(np.fromiter(map(len, new), dtype=np.int32, count=len(new)))
            self._insert(Index(*sorted_columns([high[missing], low[missing], numbers[missing]])))
        return numbers[which]

    def _insert(self, index: Index) -> None:
        # Each index has more than twice the size of the next, so a name is copied only some log2(count) times.
        while self._indices and len(self._indices[-1]) <= 2 * len(index):
            index = self._indices.pop().extended(index.high, index.low, index.numbers)
        self._indices.append(index)

    def to_strings(self) -> Strings:
        """Returns all names in the order of their numbers."""
        return Strings(np.frombuffer(b"".join(self._texts), dtype=np.uint8), bounds_of(np.concatenate(self._lengths)))


@dataclass(frozen=True, slots=True)
class _Collected:
    """The rows of a file as columns, sorted by the digest of the id; those of one id keep the order of the file.

    Attributes:
        high: High half of the digest of each id, uint64.
        low: Low half of the same.
        labels: Numbers of the labels, int32.
        lines: Line of each row, int64.
        names: The names of the labels.
        examples: The first ids of the file, each with its label.
    """

    high: np.ndarray
    low: np.ndarray
    labels: np.ndarray
    lines: np.ndarray
    names: _Names
    examples: Sequence[tuple[str, str]]

    def is_first(self) -> np.ndarray:
        """Returns for each row whether it is the first of its id, bool (rows)."""
        is_first = np.ones(len(self.high), dtype=bool)
        is_first[1:] = (self.high[1:] != self.high[:-1]) | (self.low[1:] != self.low[:-1])
        return is_first

    def only(self, is_wanted: np.ndarray) -> "_Collected":
        """Returns the chosen rows."""
        high, low, labels, lines = (c[is_wanted] for c in (self.high, self.low, self.labels, self.lines))
        return _Collected(high, low, labels, lines, self.names, self.examples)


def _collect(path: str | Path, rows: Iterable[label_rows.Rows]) -> _Collected:
    names = _Names()
    batches: tuple[list[np.ndarray], ...] = ([], [], [], [])
    examples: list[tuple[str, str]] = []
    for batch in rows:
        if wanted := _EXAMPLES - len(examples):
            pairs = zip(batch.ids[:wanted], batch.labels[:wanted], strict=True)
            examples += [(record_id.decode(), label.decode()) for record_id, label in pairs]
        high, low = digests_of(batch.ids).T.copy()
        for column, values in zip(batches, (high, low, names.numbers_of(batch.labels), batch.lines), strict=True):
            column.append(values)
    if not names.count:
        raise ProtlmError(f"{path}: no rows; expected an id and its label on each line")
    columns = []
    for column in batches:
        columns.append(np.concatenate(column))
        # Otherwise all columns would be in memory twice.
        column.clear()
    high, low, labels, lines = sorted_columns(columns)
    return _Collected(high, low, labels, lines, names, examples)


def _label(text: label_rows.LabelText, rows: Iterable[label_rows.Rows], kind: str) -> Labels:
    """Returns the labels of a file in which each id has only one."""
    collected = _collect(text.path, rows)
    names = collected.names.to_strings()
    index = _unique_index(text.path, collected, names, kind)
    sizes = np.bincount(index.numbers, minlength=len(names))
    return Labels(text.source, index, names, sizes, collected.examples, num_marks=text.num_marks)


def _read_cd_hit(text: label_rows.LabelText) -> Labels:
    path, num_clusters = text.path, 0

    def counted() -> Iterator[label_rows.Cluster]:
        nonlocal num_clusters
        for cluster in label_rows.cd_hit_clusters(text):
            num_clusters += 1
            yield cluster

    rows = _collect(path, label_rows.rows_of(counted()))
    names = rows.names.to_strings()
    index = _unique_index(path, rows, names, "cluster", _CD_HIT_HINT)
    if num_clusters != len(names):
        raise ProtlmError(
            f"{path}: {num_clusters:,} clusters, but only {len(names):,} different representatives, such as "
            f"{shown(names[0])}{_CD_HIT_HINT}"
        )
    sizes = np.bincount(index.numbers, minlength=len(names))
    return Labels(text.source, index, names, sizes, rows.examples, num_marks=text.num_marks)


def _unique_index(path: str | Path, rows: _Collected, names: Strings, kind: str, hint: str = "") -> Index:
    is_first = rows.is_first()
    if len(conflicts := _conflicts(rows, is_first)):
        second = conflicts[np.argmin(rows.lines[conflicts])]
        listed = names.to_list()
        here, there = (shown(listed[rows.labels[place]]) for place in (second, second - 1))
        message = (
            f"this id is in {kind} {here}, and by line {rows.lines[second - 1]} in {kind} {there}; "
            f"give each id one {kind} only{hint}"
        )
        raise RecordError(path, int(rows.lines[second]), message, reason="two_labels")
    if is_first.all():
        return Index(rows.high, rows.low, rows.labels)
    return Index(rows.high[is_first], rows.low[is_first], rows.labels[is_first])


def _conflicts(rows: _Collected, is_first: np.ndarray) -> np.ndarray:
    """Returns the indices of rows that give their id another label than the row before."""
    return np.flatnonzero(~is_first[1:] & (rows.labels[1:] != rows.labels[:-1])) + 1


def _joined(labels: np.ndarray, starts: np.ndarray, names: _Names) -> np.ndarray:
    """Returns one label for every group of labels; different ones become a new label, their names joined by `;`.

    Args:
        labels: Numbers of labels, group by group.
        starts: The bounds of the groups, (groups + 1).
        names: The names of the labels; the new ones are added.

    Returns:
        Number of the label of each group, int32.
    """
    numbers: np.ndarray = labels[starts[:-1]]
    listed = names.to_strings().to_list()
    several = np.flatnonzero(np.diff(starts) > 1)
    for first in range(0, len(several), _BATCH_ROWS):
        groups = several[first : first + _BATCH_ROWS]
        bounds = zip(starts[groups].tolist(), starts[groups + 1].tolist(), strict=True)
        # A family that is listed twice for an id counts once, at its first place.
        distinct = (dict.fromkeys(labels[start:end].tolist()) for start, end in bounds)
        numbers[groups] = names.numbers_of(";".join([listed[label] for label in group]).encode() for group in distinct)
    return numbers


def _read_uniref(text: label_rows.LabelText) -> Labels:
    path, sizes = text.path, list[int]()

    def clusters() -> Iterator[label_rows.Cluster]:
        for cluster in clusters_of(path, text.blocks):
            sizes.append(cluster.num_members)
            names = [name.encode() for name in cluster.names]
            secondary = [name.encode() for name in cluster.secondary]
            # A negative line marks a name that may be in several clusters.
            lines = [cluster.line] * len(names) + [-cluster.line] * len(secondary)
            yield label_rows.Cluster(cluster.id.encode(), names + secondary, lines)

    rows = _collect(path, label_rows.rows_of(clusters()))
    if len(sizes) != rows.names.count:
        raise ProtlmError(f"{path}: a cluster stands in the file twice; was it put together from overlapping files?")
    names = rows.names.to_strings()
    index = _unique_index(path, rows.only(rows.lines > 0), names, "cluster")
    others = rows.only(rows.lines < 0)
    is_first = others.is_first()
    is_clear = np.ones(is_first.sum(), dtype=bool)
    is_clear[(np.cumsum(is_first) - 1)[_conflicts(others, is_first)]] = False
    others = others.only(is_first).only(is_clear)
    is_new = index.find(others.high, others.low) == UNLABELLED
    others = others.only(is_new)
    index = index.extended(others.high, others.low, others.labels)
    return Labels(text.source, index, names, np.array(sizes, dtype=np.int64), rows.examples, num_marks=text.num_marks)
