"""Files and folders that appear complete or not at all: hides the temporary names under which they are written."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

PARTIAL_SUFFIX = ".partial"
"""Suffix of the name of an incomplete file or folder; only a killed process leaves one behind."""


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; the file written there is renamed to `path` on success, else removed."""
    temporary = partial_path(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def left_overs(path: Path) -> list[Path]:
    """Returns the incomplete files and folders that killed processes left beside a path, named by `partial_path`."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}{re.escape(PARTIAL_SUFFIX)}")
    return [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]


def partial_path(path: Path) -> Path:
    """Returns an unused name in the same folder for a file or folder that is not complete yet."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}{PARTIAL_SUFFIX}")


def publish(source: Path, target: Path) -> None:
    """Renames a finished file or folder to its target; an old folder there is removed once the new one has its name."""
    if not target.is_dir():
        os.replace(source, target)
        return
    # Left by a process that was killed inside this function.
    for left_over in left_overs(target):
        remove(left_over)
    old = partial_path(target)
    target.rename(old)
    try:
        source.rename(target)
    except BaseException:
        old.rename(target)
        raise
    remove(old)


def remove_at_once(folder: Path) -> None:
    """Removes a folder under another name, so that an interruption leaves no half of it under its own."""
    doomed = partial_path(folder)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def remove(path: Path) -> None:
    """Removes a file, a link or a folder with its content; does nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
