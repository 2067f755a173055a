"""The interface of the layouts: the kinds that each can hold, the files that it makes, and how proteins are written."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from protlm.data.embeddings.kinds import RESIDUE_KINDS, Dtype, Kind
from protlm.data.embeddings.layouts.contents import Column, Contents, Embeddings
from protlm.data.records import shown
from protlm.data.strings import Strings
from protlm.errors import ProtlmError


class LayoutWriter(ABC):
    """Writes the embeddings of proteins in order; used with `with`, it is closed at the end, or discarded on an error.

    Attributes:
        contents: The contents of the output.
    """

    def __init__(self, contents: Contents, *, resume: bool) -> None:
        """Prepares to write; on a resume the first record may be any, as those before it were written already."""
        self.contents = contents
        self._columns = contents.columns
        self._next: int | None = None if resume else 0

    def write(self, index: int, embeddings: Embeddings) -> None:
        """Writes the embeddings of a record.

        Args:
            index: The record's index among the ids.
            embeddings: One array for every column of the contents, of any floating-point type.

        Raises:
            ValueError: The record is out of order, or its embeddings do not fit the contents.
            ProtlmError: A number is too large for float16.
            OSError: The disk is full or failed; a layout that can resume continues from the last flush.
        """
        self._check_order(index)
        self._write(index, self._as_stored(index, embeddings))
        self._next = index + 1

    def close(self) -> None:
        """Completes the output.

        Raises:
            ValueError: A record was not written; the output is then left as by `discard`.
        """
        missing = self._missing()
        if missing is not None:
            self.discard()
            raise ValueError(f"expected every record, got none for {missing}")
        self._complete()

    @abstractmethod
    def flush(self) -> None:
        """Syncs all written records to disk; does nothing in a layout that cannot resume."""

    @abstractmethod
    def discard(self) -> None:
        """Closes the output without completing it."""

    @abstractmethod
    def _write(self, index: int, stored: Mapping[Column, np.ndarray]) -> None:
        """Writes contiguous arrays of the stored type, in the order of the contents' columns."""

    @abstractmethod
    def _complete(self) -> None:
        """Completes the output after the last record."""

    def _check_order(self, index: int) -> None:
        if not 0 <= index < len(self.contents) or self._next not in (None, index):
            expected = f"record {self._next}" if self._next is not None else f"one of {len(self.contents)} records"
            raise ValueError(f"index: expected {expected}, got {index}")

    def _missing(self) -> int | None:
        """Returns a record that was not written, None if all were; those before a resume are taken as written."""
        return None if self._next in (None, len(self.contents)) else self._next

    def _as_stored(self, index: int, embeddings: Embeddings) -> dict[Column, np.ndarray]:
        if embeddings.keys() != set(self._columns):
            raise ValueError(f"embeddings: expected {list(self._columns)}, got {list(embeddings)}")
        stored = {}
        for column in self._columns:
            kind, _ = column
            values, expected = embeddings[column], self.contents.shape(kind, index)
            if values.shape != expected:
                where = f"{kind} of record {index}"
                raise ValueError(f"embeddings: expected shape {expected} for {where}, got {values.shape}")
            try:
                # A number too large would silently become infinite.
                with np.errstate(over="raise"):
                    stored[column] = np.ascontiguousarray(values, dtype=self.contents.dtype)
            except FloatingPointError:
                raise ProtlmError(
                    f"{shown(self.contents.record_id(index))}: {kind}: expected numbers up to 65504, which float16 "
                    f"holds, got {np.abs(values)[np.isfinite(values)].max():.6g}; store them with --dtype float32"
                ) from None
        return stored

    def __enter__(self) -> "LayoutWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSummary:
    """The summary of an output; what its layout does not store is None or empty.

    Attributes:
        num_entries: Proteins; in the layout `biotrainer` different sequences.
        num_residues: Rows of the residue kinds.
        kinds: The kinds in it.
        layers: The layers in it, by absolute number.
        dim: Numbers of an embedding; None without any entry.
        dtype: Type of the stored numbers; None without any entry.
        model_hash: Hash of the model that made it.
        precision: Number type in which that computed: `32`, `bf16` or `fp16`.
    """

    num_entries: int
    num_residues: int | None = None
    kinds: tuple[Kind, ...] = ()
    layers: tuple[int, ...] = ()
    dim: int | None = None
    dtype: str | None = None
    model_hash: str | None = None
    precision: str | None = None


class Layout(ABC):
    """A layout of embeddings on disk, for other programs to read.

    Attributes:
        name: Name on the command line.
        can_resume: Whether a new process can continue the output of a killed one.
        default_dtype: Type of the stored numbers unless the user chooses one.
        bytes_per_record: Approximate disk space of a record without its id and its numbers.
    """

    name: str
    can_resume: bool
    default_dtype: Dtype = "float32"
    bytes_per_record: int = 32

    def check(self, kinds: Sequence[Kind], layers: Sequence[int], dtype: Dtype) -> None:  # noqa: B027  all is allowed
        """Checks the requested kinds, layers and number type before anything is computed.

        Args:
            kinds: Kinds of embedding, each once.
            layers: Layers, each once.
            dtype: Type of the stored numbers.

        Raises:
            ValueError: The layout cannot hold these; the message is one sentence.
            ProtlmError: A package that the layout needs is not installed.
        """

    def check_ids(self, ids: Strings) -> None:  # noqa: B027  most can hold any
        """Checks the ids before anything is computed.

        Raises:
            ProtlmError: The layout cannot hold one of them.
        """

    def paths(self, out: Path) -> tuple[Path, ...]:
        """Returns the paths of the layout's files and folders: `out`, then any beside it."""
        return (out,)

    @abstractmethod
    def is_own(self, out: Path) -> bool:
        """Returns whether the files at `paths(out)` are of this layout, so that they may be replaced."""

    @abstractmethod
    def summary(self, out: Path) -> OutputSummary:
        """Returns the summary of a complete output of this layout.

        Raises:
            ShardError: It is not whole. A damaged one raises what the library raises that reads it.
        """

    @abstractmethod
    def open(self, path: Path, contents: Contents, *, resume: bool) -> LayoutWriter:
        """Starts an output, or continues one.

        Args:
            path: Path of the output until it is complete; further files go to `paths(path)[1:]`. Without `resume`,
                existing files there are replaced. An output exists at `path` only once it can be resumed.
            contents: The contents to write; for a resume the same as before.
            resume: Continue the output that an earlier process left at `path`.

        Raises:
            ShardError: There is no output to resume, or it has other contents.
            ValueError: The layout cannot resume.
            OSError: The disk is full or failed; then `path` is as it was before.
        """

    def _refuse_resume(self, *, resume: bool) -> None:
        if resume:
            raise ValueError(f"resume: layout {self.name} cannot go on with an unfinished output")

    def _check_one_column(self, kinds: Sequence[Kind], layers: Sequence[int]) -> None:
        if len(kinds) != 1:
            raise ValueError(f"layout {self.name} holds one kind of embedding, not {len(kinds)} ({', '.join(kinds)})")
        if kinds[0] != "logits" and len(layers) != 1:
            raise ValueError(f"layout {self.name} holds one layer, not {len(layers)}")

    def _check_one_row(self, kinds: Sequence[Kind]) -> None:
        for kind in kinds:
            if kind in RESIDUE_KINDS:
                raise ValueError(f"layout {self.name} holds one row for each protein, mean or cls, not {kind}")
