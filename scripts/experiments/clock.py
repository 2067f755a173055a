"""The processor time of training, and the curve of a run over it: hides which updates count how much."""

import csv
import time
from collections.abc import Sequence
from pathlib import Path

from protlm.runtime.progress import Advance, Details, no_details


class StepClock:
    """Processor seconds of this process at each update, without the measurements between the updates.

    An update with a measurement behind it, and the one after that, which began with its checkpoint, count as much as
    the mean of the others; so does the first, which loads libraries.

    Attributes:
        every: Updates from one measurement to the next.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._seconds: list[float] = []
        self._last = 0.0

    def start(self, _stage: str, _size: int, /, *, done: int = 0, details: Details = no_details) -> Advance:
        """Starts the stage of training."""
        self._last = time.process_time()
        return self._advance

    def _advance(self, done: int, /) -> None:
        if done:
            now = time.process_time()
            self._seconds.append(now - self._last)
            self._last = now

    def seconds(self) -> list[float]:
        """Returns the processor seconds of training up to each update, the first one first."""
        is_clean = [step > 1 and step % self.every and (step - 1) % self.every for step in self._steps()]
        is_clean[-1] = False
        clean = [seconds for seconds, counts in zip(self._seconds, is_clean, strict=True) if counts]
        # Where a run is so short that every update is measured.
        mean = sum(clean or self._seconds) / len(clean or self._seconds)
        total, sums = 0.0, []
        for seconds, counts in zip(self._seconds, is_clean, strict=True):
            total += seconds if counts else mean
            sums.append(total)
        return sums

    def _steps(self) -> range:
        return range(1, len(self._seconds) + 1)


def valid_curve(path: Path, seconds: Sequence[float]) -> list[dict[str, float]]:
    """Returns the measurements on the valid split, of hidden residues, with the processor time before each."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["valid/accuracy"]]
    return [
        {
            "step": int(row["step"]),
            "seconds": round(seconds[int(row["step"]) - 1], 2),
            "accuracy": round(float(row["valid/accuracy"]), 5),
            "perplexity": round(float(row["valid/perplexity"]), 4),
        }
        for row in rows
    ]
