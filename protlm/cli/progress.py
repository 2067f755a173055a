"""Progress on stderr, one stage of a command after the other: a bar each on a terminal, a line a minute elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from protlm.runtime.progress import Advance, Details, no_details

_SECONDS_BETWEEN_LINES = 60.0
_LARGEST_UNSCALED = 1_000_000
"""Larger numbers are shown short in a bar."""


class Progress:
    """The progress of a command; use it as a context, and give `start` to a workflow.

    Where stderr is no terminal, as in the log of a job, nothing is printed in the first minute.
    """

    def __init__(self, units: Mapping[str, str]) -> None:
        """Shows nothing yet.

        Args:
            units: The unit of each stage by its name, in the singular.
        """
        from tqdm import tqdm

        # Its thread would have to be forked with worker processes.
        tqdm.monitor_interval = 0
        self._tqdm = tqdm
        self._units = units
        self._bar: Any = None
        self._line_is_due_at = time.monotonic() + _SECONDS_BETWEEN_LINES

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, stage: str, size: int, /, *, done: int = 0, details: Details = no_details) -> Advance:
        """Starts to show a stage and returns the function that advances it: a `StartProgress`."""
        self.__exit__()
        if sys.stderr is not None and sys.stderr.isatty():
            return self._start_bar(stage, size, done, details)
        return self._start_lines(stage, size, done, details)

    def _start_bar(self, stage: str, size: int, done: int, details: Details) -> Advance:
        bar = self._tqdm(
            total=size, initial=done, unit=self._units[stage], unit_scale=not 0 < size < _LARGEST_UNSCALED,
            desc=stage, smoothing=0.05,
        )  # fmt: skip
        self._bar = bar

        def advance(amount: int) -> None:
            if shown := details():
                bar.set_postfix(shown, refresh=False)
            bar.update(amount)

        return advance

    def _start_lines(self, stage: str, size: int, first: int, details: Details) -> Advance:
        began, done, unit = time.monotonic(), first, self._units[stage]

        def advance(amount: int) -> None:
            nonlocal done
            done += amount
            now = time.monotonic()
            # Without a stderr, print would take stdout.
            if now >= self._line_is_due_at and sys.stderr is not None:
                self._line_is_due_at = now + _SECONDS_BETWEEN_LINES
                parts = [
                    *_progress(unit, size, done, rate=(done - first) / max(now - began, 1e-9), seconds=now - began),
                    *(f"{name} {value}" for name, value in details().items()),
                ]
                print(f"{stage}: {', '.join(parts)}", file=sys.stderr, flush=True)

        return advance


def _progress(unit: str, size: int, done: int, *, rate: float, seconds: float) -> list[str]:
    """Returns the parts of a line: the amount of work done, the amount a second, and the time that is left."""
    units = unit if unit == "B" else f"{unit}s"
    if not rate and not done:
        return [f"at work for {_clock(seconds)}"]
    shown_rate = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
    if not size:
        return [f"{done:,} {units}", f"{shown_rate} {units}/s"]
    left = f"{_clock((size - done) / rate)} left" if rate else "time left unknown"
    return [f"{done:,} of {size:,} {units} ({done / size:.0%})", f"{shown_rate} {units}/s", left]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
