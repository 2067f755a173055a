"""A portion is computed row by row, and written by a thread while the next one is computed."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from protlm import files
from protlm.data.embeddings.layouts import LAYOUTS, Column, Contents
from protlm.data.records import shown
from protlm.data.storage.protein_store import ProteinStore, open_proteins
from protlm.data.strings import Strings
from protlm.errors import ProtlmError
from protlm.inference.long_proteins import Window
from protlm.inference.precision import overflow_hint
from protlm.inference.row_embeddings import RowEmbedder, Sums, merge_windows
from protlm.model.performer import Performer
from protlm.runtime.progress import Advance, StartProgress
from protlm.workflows.embed.folder import EmbedFolder
from protlm.workflows.embed.plan import Plan
from protlm.workflows.embed.settings import EmbedSettings


class PortionRow(NamedTuple):
    """A row to compute, and the portion that it belongs to.

    A portion in which nothing is computed has one row without windows.
    """

    portion: int
    windows: list[Window]
    proteins: list[np.ndarray]
    is_last: bool

    def compute(self, embedder: RowEmbedder) -> list[Sums | None]:
        """Returns the sums of each window; None for one that does not fit into memory."""
        if not self.windows:
            return []
        cores = [slice(core_start - start, core_stop - start) for _, start, _, core_start, core_stop in self.windows]
        return list(embedder.compute_by_halves(self.proteins, cores))


class PortionRows:
    """Iterates over the rows of some portions, one portion after the other."""

    def __init__(self, plan: Plan, proteins: ProteinStore, portions: Sequence[int]) -> None:
        self._plan, self._proteins, self._portions = plan, proteins, portions

    def __iter__(self) -> Iterator[PortionRow]:
        for portion in self._portions:
            rows = list(self._plan.rows(portion)) or [[]]
            for number, windows in enumerate(rows, start=1):
                tokens = [self._proteins.tokens(record)[start:stop] for record, start, stop, _, _ in windows]
                yield PortionRow(portion, windows, tokens, number == len(rows))

    @property
    def num_residues(self) -> int:
        """Residues computed in all of these portions."""
        return sum(self._plan.num_residues(portion) for portion in self._portions)


class PortionWriter:
    """Collects the sums of rows and writes each portion once it is complete, in a thread.

    Memory holds two portions at most: one that is computed and one that is written.
    """

    def __init__(
        self,
        folder: EmbedFolder,
        proteins: ProteinStore,
        plan: Plan,
        settings: EmbedSettings,
        advance: Advance,
    ) -> None:
        """Prepares.

        Args:
            folder: The folder to write to.
            proteins: All proteins.
            plan: The records of each portion.
            settings: The settings of the run.
            advance: Called with the residues of each row that was computed.
        """
        self._folder, self._proteins, self._plan, self._settings = folder, proteins, plan, settings
        self._advance = advance
        self._gathered: dict[int, list[tuple[Window, Sums | None]]] = {}
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def add(self, row: PortionRow, results: Sequence[Sums | None]) -> None:
        """Takes the sums of each window of a row; rows must come in the order of `PortionRows`."""
        for window, sums in zip(row.windows, results, strict=True):
            self._gathered.setdefault(window.record, []).append((window, sums))
        if row.is_last:
            self._wait()
            self._writing = self._pool.submit(self._write, row.portion, self._gathered)
            self._gathered = {}
        self._advance(sum(window.core_stop - window.core_start for window in row.windows))

    def close(self) -> None:
        """Waits until the last portion is written.

        Raises:
            OSError, ProtlmError: It could not be written.
        """
        try:
            self._wait()
        finally:
            self._pool.shutdown()

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, portion: int, gathered: dict[int, list[tuple[Window, Sums | None]]]) -> None:
        """Writes a portion: an embeddings file of the records that were computed in it."""
        embeddings: dict[int, dict[Column, np.ndarray]] = {}
        skipped = []
        for record in self._plan.computed(portion):
            # Rows are sorted by length, so the windows of a protein have to be put back in order.
            results = sorted(gathered.pop(record), key=lambda result: result[0].start)
            sums = [result for _, result in results if result is not None]
            try:
                if len(sums) < len(results):
                    raise MemoryError
                merged = merge_windows(sums, results[-1][0].core_stop)
                self._check_finite(record, merged)
                embeddings[record] = merged
            except MemoryError:
                skipped.append(record)
        self._folder.note_skipped(portion, skipped)
        with files.written_whole(self._folder.portion_path(portion)) as path:
            contents = contents_of(self._proteins, self._settings, np.array(list(embeddings), dtype=np.int64))
            writer = LAYOUTS["protlm"].open(path, contents, resume=False)
            try:
                for index, by_column in enumerate(embeddings.values()):
                    writer.write(index, by_column)
                writer.close()
            except BaseException:
                writer.discard()
                raise

    def _check_finite(self, record: int, embeddings: dict[Column, np.ndarray]) -> None:
        """Raises ProtlmError if a number in the embeddings of a record is not finite, or a logit not even −∞."""
        for (kind, _), array in embeddings.items():
            # A token that the model lacks has the logit −∞.
            if np.isfinite(array).all() or (kind == "logits" and (array < np.inf).all()):
                continue
            raise ProtlmError(
                f"{shown(self._proteins.id(record))}: its embedding is not finite; "
                f"{overflow_hint(self._settings.precision)}"
            )


class EmbedWork:
    """The share of one process: a `PortionWork`."""

    def __init__(self, folder: EmbedFolder, model: Performer, settings: EmbedSettings) -> None:
        """Prepares.

        Args:
            folder: The folder, which the first process fills with the proteins.
            model: The network.
            settings: The settings of the run.
        """
        self._folder, self._settings = folder, settings
        self._embedder = RowEmbedder(model, settings.kinds, settings.layers)
        self._proteins: ProteinStore
        self._plan: Plan
        self._writer: PortionWriter | None = None

    def waiting(self) -> list[int]:
        """Returns the portions that are neither computed nor in the output."""
        self._proteins = open_proteins(self._folder.proteins_path)
        self._plan = Plan.of(self._proteins, self._settings)
        return self._folder.unfinished_portions(self._plan.num_portions)

    def start(self, portions: Sequence[int], start_progress: StartProgress) -> Iterator[PortionRow]:
        """Starts the stage `embed` (residues), and returns an iterator over the rows of some portions."""
        rows = PortionRows(self._plan, self._proteins, portions)
        advance = start_progress("embed", rows.num_residues)
        self._writer = PortionWriter(self._folder, self._proteins, self._plan, self._settings, advance)
        return iter(rows)

    def compute(self, row: PortionRow) -> list[Sums | None]:
        """Returns the sums of each window of a row."""
        return row.compute(self._embedder)

    def add(self, row: PortionRow, results: Sequence[Sums | None]) -> None:
        """Passes the sums of a row to the writer."""
        assert self._writer is not None
        self._writer.add(row, results)

    def close(self) -> None:
        """Waits until the last portion is written."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def contents_of(proteins: ProteinStore, settings: EmbedSettings, records: np.ndarray | None) -> Contents:
    """Returns the description of a file of embeddings that its writer starts with.

    Args:
        proteins: All proteins.
        settings: The settings of the run.
        records: The records in the file, by number; None for all.
    """
    some = slice(None) if records is None else records
    return Contents(
        ids=proteins.ids if records is None else Strings.of(map(proteins.id, records.tolist())),
        lengths=settings.cut.kept(proteins.lengths[some]),
        digests=proteins.digests[some],
        residues=lambda index: proteins.residues(index if records is None else int(records[index])),
        kinds=settings.kinds,
        layers=settings.layers,
        last_layer=settings.last_layer,
        model_dim=settings.model_dim,
        dtype=settings.dtype,
        model_hash=settings.weights_hash,
        precision=settings.precision,
    )
