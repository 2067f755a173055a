"""Lightning's trainers for our devices: the strategy for each choice of devices, and no advice on stderr."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins import CheckpointIO
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy

from protlm.config import Config
from protlm.runtime.devices import Devices, best_device


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
        plugins=[checkpoint_io],
        logger=list(loggers),
        num_sanity_val_steps=0,
    )


def inference_trainer(devices: Devices) -> pl.Trainer:
    """Returns a trainer that runs a model without gradients on the given devices."""
    return pl.Trainer(**_shared_options(devices), logger=False)


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


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silences Lightning's advice that does not apply here, such as to use more loader workers."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning.*")
        warnings.filterwarnings("ignore", module="lightning_fabric.*")
        yield
