"""How work reports its progress, in one shape everywhere: a stage is started once and advanced until it is done."""

from collections.abc import Callable, Mapping
from typing import Protocol


class Advance(Protocol):
    """The function that advances a stage; starting the stage returned it."""

    def __call__(self, done: int, /) -> object:
        """Adds what was done since the last call, in the unit of the stage; 0 says only that it is still at work."""


Details = Callable[[], Mapping[str, str]]
"""A function that is asked for more to show beside the progress, by name."""


def no_details() -> Mapping[str, str]:
    """Returns nothing: the default of a stage that has no more to show."""
    return {}


class StartProgress(Protocol):
    """The callback that a workflow takes from whoever wants to see its progress.

    The workflow calls it at the start of each stage, and passes the `Advance` on to the functions that do the work. A
    stage ends where the next one starts.
    """

    def __call__(self, stage: str, size: int, /, *, done: int = 0, details: Details = no_details) -> Advance:
        """Starts a stage.

        Args:
            stage: Its name; each workflow lists the names of its stages, with their units.
            size: The amount of work in it, in its unit (bytes, residues, proteins); 0 if it is unknown.
            done: How much of it was done before.
            details: What to show beside it.

        Returns:
            The function to call with each amount done.
        """


def tell_nobody(_line: str) -> None:
    """Drops a line of a workflow: the default where nobody asked for lines beside its progress."""


def no_advance(_done: int) -> None:
    """Reports nothing: the default where nobody asked for progress."""


def no_progress(_stage: str, _size: int, *, done: int = 0, details: Details = no_details) -> Advance:
    """Starts a stage that reports nothing: the default where nobody asked for progress."""
    return no_advance
