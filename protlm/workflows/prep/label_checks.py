"""Whether the labels fit the records: what labels nothing, or not what was meant, is told before a dataset is made."""

from collections.abc import Iterator, Sequence

import numpy as np

from protlm.data import splits
from protlm.data.building.pieces import Piece, PieceFile
from protlm.data.building.selection import FIRST_REJECT, NO_SPLIT, NOT_LISTED, Selection
from protlm.data.labels.labels import Labels
from protlm.data.labels.mismatch import mismatch_of
from protlm.data.records import shown
from protlm.data.storage.manifest import PrepOptions
from protlm.errors import ProtlmError, RecordError
from protlm.workflows.prep.reading import LabelFiles

# Enough to find the known causes among, few enough to keep.
_EXAMPLES = 1000


def check_labels(
    by_source: Sequence[Sequence[PieceFile]],
    chosen: Selection,
    options: PrepOptions,
    labels: LabelFiles,
    ood_names: Sequence[str],
) -> tuple[str, ...]:
    """Compares the labels with the records that they are for.

    Args:
        by_source: The pieces of each file.
        chosen: The decisions on their records.
        options: The options that shape the content.
        labels: The label files.
        ood_names: The families to hold out, as the user named them.

    Returns:
        A note for each file that labels only some of the records.

    Raises:
        ProtlmError: A file that labels none of the records, a record without a cluster in a split by cluster that does
            not allow it, or a family to hold out that no record has.
        RecordError: An id that is repeated, where a label file says by id to which split a record belongs.
    """
    notes = []
    pieces = [piece for source_pieces in by_source for piece in source_pieces]
    kinds = (("cluster", "cluster_id", labels.clusters), ("family", "family", labels.families),
             ("split", "split", labels.splits))  # fmt: skip
    for kind, column, table in kinds:
        if table is not None and (note := _coverage(pieces, chosen, kind, column, table)):
            notes.append(note)
    by_id = {kind: table for kind, _, table in kinds if table is not None and not table.by_sequence}
    if by_id and (shared := _shared_id(by_source, chosen)) is not None:
        deciding = by_id.get({"file": "split"}.get(options.split, options.split))
        if deciding is not None:
            raise RecordError(
                shared.path,
                shared.line,
                f"{shared.message}, and {deciding.file_name} tells them apart by id; give each an id of its own, such "
                "as by replacing the blanks in headers",
                reason=shared.reason,
                record_id=shared.record_id,
            )
        names = " and ".join(table.file_name for table in by_id.values())
        notes.append(f"{shared}, and {names} gives both the same label; give each an id of its own")
    if options.split == "cluster":
        _check_clustered(chosen, options, notes)
    for name in ood_names:
        if splits.held_out_families([name]).isdisjoint(chosen.held_out):
            raise ProtlmError(f"ood_families: no record has the family {shown(name)}{_families_hint(pieces)}")
    return tuple(notes)


def _coverage(pieces: Sequence[PieceFile], chosen: Selection, kind: str, column: str, table: Labels) -> str:
    """Returns a note if a file labels only some of the records, empty if it labels all; raises if it labels none."""
    num_records = num_missing = 0
    missing: list[str] = []
    known: list[str] = []
    for number, piece_file in enumerate(pieces):
        if not piece_file.num_records:
            continue
        piece, codes = Piece(piece_file.path), chosen.codes_of(number)
        is_wanted = (codes < FIRST_REJECT) | (codes == NOT_LISTED)
        is_labelled = _is_labelled(piece, column)
        num_records += int(is_wanted.sum())
        num_missing += int((is_wanted & ~is_labelled).sum())
        ids = piece.strings("ids")
        for examples, is_one in ((missing, is_wanted & ~is_labelled), (known, is_labelled)):
            examples += [ids[place] for place in np.flatnonzero(is_one)[: _EXAMPLES - len(examples)].tolist()]
    if not num_missing:
        return ""
    told = f"{table.file_name}: gives no record a {kind}"
    if num_missing < num_records:
        told = f"{table.file_name}: {num_missing:,} of {num_records:,} records have no {kind}"
    # What was found by sequence does not depend on ids.
    if not table.by_sequence:
        told += f": {mismatch_of(missing, table.examples, known)}"
    if num_missing == num_records:
        raise ProtlmError(f"{told}; is it the file of these proteins?")
    return told


