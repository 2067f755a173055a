"""Layout `npy`: one array of (records, dim) that `numpy.load(…, mmap_mode="r")` maps, and a file of ids beside it.

The ids of `NAME.npy` are in `NAME.ids.txt`, one a line, in the order of the rows.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from tokenize import TokenError

import numpy as np

from protlm import files
from protlm.data.embeddings.kinds import Dtype, Kind
from protlm.data.embeddings.layouts.contents import Column, Contents
from protlm.data.embeddings.layouts.layout import Layout, LayoutWriter, OutputSummary
from protlm.data.embeddings.layouts.names import check_one_line_each
from protlm.data.embeddings.layouts.sized_file import SizedFile, sync
from protlm.data.strings import Strings
from protlm.errors import ShardError

_SUFFIX = ".npy"


class NpyLayout(Layout):
    """Layout `npy`."""

    name = "npy"
    can_resume = True

    def check(self, kinds: Sequence[Kind], layers: Sequence[int], dtype: Dtype) -> None:
        """Raises ValueError unless mean or cls of one layer is requested."""
        self._check_one_row(kinds)
        self._check_one_column(kinds, layers)

    def check_ids(self, ids: Strings) -> None:
        """Raises ProtlmError for an id with a line end or a tab."""
        check_one_line_each(ids, self.name)

    def paths(self, out: Path) -> tuple[Path, ...]:
        """Returns the array and the ids beside it."""
        return out, out.with_name(out.name.removesuffix(_SUFFIX) + ".ids.txt")

    def is_own(self, out: Path) -> bool:
        """Returns whether the file is an array of floating-point rows with a file of as many lines beside it."""
        try:
            with files.open_regular(out) as file:
                if np.lib.format.read_magic(file) != (1, 0):
                    return False
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if len(shape) != 2 or dtype.kind != "f":
                return False
            with files.open_regular(self.paths(out)[1]) as file:
                return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b"")) == shape[0]
        except (OSError, ValueError, TokenError):
            # TokenError: a header that NumPy takes for one of Python 2.
            return False

    def summary(self, out: Path) -> OutputSummary:
        """Returns the summary of an array; see `Layout.summary`."""
        rows = np.load(out, mmap_mode="r")
        return OutputSummary(num_entries=len(rows), dim=rows.shape[1], dtype=str(rows.dtype))

    def open(self, path: Path, contents: Contents, *, resume: bool) -> "NpyWriter":
        """Starts a file, or continues one; see `Layout.open`."""
        header, size = _header(contents)
        if not resume:
            self._create(path, contents, header, size)
        elif not path.is_file() or path.stat().st_size != size or _begins(path, len(header)) != header:
            raise ShardError(f"{path}: no unfinished output of these proteins; begin again without --resume")
        return NpyWriter(path, contents, len(header), resume=resume)

    def _create(self, path: Path, contents: Contents, header: bytes, size: int) -> None:
        self.check_ids(contents.ids)
        with files.written_whole(self.paths(path)[1]) as temporary, temporary.open("wb") as file:
            for record_id in contents.ids:
                file.write(record_id.encode() + b"\n")
        sync(self.paths(path)[1])
        with files.written_whole(path) as temporary, temporary.open("wb") as file:
            file.write(header)
            file.truncate(size)


class NpyWriter(LayoutWriter):
    """Writes rows in place."""

    def __init__(self, path: Path, contents: Contents, first_row: int, *, resume: bool) -> None:
        """Opens a file of its final size with its header."""
        super().__init__(contents, resume=resume)
        self._first_row = first_row
        self._file = SizedFile(path)

    def flush(self) -> None:
        """Syncs all written rows to disk."""
        self._file.flush()

    def discard(self) -> None:
        """Closes the file; a resume can continue it."""
        self._file.close()

    def _write(self, index: int, stored: Mapping[Column, np.ndarray]) -> None:
        (row,) = stored.values()
        self._file.write(self._first_row + index * row.nbytes, row)

    def _complete(self) -> None:
        self._file.flush()
        self._file.close()


def _header(contents: Contents) -> tuple[bytes, int]:
    """Returns the header of the file, and the size of the whole file in bytes."""
    dtype, shape = np.dtype(contents.dtype), (len(contents), contents.model_dim)
    file = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)
    return file.getvalue(), len(file.getvalue()) + shape[0] * shape[1] * dtype.itemsize


def _begins(path: Path, num_bytes: int) -> bytes:
    with path.open("rb") as file:
        return file.read(num_bytes)
