"""Portions on several devices, with the processes that Lightning starts.

Each process computes and writes every n-th of the unfinished portions; the first process then makes the output. With
several machines the folder must be on storage that all of them share.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytorch_lightning as pl
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from protlm.errors import ProtlmError
from protlm.runtime.devices import Devices, OtherProcessError, is_lost_peer
from protlm.runtime.launch import process_rank
from protlm.runtime.portion_work import PortionWork
from protlm.runtime.progress import StartProgress, no_progress
from protlm.workflows.trainers import inference_trainer, quiet_lightning


def compute_on_devices(model: nn.Module, work: PortionWork, devices: Devices, start_progress: StartProgress) -> None:
    """Computes the unfinished portions; every process calls it, and it returns when all processes are done.

    Args:
        model: The network of the work, which Lightning moves to the device of the process.
        work: The share of this process.
        devices: The devices of the run.
        start_progress: Shows the progress of this process.

    Raises:
        OtherProcessError: Another process failed, and reports why; raised in all processes but the first.
        ProtlmError: Another process failed; raised in the first process.
    """
    task = _Portions(model, work, start_progress)
    with quiet_lightning():
        trainer = inference_trainer(devices)
        try:
            trainer.predict(task, return_predictions=False)
        except SystemExit:
            # Lightning exits so on Ctrl-C; the command line expects a KeyboardInterrupt.
            raise KeyboardInterrupt from None
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            if process_rank(devices):
                raise OtherProcessError from None
            raise ProtlmError(
                "another process of this run ended early, and its own message says why; what is finished is kept: go "
                "on with the same command and --resume"
            ) from None
        finally:
            work.close()


def join(model: nn.Module, work: PortionWork, devices: Devices) -> None:
    """Computes this process's share of a run that the first process prepares and finishes."""
    with suppress(OtherProcessError):
        compute_on_devices(model, work, devices, no_progress)


class _Rows(IterableDataset[Any]):
    """The rows of one process."""

    def __init__(self, rows: Iterator[Any]) -> None:
        self._rows = rows

    def __iter__(self) -> Any:
        return self._rows


class _Portions(pl.LightningModule):
    """The run as a Lightning module: each process writes the results of the rows that it computed."""

    def __init__(self, model: nn.Module, work: PortionWork, start_progress: StartProgress) -> None:
        super().__init__()
        self.model = model
        self._work, self._start_progress = work, start_progress

    def predict_dataloader(self) -> DataLoader[Any]:
        """Returns the rows of this process, once the first process has prepared the folder."""
        self.trainer.strategy.barrier()
        waiting = self._work.waiting()
        # No process may finish a portion before all have seen what is finished.
        self.trainer.strategy.barrier()
        rows = self._work.start(waiting[self.global_rank :: self.trainer.world_size], self._start_progress)
        # The default collate function would turn arrays into tensors.
        return DataLoader(_Rows(rows), batch_size=None, collate_fn=lambda row: row)

    def predict_step(self, row: Any, index: int) -> Any:
        """Returns the results of a row."""
        return self._work.compute(row)

    def on_predict_batch_end(self, results: Any, row: Any, index: int, dataloader_index: int = 0) -> None:
        """Passes the results of a row on."""
        self._work.add(row, results)

    def on_predict_end(self) -> None:
        """Waits until all processes have written their portions."""
        self._work.close()
        self.trainer.strategy.barrier()
