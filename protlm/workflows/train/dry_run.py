"""`protlm train --dry-run`: the size and pace of a run, from its settings, its data and one update on this machine."""

import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_lightning.tuner.tuning import Tuner

from protlm.choices import MOST_TOKENS
from protlm.config import Config
from protlm.data.batching.batches import Batch, epoch_size, training_batch, training_rows
from protlm.data.batching.draws import Draws
from protlm.data.storage.mixture import Mixture
from protlm.errors import ConfigError
from protlm.model.performer import Performer
from protlm.runtime.devices import Devices, best_device, memory_bytes
from protlm.workflows.train.memory import MemoryEstimate
from protlm.workflows.train.optimizer import build_optimizer
from protlm.workflows.train.run_checkpoints import WholeCheckpointIO
from protlm.workflows.train.start import Start, TrainRequest, prepare_start
from protlm.workflows.train.stop_request import StopRequest
from protlm.workflows.train.task import LanguageModelling, objective_of
from protlm.workflows.trainers import quiet_lightning, training_trainer

_LARGEST_BUDGET = MOST_TOKENS
"""Where the search for the largest row ends, in tokens."""


@dataclass(frozen=True, kw_only=True)
class DryRunReport:
    """The size and pace of a run that was not started.

    Attributes:
        num_parameters: Trained parameters of the model.
        memory: Estimated memory of a step, by purpose, on a device that holds the whole model.
        memory_bytes: Its sum.
        available_bytes: Memory of the device.
        num_records: Training proteins.
        residues_per_epoch: Residues in the rows of an epoch.
        tokens_per_epoch: Tokens in them, special tokens included.
        rows_per_epoch: Number of rows.
        first_step: Updates made before, by the run that would be resumed.
        steps: Updates of the whole run.
        epochs: Passes of the whole run over the data.
        seconds_per_step: Time of an update on this machine, from a row that was trained on; None if none was.
        seconds: Time of the remaining steps at that pace, without measurements and checkpoints.
        largest_tokens_per_batch: The largest data.tokens_per_batch that fits; None if it was not searched for.
        note: A warning about the checkpoint that the run would go on from; None if all is well.
    """

    num_parameters: int
    memory: MemoryEstimate
    memory_bytes: int
    available_bytes: int
    num_records: int
    residues_per_epoch: int
    tokens_per_epoch: int
    rows_per_epoch: int
    first_step: int
    steps: int
    epochs: float
    seconds_per_step: float | None
    seconds: float | None
    largest_tokens_per_batch: int | None
    note: str | None


def dry_run(request: TrainRequest, *, find_batch: bool = False) -> DryRunReport:
    """Checks all that `train` checks, writes nothing, and returns the size and pace of the run.

    Args:
        request: The run that would be started.
        find_batch: Searches for the largest row that fits into the memory of a GPU.

    Raises:
        ProtlmError: Anything for which `train` would refuse to start.
    """
    start = prepare_start(request)
    settings, proteins, memory = start.settings, start.sets.train, start.memory
    available = memory_bytes(best_device())
    epoch = epoch_size(start.data.draws, proteins.lengths, settings.data)
    seconds = None
    if memory.total <= available:
        seconds = _seconds_per_step(start.model, proteins, start.data.draws, settings, request.devices)
    return DryRunReport(
        num_parameters=memory.parameters,
        memory=memory,
        memory_bytes=memory.total,
        available_bytes=available,
        num_records=proteins.num_records,
        residues_per_epoch=epoch.num_residues,
        tokens_per_epoch=epoch.num_tokens,
        rows_per_epoch=epoch.num_rows,
        first_step=start.first_step,
        steps=settings.train.max_steps,
        epochs=settings.train.max_steps * settings.train.accumulate / epoch.num_rows,
        seconds_per_step=seconds,
        seconds=None if seconds is None else seconds * (settings.train.max_steps - start.first_step),
        largest_tokens_per_batch=_largest_budget(start) if find_batch else None,
        note=None if start.resume_point is None else start.resume_point.note,
    )


def _seconds_per_step(model: Performer, proteins: Mixture, draws: Draws, settings: Config, devices: Devices) -> float:
    """Returns the time of an update here: the second of two rows, times the rows per device, and the optimizer."""
    device = best_device()
    model = model.to(device).train()
    optimizer = build_optimizer(model, settings.train)
    rows = training_rows(draws, proteins.lengths, settings.data)
    is_mixed = settings.train.precision == "bf16-mixed"
    row_seconds = update_seconds = 0.0
    for row in (next(rows), next(rows)):
        batch = training_batch(row, proteins, settings.data, settings.train.seed, objective_of(settings))
        began = _now(device)
        with torch.autocast(device.type, torch.bfloat16) if is_mixed else nullcontext():
            loss = _row_loss(model, batch, device)
        torch.autograd.backward(loss)
        row_seconds = _now(device) - began
        began = _now(device)
        optimizer.step()
        optimizer.zero_grad()
        update_seconds = _now(device) - began
    return row_seconds * (settings.train.accumulate // devices.total) + update_seconds


def _row_loss(model: Performer, batch: Batch, device: torch.device) -> torch.Tensor:
    logits = model(batch.tokens.to(device), batch.cu_seqlens.to(device), batch.target_positions.to(device))
    return F.cross_entropy(logits.float(), model.token_table.own(batch.targets.to(device)))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _largest_budget(start: Start) -> int:
    """Returns the largest data.tokens_per_batch with which Lightning's search can make some updates.

    Raises:
        ConfigError: There is no GPU; without one, running out of memory would kill the search and other processes too.
    """
    if best_device().type != "cuda":
        raise ConfigError("--find-batch: looks for the limit of a GPU's memory, and no GPU is here")
    settings = start.settings
    with tempfile.TemporaryDirectory() as folder, StopRequest() as stop_request, quiet_lightning():
        task = LanguageModelling(start.model, settings, start.sets.hash, stop_request)
        tuner = Tuner(training_trainer(settings, Devices(), Path(folder), [], [], WholeCheckpointIO()))
        largest = tuner.scale_batch_size(
            task, datamodule=start.data, mode="binsearch", init_val=settings.data.tokens_per_batch,
            batch_arg_name="tokens_per_batch", max_val=_LARGEST_BUDGET,
        )  # fmt: skip
    assert largest is not None
    return largest
