"""Locks on folders: hides how a process is kept out of a folder in which another one works.

The lock is the system's, on a file in the folder, so it ends with its process however that ends. The file names its
holder for those who have to wait.
"""

import contextlib
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from protlm.errors import ProtlmError, ProtlmWarning

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

LOCK_NAME = ".lock"
"""Name of the file in a locked folder; removed with the lock, unless its process is killed."""

PATIENCE_SECONDS = 3.0
"""How long a lock is asked for: the workers of a process that was killed hold its lock until they notice."""

_PAUSE_SECONDS = 0.05
_MOST_HOLDER_BYTES = 200


class FolderGoneError(ProtlmError):
    """Between two steps of locking a folder, its holder gave its name to another one, or removed it."""


@contextlib.contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Locks a folder against other processes; with `shared`, only against those that do not share it.

    The folder may be renamed meanwhile. Where the file system has no locks, a warning says so.

    Raises:
        ProtlmError: Another process holds the lock; the message names it.
        OSError: The folder is missing or cannot be written to.
    """
    if fcntl is None:
        yield
        return
    # By its descriptor the folder can be found under any name.
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        lock = _lock(folder, directory, shared=shared)
        try:
            os.ftruncate(lock, 0)
            os.pwrite(lock, _this_process(), 0)
            yield
        finally:
            if not shared and _is_in(directory, lock):
                os.unlink(LOCK_NAME, dir_fd=directory)
            os.close(lock)
    finally:
        os.close(directory)


def is_locked(folder: Path) -> bool:
    """Returns whether a process holds the lock of a folder."""
    if fcntl is None:
        return False
    try:
        lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_NB | fcntl.LOCK_EX)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(lock)
    return False


def _lock(folder: Path, directory: int, *, shared: bool) -> int:
    """Returns the descriptor of a folder's lock file, locked."""
    until = time.monotonic() + PATIENCE_SECONDS
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        try:
            lock = os.open(LOCK_NAME, flags, 0o666, dir_fd=directory)
        except FileNotFoundError:
            raise _gone(folder) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_NB | mode)
        except BlockingIOError:
            holder = os.read(lock, _MOST_HOLDER_BYTES).decode(errors="replace").strip()
            os.close(lock)
            if time.monotonic() < until:
                time.sleep(_PAUSE_SECONDS)
                continue
            by = f" ({holder})" if holder else ""
            raise ProtlmError(f"{folder}: another run is at work here{by}; wait for it, or stop it") from None
        except OSError as error:
            warnings.warn(
                f"{folder}: this file system has no locks ({error.strerror}); start no second run here meanwhile",
                ProtlmWarning,
                stacklevel=4,
            )
            return lock
        if _is_in(directory, lock):
            if not _is_at(folder, directory):
                os.close(lock)
                raise _gone(folder)
            return lock
        # Its holder removed it between the two steps.
        os.close(lock)


def _gone(folder: Path) -> FolderGoneError:
    return FolderGoneError(
        f"{folder}: another run was at work here, and has just replaced or removed it; run the command again"
    )


def _is_at(folder: Path, directory: int) -> bool:
    """Returns whether a path still leads to the folder that was opened there."""
    try:
        return os.path.samestat(os.stat(folder), os.fstat(directory))
    except FileNotFoundError:
        return False


def _is_in(directory: int, lock: int) -> bool:
    """Returns whether the lock file of a folder is this one."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(LOCK_NAME, dir_fd=directory, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _this_process() -> bytes:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"process {os.getpid()} on {platform.node() or 'this machine'}, since {now}\n".encode()
