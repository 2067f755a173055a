"""A file of final size whose rows are written in place, in any order: hides short writes and fsync.

It takes up disk only for written rows, so embeddings can be moved from one file to another without storing them twice.
Writes use `os.pwrite` and not a memory map, so that the memory of the process does not grow with the file, and so that
a full disk is an OSError and not a bus error.
"""

import os
from pathlib import Path

import numpy as np


class SizedFile:
    """An open file that has its final size."""

    def __init__(self, path: Path) -> None:
        """Opens an existing file."""
        self._folder = path.parent
        self._descriptor: int | None = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))

    def write(self, place: int, rows: np.ndarray) -> None:
        """Writes a contiguous array at an offset in bytes from the beginning of the file."""
        assert self._descriptor is not None
        left = rows.reshape(-1).view(np.uint8).data
        while left:
            # One call writes at most 2 GiB.
            written = os.pwrite(self._descriptor, left, place)
            left, place = left[written:], place + written

    def flush(self) -> None:
        """Syncs the file's content and name to disk."""
        assert self._descriptor is not None
        os.fsync(self._descriptor)
        sync(self._folder)

    def close(self) -> None:
        """Closes the file; does nothing if it is closed."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def sync(path: Path) -> None:
    """Syncs the content of a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
