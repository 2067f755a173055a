"""Labels of proteins and residues, from the files in which they come: hides their formats, and joins them to sequences.

Formats: a table with a column for the label; FASTA with `KEY=label` in its headers, as biotrainer writes it; and
FASTA of label strings, a letter for each residue, beside the FASTA of the sequences, as in FLIP.
"""

import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from protlm import vocabulary
from protlm.data.labels.rows import LabelText
from protlm.data.nucleotides import is_nucleic_acid
from protlm.data.parsing.reader import RecordReader
from protlm.data.parsing.tables import Table
from protlm.data.records import NUCLEOTIDES, shown
from protlm.data.storage.protein_store import ProteinStore, write_proteins
from protlm.errors import ProtlmError, RecordError
from protlm.runtime.progress import StartProgress, no_progress
from protlm.workflows.probe.request import ProbeRequest

LABEL_NAMES = ("label", "target")
_SPLIT_COLUMNS, _SPLIT_KEY = ("split", "set"), "set"
"""A header may have a `split=` that means something else, as those of TrEMBL do."""
_SEQUENCE_NAMES = ("sequence", "protein", "mutated_sequence")
_ID_NAMES = ("id", "name", "accession")
_VALIDATION, _MASK = "validation", "mask"

_SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "valid": "valid", "val": "valid",
    "validation": "valid", "dev": "valid",
}  # fmt: skip
_NO_LABEL = ("", "nan", "na", "n/a")
_NO_SPLIT = (*_NO_LABEL, "none", "null")
_IS_VALIDATION = ("true", "1", "1.0", "yes")
_IS_NO_VALIDATION = (*_NO_SPLIT, "false", "0", "0.0", "no")
_KEY = re.compile(r"(?:^|\s)([^\W\d][\w.-]*)=")
_MOST_PROTEINS = 200_000
_MOST_RESIDUES = 200_000_000
_SHOWN_KEYS = 12


class LabelledRecord(NamedTuple):
    """A protein, or a label that waits for one.

    Attributes:
        id: Its id.
        line: Its line in the file of the labels.
        residues: Its cleaned sequence; empty where another file has it.
        label: Its label as text, with its blanks: one may stand for a residue.
        split: `train`, `valid` or `test`; empty where the file names none.
        mask: 0 or 1 for each residue; empty for none.
    """

    id: str
    line: int
    residues: str
    label: str
    split: str
    mask: str


@dataclass
class LabelledProteins:
    """The proteins that have a label, in the order of their file.

    Attributes:
        proteins: Their sequences.
        ids: The id of each as given; in `proteins` those of a repeated id are numbered.
        name: Name of the label.
        labels: The label of each as text.
        lines: The line of each in the file of the labels.
        splits: The split of each; empty where the file names none.
        masks: The mask of each; empty for none.
        is_of_strings: Whether the labels are FASTA of label strings.
        num_unlabelled: Proteins that were left out, as they have no label.
        num_unused_masks: Masks of proteins that have no label.
        repairs: Number of repaired letters, by rule.
    """

    proteins: ProteinStore
    ids: list[str]
    name: str
    labels: list[str]
    lines: list[int]
    splits: list[str]
    masks: list[str]
    is_of_strings: bool = False
    num_unlabelled: int = 0
    num_unused_masks: int = 0
    repairs: Counter[str] = field(default_factory=Counter)


def read_labels(request: ProbeRequest, folder: Path, start_progress: StartProgress = no_progress) -> LabelledProteins:
    """Reads labels and sequences into a new store in a folder.

    Args:
        request: The files and how they are read.
        folder: Where the store is made.
        start_progress: Starts the stage `read` (bytes).

    Raises:
        ProtlmError: A file that cannot be read, labels without sequences, a label that is none, or no label at all.
    """
    reader = _Reader(request, start_progress)
    kept: list[LabelledRecord] = []

    def proteins() -> Iterator[tuple[str, np.ndarray]]:
        for record in reader.records():
            kept.append(record)
            yield record.id, vocabulary.encode(record.residues.encode())

    store = write_proteins(folder / "proteins", proteins())
    if not kept:
        shutil.rmtree(folder / "proteins")
        of_unlabelled = f" among {reader.num_unlabelled:,} proteins" if reader.num_unlabelled else ""
        raise ProtlmError(f"{request.labels}: no label{of_unlabelled}; nothing to probe")
    labelled = LabelledProteins(
        proteins=store,
        ids=[record.id for record in kept],
        name=reader.name,
        labels=[record.label for record in kept],
        lines=[record.line for record in kept],
        splits=[record.split for record in kept],
        masks=[record.mask for record in kept],
        is_of_strings=reader.is_of_strings,
        num_unlabelled=reader.num_unlabelled,
        num_unused_masks=reader.num_unused_masks,
        repairs=reader.repairs,
    )
    _check_splits(request, labelled)
    return labelled


