"""What all parts of the first run on a GPU are told."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Setting:
    """The setting of a part.

    Attributes:
        device: Such as `cuda` or `cpu`.
        is_tiny: Whether sizes are those of a dry run.
        deadline: When the part should end, as `time.monotonic` counts.
        dataset: A prepared dataset to train on; None to prepare the sample that protlm ships.
        work: A folder for what nobody keeps.
    """

    device: str
    is_tiny: bool
    deadline: float
    dataset: Path | None
    work: Path

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(0.0, self.deadline - time.monotonic())

    @property
    def is_over(self) -> bool:
        """Whether the deadline has passed: a part then begins nothing new."""
        return self.seconds_left == 0.0

    @property
    def gpu_name(self) -> str:
        """The name of the GPU, or of the device."""
        return torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else self.device


def synchronise(device: str) -> None:
    """Waits until a device has finished all kernels that were launched on it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_bytes(device: str) -> int | None:
    """Returns the most memory that tensors took on a GPU since the last call; None elsewhere."""
    if not device.startswith("cuda"):
        return None
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak
