"""Selection of records: whether each is kept, its split and its id; decided from digests, in bounded memory.

Workers share the passes over all records: each task has some pieces, or a range of digests in all of them. Every digest
is in one range, so no task depends on another of the same pass.
"""

import functools
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from protlm.choices import Unclustered
from protlm.data import splits
from protlm.data.building.pieces import Piece, PieceFile
from protlm.data.digests import Digests, digests_of, duplicates, repeats
from protlm.data.numbered_ids import NumberedIds, numbered_id
from protlm.data.records import NUCLEOTIDES
from protlm.data.splits import SPLIT_NAMES
from protlm.files import written_whole
from protlm.runtime.workers import Workers, check_wanted

FIRST_REJECT = 100
"""Smaller codes are those of splits."""
TOO_SHORT, TOO_LONG, NOT_LISTED, NUCLEIC_ACID, DUPLICATE_WITHIN, DUPLICATE_ACROSS = range(
    FIRST_REJECT, FIRST_REJECT + 6
)
NO_SPLIT = 255
"""The value in column `split` of a record that the split file does not list."""
REASONS = {TOO_SHORT: "too_short", TOO_LONG: "too_long", NOT_LISTED: "not_in_split_file", NUCLEIC_ACID: NUCLEOTIDES}

_UNIREF = ("UniRef50_", "UniRef90_", "UniRef100_")
# Records of a task: of the pieces that it decides on first, or of the range of digests that it compares.
_DECIDED_AT_ONCE = 1 << 20
_COMPARED_AT_ONCE = 1 << 22
# Every range is a pass over all digests.
_MOST_RANGES = 64
_HASHES = 2**64

