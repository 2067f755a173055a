"""How work reports its progress, in one shape everywhere: a stage is started once and advanced until it is done."""

from typing import Protocol


class Advance(Protocol):
    """The function that advances a stage; starting the stage returned it."""

    def __call__(self, done: int, /) -> object:
        """Adds what was done since the last call, in the unit of the stage."""


class StartProgress(Protocol):
    """The callback that a workflow takes from whoever wants to see its progress.

    The workflow calls it at the start of each stage, and passes the `Advance` on to the functions that do the work. A
    stage ends where the next one starts.
    """

    def __call__(self, stage: str, size: int, /) -> Advance:
        """Starts a stage.

        Args:
            stage: Its name; each workflow lists the names of its stages, with their units.
            size: The amount of work in it, in its unit (bytes, residues, proteins); 0 if it is unknown.

        Returns:
            The function to call with each amount done.
        """


def no_advance(_done: int) -> None:
    """Reports nothing: the default where nobody asked for progress."""


def no_progress(_stage: str, _size: int) -> Advance:
    """Starts a stage that reports nothing: the default where nobody asked for progress."""
    return no_advance
