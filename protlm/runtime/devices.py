"""The devices of a run, and the device that is used by default.

torch is loaded by the functions that ask it, so that what needs only options does not wait for it.
"""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from protlm.choices import StrategyName, UsedPrecision

if TYPE_CHECKING:
    import torch

_CPU_INFO = Path("/proc/cpuinfo")
_OWN_GROUPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer")
"""Messages of gloo when another process is gone; NCCL raises an error class of its own."""


class OtherProcessError(Exception):
    """Ends this process without a message, because the first process reports the error."""


@dataclass(frozen=True)
class Devices:
    """The devices of a run.

    Attributes:
        per_node: Devices on each machine; each has a process.
        num_nodes: Number of machines.
        strategy: `ddp`: each device has the whole model; `fsdp`: the devices share its parameters (FSDP2); `auto`: ddp
            if there are several devices.
    """

    per_node: int = 1
    num_nodes: int = 1
    strategy: StrategyName = "auto"

    @property
    def total(self) -> int:
        """Number of devices on all machines."""
        return self.per_node * self.num_nodes


def is_lost_peer(error: RuntimeError) -> bool:
    """Returns whether an error means that another process of the run is gone."""
    import torch.distributed

    return isinstance(error, torch.distributed.DistError) or any(sign in str(error) for sign in _LOST_PEER)


def best_device() -> "torch.device":
    """Returns the first CUDA GPU if there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_half_precision_units(precision: UsedPrecision) -> bool:
    """Returns whether the default device has units of its own for matrix products in a half precision.

    GPUs from Volta on have such units for float16, from Ampere on for bfloat16; a CPU has them for bfloat16 with
    AVX512-BF16 or AMX, and for float16 with AMX-FP16.
    """
    import torch

    if best_device().type == "cuda":
        return torch.cuda.get_device_capability()[0] >= (8 if precision == "bf16" else 7)
    if precision == "bf16":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cpu._is_amx_fp16_supported()


def memory_bytes(device: "torch.device") -> int:
    """Returns the memory of a GPU, or for a CPU that which this process may use."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    return machine_memory_bytes()


def machine_memory_bytes() -> int:
    """Returns the memory, not of a GPU, that this process may use."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_group_limits()])


def _group_limits(own_groups: Path = _OWN_GROUPS, groups: Path = _GROUPS) -> Iterator[int]:
    """Yields the limits of memory of the control groups that this process is in, as of a container or a job."""
    for line in own_groups.read_text(encoding="utf-8").splitlines() if own_groups.exists() else ():
        _, controllers, name = line.split(":", 2)
        if not controllers:
            root, file_name = groups, "memory.max"
        elif "memory" in controllers.split(","):
            root, file_name = groups / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / name.strip("/")
        # A container may see itself as the root, but its process by the name that it has outside.
        for folder in (group, *group.parents):
            if folder.is_relative_to(root) and (folder / file_name).is_file():
                limit = (folder / file_name).read_text(encoding="utf-8").strip()
                if limit.isdecimal():
                    yield int(limit)


def gigabytes(num_bytes: int) -> str:
    """Returns a size for a message."""
    return f"{num_bytes / 1e9:,.1f} GB"


def device_name() -> str:
    """Returns the model of the default device: of the first GPU, or of the processor as far as the system knows it."""
    import torch

    return torch.cuda.get_device_name(0) if best_device().type == "cuda" else processor_name()


def processor_name() -> str:
    """Returns the model of the processor as far as the system knows it, else its kind."""
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"
