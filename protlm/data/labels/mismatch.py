"""Why a label file does not fit its records: the known ways in which programs write other ids, told by examples."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from protlm.data.records import shown

_CD_HIT_LETTERS = 19


@dataclass(frozen=True, slots=True)
class Mismatch:
    """An id of each side, and the likely reason why they are not the same.

    Attributes:
        record_id: Id of a record that the file does not label.
        label_id: Id in the file.
        cause: The likely reason and the next step, empty if it is none of the known ones.
    """

    record_id: str
    label_id: str
    cause: str

    def __str__(self) -> str:
        ids = f"the record {shown(self.record_id)} is not in it, and it has {shown(self.label_id)}"
        return f"{ids}: {self.cause}" if self.cause else ids


def mismatch_of(record_ids: Sequence[str], examples: Sequence[tuple[str, str]], known: Iterable[str]) -> Mismatch:
    """Returns the likeliest reason why records have no label.

    Args:
        record_ids: Ids of some records without label, at least one.
        examples: Ids of the label file, each with its label; at least one.
        known: Ids of some records that have a label.
    """
    matched = {part for record_id in known for part in (record_id, *record_id.split("|"))}
    others = [pair for pair in examples if pair[0] not in matched]
    if not others:
        return Mismatch(record_ids[0], examples[0][0], "it seems to be made from fewer records")
    for find in _CAUSES:
        if (found := next(find(record_ids, others), None)) is not None:
            return found
    return Mismatch(record_ids[0], others[0][0], "")


def _cut(record_ids: Sequence[str], examples: Sequence[tuple[str, str]]) -> Iterator[Mismatch]:
    beginnings = {name[:_CD_HIT_LETTERS]: name for name in record_ids if len(name) > _CD_HIT_LETTERS}
    for name, _ in examples:
        if name in beginnings:
            cause = f"CD-HIT cuts names at {_CD_HIT_LETTERS} letters; run it again with `-d 0`"
            yield Mismatch(beginnings[name], name, cause)


def _written_otherwise(record_ids: Sequence[str], examples: Sequence[tuple[str, str]]) -> Iterator[Mismatch]:
    for name, _ in examples:
        if name[:1] in ("'", '"'):
            yield Mismatch(record_ids[0], name, "its ids are quoted; write them without quotes, first words only")
        elif name.startswith(">"):
            yield Mismatch(record_ids[0], name, "its ids begin with `>`; write them without")
        elif len(name.split()) != 1 or name.strip() != name:
            yield Mismatch(record_ids[0], name, "it has whole headers; an id is the first word of its header")


def _swapped(record_ids: Sequence[str], examples: Sequence[tuple[str, str]]) -> Iterator[Mismatch]:
    wanted = set(record_ids)
    for name, label in examples:
        if label in wanted and label != name:
            yield Mismatch(label, name, "that record stands in the column of labels; are the columns swapped?")


def _numbers(record_ids: Sequence[str], examples: Sequence[tuple[str, str]]) -> Iterator[Mismatch]:
    if all(name.isdecimal() for name, _ in examples) and not all(name.isdecimal() for name in record_ids):
        cause = "its ids are numbers of rows, as in MMseqs2's own databases; write names with `mmseqs createtsv`"
        yield Mismatch(record_ids[0], examples[0][0], cause)


def _parts(record_ids: Sequence[str], examples: Sequence[tuple[str, str]]) -> Iterator[Mismatch]:
    by_part = {part: name for name in record_ids for part in name.split("|") if part and part != name}
    for name, _ in examples:
        if name in by_part:
            cause = (
                "it has only a part of that id, as MMseqs2 writes it; write whole ids, or let --cluster-with mmseqs "
                "make the clusters"
            )
            yield Mismatch(by_part[name], name, cause)
    wanted = set(record_ids)
    for name, _ in examples:
        if (part := next((part for part in name.split("|") if part in wanted), None)) is not None:
            yield Mismatch(part, name, "the records have only a part of that id; write the ids of the records")


def _equal_but_for(
    change: Callable[[str], str], cause: str
) -> Callable[[Sequence[str], Sequence[tuple[str, str]]], Iterator[Mismatch]]:
    def find(record_ids: Sequence[str], examples: Sequence[tuple[str, str]]) -> Iterator[Mismatch]:
        changed = {change(name): name for name in record_ids}
        for name, _ in examples:
            if change(name) in changed:
                yield Mismatch(changed[change(name)], name, cause)

    return find


def _without_version(name: str) -> str:
    stem, dot, version = name.rpartition(".")
    return stem if dot and version.isdecimal() else name


_CAUSES = (
    _cut,
    _written_otherwise,
    _swapped,
    _numbers,
    _parts,
    _equal_but_for(_without_version, "they differ by their version; write the ids of the records"),
    _equal_but_for(str.casefold, "they differ by upper and lower case; write the ids of the records"),
)
