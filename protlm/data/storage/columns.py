"""Columns in HDF5 files: contiguous, uncompressed and aligned, so that they can be read through a memory map.

Files may come from anyone: a column is mapped only after its offset, type and size were checked against the file.
"""

import contextlib
import errno
import mmap
import os
import re
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import h5py
import numpy as np
from numpy.typing import DTypeLike

from protlm import files
from protlm.data.strings import Strings
from protlm.errors import ShardError

ALIGNMENT_BYTES = 64
"""Every column starts at a multiple of this in its file: a cache line, which suits any number type."""

_MOST_ATTRIBUTE_BYTES = 500
"""Several times the longest that protlm writes; messages may show it whole."""

Scalar = TypeVar("Scalar", str, int)


@contextlib.contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Turns an error of HDF5, such as that of a full disk, into the OSError of the system."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        match = re.search(r"errno = (\d+)", str(error))
        if match is None and isinstance(error, OSError):
            raise
        number = int(match[1]) if match is not None else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def open_hdf5(path: Path, mode: str, **options: Any) -> h5py.File:
    """Opens an HDF5 file without HDF5's own locks; use it for every HDF5 file.

    Some network file systems have no locks, and a file of ours never changes once it has its name: a notebook that
    holds it open, locked, is in nobody's way.
    """
    for locking in (False, "best-effort"):
        try:
            return h5py.File(path, mode, locking=locking, **options)
        except OSError as error:
            # HDF5 shares a file that this process has open already, and wants it opened alike.
            if "flag values don't match" not in str(error):
                raise
    return h5py.File(path, mode, locking=True, **options)


@contextlib.contextmanager
def create_columns(path: Path) -> Iterator[h5py.File]:
    """Opens a new HDF5 file whose columns will be aligned; equal content gives equal bytes.

    Args:
        path: The file; it must not exist.
    """
    options = {"alignment_threshold": 1, "alignment_interval": ALIGNMENT_BYTES}
    with system_errors(path), open_hdf5(path, "x", **options) as file:
        yield file


@contextlib.contextmanager
def change_columns(path: Path) -> Iterator[h5py.File]:
    """Opens a file of columns to change it."""
    with open_hdf5(path, "r+") as file:
        yield file


def write_column(file: h5py.File, name: str, column: np.ndarray) -> None:
    """Writes a whole array as a contiguous, uncompressed dataset."""
    file.create_dataset(name, data=np.ascontiguousarray(column), track_times=False)


def write_strings(
    file: h5py.File, name: str, text: bytes | bytearray | np.ndarray, offsets: Sequence[int] | np.ndarray
) -> None:
    """Writes a string column: its UTF-8 bytes back to back, and the (strings + 1) bounds between them."""
    write_column(file, f"{name}/bytes", np.frombuffer(text, dtype=np.uint8))
    write_column(file, f"{name}/offsets", np.asarray(offsets, dtype=np.int64))


