"""Shards from the kept records of all pieces: hides where each shard begins and how its columns are gathered."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protlm.choices import SplitName
from protlm.data.building.pieces import Piece, PieceFile
from protlm.data.building.selection import Selection
from protlm.data.numbered_ids import number_suffix
from protlm.data.records import UNKNOWN
from protlm.data.residue_counts import count_residues
from protlm.data.splits import SPLIT_NAMES
from protlm.data.storage.shards import LABEL_COLUMNS, NUMBER_COLUMNS, FinishedShard, ShardInfo, ShardReader, write_shard
from protlm.data.strings import Strings, bounds_of
from protlm.errors import ShardError
from protlm.runtime.workers import check_wanted


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The plan of one shard: it gets the records of its split in a range of all records.

    Attributes:
        split: The split.
        name: The base name of its file.
        start: Number of its first record in the whole input.
        end: One more than the number of its last record.
        num_residues: Number of residues of its records.
    """

    split: SplitName
    name: str
    start: int
    end: int
    num_residues: int


@dataclass(frozen=True, slots=True)
class _Members:
    """The records of a shard from one piece: the piece's path, the number of its first record, their indices in it."""

    path: Path
    start: int
    places: np.ndarray


def plan_shards(pieces: Sequence[PieceFile], selection: Selection, shard_residues: int) -> list[ShardPlan]:
    """Returns the plans of the shards of all splits; a shard ends where the next record would make it too large.

    Args:
        pieces: All pieces, in order.
        selection: The decisions on their records.
        shard_residues: Maximum number of residues in a shard; only a single longer record may exceed it.
    """
    open_plans: dict[int, tuple[int, int, int]] = {}
    counts = dict.fromkeys(range(len(SPLIT_NAMES)), 0)
    plans: list[ShardPlan] = []

    def close(code: int) -> None:
        start, end, num_residues = open_plans.pop(code)
        split = SPLIT_NAMES[code]
        plans.append(ShardPlan(split, f"{split}-{counts[code]:05d}.h5", start, end, num_residues))
        counts[code] += 1

    for number, piece_file in enumerate(pieces):
        if not piece_file.num_records:
            continue
        lengths, codes, first = (
            Piece(piece_file.path).lengths,
            selection.codes_of(number),
            int(selection.starts[number]),
        )
        for code in range(len(SPLIT_NAMES)):
            places = np.flatnonzero(codes == code)
            ends = np.cumsum(lengths[places])
            done = taken = 0
            while done < len(places):
                start, _, held = open_plans.get(code, (first + int(places[done]), 0, 0))
                fitting = int(np.searchsorted(ends, taken + shard_residues - held, side="right"))
                if fitting == done and not held:
                    fitting = done + 1
                if fitting > done:
                    held += int(ends[fitting - 1]) - taken
                    open_plans[code] = (start, first + int(places[fitting - 1]) + 1, held)
                    taken, done = int(ends[fitting - 1]), fitting
                if done < len(places):
                    close(code)
    for code in sorted(open_plans):
        close(code)
    return sorted(plans, key=lambda plan: (SPLIT_NAMES.index(plan.split), plan.start))


def make_shard(plan: ShardPlan, directory: Path, pieces: Sequence[PieceFile], selection: Selection) -> FinishedShard:
    """Returns a shard, after writing it unless it is there already.

    Args:
        plan: Its plan.
        directory: The folder of the dataset.
        pieces: All pieces, in order.
        selection: The decisions on their records.
    """
    if (reader := _finished(plan, directory / plan.name)) is not None:
        offsets = reader.offsets
        info = ShardInfo(plan.name, reader.num_records, reader.num_residues, reader.checksum)
        residue_counts = count_residues(reader.tokens)
    else:
        members = list(_members(plan, pieces, selection))
        other_columns = _columns(members, selection)
        offsets = other_columns["offsets"]
        tokens = _tokens(members)
        info, residue_counts = write_shard(directory, plan.name, plan.split, plan.num_residues, tokens, other_columns)
    lengths, length_counts = np.unique(np.diff(offsets), return_counts=True)
    return FinishedShard(plan.split, info, residue_counts, lengths, length_counts)


