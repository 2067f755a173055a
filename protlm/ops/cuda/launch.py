"""A kernel launch as a value, so that tests can run it in the interpreter or compile it without a GPU."""

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs kernels as Python on the CPU: read when a kernel is defined, so fixed for the whole process."""


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: A function under `triton.jit`.
        grid: Programs along each axis.
        arguments: Parameters of the run, by name.
        constants: Parameters of the compilation, by name.
        num_warps: Warps of a program.
        num_stages: Most loads in flight in a loop.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Tensor | int | float]
    constants: dict[str, int | bool]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        """Starts the kernel; does nothing for a grid without programs."""
        if 0 in self.grid:
            return
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        self.kernel[self.grid](**self.arguments, **self.constants, **options)


@functools.cache
def capability_of(index: int | None) -> int:
    """Returns the compute capability of a GPU, 10 · major + minor."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
