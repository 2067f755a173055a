"""A run that is not started: what it needs, and the time of an update on this machine."""

import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pytorch_lightning.tuner.tuning import Tuner

from protlm.choices import MOST_TOKENS
from protlm.config import Config
from protlm.data.batching.batches import Batch, training_batch
from protlm.data.batching.rows import training_rows
from protlm.errors import ConfigError
from protlm.runtime.devices import Devices, best_device, memory_bytes
from protlm.workflows.train.memory import MemoryEstimate
from protlm.workflows.train.optimizer import build_optimizer
from protlm.workflows.train.request import TrainRequest
from protlm.workflows.train.row_losses import row_loss_of
from protlm.workflows.train.run_checkpoints import WholeCheckpointIO
from protlm.workflows.train.run_size import size_of
from protlm.workflows.train.start import Start, prepare_start
from protlm.workflows.train.stop_request import StopRequest
from protlm.workflows.train.task import LanguageModelling, objective_of
from protlm.workflows.trainers import quiet_lightning, training_trainer

_LARGEST_BUDGET = MOST_TOKENS
"""Where the search for the largest row ends, in tokens."""
_TIMED_ROWS = 2
_PROBE_WIDTH, _PROBE_REPEATS = 1024, 5
_PROBE_FLOPS = 2 * _PROBE_WIDTH**3
_ASSUMED_UTILISATION = 0.8
"""Share of the rate of a matrix product that a training step is taken to reach."""


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
        row_flops: Floating-point operations of a training step of a row.
        seconds_per_step: Time of an update on this machine; None if it needs more memory than is here.
        seconds_from: How it is known: `measured` on rows that were trained on, or `estimated` from the operations and
            the rate of a matrix product here.
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
    row_flops: float
    seconds_per_step: float | None
    seconds_from: Literal["measured", "estimated"] | None
    seconds: float | None
    largest_tokens_per_batch: int | None
    note: str | None


def dry_run(request: TrainRequest, *, find_batch: bool = False, timing_seconds: float = 60.0) -> DryRunReport:
    """Checks all that `train` checks, writes nothing, and returns the size and pace of the run.

    Args:
        request: The run that would be started.
        find_batch: Searches for the largest row that fits into the memory of a GPU.
        timing_seconds: An update is timed only if that takes no longer, as far as can be foreseen.

    Raises:
        ProtlmError: Anything for which `train` would refuse to start.
    """
    start = prepare_start(request)
    settings, proteins, memory = start.settings, start.sets.train, start.memory
    available = memory_bytes(best_device())
    size = size_of(settings, proteins, None if start.teacher is None else start.teacher.config)
    seconds: float | None = None
    seconds_from: Literal["measured", "estimated"] | None = None
    if memory.total <= available:
        row_seconds = size.row_flops / (_ASSUMED_UTILISATION * _rate())
        if _TIMED_ROWS * row_seconds <= timing_seconds:
            seconds_from = "measured"
            seconds = _seconds_per_step(start, request.devices)
        else:
            seconds_from, seconds = "estimated", row_seconds * _rows_per_device(settings, request.devices)
    return DryRunReport(
        num_parameters=memory.parameters,
        memory=memory,
        memory_bytes=memory.total,
        available_bytes=available,
        num_records=size.num_records,
        residues_per_epoch=size.residues_per_epoch,
        tokens_per_epoch=size.tokens_per_epoch,
        rows_per_epoch=size.rows_per_epoch,
        first_step=start.first_step,
        steps=size.steps,
        epochs=size.epochs,
        row_flops=size.row_flops,
        seconds_per_step=seconds,
        seconds_from=seconds_from,
        seconds=None if seconds is None else seconds * (size.steps - start.first_step),
        largest_tokens_per_batch=_largest_budget(start) if find_batch else None,
        note=None if start.resume_point is None else start.resume_point.note,
    )


def _rate() -> float:
    """Returns the rate of a float32 matrix product on the default device, in operations a second."""
    device = best_device()
    matrix = torch.ones(_PROBE_WIDTH, _PROBE_WIDTH, device=device)
    seconds = []
    for _ in range(_PROBE_REPEATS):
        began = _now(device)
        torch.matmul(matrix, matrix)
        seconds.append(_now(device) - began)
    return _PROBE_FLOPS / min(seconds)


def _rows_per_device(settings: Config, devices: Devices) -> int:
    return settings.train.accumulate // devices.total


def _seconds_per_step(start: Start, devices: Devices) -> float:
    """Returns the time of an update here: the second of two rows, times the rows per device, and the optimizer."""
    device, settings, proteins = best_device(), start.settings, start.sets.train
    model = start.model.to(device).train()
    row_loss = row_loss_of(settings, start.teacher)
    optimizer = build_optimizer(model, settings.train)
    rows = training_rows(start.data.draws, proteins.lengths, settings.data)
    is_mixed = settings.train.precision == "bf16-mixed"
    row_seconds = update_seconds = 0.0
    for _ in range(_TIMED_ROWS):
        batch = training_batch(next(rows), proteins, settings.data, settings.train.seed, objective_of(settings))
        began = _now(device)
        with torch.autocast(device.type, torch.bfloat16) if is_mixed else nullcontext():
            row = row_loss(model, _on(batch, device))
        torch.autograd.backward(row.loss / max(1, row.weight))
        row_seconds = _now(device) - began
        began = _now(device)
        optimizer.step()
        optimizer.zero_grad()
        update_seconds = _now(device) - began
    return row_seconds * _rows_per_device(settings, devices) + update_seconds


def _on(batch: Batch, device: torch.device) -> Batch:
    return batch._replace(
        tokens=batch.tokens.to(device),
        cu_seqlens=batch.cu_seqlens.to(device),
        target_positions=batch.target_positions.to(device),
        targets=batch.targets.to(device),
    )


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
        task = LanguageModelling(start.model, settings, start.sets.hash, stop_request, start.teacher)
        tuner = Tuner(training_trainer(settings, Devices(), Path(folder), [], [], WholeCheckpointIO()))
        largest = tuner.scale_batch_size(
            task, datamodule=start.data, mode="binsearch", init_val=settings.data.tokens_per_batch,
            batch_arg_name="tokens_per_batch", max_val=_LARGEST_BUDGET,
        )  # fmt: skip
    assert largest is not None
    return largest
