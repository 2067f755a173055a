"""Files and folders that appear complete or not at all: hides the temporary names under which they are written.

A name is replaced by one operation of the system, so that at no moment it leads to nothing or to a half: a file by a
rename, a folder by an exchange of two names. Where the file system cannot exchange, the old folder waits under a second
name, from which `restore` brings it back or removes it.
"""

import contextlib
import ctypes
import errno
import functools
import io
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

PARTIAL_SUFFIX = ".partial"
"""Suffix of the name of an incomplete file or folder; only a killed process leaves one behind."""

_MANY_OPEN_FILES = 1 << 16
_AT_FDCWD, _EXCHANGE = -100, 2
# Answers of a file system or kernel that has no exchange.
_UNKNOWN = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM})


def as_text(name: str) -> str:
    """Returns a name as text that a file can hold: its bytes that are not UTF-8 are written as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def is_text(path: Path) -> bool:
    """Returns whether a path is UTF-8 throughout, as some libraries need it."""
    return as_text(str(path)) == str(path)


def free_bytes(path: Path) -> int:
    """Returns the free space of the disk on which a path lies, or will lie."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; the file written there is renamed to `path` on success, else removed."""
    temporary = partial_path(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_each_whole(folder: Path, contents: Mapping[str, str]) -> None:
    """Writes texts into files of a folder, by their names and in their order; each appears complete or not at all."""
    for name, content in contents.items():
        with written_whole(folder / name) as partial:
            partial.write_text(content, encoding="utf-8")


@contextlib.contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """Makes a folder with its parents; if the block fails, those that were made here and are empty are removed."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def left_overs(path: Path) -> list[Path]:
    """Returns the incomplete files and folders that killed processes left beside a path, named by `partial_path`."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}{re.escape(PARTIAL_SUFFIX)}")
    try:
        return sorted(entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name))
    except FileNotFoundError:
        return []


def partial_path(path: Path) -> Path:
    """Returns an unused name in the same folder for a file or folder that is not complete yet."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}{PARTIAL_SUFFIX}")


def publish(source: Path, target: Path) -> None:
    """Gives a finished file or folder the name of its target; what had that name before is removed.

    After a kill the target leads to the old or the new, once `restore` was called; a folder that was replaced may still
    lie at `source`, where the exchange put it.
    """
    if target.is_dir():
        discard(replace_folder(source, target))
    else:
        os.replace(source, target)


def replace_folder(source: Path, target: Path) -> Path:
    """Gives a finished folder the name of an existing one, and returns the path at which that one lies now."""
    restore(target)
    if exchange(source, target):
        return source
    replaced = replaced_path(target)
    target.rename(replaced)
    try:
        source.rename(target)
    except BaseException:
        replaced.rename(target)
        raise
    return replaced


def restore(target: Path) -> None:
    """Undoes or completes a replacement of a folder that was killed on a file system without exchange."""
    replaced = replaced_path(target)
    if not os.path.lexists(replaced):
        return
    if os.path.lexists(target):
        remove(replaced)
    else:
        replaced.rename(target)


def replaced_path(target: Path) -> Path:
    """Returns the path at which a folder waits while another one takes its name, where there is no exchange."""
    return target.with_name(f".{target.name}.replaced{PARTIAL_SUFFIX}")


def exchange(first: Path, second: Path) -> bool:
    """Exchanges the names of two files or folders in one step; returns False where the system cannot.

    Raises:
        OSError: One of them does not exist, or may not be renamed.
    """
    rename = _exchanging_rename()
    if rename is None:
        return False
    if rename(os.fsencode(first), os.fsencode(second)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))


@functools.cache
def _exchanging_rename() -> Callable[[bytes, bytes], int] | None:
    """Returns the system's function for an exchange; None if it has none."""
    library = ctypes.CDLL(None, use_errno=True) if sys.platform in ("linux", "darwin") else None
    if sys.platform == "linux":
        # Linux 3.15 and glibc 2.28; see rename(2).
        if (function := getattr(library, "renameat2", None)) is not None:
            function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
            return lambda first, second: int(function(_AT_FDCWD, first, _AT_FDCWD, second, _EXCHANGE))
    elif (function := getattr(library, "renamex_np", None)) is not None:
        # macOS 10.12; RENAME_SWAP has the same number.
        function.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint)
        return lambda first, second: int(function(first, second, _EXCHANGE))
    return None


def remove_at_once(folder: Path) -> None:
    """Removes a folder under another name, so that an interruption leaves no half of it under its own."""
    doomed = partial_path(folder)
    folder.rename(doomed)
    discard(doomed)


def remove(path: Path) -> None:
    """Removes a file, a link or a folder with its content; what is not there, or goes meanwhile, is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, onerror=_raise_unless_missing)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Removes what has a name of `partial_path`, as far as it can be removed now.

    A network file system keeps a file that is open, as a lock or a memory map is, and so its folder. The next command
    on the same output finds it among the left-overs.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, onerror=_raise_unless_held)
    else:
        path.unlink(missing_ok=True)


def _raise_unless_held(_function: object, _path: str, failure: tuple[Any, BaseException, Any]) -> None:
    error = failure[1]
    if not (isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTEMPTY, errno.EBUSY)):
        raise error


def _raise_unless_missing(_function: object, _path: str, failure: tuple[Any, BaseException, Any]) -> None:
    if not isinstance(failure[1], FileNotFoundError):
        raise failure[1]


@functools.cache
def allow_many_open_files() -> None:
    """Raises the number of files that this process may have open at a time, as far as the system lets a user do so.

    The usual limit is 256 or 1,024, which a program may raise; a dataset of many shards needs more.
    """
    try:
        import resource
    except ImportError:
        # Windows, which has no such limit.
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MANY_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # Some systems refuse what they seem to allow.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def open_regular(path: str | Path, *, max_bytes: int | None = None) -> io.BufferedReader:
    """Opens a file to read its bytes, if it is a regular file: neither a pipe, which waits, nor a device without end.

    Links are followed. The kind and the size are those of the opened file itself, so that nobody can exchange it in
    between.

    Args:
        path: The file.
        max_bytes: Most bytes that it may have; None for any number.

    Raises:
        OSError: It cannot be opened, is of another kind or is larger; its `strerror` is a message for users.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "expected a regular file, got a pipe, socket or device", str(path))
        if max_bytes is not None and status.st_size > max_bytes:
            size = f"expected at most {max_bytes:,} bytes, got {status.st_size:,}"
            raise OSError(errno.EFBIG, size, str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | Path, *, max_bytes: int) -> bytes:
    """Returns the content of a file that `open_regular` opens.

    Raises:
        OSError: As `open_regular` raises.
    """
    with open_regular(path, max_bytes=max_bytes) as file:
        # None: nothing to read without waiting, as in some files of /proc.
        content = file.read(max_bytes + 1) or b""
    # One that grows, or whose size the system does not tell, as in /proc.
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"expected at most {max_bytes:,} bytes, got more", str(path))
    return content
