"""The wish to stop: hides which signals ask for it, so that a run ends between two updates with a whole checkpoint."""

import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Ctrl-C; what ends a process or a preempted job; what SLURM sends ahead of a time limit (`--signal=USR1@120`)."""


class StopRequest:
    """Whether a run should stop: a signal asked for it, or its time is over.

    The first signal asks for a stop between two updates. A second Ctrl-C stops at once.

    Attributes:
        interrupted: A signal came.
    """

    def __init__(self, max_seconds: float | None = None) -> None:
        self.interrupted = False
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def time_is_over(self) -> bool:
        """Whether the run has lasted as long as it may."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    def listen(self) -> None:
        """Takes the signals over, again where somebody else did meanwhile; only a main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                previous = signal.signal(number, self._ask)
                self._previous.setdefault(number, previous)

    def __enter__(self) -> "StopRequest":
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _ask(self, signal_number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        if signal_number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
