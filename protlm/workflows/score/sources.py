"""Where mutants come from: tables, protein files, every single position; each source yields wild types and their rows.

A source checks each row against its protein. What it yields does not depend on the model, but for residues that the
model has no token for.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from protlm import files, vocabulary
from protlm.data.mutations import Substitution, differences, mutant_name, mutated, parse_mutant, reverted
from protlm.data.nucleotides import is_nucleic_acid
from protlm.data.parsing.reader import RecordReader
from protlm.data.parsing.tables import Table
from protlm.data.records import NUCLEOTIDES, Record, shown
from protlm.errors import ProtlmError, RecordError
from protlm.inference.blosum import STANDARD_RESIDUES
from protlm.inference.marginals import check_mutants
from protlm.runtime.progress import Advance
from protlm.workflows.score.reference import ReferenceRow

MUTANT, SEQUENCE, MEASURED, FIT = "mutant", "mutated_sequence", "DMS_score", "DMS_score_bin"
"""The columns of a table that are read, as ProteinGym names them."""

_ROWS_FOR_A_PROTEIN = 100
"""First rows of a table of which most decide on the protein that it is of."""

_LARGEST_MEASUREMENT = 1e100
"""Differences and sums of such numbers are finite."""

_NOT_MEASURED = ("", "nan", "na", "n/a", "none", "null")
_FIT_VALUES = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}

Reject = Callable[[RecordError], None]
"""Raises the error of a bad row, or counts it."""


class WildType(NamedTuple):
    """The protein that the rows after it are variants of."""

    id: str
    residues: str


class Row(NamedTuple):
    """A variant.

    Attributes:
        substitutions: How it differs from the protein; None: by insertions or deletions.
        sequence: Its residues where they are given; None where they follow from the substitutions.
        measured: Its measurement; None if it has none.
        is_fit: Whether that counts as fit; None where the table does not say.
        fields: Its fields in the output, before the scores.
    """

    substitutions: tuple[Substitution, ...] | None
    sequence: str | None
    measured: float | None
    is_fit: bool | None
    fields: list[str]


@dataclass(frozen=True)
class Limits:
    """What a run can score.

    Attributes:
        lacked: Residues that the model has no token for.
        takes_indels: Whether variants may have insertions and deletions.
        offset: Difference between the numbering of mutations and that of the protein from 1.
        max_residues: Longest protein that the model's positions reach; None: any.
    """

    lacked: str
    takes_indels: bool
    offset: int
    max_residues: int | None

    def check(self, substitutions: tuple[Substitution, ...] | None, sequence: str | None) -> None:
        """Raises ValueError if a variant cannot be scored.

        Args:
            substitutions: How it differs from the protein; None: by insertions or deletions.
            sequence: Its residues where they are given.
        """
        if self.takes_indels and self.max_residues is not None and len(sequence or "") > self.max_residues:
            raise ValueError(
                f"has {len(sequence or ''):,} residues, and the positions of this model reach {self.max_residues:,}; "
                f"score long proteins in windows with --window {self.max_residues}"
            )
        if substitutions is None and not self.takes_indels:
            raise ValueError(
                "has insertions or deletions, which only --strategy pseudo-perplexity can score; or leave such rows "
                "out with --on-bad-record skip"
            )
        if not self.takes_indels:
            check_mutants(substitutions or (), self.lacked)


class ProteinFile:
    """The records of a protein file.

    Attributes:
        reader: The reader, which counts repairs and rejects.
    """

    def __init__(self, path: str | Path, reject: Reject, advance: Advance, *, skips: bool) -> None:
        self.reader = RecordReader([path], on_bad_record="skip" if skips else "error", advance=advance)
        self._path, self._reject = path, reject

    def __iter__(self) -> Iterator[Record]:
        for record in self.reader:
            if is_nucleic_acid(record.sequence.encode(), record.description):
                message = f"record {shown(record.id)} is a nucleic acid, by its header or its letters; translate it"
                self._reject(RecordError(self._path, record.line, message, reason=NUCLEOTIDES, record_id=record.id))
                continue
            yield record


def chosen_protein(records: Iterator[Record], path: str | Path, wanted: str | None) -> WildType:
    """Returns the one protein of a file, or that of the wanted id.

    Raises:
        ProtlmError: There are several proteins, or none of that id.
    """
    chosen: Record | None = None
    for number, record in enumerate(records):
        if wanted is not None and record.id == wanted:
            return WildType(record.id, record.sequence)
        if wanted is None and number:
            raise ProtlmError(f"{path}: expected one protein, got more; name the one that is mutated with --wild-type")
        chosen = record
    if wanted is not None:
        raise ProtlmError(
            f"{path}: expected a record {shown(wanted)}, as --wild-type says, got none; give its whole id"
        )
    if chosen is None:
        raise ProtlmError(f"{path}: no usable record; nothing to score")
    return WildType(chosen.id, chosen.sequence)


def single_substitutions(wild_type: WildType, offset: int) -> Iterator[Row]:
    """Yields every substitution of a standard residue of a protein by another one, position by position.

    Another residue, such as an unknown one, is hardly ever the most likely in its place: whatever replaces it would
    seem a gain.
    """
    for position, letter in enumerate(wild_type.residues):
        for mutant in STANDARD_RESIDUES:
            if letter in STANDARD_RESIDUES and mutant != letter:
                substitutions = (Substitution(position, letter, mutant),)
                yield Row(substitutions, None, None, None, [wild_type.id, mutant_name(substitutions, offset)])


def num_not_standard(residues: str) -> int:
    """Returns the number of residues other than the 20 standard ones."""
    return sum(letter not in STANDARD_RESIDUES for letter in residues)


def sequence_variants(
    records: Iterator[Record], path: str | Path, wild_type: WildType, limits: Limits, reject: Reject
) -> Iterator[Row]:
    """Yields the variants of a protein that stand in a protein file, without the protein itself."""
    passed = False
    for record in records:
        if record.id == wild_type.id and not passed:
            passed = True
            continue
        try:
            substitutions = _differences(wild_type.residues, record.sequence)
            limits.check(substitutions, record.sequence)
        except ValueError as error:
            reason = "indel" if len(record.sequence) != len(wild_type.residues) else "no_token"
            reject(RecordError(path, record.line, f"record {shown(record.id)} {error}", reason=reason))
            continue
        name = "" if substitutions is None else mutant_name(substitutions, limits.offset)
        yield Row(substitutions, record.sequence, None, None, [record.id, name])


def _differences(wild_type: str, sequence: str) -> tuple[Substitution, ...] | None:
    return differences(wild_type, sequence) if len(sequence) == len(wild_type) else None


class VariantTable:
    """The variants of one protein in a table.

    Attributes:
        columns: The columns of the table.
        fit_by: How fit variants are known: the name of the column, the threshold of the benchmark's reference file, or
            the median of the measurements.
    """

    def __init__(
        self,
        path: str | Path,
        wild_type: WildType | None,
        limits: Limits,
        reject: Reject,
        advance: Advance,
        reference: ReferenceRow | None = None,
    ) -> None:
        """Opens the table.

        Args:
            path: The table.
            wild_type: The protein; None: that of `reference`, or the one that a mutant and its sequence lead to.
            limits: What can be scored.
            reject: Raises the error of a bad row, or counts it.
            advance: Called with the bytes that are read.
            reference: What the benchmark says of this assay.

        Raises:
            ProtlmError: A file that cannot be read, or has neither mutants nor sequences.
        """
        self._table = Table(path, advance=advance)
        self._limits, self._reject, self._reference = limits, reject, reference
        self.columns = self._table.columns
        self._table.required(MUTANT, SEQUENCE)
        self._mutant, self._sequence, self._measured, self._fit = map(
            self._table.place, (MUTANT, SEQUENCE, MEASURED, FIT)
        )
        self._threshold = None if reference is None else reference.threshold
        self.fit_by = FIT if self._fit is not None else "threshold" if self._threshold is not None else "median"
        name = files.as_text(Path(path).name).partition(".")[0]
        self._rows = iter(self._table)
        if wild_type is None and reference is not None and reference.target is not None:
            wild_type = WildType(name, reference.target)
        if wild_type is None and (first := list(islice(self._rows, _ROWS_FOR_A_PROTEIN))):
            wild_type = WildType(name, self._derived(first))
            self._rows = chain(first, self._rows)
        self._wild_type = wild_type

    def __iter__(self) -> Iterator[WildType | Row]:
        """Yields the protein, and then its variants."""
        wild_type = self._wild_type
        if wild_type is None:
            return
        yield wild_type
        for line, fields in self._rows:
            try:
                self._table.check_width(line, fields)
                row = self._row(line, fields, wild_type.residues)
            except RecordError as error:
                self._reject(error)
                continue
            yield row

    def _derived(self, rows: list[tuple[int, list[str]]]) -> str:
        """Returns the protein to which the sequences and mutants of most rows lead back: one may be a bad row."""
        proteins: Counter[str] = Counter()
        first_error: ProtlmError | None = None
        mutant, sequence_place = self._mutant, self._sequence
        for line, fields in rows:
            if mutant is None or sequence_place is None:
                break
            try:
                self._table.check_width(line, fields)
                name, sequence = fields[mutant].strip(), _cleaned(fields[sequence_place])
                if name and name != sequence:
                    proteins[reverted(sequence, name, self._limits.offset)] += 1
            except RecordError as error:
                first_error = first_error or error
            except ValueError as error:
                first_error = first_error or self._error(line, str(error))
        if proteins:
            return proteins.most_common(1)[0][0]
        if first_error is not None:
            # Of the table and not of a row: none of them leads to a protein.
            raise ProtlmError(str(first_error))
        raise ProtlmError(
            f"{self._table.path}: the protein does not follow from this table, which would need the columns "
            f"{MUTANT} and {SEQUENCE}; give it as INPUT with --mutations, or --reference"
        )

    def _row(self, line: int, fields: list[str], protein: str) -> Row:
        try:
            substitutions, sequence = self._variant(fields, protein)
            self._limits.check(substitutions, sequence)
        except ValueError as error:
            raise self._error(line, str(error)) from None  # now with file and line
        measured = self._number(line, fields)
        return Row(substitutions, sequence, measured, self._is_fit(line, fields, measured), fields)

    def _variant(self, fields: list[str], protein: str) -> tuple[tuple[Substitution, ...] | None, str | None]:
        name = "" if self._mutant is None else fields[self._mutant].strip()
        sequence = "" if self._sequence is None else _cleaned(fields[self._sequence])
        # Files of insertions and deletions repeat the sequence in place of a mutant.
        if not name or (sequence and name == sequence):
            if not sequence:
                raise ValueError(f"expected a mutant such as 'A42G', got {shown(name)}")
            return _differences(protein, sequence), sequence
        substitutions = parse_mutant(name, protein, self._limits.offset)
        if sequence and mutated(protein, substitutions) != sequence:
            raise ValueError(f"its {SEQUENCE} is not the protein with {shown(name)}; check the protein and --offset")
        return substitutions, None

    def _number(self, line: int, fields: list[str]) -> float | None:
        if self._measured is None or (text := fields[self._measured].strip()).lower() in _NOT_MEASURED:
            return None
        try:
            value = float(text)
        except ValueError:
            value = np.nan  # refused below, as for other values that are no measurement
        if not abs(value) <= _LARGEST_MEASUREMENT:
            raise self._error(line, f"{MEASURED}: expected a number, or nothing, got {shown(text)}")
        return value

    def _is_fit(self, line: int, fields: list[str], measured: float | None) -> bool | None:
        if measured is None:
            return None
        if self._fit is None:
            return None if self._threshold is None else measured > self._threshold
        text = fields[self._fit].strip().lower()
        if text not in _FIT_VALUES:
            raise self._error(line, f"{FIT}: expected 0 or 1, got {shown(text)}")
        return _FIT_VALUES[text]

    def _error(self, line: int, message: str) -> RecordError:
        return RecordError(self._table.path, line, message, reason="bad_row")


def _cleaned(sequence: str) -> str:
    """Returns the residues of a field.

    Raises:
        ValueError: Something else than residues.
    """
    residues, _ = vocabulary.clean(sequence.strip().encode())
    return residues.decode()
