"""The devices of a run: hides which process of it this is, and which device is used when nobody says so."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed

from protlm.choices import StrategyName

_LOST_PEER = ("Connection closed by peer", "Connection reset by peer")
"""How gloo says that the process at the other end is gone; NCCL has an error of its own."""


class OtherProcessError(Exception):
    """Ends this process quietly: the first one tells the user what is wrong."""


@dataclass(frozen=True)
class Devices:
    """The devices of a run.

    Attributes:
        per_node: Devices, and so processes, on each machine.
        num_nodes: Machines.
        strategy: `ddp`: each device has the whole model; `fsdp`: each holds a part of it (FSDP2); `auto`: ddp where
            there are several devices.
    """

    per_node: int = 1
    num_nodes: int = 1
    strategy: StrategyName = "auto"

    @property
    def total(self) -> int:
        """Devices on all machines."""
        return self.per_node * self.num_nodes


def process_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Returns the number of this process among those of the run, before they are joined; 0 is the first.

    torchrun sets RANK; Lightning gives the processes that it starts a LOCAL_RANK, also inside a job of SLURM; where
    SLURM starts them, it numbers the tasks of a step.
    """
    if "RANK" in environment:
        return int(environment["RANK"])
    if "LOCAL_RANK" in environment:
        return int(environment["LOCAL_RANK"]) or int(environment.get("NODE_RANK", "0"))
    if int(environment.get("SLURM_NTASKS", "1")) > 1:
        return int(environment.get("SLURM_PROCID", "0"))
    return int(environment.get("NODE_RANK", "0"))


def is_lost_peer(error: RuntimeError) -> bool:
    """Says whether an error means that another process of the run is gone."""
    return isinstance(error, torch.distributed.DistError) or any(sign in str(error) for sign in _LOST_PEER)


def default_tokens_per_batch() -> int:
    """Returns the budget of one forward pass without gradients that suits the device.

    A CPU is fastest while a row and what is made of it stay in its cache; a GPU wants more to do at once.
    """
    return 8192 if best_device().type == "cuda" else 2048


def best_device() -> torch.device:
    """Returns the first CUDA GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
