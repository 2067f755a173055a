"""Computing a part: hides how its rows follow each other, and how it is written while the next one is computed."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from protlm import files
from protlm.data.embeddings.layouts import LAYOUTS, Column, Contents
from protlm.data.records import shown
from protlm.data.storage.protein_store import ProteinStore
from protlm.data.strings import Strings
from protlm.errors import ProtlmError
from protlm.inference.long_proteins import Segment
from protlm.inference.row_embeddings import RowEmbedder, Sums, merged
from protlm.runtime.progress import Advance
from protlm.workflows.embed.folder import EmbedFolder
from protlm.workflows.embed.plan import Plan
from protlm.workflows.embed.settings import EmbedSettings


class PartRow(NamedTuple):
    """A row to compute, and its place; the only row of a part without anything to compute has no segments."""

    part: int
    segments: list[Segment]
    proteins: list[np.ndarray]
    is_last: bool

    def computed(self, embedder: RowEmbedder) -> list[Sums | None]:
        """Returns what each segment gives; None for one that does not fit into memory."""
        if not self.segments:
            return []
        cores = [slice(core_start - start, core_stop - start) for _, start, _, core_start, core_stop in self.segments]
        return list(embedder.or_none(self.proteins, cores))


class PartRows:
    """Iterates over the rows of some parts, one part after the other."""

    def __init__(self, plan: Plan, proteins: ProteinStore, parts: Sequence[int]) -> None:
        self._plan, self._proteins, self._parts = plan, proteins, parts

    def __iter__(self) -> Iterator[PartRow]:
        for part in self._parts:
            rows = list(self._plan.rows(part)) or [[]]
            for number, segments in enumerate(rows, start=1):
                tokens = [self._proteins.tokens(record)[start:stop] for record, start, stop, _, _ in segments]
                yield PartRow(part, segments, tokens, number == len(rows))

    @property
    def num_residues(self) -> int:
        """Residues of all of them."""
        return sum(self._plan.num_residues(part) for part in self._parts)


class PartWriter:
    """Gathers what rows give and writes each part when it is complete, in a thread of its own.

    Memory holds two parts.
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
            folder: Where parts go.
            proteins: All proteins.
            plan: What is in which part.
            settings: What is stored.
            advance: Called with the residues of each row that was computed.
        """
        self._folder, self._proteins, self._plan, self._settings = folder, proteins, plan, settings
        self._advance = advance
        self._gathered: dict[int, list[tuple[Segment, Sums | None]]] = {}
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def add(self, row: PartRow, results: Sequence[Sums | None]) -> None:
        """Takes what a row gave; rows come as `PartRows` has them."""
        for segment, result in zip(row.segments, results, strict=True):
            self._gathered.setdefault(segment.record, []).append((segment, result))
        if row.is_last:
            self._wait()
            self._writing = self._pool.submit(self._write, row.part, self._gathered)
            self._gathered = {}
        self._advance(sum(segment.core_stop - segment.core_start for segment in row.segments))

    def close(self) -> None:
        """Waits for the last part.

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

    def _write(self, part: int, gathered: dict[int, list[tuple[Segment, Sums | None]]]) -> None:
        """Writes a part: an embeddings file of the records that were computed in it."""
        embeddings: dict[int, dict[Column, np.ndarray]] = {}
        skipped = []
        for record in self._plan.computed(part):
            # The rows are sorted by length; the windows of a protein belong in their own order.
            parts = sorted(gathered.pop(record), key=lambda found: found[0].start)
            sums = [result for _, result in parts if result is not None]
            try:
                if len(sums) < len(parts):
                    raise MemoryError
                embeddings[record] = self._check(record, merged(sums, parts[-1][0].core_stop))
            except MemoryError:
                skipped.append(record)
        self._folder.note_skipped(part, skipped)
        with files.written_whole(self._folder.part_path(part)) as path:
            contents = contents_of(self._proteins, self._settings, np.array(list(embeddings), dtype=np.int64))
            writer = LAYOUTS["protlm"].open(path, contents, resume=False)
            try:
                for index, found in enumerate(embeddings.values()):
                    writer.write(index, found)
                writer.close()
            except BaseException:
                writer.discard()
                raise

    def _check(self, record: int, embeddings: dict[Column, np.ndarray]) -> dict[Column, np.ndarray]:
        """Returns the embeddings of a record.

        Raises:
            ProtlmError: A number in them is not finite.
        """
        if not all(np.isfinite(array).all() for array in embeddings.values()):
            raise ProtlmError(
                f"{shown(self._proteins.id(record))}: its embedding is not finite; the model is of no use"
            )
        return embeddings


def contents_of(proteins: ProteinStore, settings: EmbedSettings, records: np.ndarray | None) -> Contents:
    """Returns what a file of embeddings is told before the first of them.

    Args:
        proteins: All proteins.
        settings: What is stored.
        records: The numbers of those in the file; None for all.
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
    )
