"""Selection of records: whether each is kept, its split and its id; decided from digests, in bounded memory."""

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from protlm.choices import Unclustered
from protlm.data import splits
from protlm.data.building.pieces import Piece, PieceFile
from protlm.data.digests import Digests, digests_of, duplicates, repeats
from protlm.data.numbered_ids import NumberedIds, numbered_id
from protlm.data.records import NUCLEOTIDES
from protlm.data.splits import SPLIT_NAMES

FIRST_REJECT = 100
"""Smaller codes are those of splits."""
TOO_SHORT, TOO_LONG, NOT_LISTED, NUCLEIC_ACID, DUPLICATE_WITHIN, DUPLICATE_ACROSS = range(
    FIRST_REJECT, FIRST_REJECT + 6
)
NO_SPLIT = 255
"""The value in column `split` of a record that the split file does not list."""
REASONS = {TOO_SHORT: "too_short", TOO_LONG: "too_long", NOT_LISTED: "not_in_split_file", NUCLEIC_ACID: NUCLEOTIDES}

_UNIREF = ("UniRef50_", "UniRef90_", "UniRef100_")
_COMPARED_AT_ONCE = 1 << 22
# Every range is a pass over all digests.
_MOST_RANGES = 64
_HASHES = 2**64


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
        """Returns the codes of a range of records, uint8, writable in place."""
        if start == end:
            return np.zeros(0, dtype=np.uint8)
        return np.memmap(self.codes_path, dtype=np.uint8, mode="r+", offset=start, shape=end - start)

    def numbers_between(self, start: int, end: int) -> dict[int, int]:
        """Returns the records of a range whose id repeats an earlier one, each with the number that its id gets."""
        first, last = np.searchsorted(self.repeats[0], [start, end]).tolist()
        return dict(zip(*self.repeats[:, first:last].tolist(), strict=True))

    def codes_of(self, number: int) -> np.ndarray:
        """Returns the codes of the records of a piece, uint8, writable in place."""
        return self.codes(int(self.starts[number]), int(self.starts[number + 1]))


def select(pieces: Sequence[PieceFile], rules: Rules, codes_path: Path) -> Selection:
    """Returns the decision on every record of the pieces, in order.

    Memory: digests are compared a range at a time, some four million records or a 64th of all, 50 bytes each; the codes
    are in a file, a byte a record; a repeated id takes 16 bytes, or about 200 if an id holds a `#`.

    Args:
        pieces: All pieces in the order of the input.
        rules: The rules of selection.
        codes_path: The file to write the codes to.
    """
    starts = np.concatenate([[0], np.cumsum([piece.num_records for piece in pieces], dtype=np.int64)]).astype(np.int64)
    num_records = int(starts[-1])
    with codes_path.open("wb") as file:
        if num_records and hasattr(os, "posix_fallocate"):
            # If the disk filled up later, a write to the map would end the process without a message.
            os.posix_fallocate(file.fileno(), 0, num_records)
        file.truncate(num_records)
    selection = Selection(codes_path, starts)
    codes = selection.codes(0, num_records)
    for number, piece_file in enumerate(pieces):
        if piece_file.num_records:
            piece = Piece(piece_file.path)
            selection.codes_of(number)[:] = _first_codes(piece, piece_file.role, rules, selection.held_out)
    for digests in _digest_ranges(pieces, selection, "sequence"):
        claims = codes[digests.index]
        if rules.method == "family":
            # A sequence that is held out must not be in any other split.
            claims = (claims - splits.OOD) % len(SPLIT_NAMES)
        within, across = duplicates(digests, claims, dedupe=rules.dedupe)
        codes[within] = DUPLICATE_WITHIN
        codes[across] = DUPLICATE_ACROSS
    if rules.method == "cluster":
        _count_unclustered(pieces, selection)
    repeated = [np.stack(repeats(digests)) for digests in _digest_ranges(pieces, selection, "id")]
    if repeated:
        selection.repeats = np.concatenate(repeated, axis=1)
        selection.repeats = selection.repeats[:, np.argsort(selection.repeats[0])]
    if selection.repeats.size and any(piece.has_numbered_ids for piece in pieces):
        _avoid_taken_numbers(pieces, selection)
    for number, piece_file in enumerate(pieces):
        codes = selection.codes_of(number)
        selection.counts.update(dict(enumerate(np.bincount(codes).tolist())))
        if piece_file.num_nucleotides:
            selection.num_nucleotides += int((codes[Piece(piece_file.path)["nucleotides"]] < FIRST_REJECT).sum())
    return selection


def _count_unclustered(pieces: Sequence[PieceFile], selection: Selection) -> None:
    for number, piece_file in enumerate(pieces):
        if piece_file.num_records:
            piece = Piece(piece_file.path)
            is_unclustered = np.array([not name for name in _cluster_names(piece)])
            places = np.flatnonzero(is_unclustered & (selection.codes_of(number) < FIRST_REJECT))
            if len(places) and not selection.num_unclustered:
                selection.first_unclustered = piece.strings("ids")[int(places[0])]
            selection.num_unclustered += len(places)


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


def _digest_ranges(pieces: Sequence[PieceFile], selection: Selection, kind: str) -> Iterator[Digests]:
    """Yields the digests of the records kept so far, by ranges of their high halves; equal ones share a range."""
    num_ranges = min(int(selection.starts[-1]) // _COMPARED_AT_ONCE + 1, _MOST_RANGES)
    bounds = [_HASHES * number // num_ranges for number in range(num_ranges + 1)]
    for start, end in itertools.pairwise(bounds):
        by_piece = []
        for number, piece_file in enumerate(pieces):
            if not piece_file.num_records:
                continue
            piece = Piece(piece_file.path)
            high = piece[f"{kind}_digest/high"]
            is_wanted = selection.codes_of(number) < FIRST_REJECT
            if num_ranges > 1:
                is_wanted &= (high >= np.uint64(start)) & (high <= np.uint64(end - 1))
            index = np.flatnonzero(is_wanted)
            by_piece.append(Digests(high[index], piece[f"{kind}_digest/low"][index], index + selection.starts[number]))
        if by_piece:
            columns = ([getattr(digests, name) for digests in by_piece] for name in ("high", "low", "index"))
            yield Digests(*map(np.concatenate, columns))


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
