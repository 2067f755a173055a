"""How files appear: hides that each is written under a temporary name, so that nobody ever sees a half of it."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

PARTIAL_SUFFIX = ".partial"
"""Ends the name of what is not complete; only a killed process leaves one behind."""


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`; the file written there takes its place on success and is gone otherwise."""
    temporary = partial_path(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def left_overs(path: Path) -> list[Path]:
    """Returns what killed processes left under the names that `partial_path` gives for a path."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}{re.escape(PARTIAL_SUFFIX)}")
    return [found for found in path.parent.iterdir() if pattern.fullmatch(found.name)]


def partial_path(path: Path) -> Path:
    """Returns an unused name in the same folder for something that is not complete yet."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}{PARTIAL_SUFFIX}")


def publish(source: Path, target: Path) -> None:
    """Renames a finished file or folder to its place; an old folder there is removed once the new one has its name."""
    if not target.is_dir():
        os.replace(source, target)
        return
    # Of a process that was killed while it did this.
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
    """Removes a folder; if that is cut short, no half of it keeps its name."""
    doomed = partial_path(folder)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def remove(path: Path) -> None:
    """Removes a file, a link or a folder with all that is in it, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
