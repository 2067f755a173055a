"""A kernel launch as a value: what a GPU would be given, so that tests can run it, or compile it without a GPU."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs kernels as Python on the CPU; it asks when a kernel is defined, so for the whole process."""


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: A function under `triton.jit`.
        grid: Programs along each axis.
        arguments: The parameters known when it runs, by name.
        constants: The parameters known when it is compiled, by name.
        num_warps: Of a program.
        num_stages: Loads in flight in a loop, at most.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Tensor | int | float]
    constants: dict[str, int | bool]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        """Starts the kernel; a grid without programs is no launch."""
        if 0 in self.grid:
            return
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        self.kernel[self.grid](**self.arguments, **self.constants, **options)


def run_all(launches: Sequence[Launch]) -> None:
    """Starts kernels one after the other, on one stream."""
    for launch in launches:
        launch.run()