def _is_labelled(piece: Piece, column: str) -> np.ndarray:
    if column == "split":
        is_listed: np.ndarray = piece["split"] != NO_SPLIT
        return is_listed
    if f"{column}/offsets" not in piece:
        return np.zeros(len(piece.lengths), dtype=bool)
    return np.diff(piece[f"{column}/offsets"]) > 0


def _check_clustered(chosen: Selection, options: PrepOptions, notes: Sequence[str]) -> None:
    if chosen.num_unclustered == _num_kept(chosen) > 0:
        raise ProtlmError("split by cluster: no record is in a cluster; give --clusters, or --cluster-with mmseqs")
    if chosen.num_unclustered and options.unclustered is None:
        raise ProtlmError(
            f"split by cluster: {chosen.num_unclustered:,} of {_num_kept(chosen):,} records are in no cluster, such as "
            f"{shown(chosen.first_unclustered)}; a relative of each may get into another split: cluster them too, or "
            "allow it with --unclustered random (each drawn for itself) or train"
            + "".join(f"; {note}" for note in notes)
        )


def _num_kept(chosen: Selection) -> int:
    return sum(count for code, count in chosen.counts.items() if code < FIRST_REJECT)


def _shared_id(by_source: Sequence[Sequence[PieceFile]], chosen: Selection) -> RecordError | None:
    """Returns the error of the first record whose id an earlier one of another sequence has; None if there is none."""
    repeated = _repeated_ids([piece for pieces in by_source for piece in pieces], chosen)
    highs = np.array([high for high, _ in repeated], dtype=np.uint64)
    sequences: dict[tuple[int, int], tuple[int, int]] = {}
    number = 0
    for pieces in by_source:
        num_lines = 0
        for piece_file in pieces:
            if repeated and piece_file.num_records:
                piece = Piece(piece_file.path)
                places = np.flatnonzero(
                    np.isin(piece["id_digest/high"], highs) & (chosen.codes_of(number) < FIRST_REJECT)
                )
                rows = zip(
                    places.tolist(), _digests(piece, "id", places), _digests(piece, "sequence", places), strict=True
                )
                for place, record_id, sequence in rows:
                    if record_id in repeated and sequences.setdefault(record_id, sequence) != sequence:
                        name, line = piece.strings("ids")[place], int(piece["lines"][place]) + num_lines
                        message = f"another protein has the id {shown(name)} too"
                        return RecordError(
                            piece_file.path_of_source, line, message, reason="repeated_id", record_id=name
                        )
            num_lines += piece_file.num_lines
            number += 1
    return None


def _repeated_ids(pieces: Sequence[PieceFile], chosen: Selection) -> set[tuple[int, int]]:
    """Returns the digests of the ids that several kept records have."""
    repeated: set[tuple[int, int]] = set()
    for number, piece_file in enumerate(pieces):
        start = int(chosen.starts[number])
        if places := sorted(chosen.numbers_between(start, start + piece_file.num_records)):
            repeated.update(_digests(Piece(piece_file.path), "id", np.array(places) - start))
    return repeated


def _digests(piece: Piece, kind: str, places: np.ndarray) -> list[tuple[int, int]]:
    high, low = (piece[f"{kind}_digest/{half}"][places].tolist() for half in ("high", "low"))
    return list(zip(high, low, strict=True))


def _families_hint(pieces: Sequence[PieceFile]) -> str:
    first = next(_families(pieces), None)
    return "; no record has a family: give --families" if first is None else f"; there are such as {shown(first)}"


def _families(pieces: Sequence[PieceFile]) -> Iterator[str]:
    for piece_file in pieces:
        if piece_file.num_records and "family/offsets" in (piece := Piece(piece_file.path)):
            yield from (family for joined in piece.strings("family") if joined for family in joined.split(";"))