class _Reader:
    """Reads the files of a request, once.

    Attributes:
        name: Name of the label.
        is_of_strings: Whether the labels are FASTA of label strings.
        num_unlabelled: Proteins without a label so far.
        num_unused_masks: Masks of proteins without a label, once all was read.
        repairs: Number of repaired letters, by rule.
    """

    def __init__(self, request: ProbeRequest, start_progress: StartProgress) -> None:
        self.name = request.label or LABEL_NAMES[0]
        self.is_of_strings = False
        self.num_unlabelled = self.num_unused_masks = 0
        self.repairs: Counter[str] = Counter()
        self._request, self._path = request, request.labels
        size = sum(path.stat().st_size for path in (request.labels, request.sequences) if path is not None)
        self._advance = start_progress("read", size)
        self._num_residues = 0

    def records(self) -> Iterator[LabelledRecord]:
        """Yields every protein that has a label."""
        if not LabelText(self._path).start.startswith(b">"):
            records = self._of_table()
        elif self._request.sequences is not None:
            self.is_of_strings = True
            records = self._of_strings(self._path)
            self._advance(self._path.stat().st_size)
        else:
            records = self._of_headers()
        if self._request.sequences is not None:
            records = self._joined(records)
        masks = None if self._request.mask is None else self._masks(self._request.mask)
        for number, record in enumerate(records):
            self._num_residues += len(record.residues)
            if number == _MOST_PROTEINS or self._num_residues > _MOST_RESIDUES:
                raise ProtlmError(
                    f"{self._path}: more than {_MOST_PROTEINS:,} proteins, or {_MOST_RESIDUES:,} residues, with a "
                    "label; a probe needs no more: give a sample of them"
                )
            yield record._replace(mask=self._mask_of(record, masks))
        self.num_unused_masks = len(masks or ())

    def _masks(self, path: Path) -> dict[str, str]:
        masks: dict[str, str] = {}
        for record in self._of_strings(path):
            if record.id in masks:
                raise RecordError(path, record.line, f"a second mask of {shown(record.id)}; leave one out")
            if set(record.label) - {"0", "1"}:
                raise RecordError(path, record.line, f"expected 0 and 1 alone as the mask of {shown(record.id)}")
            masks[record.id] = record.label
        return masks

    def _mask_of(self, record: LabelledRecord, masks: dict[str, str] | None) -> str:
        """Returns the mask of a protein, checked; it is taken out of those of the mask file."""
        mask = record.mask
        if masks is not None:
            name = next((name for name in _names_of(record.id) if name in masks), None)
            if name is None:
                raise ProtlmError(f"{self._request.mask}: expected a mask of {shown(record.id)}, got none")
            mask = masks.pop(name)
        if mask and (set(mask) - {"0", "1"} or len(mask) != len(record.residues)):
            raise RecordError(
                self._path, record.line,
                f"the mask of {shown(record.id)}: expected {len(record.residues):,} times 0 or 1, one for each residue",
            )  # fmt: skip
        return mask

    def _of_table(self) -> Iterator[LabelledRecord]:
        separate = self._request.sequences is not None
        table = Table(self._path, advance=self._advance)
        places = {name.lower(): place for place, name in reversed(list(enumerate(table.columns)))}
        label = self._label_place(table, places)
        sequence = None if separate else _first(places, _SEQUENCE_NAMES)
        if sequence is None and not separate:
            # Raises, with the columns that there are.
            table.required(*_SEQUENCE_NAMES)
        record_id = _first(places, _ID_NAMES)
        if separate and record_id is None:
            table.required(*_ID_NAMES)
        split, mask, validation = _first(places, _SPLIT_COLUMNS), places.get(_MASK), places.get(_VALIDATION)
        for line, fields in table:
            table.check_width(line, fields)
            text = fields[label]
            if text.strip().lower() in _NO_LABEL:
                self.num_unlabelled += 1
                continue
            yield LabelledRecord(
                id=f"line {line}" if record_id is None else fields[record_id].strip(),
                line=line,
                residues="" if sequence is None else self._cleaned(fields[sequence], line),
                label=text,
                split=self._split(
                    "" if split is None else fields[split], "" if validation is None else fields[validation], line
                ),
                mask="" if mask is None else fields[mask].strip(),
            )

    def _label_place(self, table: Table, places: dict[str, int]) -> int:
        wanted = self._request.label
        if wanted is not None:
            return places[wanted.lower()] if wanted.lower() in places else table.required(wanted)
        place = _first(places, LABEL_NAMES)
        if place is None:
            names = ", ".join(shown(name) for name in table.columns[:_SHOWN_KEYS])
            raise ProtlmError(
                f"{self._path}: expected a column {' or '.join(LABEL_NAMES)}, got {names}; name yours with --label"
            )
        self.name = table.columns[place]
        return place

    def _of_headers(self) -> Iterator[LabelledRecord]:
        wanted = LABEL_NAMES if self._request.label is None else (self._request.label.lower(),)
        is_known, first_keys = False, ""
        reader = RecordReader([self._path], advance=self._advance)
        for record in reader:
            _check_protein(self._path, record.line, record.id, record.sequence, record.description)
            values = _header_values(record.description)
            first_keys = first_keys or ", ".join(list(values)[:_SHOWN_KEYS])
            key = next((name for name in wanted if name in values), None)
            if key is None or values[key].lower() in _NO_LABEL:
                is_known |= key is not None
                self.num_unlabelled += 1
                continue
            if self._request.label is None:
                self.name = key
            is_known = True
            split = self._split(values.get(_SPLIT_KEY, ""), values.get(_VALIDATION, ""), record.line)
            yield LabelledRecord(record.id, record.line, record.sequence, values[key], split, values.get(_MASK, ""))
        self.repairs.update(reader.repairs)
        if not is_known:
            keys = f"got {first_keys}" if first_keys else "got none"
            raise ProtlmError(
                f"{self._path}: expected {' or '.join(f'{name}=…' for name in wanted)} in the headers, {keys}; name "
                "the key of the labels with --label, or give the proteins of label strings with --sequences"
            )

    def _of_strings(self, path: Path) -> Iterator[LabelledRecord]:
        """Yields the records of FASTA whose lines are no residues but labels, or a mask."""
        header, first_line, lines = "", 0, list[str]()
        for start, stretch in LabelText(path).whole_lines():
            for number, text in enumerate(stretch.decode().removesuffix("\n").split("\n"), start=start):
                if text.startswith(">"):
                    if first_line:
                        yield self._string(path, header, first_line, lines)
                    header, first_line, lines = text[1:], number, []
                    if not header.strip():
                        raise RecordError(path, number, "expected an id behind `>`, got none")
                elif text.strip() and not first_line:
                    raise RecordError(path, number, "expected a line `>id …`, got text before the first of them")
                else:
                    lines.append(text)
        if first_line:
            yield self._string(path, header, first_line, lines)

    def _string(self, path: Path, header: str, line: int, lines: Sequence[str]) -> LabelledRecord:
        name, *rest = header.split(maxsplit=1)
        text = "".join(lines)
        if not text.strip():
            raise RecordError(path, line, f"expected a letter for each residue of {shown(name)}, got none")
        # A mask has no split.
        values = _header_values(rest[0] if rest and path == self._path else "")
        split = self._split(values.get(_SPLIT_KEY, ""), values.get(_VALIDATION, ""), line)
        return LabelledRecord(name, line, "", text, split, "")

    def _joined(self, records: Iterator[LabelledRecord]) -> Iterator[LabelledRecord]:
        """Yields labels with the sequences that another file has, in the order of that file."""
        path = self._request.sequences
        assert path is not None
        waiting: dict[str, LabelledRecord] = {}
        for record in records:
            if record.id in waiting:
                raise RecordError(self._path, record.line, f"a second label of {shown(record.id)}; leave one out")
            if len(waiting) == _MOST_PROTEINS:
                raise ProtlmError(f"{self._path}: more than {_MOST_PROTEINS:,} labels; give a sample of them")
            waiting[record.id] = record
        reader = RecordReader([path], advance=self._advance)
        for protein in reader:
            name = next((name for name in _names_of(protein.id) if name in waiting), None)
            if name is None:
                self.num_unlabelled += 1
                continue
            _check_protein(path, protein.line, protein.id, protein.sequence, protein.description)
            yield waiting.pop(name)._replace(id=protein.id, residues=protein.sequence)
        self.repairs.update(reader.repairs)
        if waiting:
            first = next(iter(waiting.values()))
            raise RecordError(
                self._path, first.line,
                f"labels without sequences: {len(waiting):,}, the first of {shown(first.id)}; {path} has none of that "
                "id: add it, or remove the label",
            )  # fmt: skip

    def _split(self, text: str, validation: str, line: int) -> str:
        """Returns the split of a protein by what its row says; `validation` marks those of train that select."""
        text, validation = text.strip().lower(), validation.strip().lower()
        if validation not in _IS_VALIDATION and validation not in _IS_NO_VALIDATION:
            raise RecordError(self._path, line, f"validation: expected True or False, got {shown(validation)}")
        if text in _NO_SPLIT:
            return ""
        if text not in _SPLITS:
            raise RecordError(self._path, line, f"expected train, valid or test as its split, got {shown(text)}")
        split = _SPLITS[text]
        return "valid" if split == "train" and validation in _IS_VALIDATION else split

    def _cleaned(self, sequence: str, line: int) -> str:
        try:
            residues, repairs = vocabulary.clean(sequence.strip().encode())
        except ValueError as error:
            raise RecordError(self._path, line, f"its sequence: {error}") from None  # with the place in the file
        if not residues:
            raise RecordError(self._path, line, "expected a sequence, got none")
        _check_protein(self._path, line, f"line {line}", residues.decode(), "")
        self.repairs.update(repairs)
        return residues.decode()