DigestKind = Literal["sequence", "id"]


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules by which records are selected; see `workflows.prep.options.PrepRequest`.

    Attributes:
        method: `random`, `cluster`, `family`, `file` or `ready-made`.
        ood_families: The families held out, for `family`.
        keep_nucleotides: Whether nucleic acids are kept.
        unclustered: Where a record without cluster goes, for `cluster`; None stands for `random`.
    """

    method: str
    seed: int
    valid_fraction: float
    test_fraction: float
    min_length: int
    max_length: int | None
    dedupe: bool
    ood_families: frozenset[str] = frozenset()
    unclustered: Unclustered | None = None
    keep_nucleotides: bool = True


@dataclass
class Selection:
    """The decisions on all records.

    Attributes:
        codes_path: A file with a byte for every record of all pieces: the code of its split, or the reason why it is
            left out.
        starts: The number of the first record of each piece, and the number of all records.
        repeats: The kept records whose id repeats an earlier one, ascending, and the number that each gets; int64
            (2, n).
        counts: Number of records with each code.
        num_unclustered: In a split by cluster, the number of kept records without cluster.
        first_unclustered: The id of the first of them.
        num_nucleotides: The number of kept records that are nucleic acids.
        held_out: Those families to hold out that a record has.
    """

    codes_path: Path
    starts: np.ndarray
    repeats: np.ndarray = field(default_factory=lambda: np.zeros((2, 0), dtype=np.int64))
    counts: Counter[int] = field(default_factory=Counter)
    num_unclustered: int = 0
    first_unclustered: str = ""
    num_nucleotides: int = 0
    held_out: set[str] = field(default_factory=set)

    def between(self, first: int, last: int) -> "Selection":
        """Returns the decisions on pieces first to last, the last one excluded."""
        starts = self.starts[first : last + 1]
        low, high = np.searchsorted(self.repeats[0], [starts[0], starts[-1]]).tolist()
        return Selection(self.codes_path, starts, self.repeats[:, low:high])

    def codes(self, start: int, end: int) -> np.ndarray:
        """Returns the codes of a range of records, uint8."""
        return _mapped_codes(self.codes_path, start, end, "r")

    def numbers_between(self, start: int, end: int) -> dict[int, int]:
        """Returns the records of a range whose id repeats an earlier one, each with the number that its id gets."""
        first, last = np.searchsorted(self.repeats[0], [start, end]).tolist()
        return dict(zip(*self.repeats[:, first:last].tolist(), strict=True))

    def codes_of(self, number: int) -> np.ndarray:
        """Returns the codes of the records of a piece, uint8."""
        return self.codes(int(self.starts[number]), int(self.starts[number + 1]))


@dataclass(frozen=True, slots=True)
class _PiecesTask:
    """Some pieces that follow each other, to decide on their records.

    Attributes:
        pieces: The pieces.
        rules: The rules of selection.
        first: Number of the first record.
    """

    pieces: Sequence[PieceFile]
    rules: Rules
    first: int

    @property
    def title(self) -> str:
        """The files of the records."""
        return f"records {self.first + 1:,} and on, from {self.pieces[0].path_of_source}"


@dataclass(frozen=True, slots=True)
class _RangeTask:
    """The records whose digests have their high half in a range, to compare them.

    Attributes:
        list_path: The list of all pieces.
        codes_path: The file of codes: only records that are kept so far are compared.
        kind: Whether sequences or ids are compared.
        number: The number of the range.
        num_ranges: The number of ranges.
        rules: The rules of selection.
    """

    list_path: Path
    codes_path: Path
    kind: DigestKind
    number: int
    num_ranges: int
    rules: Rules

    @property
    def title(self) -> str:
        """The range."""
        return f"comparison of {self.kind}s, range {self.number + 1} of {self.num_ranges}"


def select(pieces: Sequence[PieceFile], rules: Rules, codes_path: Path, workers: Workers) -> Selection:
    """Returns the decision on every record of the pieces, in order.

    Memory: every task compares a range of digests, some four million records or a 64th of all, 70 bytes each; the codes
    are in a file, a byte a record; a repeated id takes 16 bytes, or about 200 if an id holds a `#`.

    Args:
        pieces: All pieces in the order of the input.
        rules: The rules of selection.
        codes_path: The file to write the codes to; the list of pieces is written beside it.
        workers: The workers that share the passes over the records.
    """
    starts = np.concatenate([[0], np.cumsum([piece.num_records for piece in pieces], dtype=np.int64)]).astype(np.int64)
    num_records = int(starts[-1])
    with codes_path.open("wb") as file:
        if num_records and hasattr(os, "posix_fallocate"):
            # If the disk filled up later, a write to the map would end the process without a message.
            os.posix_fallocate(file.fileno(), 0, num_records)
        file.truncate(num_records)
    selection = Selection(codes_path, starts)
    codes = _mapped_codes(codes_path, 0, num_records, "r+")
    groups = list(_groups(pieces, rules))
    for group, (decided, held_out) in zip(groups, workers.in_order(_decide, groups), strict=True):
        codes[group.first : group.first + len(decided)] = decided
        selection.held_out |= held_out
    # Workers elsewhere read the file, not this process's memory.
    _flush(codes)
    list_path = _write_list(pieces, codes_path)
    num_ranges = min(num_records // _COMPARED_AT_ONCE + 1, _MOST_RANGES)
    ranges = _ranges(list_path, codes_path, "sequence", num_ranges, rules)
    for within, across in workers.in_order(_find_duplicates, ranges):
        codes[within] = DUPLICATE_WITHIN
        codes[across] = DUPLICATE_ACROSS
    _flush(codes)
    if rules.method == "cluster":
        for number, first in workers.in_order(_count_unclustered, _kept_groups(groups, codes_path)):
            selection.first_unclustered = selection.first_unclustered or first
            selection.num_unclustered += number
    repeated = list(workers.in_order(_find_repeats, _ranges(list_path, codes_path, "id", num_ranges, rules)))
    selection.repeats = np.concatenate(repeated, axis=1)
    selection.repeats = selection.repeats[:, np.argsort(selection.repeats[0])]
    if selection.repeats.size and any(piece.has_numbered_ids for piece in pieces):
        _avoid_taken_numbers(pieces, selection)
    for number, piece_file in enumerate(pieces):
        of_piece = selection.codes_of(number)
        selection.counts.update(dict(enumerate(np.bincount(of_piece).tolist())))
        if piece_file.num_nucleotides:
            selection.num_nucleotides += int((of_piece[Piece(piece_file.path)["nucleotides"]] < FIRST_REJECT).sum())
    return selection


def _mapped_codes(path: Path, start: int, end: int, mode: Literal["r", "r+"]) -> np.ndarray:
    if start == end:
        return np.zeros(0, dtype=np.uint8)
    return np.memmap(path, dtype=np.uint8, mode=mode, offset=start, shape=end - start)


def _flush(codes: np.ndarray) -> None:
    if isinstance(codes, np.memmap):
        codes.flush()


def _groups(pieces: Sequence[PieceFile], rules: Rules) -> Iterator[_PiecesTask]:
    """Yields the tasks of the first pass, each with pieces of about `_DECIDED_AT_ONCE` records."""
    group: list[PieceFile] = []
    first = size = 0
    for piece in pieces:
        if not piece.num_records:
            continue
        group.append(piece)
        size += piece.num_records
        if size >= _DECIDED_AT_ONCE:
            yield _PiecesTask(group, rules, first)
            group, first, size = [], first + size, 0
    if group:
        yield _PiecesTask(group, rules, first)


def _decide(_shared: object, task: _PiecesTask) -> tuple[np.ndarray, set[str]]:
    """Returns the codes of the records of some pieces by themselves, and the families to hold out that they have."""
    held_out: set[str] = set()
    codes = [_first_codes(Piece(piece.path), piece.role, task.rules, held_out) for piece in task.pieces]
    return np.concatenate(codes), held_out


def _write_list(pieces: Sequence[PieceFile], codes_path: Path) -> Path:
    """Writes path and number of records of every piece, which tasks would otherwise all carry, and returns its path."""
    text = json.dumps([[str(piece.path), piece.num_records] for piece in pieces])
    # Named after its content, so that no worker takes the list of an earlier run for it.
    path = codes_path.with_name(f"pieces-{xxhash.xxh3_64_hexdigest(text.encode())}.json")
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


@functools.lru_cache(maxsize=1)
def _read_list(path: Path) -> list[tuple[Path, int]]:
    return [(Path(piece), num_records) for piece, num_records in json.loads(path.read_text(encoding="utf-8"))]


def _ranges(list_path: Path, codes_path: Path, kind: DigestKind, num_ranges: int, rules: Rules) -> Iterator[_RangeTask]:
    return (_RangeTask(list_path, codes_path, kind, number, num_ranges, rules) for number in range(num_ranges))


def _find_duplicates(_shared: object, task: _RangeTask) -> tuple[np.ndarray, np.ndarray]:
    """Returns the repeats within a split, and the records whose sequence an earlier split has, by their numbers."""
    digests, claims = _digests_in(task)
    if task.rules.method == "family":
        # A sequence that is held out must not be in any other split.
        claims = (claims - splits.OOD) % len(SPLIT_NAMES)
    return duplicates(digests, claims, dedupe=task.rules.dedupe)


def _find_repeats(_shared: object, task: _RangeTask) -> np.ndarray:
    """Returns the records whose id repeats an earlier one, and the number that each gets, int64 (2, n)."""
    digests, _ = _digests_in(task)
    return np.stack(repeats(digests))


@dataclass(frozen=True, slots=True)
class _KeptTask:
    """Some pieces, and where the codes of their records are."""

    pieces: _PiecesTask
    codes_path: Path

    @property
    def title(self) -> str:
        """The files of the records."""
        return self.pieces.title


def _kept_groups(groups: Sequence[_PiecesTask], codes_path: Path) -> Iterator[_KeptTask]:
    return (_KeptTask(group, codes_path) for group in groups)


def _count_unclustered(_shared: object, task: _KeptTask) -> tuple[int, str]:
    """Returns the number of kept records without cluster, and the id of the first of them."""
    number, first_id, start = 0, "", task.pieces.first
    for piece_file in task.pieces.pieces:
        piece = Piece(piece_file.path)
        is_unclustered = np.array([not name for name in _cluster_names(piece)])
        is_kept = _mapped_codes(task.codes_path, start, start + piece_file.num_records, "r") < FIRST_REJECT
        places = np.flatnonzero(is_unclustered & is_kept)
        if len(places) and not number:
            first_id = piece.strings("ids")[int(places[0])]
        number += len(places)
        start += piece_file.num_records
    return number, first_id


def _first_codes(piece: Piece, role: str, rules: Rules, held_out: set[str]) -> np.ndarray:
    lengths = piece.lengths
    if role != "input":
        codes = np.full(len(lengths), SPLIT_NAMES.index(role), dtype=np.uint8)
    else:
        codes = _split_codes(piece, rules, held_out)
    codes[lengths < rules.min_length] = TOO_SHORT
    if rules.max_length is not None:
        codes[lengths > rules.max_length] = TOO_LONG
    if not rules.keep_nucleotides:
        codes[piece["nucleotides"]] = NUCLEIC_ACID
    return codes


def _split_codes(piece: Piece, rules: Rules, held_out: set[str]) -> np.ndarray:
    """Returns the split of each record; adds the families to hold out that it finds to `held_out`."""
    if rules.method == "file":
        listed = piece["split"].copy()
        listed[listed == NO_SPLIT] = NOT_LISTED
        return listed
    digests = piece["sequence_digest/low"].copy()
    if rules.method == "cluster":
        names = _cluster_names(piece)
        is_named = np.array([bool(name) for name in names])
        digests[is_named] = digests_of(name.encode() for name in names if name)[:, 1]
    codes = splits.random_split(
        digests, seed=rules.seed, valid_fraction=rules.valid_fraction, test_fraction=rules.test_fraction
    )
    if rules.method == "cluster" and rules.unclustered == "train":
        codes[~is_named] = splits.TRAIN
    if rules.method == "family" and "family/offsets" in piece:
        for index, joined in enumerate(piece.strings("family").to_list()):
            if joined and (wanted := rules.ood_families.intersection(map(splits.plain_family, joined.split(";")))):
                codes[index] = splits.OOD
                held_out |= wanted
    return codes


def _cluster_names(piece: Piece) -> list[str]:
    """Returns the name of each record's cluster, for an entry of UniRef its id; empty if it has none."""
    ids = piece.strings("ids").to_list()
    names = piece.strings("cluster_id").to_list() if "cluster_id/offsets" in piece else [""] * len(ids)
    return [
        name or (record_id if record_id.startswith(_UNIREF) else "") for name, record_id in zip(names, ids, strict=True)
    ]


