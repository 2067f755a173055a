"""What is scored is read once: proteins into a store, rows into a file, and the positions that the rows touch."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import xxhash

from protlm import files, vocabulary
from protlm.data.mutations import Substitution, mutant_name, mutated, parse_mutant
from protlm.data.parsing.alignment import count_alignment
from protlm.data.parsing.sources import STDIN
from protlm.data.storage.protein_store import ProteinStore, write_proteins
from protlm.data.strings import bounds_of
from protlm.errors import ProtlmError, RecordError
from protlm.inference.site_frequencies import SiteFrequencies
from protlm.pretrained.model_description import ModelDescription
from protlm.runtime.progress import Advance, StartProgress, no_progress
from protlm.workflows.score.folder import VARIANTS_NAME, write_read_inputs
from protlm.workflows.score.heat_map import MOST_POSITIONS
from protlm.workflows.score.reference import ReferenceRow, read_reference
from protlm.workflows.score.request import ScoreRequest
from protlm.workflows.score.sites import Sites
from protlm.workflows.score.sources import (
    Limits,
    ProteinFile,
    Row,
    VariantTable,
    WildType,
    chosen_protein,
    num_not_standard,
    sequence_variants,
    single_substitutions,
)

_ID, _MUTANT = "id", "mutant"
_SUFFIXES = re.compile(r"\.(csv|tsv)(\.gz)?$", re.IGNORECASE)
_MOST_SITES = 10**9
"""Positions of one run: with a forward pass for each, months of work. Their results are 4 or 132 bytes each."""


@dataclass(frozen=True)
class Assay:
    """The rows that become one table of scores.

    Attributes:
        name: Name of its file; empty for the only one of a run.
        columns: The columns of its rows.
        fit_by: How fit variants are known.
        protein: Name of its protein in the reference file of the benchmark; None without one.
        function: Type of function there.
    """

    name: str
    columns: list[str]
    fit_by: str = "median"
    protein: str | None = None
    function: str | None = None

    @property
    def stem(self) -> str:
        """The name without its suffixes."""
        return _SUFFIXES.sub("", self.name)


class Variant(NamedTuple):
    """A row as it was kept.

    Attributes:
        assay: Number of its assay.
        target: Number of its protein in the store.
        mutant: Its substitutions in the numbering from 1, or None for insertions and deletions.
        sequence: Number of its own sequence in the store; None where that is not computed.
        measured: Its measurement.
        is_fit: Whether that counts as fit.
        fields: Its fields in the output.
    """

    assay: int
    target: int
    mutant: str | None
    sequence: int | None
    measured: float | None
    is_fit: bool | None
    fields: list[str]


class ScoreInputs:
    """Reads everything that a request names, once.

    Attributes:
        rejects: Number of skipped records and rows, by reason.
        repairs: Number of repaired letters of protein files, by rule.
        left_out: Files of a folder that are no assays, each with the reason.
        num_variants: Rows that were kept.
        lengths: Of each protein that they are variants of.
        num_not_standard: Positions that `all_singles` left out: their residue is none of the 20 standard ones.
        frequencies: Those of the alignment, once the protein is known; None without one.
    """

    def __init__(
        self, request: ScoreRequest, description: ModelDescription, start_progress: StartProgress = no_progress
    ) -> None:
        """Opens nothing yet.

        Args:
            request: The options of the run.
            description: The model.
            start_progress: Starts the stage `read` (bytes).
        """
        self.rejects: Counter[str] = Counter()
        self.repairs: Counter[str] = Counter()
        self.left_out: list[str] = []
        self.num_variants = 0
        self.num_not_standard = 0
        self.lengths: list[int] = []
        self.frequencies: SiteFrequencies | None = None
        self._request = request
        self._is_of_sequences = request.strategy == "pseudo-perplexity"
        max_residues = description.max_residues if request.window is None else None
        lacked = description.model.tokens().lacked
        self._limits = Limits(lacked, self._is_of_sequences, request.offset, max_residues)
        self._start_progress = start_progress
        self._assays: list[Assay] = []
        self._touched: dict[int, np.ndarray] = {}
        self._num_sites = 0

    @property
    def num_proteins(self) -> int:
        """Number of proteins that the kept rows are variants of."""
        return len(self.lengths)

    @property
    def others(self) -> str:
        """A hash of what was read and is in no file of `read`."""
        logs = b"" if self.frequencies is None else self.frequencies.log_frequencies.tobytes()
        return xxhash.xxh3_128_hexdigest(logs)

    def read(self, folder: Path) -> ProteinStore:
        """Reads into a new folder: the proteins, the rows, the positions, and the assays that the rows are of.

        Raises:
            ProtlmError: An input that cannot be used, or nothing to score.
        """
        folder.mkdir(parents=True)
        with (folder / VARIANTS_NAME).open("w", encoding="utf-8") as file:
            proteins = write_proteins(folder / "store", self._proteins(file))
        if not self.num_variants:
            raise ProtlmError(f"{self._request.mutations or self._request.input}: no usable mutant; nothing to score")
        write_read_inputs(folder, self._sites(proteins), [asdict(assay) for assay in self._assays])
        return proteins

    def _sites(self, proteins: ProteinStore) -> Sites:
        """Returns the positions to compute of each protein; of equal proteins the first has them."""
        first = np.asarray(proteins.first)
        if self._is_of_sequences:
            is_first = first == np.arange(len(first))
            return Sites(bounds_of(np.where(is_first, np.asarray(proteins.lengths), 0)))
        touched: dict[int, np.ndarray] = {}
        for record, mask in self._touched.items():
            leader = int(first[record])
            touched[leader] = touched[leader] | mask if leader in touched else mask
        none = np.zeros(0, dtype=np.int64)
        each = [np.flatnonzero(touched[record]) if record in touched else none for record in range(len(first))]
        return Sites(bounds_of([len(positions) for positions in each]), np.concatenate([none, *each]))

    def _count_sites(self, number: int) -> None:
        self._num_sites += number
        if self._num_sites > _MOST_SITES:
            other = ", or --strategy masked-marginals, which computes a position once for all variants of a protein"
            raise ProtlmError(
                f"more than {_MOST_SITES:,} positions to compute; give fewer variants at a time"
                f"{other if self._is_of_sequences else ''}"
            )

    def _proteins(self, file: TextIO) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the proteins to compute, and writes the rows meanwhile."""
        number, target, protein = 0, 0, ""
        for source in self._sources():
            for each in source:
                if isinstance(each, WildType):
                    target, protein = number, each.residues
                    number += 1
                    self._note_protein(each)
                    if self._is_of_sequences:
                        self._count_sites(len(protein))
                    yield each.id, vocabulary.encode(protein.encode())
                    continue
                sequence: int | None = None
                if self._is_of_sequences:
                    residues = each.sequence or mutated(protein, each.substitutions or ())
                    self._count_sites(len(residues))
                    sequence, number = number, number + 1
                    # No id of a file has a space.
                    yield f"variant {sequence}", vocabulary.encode(residues.encode())
                else:
                    mask = self._touched.setdefault(target, np.zeros(len(protein), dtype=bool))
                    positions = [substitution.position for substitution in each.substitutions or ()]
                    self._count_sites(int(np.count_nonzero(~mask[positions])))
                    mask[positions] = True
                self._write(file, each, target, sequence)

    def _note_protein(self, wild_type: WildType) -> None:
        """Counts a protein, and prepares and checks what can be of one protein only, before anything is computed."""
        self.lengths.append(len(wild_type.residues))
        alignment, heat_map = self._request.alignment, self._request.heat_map
        for name, value in (("--alignment", alignment), ("--heat-map", heat_map)):
            if value is not None and self.num_proteins > 1:
                raise ProtlmError(f"{name}: expected one protein, got several; choose one with --wild-type")
        if heat_map is not None and len(wild_type.residues) > MOST_POSITIONS:
            raise ProtlmError(
                f"--heat-map: expected a protein of at most {MOST_POSITIONS:,} residues, which a reader can look at, "
                f"got {len(wild_type.residues):,}; leave it out"
            )
        if alignment is not None:
            try:
                counts = count_alignment(alignment, most_columns=len(wild_type.residues))
                self.frequencies = SiteFrequencies(counts, wild_type.residues)
            except ValueError as error:
                raise ProtlmError(f"{alignment}: {error}") from None  # now with the file

    def _write(self, file: TextIO, row: Row, target: int, sequence: int | None) -> None:
        mutant = None if row.substitutions is None else mutant_name(row.substitutions)
        variant = Variant(len(self._assays) - 1, target, mutant, sequence, row.measured, row.is_fit, row.fields)
        file.write(json.dumps(variant) + "\n")
        self.num_variants += 1

    def _sources(self) -> Iterator[Iterator[WildType | Row]]:
        """Yields the rows of each assay behind their wild types."""
        request, kind = self._request, self._request.kind
        if kind == "benchmark":
            yield from self._benchmark(Path(request.input))
        elif kind == "assay":
            reference = {} if request.reference is None else read_reference(request.reference)
            path = Path(request.input)
            if reference and path.name not in reference:
                raise ProtlmError(
                    f"{request.reference}: lists no {path.name}; leave --reference out, or keep the file's name"
                )
            yield self._of_table(path, None, reference.get(path.name), "", self._start([path]))
        elif kind == "mutations":
            assert request.mutations is not None
            advance = self._start([Path(request.input), request.mutations])
            wild_type = chosen_protein(iter(self._file(advance)), request.input, request.wild_type)
            yield self._of_table(request.mutations, wild_type, None, "", advance)
        else:
            self._assays.append(Assay("", [_ID, _MUTANT]))
            yield self._singles() if kind == "singles" else self._variants()

    def _singles(self) -> Iterator[WildType | Row]:
        wanted, some = self._request.wild_type, False
        for record in self._file(self._start([Path(self._request.input)])):
            if wanted is not None and record.id != wanted:
                continue
            some = True
            wild_type = WildType(record.id, record.sequence)
            yield wild_type
            self.num_not_standard += num_not_standard(wild_type.residues)
            yield from single_substitutions(wild_type, self._request.offset)
            if wanted is not None:
                break  # the first of that id, as everywhere
        if wanted is not None and not some:
            chosen_protein(iter(()), self._request.input, wanted)

    def _variants(self) -> Iterator[WildType | Row]:
        path = self._request.input
        advance = self._start([Path(path)] * 2)
        wild_type = chosen_protein(iter(self._file(advance)), path, self._request.wild_type)
        # What was skipped on the way is met again.
        self.rejects.clear()
        self.repairs.clear()
        yield wild_type
        yield from sequence_variants(iter(self._file(advance)), path, wild_type, self._limits, self._reject)

    def _benchmark(self, folder: Path) -> Iterator[Iterator[WildType | Row]]:
        reference = None if self._request.reference is None else read_reference(self._request.reference)
        paths = []
        for entry in sorted(folder.iterdir()):
            if entry.name.startswith("."):
                self.left_out.append(f"{entry}: hidden")
            elif not entry.is_file() or not _SUFFIXES.search(entry.name):
                self.left_out.append(f"{entry}: no table .csv or .tsv")
            elif reference is not None and entry.name not in reference:
                self.left_out.append(f"{entry}: not in {self._request.reference}")
            else:
                paths.append(entry)
        self._check_names(paths)
        if reference is not None and (lacking := sorted(set(reference) - {path.name for path in paths})):
            self.left_out.append(
                f"{len(lacking)} of the {len(reference)} assays of {self._request.reference} are not in {folder}, such "
                f"as {lacking[0]}: the means are not those of the whole benchmark"
            )
        advance = self._start(paths)
        for path in paths:
            row = None if reference is None else reference[path.name]
            try:
                rows = self._of_table(path, None, row, path.name, advance)
            except RecordError:
                raise  # a line that is no row of a table: there is no telling what follows
            except ProtlmError as error:
                if self._request.on_bad_record == "error":
                    raise
                self.left_out.append(str(error))
            else:
                yield rows

    def _check_names(self, paths: list[Path]) -> None:
        """Raises ProtlmError if two assays would be written to one file."""
        seen: dict[str, Path] = {}
        for path in paths:
            # Some file systems do not tell the case of letters.
            other = seen.setdefault(Assay(path.name, []).stem.casefold(), path)
            if other is not path:
                raise ProtlmError(f"{path}: named like {other.name} but for its suffix; rename one of them")

    def _of_table(
        self, path: Path, wild_type: WildType | None, row: ReferenceRow | None, name: str, advance: Advance
    ) -> Iterator[WildType | Row]:
        table = VariantTable(path, wild_type, self._limits, self._reject, advance, row)
        if self._request.column in table.columns:
            raise ProtlmError(f"{path}: has a column {self._request.column} already; name another one with --column")
        protein, function = (None, None) if row is None else (row.protein, row.function)
        self._assays.append(Assay(files.as_text(name), table.columns, table.fit_by, protein, function))
        return iter(table)

    def _file(self, advance: Advance) -> ProteinFile:
        skips = self._request.on_bad_record == "skip"
        file = ProteinFile(self._request.input, self._reject, advance, skips=skips)
        # The counts of both go on while the file is read.
        file.reader.rejects, file.reader.repairs = self.rejects, self.repairs
        return file

    def _reject(self, error: RecordError) -> None:
        if self._request.on_bad_record == "error":
            raise error
        self.rejects[error.reason] += 1

    def _start(self, paths: list[Path]) -> Advance:
        return self._start_progress("read", sum(os.stat(path).st_size for path in paths if str(path) != STDIN))


def read_variants(path: Path) -> Iterator[Variant]:
    """Yields the rows that were kept, in order."""
    # Not as CSV, whose reader bounds the length of a field.
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield Variant(*json.loads(line))


def substitutions_of(variant: Variant, protein: str) -> tuple[Substitution, ...]:
    """Returns the substitutions of a kept row; none for the protein itself."""
    return parse_mutant(variant.mutant, protein) if variant.mutant else ()
