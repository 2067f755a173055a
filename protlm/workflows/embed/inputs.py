"""The proteins to embed come from protein files, read as in prep, or from a split of a dataset; both are read once."""

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from protlm import vocabulary
from protlm.data.nucleotides import is_nucleic_acid, refusal
from protlm.data.parsing.reader import RecordReader
from protlm.data.parsing.sources import STDIN, expand_inputs
from protlm.data.records import NUCLEOTIDES, Nucleotides, OnBadRecord, shown
from protlm.data.storage.dataset import open_dataset
from protlm.data.storage.manifest import is_dataset
from protlm.data.storage.protein_store import ProteinStore, write_proteins
from protlm.errors import ProtlmError, RecordError
from protlm.inference.long_proteins import Cut
from protlm.pretrained.model_description import ModelDescription
from protlm.runtime.progress import StartProgress, no_progress


class ProteinInputs:
    """Iterates once over the proteins of the inputs, in order: ids and residue tokens.

    Attributes:
        left_out: Entries of an input folder that are not protein files.
        rejects: Number of skipped records so far, by reason.
        repairs: Number of repaired letters so far, by rule.
        num_nucleotides: Number of nucleic acids kept so far.
        names: The inputs, for messages.
    """

    def __init__(
        self,
        inputs: Sequence[str | Path],
        split: str | None,
        on_bad_record: OnBadRecord,
        nucleotides: Nucleotides,
        start_progress: StartProgress = no_progress,
    ) -> None:
        """Finds the inputs; no record is read yet.

        Raises:
            ProtlmError: An input that does not exist, a dataset among files, or a split that the dataset lacks.
        """
        self.names = ", ".join(map(str, inputs))
        self.left_out: tuple[str, ...] = ()
        self.rejects: Counter[str] = Counter()
        self.repairs: Counter[str] = Counter()
        self.num_nucleotides = 0
        datasets = [path for path in map(Path, inputs) if is_dataset(path)]
        if datasets and len(inputs) > 1:
            raise ProtlmError(f"{datasets[0]}: a dataset; embed it by itself, and not together with other inputs")
        if datasets:
            self._proteins = self._of_dataset(datasets[0], split)
        elif split is not None:
            raise ProtlmError(f"{self.names}: expected a dataset of protlm prep, which has splits; leave --split out")
        else:
            self._proteins = self._of_files(inputs, on_bad_record, nucleotides, start_progress)

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        return self._proteins

    def _of_files(
        self,
        inputs: Sequence[str | Path],
        on_bad_record: OnBadRecord,
        nucleotides: Nucleotides,
        start_progress: StartProgress,
    ) -> Iterator[tuple[str, np.ndarray]]:
        if sum(str(path) == STDIN for path in inputs) > 1:
            raise ProtlmError(f"{STDIN}: the standard input can be read only once; name it once")
        expanded = expand_inputs(inputs)
        self.left_out = tuple(expanded.left_out)
        num_bytes = sum(Path(path).stat().st_size for path in expanded.paths if path != STDIN)
        advance = start_progress("read", num_bytes)
        reader = RecordReader(expanded.paths, on_bad_record=on_bad_record, advance=advance)
        self.rejects, self.repairs = reader.rejects, reader.repairs
        return self._proteins_of(reader, expanded.paths, nucleotides)

    def _proteins_of(
        self, reader: RecordReader, paths: Sequence[str], nucleotides: Nucleotides
    ) -> Iterator[tuple[str, np.ndarray]]:
        for record in reader:
            residues = record.sequence.encode()
            if is_nucleic_acid(residues, record.description):
                if nucleotides == "error":
                    path = paths[len(reader.sources)]
                    raise RecordError(path, record.line, refusal(record.id), reason=NUCLEOTIDES, record_id=record.id)
                if nucleotides == "skip":
                    self.rejects[NUCLEOTIDES] += 1
                    continue
                self.num_nucleotides += 1
            yield record.id, vocabulary.encode(residues)

    def _of_dataset(self, path: Path, split: str | None) -> Iterator[tuple[str, np.ndarray]]:
        dataset = open_dataset(path)
        if split is None:
            filled = [name for name, summary in dataset.manifest.splits.items() if summary.num_records]
            raise ProtlmError(f"{path}: a dataset; say which of its proteins with --split: {', '.join(filled)}")
        proteins = dataset.split(split)
        proteins.open_shards()
        return ((proteins.id(number), proteins.checked_tokens(number)) for number in range(proteins.num_records))


def read_proteins(path: Path, inputs: ProteinInputs) -> ProteinStore:
    """Reads all inputs into a new store.

    Raises:
        ProtlmError: A record that cannot be used, or no record at all.
    """
    proteins = write_proteins(path, inputs)
    if not proteins.num_records:
        shutil.rmtree(path)
        raise ProtlmError(f"{inputs.names}: no usable record; nothing to embed")
    return proteins


def check_lengths(proteins: ProteinStore, cut: Cut, description: ModelDescription) -> None:
    """Raises ProtlmError if a protein is longer than the model's learned positions."""
    limit = description.max_residues
    if limit is None or cut.window is not None or cut.truncate is not None:
        return
    too_long = np.flatnonzero(proteins.lengths > limit)
    if len(too_long):
        first = int(too_long[0])
        others = f" (and {len(too_long) - 1:,} more proteins are too long)" if len(too_long) > 1 else ""
        raise ProtlmError(
            f"{shown(proteins.id(first))}: has {int(proteins.lengths[first]):,} residues, and the positions of this "
            f"model reach {limit:,}{others}; embed long proteins in windows with --window {limit}, or only their "
            f"beginning with --truncate {limit}, or use a model without learned positions"
        )