def _digests_in(task: _RangeTask) -> tuple[Digests, np.ndarray]:
    """Returns the digests of the records kept so far in a range of their high halves, and the codes of the records."""
    start, end = (_HASHES * bound // task.num_ranges for bound in (task.number, task.number + 1))
    none = np.zeros(0, dtype=np.uint64)
    columns: list[list[np.ndarray]] = [[none], [none], [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.uint8)]]
    first = 0
    for path, num_records in _read_list(task.list_path):
        check_wanted()
        if not num_records:
            continue
        piece = Piece(path)
        codes = _mapped_codes(task.codes_path, first, first + num_records, "r")
        high = piece[f"{task.kind}_digest/high"]
        is_wanted = codes < FIRST_REJECT
        if task.num_ranges > 1:
            is_wanted &= (high >= np.uint64(start)) & (high <= np.uint64(end - 1))
        index = np.flatnonzero(is_wanted)
        low = piece[f"{task.kind}_digest/low"]
        for column, values in zip(columns, (high[index], low[index], index + first, codes[index]), strict=True):
            column.append(values)
        first += num_records
    high, low, index, codes = map(np.concatenate, columns)
    return Digests(high, low, index), codes


def _avoid_taken_numbers(pieces: Sequence[PieceFile], selection: Selection) -> None:
    """Gives a repeated id the next free numbers if the input has `id#n` itself."""
    taken = NumberedIds()
    repeated: list[str] = []
    for number, piece_file in enumerate(pieces):
        if not piece_file.num_records:
            continue
        start, kept = int(selection.starts[number]), selection.codes_of(number) < FIRST_REJECT
        numbers = selection.numbers_between(start, start + len(kept))
        for index, name in enumerate(Piece(piece_file.path).strings("ids").to_list()):
            if start + index in numbers:
                repeated.append(name)
            if kept[index] and (numbered := numbered_id(name)):
                taken.add(*numbered)
    for place, name in enumerate(repeated):
        selection.repeats[1, place] = taken.next_free(name)
