"""On how many devices a run is: hides which process this is, and which of Lightning's strategies joins them."""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed

StrategyName = Literal["auto", "ddp", "fsdp"]

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

    @property
    def accelerator(self) -> str:
        """What Lightning calls the kind of device."""
        return "gpu" if best_device().type == "cuda" else "cpu"

    def lightning_strategy(self) -> Any:
        """Returns what Lightning's trainer takes as its strategy."""
        # Here, because who uses one device alone should not wait for Lightning to be imported.
        from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy

        if self.strategy == "fsdp":
            # One file in which any number of devices finds its part again.
            return ModelParallelStrategy(
                data_parallel_size=self.total, tensor_parallel_size=1, save_distributed_checkpoint=False
            )
        if self.total == 1:
            return "auto"
        # The projections are the same everywhere: all processes draw them from one seed.
        return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)


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


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hides Lightning's advice for other ways of working than ours, such as a loader with many workers."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning.*")
        warnings.filterwarnings("ignore", module="lightning_fabric.*")
        yield


def default_tokens_per_batch() -> int:
    """Returns the budget of one forward pass without gradients that suits the device.

    A CPU is fastest while a row and what is made of it stay in its cache; a GPU wants more to do at once.
    """
    return 8192 if best_device().type == "cuda" else 2048


def best_device() -> torch.device:
    """Returns the first CUDA GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