def _finished(plan: ShardPlan, path: Path) -> ShardReader | None:
    if not path.exists():
        return None
    try:
        reader = ShardReader(path)
        reader.verify()
    except ShardError:
        return None
    return reader if (reader.split, reader.num_residues) == (plan.split, plan.num_residues) else None


def _members(plan: ShardPlan, pieces: Sequence[PieceFile], selection: Selection) -> Iterator[_Members]:
    """Yields the records of a shard, piece by piece."""
    first = int(np.searchsorted(selection.starts, plan.start, side="right")) - 1
    for number in range(first, len(pieces)):
        start, end = int(selection.starts[number]), int(selection.starts[number + 1])
        if start >= plan.end:
            return
        begin, stop = max(start, plan.start), min(end, plan.end)
        is_member = selection.codes(begin, stop) == SPLIT_NAMES.index(plan.split)
        if is_member.any():
            yield _Members(pieces[number].path, start, np.flatnonzero(is_member) + (begin - start))


def _tokens(members: Sequence[_Members]) -> Iterator[np.ndarray]:
    """Yields the tokens of a shard in stretches, with one piece open at a time."""
    for member in members:
        check_wanted()
        piece = Piece(member.path)
        yield from _stretches(piece["tokens"], piece["offsets"], member.places)


def _columns(members: Sequence[_Members], selection: Selection) -> dict[str, np.ndarray]:
    """Returns the columns of a shard except its tokens."""
    by_piece = [_piece_columns(member, selection) for member in members]
    # Removed here, so that only one column at a time is in memory twice.
    columns = {name: np.concatenate([gathered.pop(name) for gathered in by_piece]) for name in list(by_piece[0])}
    for name in [name for name in columns if name.endswith("lengths")]:
        columns[name.removesuffix("lengths") + "offsets"] = bounds_of(columns.pop(name))
    for name in NUMBER_COLUMNS:
        if not (columns[name] != UNKNOWN).any():
            del columns[name]
    for name in LABEL_COLUMNS:
        if not len(columns[f"{name}/bytes"]):
            del columns[f"{name}/bytes"], columns[f"{name}/offsets"]
    return columns


def _piece_columns(member: _Members, selection: Selection) -> dict[str, np.ndarray]:
    """Returns copies of the columns of a shard's records from one piece, with lengths in place of bounds."""
    piece, places = Piece(member.path), member.places
    columns = {"lengths": piece.lengths[places]}
    for name in ("ids", "descriptions", *LABEL_COLUMNS):
        if f"{name}/offsets" not in piece:
            columns |= {f"{name}/bytes": np.zeros(0, np.uint8), f"{name}/lengths": np.zeros(len(places), np.int64)}
            continue
        strings = piece.strings(name)
        if name == "ids":
            strings = _renamed(strings, member.start, selection)
        columns[f"{name}/bytes"] = np.concatenate(_stretches(strings.text, strings.offsets, places))
        columns[f"{name}/lengths"] = np.diff(strings.offsets)[places]
    return columns | {name: piece[name][places] for name in NUMBER_COLUMNS}


def _renamed(ids: Strings, start: int, selection: Selection) -> Strings:
    """Returns the ids of a piece, with a number behind each that repeats an earlier one."""
    numbers = selection.numbers_between(start, start + len(ids))
    if not numbers:
        return ids
    renamed = ids.to_list()
    for index, number in numbers.items():
        renamed[index - start] += number_suffix(number)
    return Strings.of(renamed)


def _stretches(content: np.ndarray, offsets: np.ndarray, places: np.ndarray) -> list[np.ndarray]:
    """Returns the content of some records, that of neighbours as one stretch; a stretch may be empty."""
    breaks = np.flatnonzero(np.diff(places) != 1) + 1
    firsts = places[np.concatenate([[0], breaks])]
    lasts = places[np.concatenate([breaks, [len(places)]]) - 1]
    bounds = zip(offsets[firsts].tolist(), offsets[lasts + 1].tolist(), strict=True)
    return [content[start:end] for start, end in bounds]
