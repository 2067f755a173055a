"""How a workflow tells of its progress: one stage after the other, each of a known size."""

from collections.abc import Callable

StartProgress = Callable[[str, int], Callable[[int], object]]
"""Called with a stage and its size; returns what is called with what was done of it."""
