"""The mark of a run in the folder of its work, by which workers elsewhere know the folder and that the run goes on.

It is renamed when the run ends, however it ended: by the run itself, or by the next one that has the folder to itself.
"""

import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

_RUN, _ENDED = "run", "ended"
_NEW_FILE_SECONDS = 60
"""Longest time in which a network file system shows a new file to another machine."""
_LOOK_SECONDS = 0.5
"""Time between two looks of a task."""


def new_mark(folder: Path) -> Path:
    """Makes the mark of a new run, and returns its path."""
    mark = folder / f"{_RUN}-{uuid.uuid4().hex}"
    mark.touch()
    return mark


def end_run(mark: Path) -> None:
    """Ends the run of a mark for everybody who looks at it."""
    try:
        mark.rename(_ended(mark))
    except FileNotFoundError:
        # The folder is gone, or was finished.
        return


def end_runs(folder: Path) -> None:
    """Ends all runs in a folder: those before a run that has the folder to itself, which were killed."""
    for mark in folder.glob(f"{_RUN}-*"):
        end_run(mark)


def fault_of_mark(mark: Path) -> str:
    """Returns why a worker does not see the mark of a run that goes on; empty if it sees it."""
    end = time.monotonic() + _NEW_FILE_SECONDS
    # Listing a folder makes a network file system ask its server, unlike looking for a name.
    while mark.name not in (names := set(_names(mark.parent))):
        if _ended(mark).name in names:
            return "the run of this task has ended"
        if time.monotonic() > end:
            return (
                f"the worker on {socket.gethostname()} sees another folder as {mark.parent}; inputs, model and output "
                "must be on a file system that all machines share"
            )
        time.sleep(1)
    return ""


class MarkWatch:
    """A mark that was seen, for the tasks of its run to look at now and then."""

    def __init__(self, mark: Path) -> None:
        self._mark, self._looked, self._is_there = mark, time.monotonic(), True

    def is_there(self) -> bool:
        """Returns whether the run went on a moment ago."""
        if time.monotonic() > self._looked + _LOOK_SECONDS:
            self._looked = time.monotonic()
            self._is_there = self._mark.exists()
        return self._is_there


def _names(folder: Path) -> Iterator[str]:
    try:
        yield from os.listdir(folder)
    except FileNotFoundError:
        return


def _ended(mark: Path) -> Path:
    """Returns the name that the mark of a run gets when the run has ended."""
    return mark.with_name(mark.name.replace(_RUN, _ENDED, 1))
