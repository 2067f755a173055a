"""How the kept records of all pieces become shards: where each shard begins and ends, and what goes into it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protlm.choices import SplitName
from protlm.data.building.pieces import Piece, PieceFile
from protlm.data.building.selection import Selection
from protlm.data.numbered_ids import number_suffix
from protlm.data.parsing.record_table import UNKNOWN
from protlm.data.residue_counts import count_residues
from protlm.data.splits import SPLIT_NAMES
from protlm.data.storage.shards import LABEL_COLUMNS, NUMBER_COLUMNS, FinishedShard, ShardInfo, ShardReader, write_shard
from protlm.data.strings import Strings, bounds_of
from protlm.errors import ShardError


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The records of one shard: those of its split among a range of all records.

    Attributes:
        split: The split.
        name: The base name of its file.
        start: Number of its first record in the whole input.
        end: One more than the number of its last.
        num_residues: Residues of its records.
    """

    split: SplitName
    name: str
    start: int
    end: int
    num_residues: int


@dataclass(frozen=True, slots=True)
class _Members:
    """The records of a shard that come from one piece: its path, the number of its first record, their places in it."""

    path: Path
    start: int
    places: np.ndarray


def plan_shards(pieces: Sequence[PieceFile], selection: Selection, shard_residues: int) -> list[ShardPlan]:
    """Returns the shards of all splits: a shard ends where the next record would make it too large.

    Args:
        pieces: All pieces, in order.
        selection: What is kept of them.
        shard_residues: Residues in a shard, at most; only a single longer record makes it larger.
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
    """Writes a shard, or finds that it was written before.

    Args:
        plan: What goes into it.
        directory: The folder of the dataset.
        pieces: All pieces, in order.
        selection: What is kept of them.
    """
    if (reader := _finished(plan, directory / plan.name)) is not None:
        offsets = reader.offsets
        info = ShardInfo(plan.name, reader.num_records, reader.num_residues, reader.checksum)
        residue_counts = count_residues(reader.tokens)
    else:
        members = list(_members(plan, pieces, selection))
        found = _columns(members, selection)
        offsets = found["offsets"]
        tokens = _tokens(members)
        info, residue_counts = write_shard(directory, plan.name, plan.split, plan.num_residues, tokens, found)
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
    """Yields the tokens of a shard in stretches; one piece is open at a time."""
    for member in members:
        piece = Piece(member.path)
        yield from _stretches(piece["tokens"], piece["offsets"], member.places)


def _columns(members: Sequence[_Members], selection: Selection) -> dict[str, np.ndarray]:
    """Returns the columns of a shard but for its tokens."""
    parts = [_part(member, selection) for member in members]
    # Taken out, so that each column is there twice only while it is put together.
    found = {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}
    for name in [name for name in found if name.endswith("lengths")]:
        found[name.removesuffix("lengths") + "offsets"] = bounds_of(found.pop(name))
    for name in NUMBER_COLUMNS:
        if not (found[name] != UNKNOWN).any():
            del found[name]
    for name in LABEL_COLUMNS:
        if not len(found[f"{name}/bytes"]):
            del found[f"{name}/bytes"], found[f"{name}/offsets"]
    return found


def _part(member: _Members, selection: Selection) -> dict[str, np.ndarray]:
    """Returns what one piece gives to a shard, copied from it: columns, and lengths in place of bounds."""
    piece, places = Piece(member.path), member.places
    found = {"lengths": piece.lengths[places]}
    for name in ("ids", "descriptions", *LABEL_COLUMNS):
        if f"{name}/offsets" not in piece:
            found |= {f"{name}/bytes": np.zeros(0, np.uint8), f"{name}/lengths": np.zeros(len(places), np.int64)}
            continue
        strings = piece.strings(name)
        if name == "ids":
            strings = _renamed(strings, member.start, selection)
        found[f"{name}/bytes"] = np.concatenate(_stretches(strings.text, strings.offsets, places))
        found[f"{name}/lengths"] = np.diff(strings.offsets)[places]
    return found | {name: piece[name][places] for name in NUMBER_COLUMNS}


def _renamed(ids: Strings, start: int, selection: Selection) -> Strings:
    """Returns the ids of a piece, with the numbers of those that repeat an earlier one."""
    numbers = selection.numbers_between(start, start + len(ids))
    if not numbers:
        return ids
    renamed = ids.to_list()
    for index, number in numbers.items():
        renamed[index - start] += number_suffix(number)
    return Strings.of(renamed)


def _stretches(content: np.ndarray, offsets: np.ndarray, places: np.ndarray) -> list[np.ndarray]:
    """Returns the content of some records as few stretches as neighbours allow; empty ones included."""
    breaks = np.flatnonzero(np.diff(places) != 1) + 1
    firsts = places[np.concatenate([[0], breaks])]
    lasts = places[np.concatenate([breaks, [len(places)]]) - 1]
    bounds = zip(offsets[firsts].tolist(), offsets[lasts + 1].tolist(), strict=True)
    return [content[start:end] for start, end in bounds]
