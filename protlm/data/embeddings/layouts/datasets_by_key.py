"""The layouts with an HDF5 dataset for every protein, under a key: hides how such a file is written and resumed.

All datasets are created and allocated first, and the file is closed; then rows are written at their offsets. So a
process that is killed leaves a readable file, and another one can continue it. Datasets are listed in the order of the
proteins, which HDF5 by itself would not keep.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np
from h5py import h5a, h5d, h5o, h5p, h5s, h5t

from protlm import files
from protlm.data.embeddings.kinds import Dtype, Kind
from protlm.data.embeddings.layouts.contents import Column, Contents
from protlm.data.embeddings.layouts.layout import Layout, LayoutWriter, OutputSummary
from protlm.data.embeddings.layouts.names import is_repeat
from protlm.data.embeddings.layouts.sized_file import SizedFile
from protlm.data.storage import columns
from protlm.data.strings import Strings
from protlm.errors import ShardError


class KeyedLayout(Layout):
    """A layout of one dataset a protein; subclasses define the keys."""

    can_resume = True
    bytes_per_record = 512

    def check(self, kinds: Sequence[Kind], layers: Sequence[int], dtype: Dtype) -> None:
        """Raises ValueError unless one kind of one layer is requested."""
        self._check_one_column(kinds, layers)

    def is_own(self, out: Path) -> bool:
        """Returns whether the file has the name of this layout in its attributes."""
        return columns.file_attribute(out, "layout") == self.name

    def summary(self, out: Path) -> OutputSummary:
        """Returns the summary of a file; see `Layout.summary`."""
        with columns.open_hdf5(out, "r") as file:
            dataset = next(iter(file.values()), None)
            return OutputSummary(
                num_entries=len(file),
                kinds=(file.attrs["kind"],),
                layers=(int(file.attrs["layer"]),),
                dim=None if dataset is None else int(dataset.shape[-1]),
                dtype=None if dataset is None else str(dataset.dtype),
                model_hash=file.attrs["model_hash"],
                precision=file.attrs.get("precision"),
            )

    def open(self, path: Path, contents: Contents, *, resume: bool) -> "KeyedWriter":
        """Starts a file, or continues one; see `Layout.open`."""
        keys = self._keys(contents)
        if not resume:
            self._write_companions(path, contents, keys)
            with files.written_whole(path) as temporary:
                _create(temporary, self.name, contents, keys)
        elif columns.file_attribute(path, "model_hash") != contents.model_hash or not self.is_own(path):
            raise ShardError(f"{path}: no unfinished output of this layout and model; begin again without --resume")
        return KeyedWriter(path, contents, keys, resume=resume)

    @abstractmethod
    def _keys(self, contents: Contents) -> Strings:
        """Returns the keys of the proteins; equal sequences may have equal keys, and then share the dataset."""

    def _write_companions(self, path: Path, contents: Contents, keys: Strings) -> None:
        """Writes the files beside the output; most layouts have none."""


class KeyedWriter(LayoutWriter):
    """Fills the datasets of a file."""

    def __init__(self, path: Path, contents: Contents, keys: Strings, *, resume: bool) -> None:
        """Opens a file that has all datasets."""
        super().__init__(contents, resume=resume)
        self._path = path
        self._keys = keys
        self._is_repeat = is_repeat(keys)
        # HDF5 is used only to find the datasets; it never reads the rows, which are written without it.
        self._names = columns.open_hdf5(path, "r")
        self._rows = SizedFile(path)

    def flush(self) -> None:
        """Syncs all written rows to disk."""
        self._rows.flush()

    def discard(self) -> None:
        """Closes the file; a resume can continue it."""
        self._names.close()
        self._rows.close()

    def _write(self, index: int, stored: Mapping[Column, np.ndarray]) -> None:
        if self._is_repeat[index]:
            return
        (rows,) = stored.values()
        key = self._keys.bytes_of(index)
        try:
            dataset = h5d.open(self._names.id, key)
        except KeyError:
            dataset = None
        if dataset is None or dataset.shape != rows.shape or dataset.dtype != rows.dtype:
            raise ShardError(f"{self._path}: {key.decode()[:80]}: was begun for other proteins; begin again")
        if rows.size:
            self._rows.write(dataset.get_offset(), rows)

    def _complete(self) -> None:
        self._rows.flush()
        self.discard()


def _create(path: Path, layout: str, contents: Contents, keys: Strings) -> None:
    """Creates and allocates every dataset and writes its id; its rows are written later."""
    ((kind, layer),) = contents.columns
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_layout(h5d.CONTIGUOUS)
    properties.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    link = h5p.create(h5p.LINK_CREATE)
    link.set_char_encoding(h5t.CSET_UTF8)
    number = h5t.py_create(np.dtype(contents.dtype), logical=True)
    text, python_text = h5t.py_create(h5py.string_dtype(), logical=True), h5t.py_create(h5py.string_dtype())
    scalar = h5s.create(h5s.SCALAR)
    # The earliest version of the file format that has an order, which every version of HDF5 since 1.8 reads.
    with columns.system_errors(path), columns.open_hdf5(path, "x", libver="earliest", track_order=True) as file:
        file.attrs["layout"] = layout
        file.attrs["model_hash"] = contents.model_hash
        file.attrs["precision"] = contents.precision
        file.attrs["kind"] = kind
        file.attrs["layer"] = layer
        every = zip(keys, contents.ids, is_repeat(keys), strict=True)
        for index, (key, record_id, is_shared) in enumerate(every):
            if is_shared:
                continue
            # The low level: h5py's own create_dataset takes several times as long.
            space = h5s.create_simple(contents.shape(kind, index))
            dataset = h5d.create(file.id, None, number, space, dcpl=properties)
            attribute = h5a.create(dataset, b"original_id", text, scalar)
            attribute.write(np.array(record_id, dtype=h5py.string_dtype()), mtype=python_text)
            h5o.link(dataset, file.id, key.encode(), lcpl=link)
