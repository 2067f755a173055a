"""Labels of proteins and residues, from the files in which they come: hides their formats, and joins them to sequences.

Formats: a table with a column for the label; FASTA with `KEY=label` in its headers, as biotrainer writes it; and
FASTA of label strings, a letter for each residue, beside the FASTA of the sequences, as in FLIP.
"""

import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from protlm import vocabulary
from protlm.choices import ProbeTask
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
SPLIT_NAMES = ("split", "set")
_SEQUENCE_NAMES = ("sequence", "protein", "mutated_sequence")
_ID_NAMES = ("id", "name", "accession")
_VALIDATION, _MASK = "validation", "mask"

_SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "valid": "valid", "val": "valid",
    "validation": "valid", "dev": "valid",
}  # fmt: skip
_NOTHING = ("", "nan", "na", "n/a", "none", "null")
_KEY = re.compile(r"(?:^|\s)([A-Za-z_][A-Za-z0-9_.-]*)=")
_MOST_PROTEINS = 200_000
_MOST_RESIDUES = 200_000_000
_LARGEST_VALUE = 1e100
_SHOWN_KEYS = 12


class LabelledRecord(NamedTuple):
    """A protein, or a label that waits for one.

    Attributes:
        id: Its id.
        line: Its line in the file of the labels.
        residues: Its cleaned sequence; empty where another file has it.
        label: Its label as text.
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
    """All proteins that have a label, in the order of their file.

    Attributes:
        proteins: Their sequences.
        name: Name of the label.
        labels: The label of each as text.
        lines: The line of each in the file of the labels.
        splits: The split of each; empty where the file names none.
        masks: The mask of each; empty for none.
        is_of_residues: Whether a label is a string of a letter for each residue.
        left_out: Number of proteins without label, labels without split and so on, by reason.
        repairs: Number of repaired letters, by rule.
    """

    proteins: ProteinStore
    name: str
    labels: list[str]
    lines: list[int]
    splits: list[str]
    masks: list[str]
    is_of_residues: bool = False
    left_out: Counter[str] = field(default_factory=Counter)
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
        raise ProtlmError(f"{request.labels}: no label; nothing to probe")
    labelled = LabelledProteins(
        proteins=store,
        name=reader.name,
        labels=[record.label for record in kept],
        lines=[record.line for record in kept],
        splits=[record.split for record in kept],
        masks=[record.mask for record in kept],
        left_out=reader.left_out,
        repairs=reader.repairs,
    )
    _complete_splits(request, labelled)
    labelled.is_of_residues = _is_of_residues(request, labelled, is_of_strings=reader.is_of_strings)
    return labelled


def numbers_of(request: ProbeRequest, labelled: LabelledProteins) -> np.ndarray | None:
    """Returns the labels as numbers, float64; None where they are classes.

    With `--task auto` labels are values if all of them are numbers, but for 0 and 1 alone.

    Raises:
        RecordError: `--task regression` of a label that is no number.
    """
    if request.task == "classification":
        return None
    values = np.empty(len(labelled.labels))
    for place, text in enumerate(labelled.labels):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not abs(value) <= _LARGEST_VALUE:
            if request.task == "auto":
                return None
            message = f"--task regression: expected a number as {labelled.name}, got {shown(text)}"
            raise RecordError(request.labels, labelled.lines[place], message)
        values[place] = value
    if request.task == "auto" and set(np.unique(values)) <= {0.0, 1.0}:
        return None
    return values


class _Reader:
    """Reads the files of a request, once.

    Attributes:
        name: Name of the label.
        is_of_strings: Whether the labels are FASTA of label strings.
        left_out: What was left out, by reason.
        repairs: Number of repaired letters, by rule.
    """

    def __init__(self, request: ProbeRequest, start_progress: StartProgress) -> None:
        self.name = request.label or LABEL_NAMES[0]
        self.is_of_strings = False
        self.left_out: Counter[str] = Counter()
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
        else:
            records = self._of_headers()
        if self._request.sequences is not None:
            records = self._joined(records)
        masks = {} if self._request.mask is None else self._masks(self._request.mask)
        for number, record in enumerate(records):
            self._num_residues += len(record.residues)
            if number == _MOST_PROTEINS or self._num_residues > _MOST_RESIDUES:
                raise ProtlmError(
                    f"{self._path}: more than {_MOST_PROTEINS:,} proteins, or {_MOST_RESIDUES:,} residues, with a "
                    "label; a probe needs no more: give a sample of them"
                )
            yield record._replace(mask=self._mask_of(record, masks))

    def _masks(self, path: Path) -> dict[str, LabelledRecord]:
        masks = {record.id: record for record in self._of_strings(path)}
        for record in masks.values():
            if set(record.label) - {"0", "1"}:
                raise RecordError(path, record.line, f"expected 0 and 1 alone as the mask of {shown(record.id)}")
        return masks

    def _mask_of(self, record: LabelledRecord, masks: dict[str, LabelledRecord]) -> str:
        mask = record.mask
        if masks:
            found = next((masks[name] for name in _names_of(record.id) if name in masks), None)
            if found is None:
                raise ProtlmError(f"{self._request.mask}: expected a mask of {shown(record.id)}, got none")
            mask = found.label
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
        split, mask, validation = _first(places, SPLIT_NAMES), places.get(_MASK), places.get(_VALIDATION)
        for line, fields in table:
            table.check_width(line, fields)
            text = fields[label].strip()
            if text.lower() in _NOTHING:
                self.left_out["without a label"] += 1
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
        if self._request.label is not None:
            return table.required(self._request.label)
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
        found, first_keys = False, ""
        reader = RecordReader([self._path], advance=self._advance)
        for record in reader:
            _check_protein(self._path, record.line, record.id, record.sequence, record.description)
            values = _header_values(record.description)
            first_keys = first_keys or ", ".join(list(values)[:_SHOWN_KEYS])
            key = next((name for name in wanted if name in values), None)
            if key is None or values[key].lower() in _NOTHING:
                self.left_out["without a label"] += 1
                continue
            if not found and self._request.label is None:
                self.name = key
            found = True
            split = self._split(
                next((values[name] for name in SPLIT_NAMES if name in values), ""), values.get(_VALIDATION, ""),
                record.line,
            )  # fmt: skip
            yield LabelledRecord(record.id, record.line, record.sequence, values[key], split, values.get(_MASK, ""))
        self.repairs.update(reader.repairs)
        if not found:
            keys = f"got {first_keys}" if first_keys else "got none"
            raise ProtlmError(
                f"{self._path}: expected {' or '.join(f'{name}=…' for name in wanted)} in the headers, {keys}; name "
                "the key of the labels with --label, or give the proteins of label strings with --sequences"
            )

    def _of_strings(self, path: Path) -> Iterator[LabelledRecord]:
        """Yields the records of FASTA whose lines are no residues but labels, or a mask."""
        header, first_line, lines = "", 0, list[str]()
        for start, stretch in LabelText(path).whole_lines():
            for number, text in enumerate(stretch.decode().splitlines(), start=start):
                if text.startswith(">"):
                    if first_line:
                        yield self._string(path, header, first_line, lines)
                    header, first_line, lines = text[1:], number, []
                elif text.strip() and not first_line:
                    raise RecordError(path, number, "expected a line `>id …`, got text before the first of them")
                else:
                    lines.append(text.strip())
        if first_line:
            yield self._string(path, header, first_line, lines)

    def _string(self, path: Path, header: str, line: int, lines: Sequence[str]) -> LabelledRecord:
        name, _, description = header.strip().partition(" ")
        if not name:
            raise RecordError(path, line, "expected an id behind `>`, got none")
        values = _header_values(description)
        split = next((values[key] for key in SPLIT_NAMES if key in values), "")
        text = "".join(lines)
        if not text:
            raise RecordError(path, line, f"expected a letter for each residue of {shown(name)}, got none")
        return LabelledRecord(name, line, "", text, self._split(split, values.get(_VALIDATION, ""), line), "")

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
                self.left_out["without a label"] += 1
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
        text = text.strip().lower()
        if text in _NOTHING:
            return ""
        if text not in _SPLITS:
            raise RecordError(self._path, line, f"expected train, valid or test as its split, got {shown(text)}")
        split = _SPLITS[text]
        return "valid" if split == "train" and validation.strip().lower() in ("true", "1", "1.0") else split

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


def _complete_splits(request: ProbeRequest, labelled: LabelledProteins) -> None:
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


def _is_of_residues(request: ProbeRequest, labelled: LabelledProteins, *, is_of_strings: bool) -> bool:
    """Returns whether labels are strings of a letter for each residue, and checks that they are."""
    task: ProbeTask = request.task
    lengths = labelled.proteins.lengths.tolist()
    pairs = zip(labelled.labels, lengths, strict=True)
    if task in ("classification", "regression"):
        return False
    if task == "auto" and not is_of_strings and not any(labelled.masks) and not request.ignore:
        # A word that happens to be as long as its protein is one, but not all of them.
        return all(len(label) == length for label, length in pairs)
    for place, (label, length) in enumerate(pairs):
        if len(label) != length:
            raise RecordError(
                request.labels, labelled.lines[place],
                f"the labels of {shown(labelled.proteins.id(place))}: expected {length:,} letters, one for each "
                f"residue, got {len(label):,}",
            )  # fmt: skip
    return True
