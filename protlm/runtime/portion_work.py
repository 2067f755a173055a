"""The work of a command that computes in portions, in one shape: on one device here, on several by Lightning."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from protlm.runtime.progress import StartProgress


class PortionWork(Protocol):
    """The portions that one process computes: read from the prepared inputs, each written when it is complete.

    A row is computed in one forward pass; rows come portion by portion.
    """

    def waiting(self) -> list[int]:
        """Returns the portions that are not finished, the same in every process."""

    def start(self, portions: Sequence[int], start_progress: StartProgress) -> Iterator[Any]:
        """Starts to show progress, and returns an iterator over the rows of some of these portions."""

    def compute(self, row: Any) -> Any:
        """Returns the results of a row."""

    def add(self, row: Any, results: Any) -> None:
        """Takes the results of a row; the last row of a portion completes it."""

    def close(self) -> None:
        """Waits until every complete portion is written."""


def compute_here(work: PortionWork, start_progress: StartProgress) -> None:
    """Computes the unfinished portions in this process."""
    try:
        for row in work.start(work.waiting(), start_progress):
            work.add(row, work.compute(row))
    finally:
        work.close()