def allocate_column(file: h5py.File, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> int | None:
    """Allocates a column that is written in place later.

    Returns:
        Offset of its first byte in the file, None for an empty column, which has none.
    """
    parent, _, leaf = name.rpartition("/")
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    group = file.require_group(parent) if parent else file
    space, stored_type = h5py.h5s.create_simple(shape), h5py.h5t.py_create(np.dtype(dtype), logical=True)
    offset: int | None = h5py.h5d.create(group.id, leaf.encode(), stored_type, space, dcpl=properties).get_offset()
    return offset


def file_attribute(path: Path, name: str) -> str | None:
    """Returns a text attribute of an HDF5 file, None if it has none or is no such file."""
    if not path.is_file():
        return None
    try:
        with open_hdf5(path, "r") as file:
            value = _attribute(file, name)
    except (OSError, RuntimeError, KeyError, TypeError, ValueError):
        # h5py raises any of these for a damaged file.
        return None
    return value if isinstance(value, str) else None


def _attribute(file: h5py.File, name: str) -> Any:
    """Returns an attribute that is a single short text or a number, None if there is no such attribute.

    Memory for others, of the size that the file claims, is never asked for.
    """
    if name not in file.attrs:
        return None
    attribute = file.attrs.get_id(name)
    is_single = attribute.get_space().get_simple_extent_type() == h5py.h5s.SCALAR
    if not is_single or attribute.dtype.itemsize > _MOST_ATTRIBUTE_BYTES:
        return None
    value = file.attrs[name]
    # A text of variable length lies elsewhere in the file.
    return None if isinstance(value, str) and len(value) > _MOST_ATTRIBUTE_BYTES else value


class FileParts:
    """Reads parts of a file that somebody may cut short meanwhile, which ends a process that reads them from a map.

    It keeps the file open, and forked processes may share one.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, start: int, num_bytes: int) -> bytes | None:
        """Returns so many bytes from `start` on, None if the file ends before."""
        parts = []
        while num_bytes > 0:
            # The system reads 2 GiB at most at a time.
            part = os.pread(self._descriptor, num_bytes, start)
            if not part:
                return None
            parts.append(part)
            start, num_bytes = start + len(part), num_bytes - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class ColumnFile:
    """An open HDF5 file of columns; the mapped columns outlive it, and so do its parts."""

    def __init__(self, path: Path, file: h5py.File, raw: BinaryIO, content: mmap.mmap) -> None:
        self.path = path
        self._file = file
        self._raw = raw
        self._content = content

    def parts(self) -> FileParts:
        """Returns what reads the bytes of this file without the maps."""
        return FileParts(self._raw)

    def attribute(self, name: str, kind: type[Scalar]) -> Scalar:
        """Returns an attribute of the file as `str` or `int`; raises ShardError if it is missing or of another type."""
        value = _attribute(self._file, name)
        if kind is int and isinstance(value, np.integer):
            return kind(value)
        if kind is str and isinstance(value, str):
            return kind(value)
        got = "none" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
        raise ShardError(f"{self.path}: attribute {name!r}: expected {kind.__name__}, got {got}")

    def check_format(self, expected: str, version: int) -> None:
        """Raises ShardError for a file of another format or another version of it."""
        if _attribute(self._file, "format") != expected:
            raise ShardError(f"{self.path}: not a {expected} file")
        written_version = self.attribute("format_version", int)
        if written_version != version:
            raise ShardError(
                f"{self.path}: format_version: expected {version}, got {written_version}; make the file again, "
                "or read it with the protlm that wrote it"
            )

    def names(self, group: str = "") -> list[str]:
        """Returns the names in a group, sorted; none if there is no such group."""
        node = self._resolve(group) if group else self._file
        return sorted(node) if isinstance(node, h5py.Group) else []

    def column(self, name: str, dtype: DTypeLike, *, ndim: int = 1) -> np.ndarray:
        """Maps a column, read-only.

        Raises:
            ShardError: It is missing, of another type or rank, not contiguous, stored in another file, or cut short.
        """
        expected = np.dtype(dtype)
        dataset = self._resolve(name)
        if not isinstance(dataset, h5py.Dataset):
            raise self._fault(name, f"{expected} column", "nothing" if dataset is None else "a group")
        if dataset.shape is None or dataset.ndim != ndim:
            raise self._fault(name, f"{ndim} axes", f"shape {dataset.shape}")
        if dataset.dtype != expected:
            raise self._fault(name, str(expected), str(dataset.dtype))
        properties = dataset.id.get_create_plist()
        if properties.get_layout() != h5py.h5d.CONTIGUOUS or properties.get_external_count():
            raise self._fault(name, "a contiguous column inside the file", "another storage layout")
        shape = tuple(int(axis) for axis in dataset.shape)
        if 0 in shape:
            return np.frombuffer(b"", dtype=expected).reshape(shape)
        return self._map(name, dataset.id.get_offset(), shape, expected)

    def place(self, name: str) -> int | None:
        """Returns the offset of a column's first byte in the file, None for an empty column, which has none."""
        dataset = self._resolve(name)
        if not isinstance(dataset, h5py.Dataset):
            raise self._fault(name, "a column", "nothing" if dataset is None else "a group")
        offset: int | None = dataset.id.get_offset()
        return offset

    def strings(self, name: str) -> Strings:
        """Maps a string column after checking its offsets."""
        text = self.column(f"{name}/bytes", np.uint8)
        offsets = self.column(f"{name}/offsets", np.int64)
        self.check_offsets(f"{name}/offsets", offsets, len(text))
        return Strings(text, offsets, f"{self.path}: {name}")

    def check_offsets(self, name: str, offsets: np.ndarray, end: int, *, rising: bool = False) -> None:
        """Raises ShardError unless offsets run from 0 to `end` without falling, or with `rising`, without a pause."""
        if not len(offsets) or offsets[0] != 0 or offsets[-1] != end:
            got = f"{offsets[0]} to {offsets[-1]}" if len(offsets) else "none"
            raise self._fault(name, f"offsets from 0 to {end}", got)
        if (offsets[1:] < offsets[:-1]).any():
            raise self._fault(name, "offsets that never fall", "some that do")
        if rising and (offsets[1:] == offsets[:-1]).any():
            raise self._fault(name, "records of at least one residue", "an empty one")

    def check_size(self, name: str, column: np.ndarray | Strings, size: int) -> None:
        """Raises ShardError for a column of another number of rows."""
        if len(column) != size:
            raise self._fault(name, f"{size} rows", str(len(column)))

    def _resolve(self, name: str) -> h5py.Group | h5py.Dataset | None:
        node = self._file
        for key in name.split("/"):
            if not isinstance(node, h5py.Group):
                return None
            link = node.get(key, getlink=True)
            if link is None:
                return None
            # A soft or external link could point to any other file that the user may read.
            if not isinstance(link, h5py.HardLink):
                raise self._fault(name, "a column inside the file", "a link")
            node = node[key]
        return node

    def _map(self, name: str, offset: int | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        # Python integers, which do not overflow: the shape comes from the file.
        count = 1
        for axis in shape:
            count *= axis
        num_bytes = count * dtype.itemsize
        if offset is None or offset + num_bytes > len(self._content):
            place = "no place" if offset is None else f"bytes {offset} to {offset + num_bytes}"
            raise self._fault(name, f"a place within the {len(self._content)} bytes of the file", place)
        return np.frombuffer(self._content, dtype=dtype, count=count, offset=offset).reshape(shape)

    def _fault(self, name: str, expected: str, got: str) -> ShardError:
        return ShardError(f"{self.path}: {name}: expected {expected}, got {got}")


@contextlib.contextmanager
def open_columns(path: Path) -> Iterator[ColumnFile]:
    """Opens an HDF5 file to map its columns; HDF5's own handle is closed at the end, and only the maps stay.

    Maps are shared and read-only, so a forked worker may use those of its parent; each file costs one map and, before
    Python 3.13, one file descriptor, and its parts another one.

    Raises:
        ShardError: The file is missing, is no HDF5 file, or is damaged.
    """
    try:
        raw = files.open_regular(path)
    except FileNotFoundError as error:
        raise ShardError(f"{path}: no such file") from error
    except OSError as error:
        raise ShardError(f"{path}: not a readable HDF5 file: {error.strerror}") from error
    try:
        # Mapped first: what has no bytes to map, as files of /proc, is not given to HDF5.
        with raw:
            content = _map_file(raw)
            with open_hdf5(path, "r") as file:
                yield ColumnFile(path, file, raw, content)
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            raise
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise ShardError(f"{path}: too many files are open at a time; raise the limit with `ulimit -n`") from error
        # h5py raises any of these for a damaged file.
        reason = str(error).strip("'\" \n").split("\n")[0]
        raise ShardError(f"{path}: not a readable HDF5 file: {reason}") from error


def _map_file(file: BinaryIO) -> mmap.mmap:
    if sys.version_info >= (3, 13):
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, trackfd=False)
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
