"""Stopping on request: signals and a time limit end a run between two updates, with a whole checkpoint."""

import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Ctrl-C; the end of a process or preemption of a job; SLURM ahead of a time limit (`--signal=USR1@120`)."""


class StopRequest:
    """The request to stop a run, by a signal or because its time is over.

    The first signal asks for a stop between two updates. A second Ctrl-C stops at once.

    Attributes:
        interrupted: Whether a signal came.
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
        """Installs the signal handlers, again if other code has replaced them; does nothing outside the main thread."""
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
