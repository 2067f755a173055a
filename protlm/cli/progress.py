"""Progress on stderr, and only on a terminal: one bar after the other, one for each stage of a command."""

from collections.abc import Mapping
from typing import Any

from protlm.runtime.progress import Advance


class Bars:
    """One progress bar after the other; use it as a context, and give `start` to a workflow."""

    def __init__(self, units: Mapping[str, str]) -> None:
        """Sets the units; no bar is shown yet.

        Args:
            units: The unit of each stage by its name.
        """
        from tqdm import tqdm

        # Its thread would have to be forked with worker processes.
        tqdm.monitor_interval = 0
        self._tqdm = tqdm
        self._units = units
        self._bar: Any = None

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, stage: str, size: int, /) -> Advance:
        """Starts the bar of a stage and returns the function that advances it: a `StartProgress`."""
        self.__exit__()
        bar = self._tqdm(total=size, unit=self._units[stage], unit_scale=True, desc=stage, disable=None)
        self._bar = bar

        def advance(done: int) -> None:
            bar.update(done)

        return advance
