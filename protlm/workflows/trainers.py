"""Lightning's trainers for our devices: the strategy, who starts the processes, and no advice on stderr."""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment, find_free_network_port
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins import CheckpointIO
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy

from protlm.config import Config
from protlm.runtime.devices import Devices, best_device
from protlm.runtime.launch import launcher


def training_trainer(
    settings: Config,
    devices: Devices,
    run_dir: Path,
    callbacks: Sequence[pl.Callback],
    loggers: Sequence[Logger],
    checkpoint_io: CheckpointIO,
) -> pl.Trainer:
    """Returns the trainer of a run; it makes no checkpoints, progress bars or summaries of its own accord."""
    return pl.Trainer(
        **_shared_options(devices),
        default_root_dir=run_dir,
        max_steps=settings.train.max_steps,
        max_epochs=-1,
        precision="bf16-mixed" if settings.train.precision == "bf16-mixed" else "32-true",
        accumulate_grad_batches=settings.train.accumulate // devices.total,
        callbacks=list(callbacks),
        plugins=[checkpoint_io, cluster_environment(devices)],
        logger=list(loggers),
        num_sanity_val_steps=0,
    )


def inference_trainer(devices: Devices) -> pl.Trainer:
    """Returns a trainer that runs a model without gradients on the given devices."""
    return pl.Trainer(**_shared_options(devices), plugins=[cluster_environment(devices)], logger=False)


def _shared_options(devices: Devices) -> dict[str, Any]:
    return {
        "accelerator": "gpu" if best_device().type == "cuda" else "cpu",
        "devices": devices.per_node,
        "num_nodes": devices.num_nodes,
        "strategy": lightning_strategy(devices),
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }


def lightning_strategy(devices: Devices) -> Any:
    """Returns Lightning's strategy for these devices."""
    if devices.strategy == "fsdp":
        # One file, from which any number of devices can load their shards.
        return ModelParallelStrategy(
            data_parallel_size=devices.total, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    if devices.total == 1:
        return "auto"
    # Buffers need no broadcast: all processes draw the same projections from one seed.
    return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)


def cluster_environment(devices: Devices) -> ClusterEnvironment:
    """Returns the environment by which Lightning knows the processes of a run, lest it guess them from variables."""
    if devices.total == 1:
        return _OneProcess()
    by = launcher()
    if by == "torchrun":
        return TorchElasticEnvironment()
    if by == "lightning":
        return LightningEnvironment()
    # Lightning accepts several tasks only with this variable, which srun sets where --ntasks-per-node was given.
    os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(devices.per_node))
    return _TasksOfSrun()


class _OneProcess(LightningEnvironment):
    """A run of one process, which reads nothing that a launcher has left in the environment."""

    def __init__(self) -> None:
        super().__init__()
        # Also undoes the rank that Lightning took from the environment when it was imported.
        self.set_global_rank(0)
        self._port = find_free_network_port()

    @property
    def creates_processes_externally(self) -> bool:
        """True: there is nothing to start."""
        return True

    @property
    def main_address(self) -> str:
        """This machine."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """A free port."""
        return self._port

    def local_rank(self) -> int:
        """Returns 0."""
        return 0

    def node_rank(self) -> int:
        """Returns 0."""
        return 0


class _TasksOfSrun(SLURMEnvironment):
    """The tasks that srun started."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Checks nothing: `check_processes` has, and what Lightning compares is of the job and not of the step."""


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silences Lightning's advice that does not apply here, such as to use more loader workers."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning.*")
        warnings.filterwarnings("ignore", module="lightning_fabric.*")
        yield
