"""A kernel launch as a value, so that tests can run it in the interpreter or compile it without a GPU."""

import contextlib
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from protlm.ops.cuda.tiles import MIN_CAPABILITY, Tile

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


def launch_of(
    kernel: Any,
    tile: Tile,
    programs: int,
    tensors: Mapping[str, Tensor],
    arguments: Mapping[str, Tensor | int | float],
    constants: Mapping[str, int | bool],
    *,
    is_batch: bool,
) -> Launch:
    """Returns a launch of a kernel.

    Args:
        kernel: The kernel.
        tile: The tile of a program.
        programs: Their number.
        tensors: The tensors (batch, heads, length, head_dim) by name, whose strides are arguments too.
        arguments: All other arguments.
        constants: Constants by name, of which those are taken that the kernel has.
        is_batch: Whether segments are rows of a batch, not parts of a packed row.
    """
    given = {**arguments, **tensors}
    for name, tensor in tensors.items():
        strides = (tensor.stride(0) if is_batch else 0, tensor.stride(1), tensor.stride(2))
        given |= zip((f"{name}_row", f"{name}_head", f"{name}_token"), strides, strict=True)
    known = {
        "TILE_FEATURES": tile.features, "TILE_TOKENS": tile.tokens, "TILE_OTHERS": tile.others,
        "UPCAST": IS_INTERPRETED, **constants,
    }  # fmt: skip
    names = set(kernel.arg_names)
    return Launch(
        kernel=kernel,
        grid=(programs,),
        arguments=given,
        constants={name: value for name, value in known.items() if name in names},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def is_wide(x: Tensor) -> bool:
    """Returns whether a tensor takes the tiles of float32; the interpreter computes float32 in those of bfloat16."""
    return x.dtype == torch.float32 and not (IS_INTERPRETED and x.device.type == "cpu")


@functools.cache
def capability_of(index: int | None) -> int:
    """Returns the compute capability of a GPU, 10 · major + minor."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability_for(device: torch.device) -> int:
    """Returns the compute capability that decides on tiles: the interpreter runs with those of any GPU."""
    return capability_of(device.index) if device.type == "cuda" else MIN_CAPABILITY


def run_on(device: torch.device, launches: Sequence[Launch]) -> None:
    """Starts launches one after the other, on the current stream of a device."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for launch in launches:
            launch.run()