def _check_protein(path: Path, line: int, record_id: str, residues: str, description: str) -> None:
    if is_nucleic_acid(residues.encode(), description):
        message = f"record {shown(record_id)} is a nucleic acid, by its header or its letters; translate or remove it"
        raise RecordError(path, line, message, reason=NUCLEOTIDES, record_id=record_id)


def _first(places: dict[str, int], names: Sequence[str]) -> int | None:
    return next((places[name] for name in names if name in places), None)


def _names_of(record_id: str) -> tuple[str, ...]:
    """Returns the names under which a label of a protein may stand: its id, or parts of a UniProtKB id."""
    fields = record_id.split("|")
    return (record_id, *fields[1:]) if len(fields) == 3 and fields[0] in ("sp", "tr") else (record_id,)


def _header_values(description: str) -> dict[str, str]:
    """Returns the values of `KEY=value` in a header by their keys in lower case; a value ends before the next key."""
    matches = list(_KEY.finditer(description))
    ends = [*(match.start() for match in matches[1:]), len(description)][: len(matches)]
    return {match[1].lower(): description[match.end() : end].strip() for match, end in zip(matches, ends, strict=True)}


def _check_splits(request: ProbeRequest, labelled: LabelledProteins) -> None:
    """Checks that either every protein has a split, or none."""
    named = set(labelled.splits)
    if named <= {""}:
        return
    if "" in named:
        place = labelled.splits.index("")
        raise RecordError(
            request.labels, labelled.lines[place],
            f"expected a split for {shown(labelled.proteins.id(place))} too, as others have one: train, valid or test; "
            "or remove it",
        )  # fmt: skip
    for name in ("train", "test"):
        if name not in named:
            raise ProtlmError(
                f"{request.labels}: expected proteins of the splits train and test, got {', '.join(sorted(named))}"
            )
