"""Layout `protlm`: all proteins as columns of one HDF5 file, read through a memory map by `open_embeddings`.

The file is created at its final size; proteins are written in place, in any order.
"""

from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np

from protlm import files
from protlm.data.embeddings.kinds import LAYER_PREFIX, RESIDUE_KINDS
from protlm.data.embeddings.layouts.contents import Column, Contents
from protlm.data.embeddings.layouts.layout import Layout, LayoutWriter, OutputSummary
from protlm.data.embeddings.layouts.sized_file import SizedFile
from protlm.data.embeddings.reader import FORMAT, FORMAT_VERSION, open_embeddings
from protlm.data.storage import columns
from protlm.data.strings import bounds_of
from protlm.errors import ShardError


class NativeLayout(Layout):
    """Layout `protlm`."""

    name = "protlm"
    can_resume = True

    def is_own(self, out: Path) -> bool:
        """Returns whether the file has the format of this layout in its attributes."""
        return columns.file_attribute(out, "format") == FORMAT

    def summary(self, out: Path) -> OutputSummary:
        """Returns the summary of a file; see `Layout.summary`."""
        first = open_embeddings(out)
        opened = [open_embeddings(out, kind) for kind in first.kinds]
        of_residues = [embeddings.num_rows for embeddings in opened if embeddings.kind in RESIDUE_KINDS]
        return OutputSummary(
            num_entries=len(first),
            num_residues=of_residues[0] if of_residues else None,
            kinds=first.kinds,
            layers=tuple(sorted({layer for embeddings in opened for layer in embeddings.layers})),
            dim=next((embeddings.dim for embeddings in opened if embeddings.kind != "logits"), first.dim),
            dtype=first.dtype,
            model_hash=first.model_hash,
            precision=columns.file_attribute(out, "precision"),
        )

    def open(self, path: Path, contents: Contents, *, resume: bool) -> "EmbeddingsWriter":
        """Starts a file, or continues one; see `Layout.open`."""
        if not resume:
            _create(path, contents)
        return EmbeddingsWriter(path, contents, resume=resume)


class EmbeddingsWriter(LayoutWriter):
    """Fills a file of layout `protlm`, in any order; use `NativeLayout.open`."""

    def __init__(self, path: Path, contents: Contents, *, resume: bool) -> None:
        """Opens a file that `_create` made."""
        super().__init__(contents, resume=resume)
        self._places = _places(path, contents)
        has_residues = any(kind in RESIDUE_KINDS for kind in contents.kinds)
        self._bounds = bounds_of(contents.lengths) if has_residues else None
        # On a resume the records before it are taken as written.
        self._is_written = np.full(len(contents), resume)
        self._file = SizedFile(path)

    def flush(self) -> None:
        """Syncs all written rows to disk."""
        self._file.flush()

    def discard(self) -> None:
        """Closes the file; a resume can continue it."""
        self._file.close()

    def _check_order(self, index: int) -> None:
        if not 0 <= index < len(self.contents):
            raise ValueError(f"index: expected one of {len(self.contents)} records, got {index}")

    def _missing(self) -> int | None:
        return None if self._is_written.all() else int(self._is_written.argmin())

    def _write(self, index: int, stored: Mapping[Column, np.ndarray]) -> None:
        for column, rows in stored.items():
            place = self._places[column]
            if place is None:
                continue
            kind, _ = column
            row = index if self._bounds is None or kind not in RESIDUE_KINDS else int(self._bounds[index])
            self._file.write(place + row * rows.shape[-1] * rows.itemsize, rows)
        self._is_written[index] = True

    def _complete(self) -> None:
        self._file.flush()
        self._file.close()


def _create(path: Path, contents: Contents) -> None:
    """Creates the file at its final size; it takes up disk only as rows are written."""
    with files.written_whole(path) as temporary, columns.create_columns(temporary) as file:
        # The int64 columns come first; they are small, and the large ones after them are only allocated.
        columns.write_strings(file, "ids", contents.ids.text, contents.ids.offsets)
        for kind in contents.kinds:
            if kind in RESIDUE_KINDS:
                columns.write_column(file, f"{kind}/offsets", bounds_of(contents.lengths))
        columns.write_column(file, "sequence_hash", contents.digests)
        for column in contents.columns:
            columns.allocate_column(file, _name(column), _shape(contents, column), contents.dtype)
        _write_header(file, contents)


def _places(path: Path, contents: Contents) -> dict[Column, int | None]:
    """Returns the offset of each column in the file, after checking that the file was begun for these contents."""
    places = {}
    with columns.open_columns(path) as file:
        file.check_format(FORMAT, FORMAT_VERSION)
        expected: tuple[object, ...] = (contents.model_hash, contents.dtype, len(contents), len(contents.ids.text))
        header = file.attribute("model_hash", str), file.attribute("dtype", str)
        ids = file.strings("ids")
        if (*header, len(ids), len(ids.text)) != expected:
            raise ShardError(f"{path}: was begun for other proteins or by another model; begin again without --resume")
        for column in contents.columns:
            shape = file.column(_name(column), contents.dtype, ndim=2).shape
            if shape != _shape(contents, column):
                raise ShardError(f"{path}: {_name(column)}: expected shape {_shape(contents, column)}, got {shape}")
            places[column] = file.place(_name(column))
    return places


def _name(column: Column) -> str:
    kind, layer = column
    return f"{kind}/{LAYER_PREFIX}{layer}"


def _shape(contents: Contents, column: Column) -> tuple[int, int]:
    kind, _ = column
    num_rows = int(contents.lengths.sum()) if kind in RESIDUE_KINDS else len(contents)
    return num_rows, contents.width(kind)


def _write_header(file: h5py.File, contents: Contents) -> None:
    file.attrs["format"] = FORMAT
    file.attrs["format_version"] = FORMAT_VERSION
    file.attrs["model_hash"] = contents.model_hash
    file.attrs["dtype"] = contents.dtype
    file.attrs["precision"] = contents.precision
