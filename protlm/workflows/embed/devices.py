"""Embedding on several devices, with the processes that Lightning starts.

Each process computes and writes every n-th of the unfinished portions; the first process then assembles the output.
With several machines the folder must be on storage that all of them share.
"""

from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader, IterableDataset

from protlm.data.storage.protein_store import open_proteins
from protlm.errors import ProtlmError
from protlm.inference.row_embeddings import RowEmbedder, Sums
from protlm.model.performer import Performer
from protlm.runtime.devices import Devices, OtherProcessError, is_lost_peer
from protlm.runtime.launch import process_rank
from protlm.runtime.progress import StartProgress
from protlm.workflows.embed.folder import EmbedFolder
from protlm.workflows.embed.plan import Plan
from protlm.workflows.embed.portions import PortionRow, PortionRows, PortionWriter
from protlm.workflows.embed.settings import EmbedSettings
from protlm.workflows.trainers import inference_trainer, quiet_lightning


def compute_on_devices(
    folder: EmbedFolder,
    model: Performer,
    settings: EmbedSettings,
    devices: Devices,
    start_progress: StartProgress,
) -> None:
    """Computes the unfinished portions; every process calls it, and it returns when all processes are done.

    Raises:
        OtherProcessError: Another process failed, and reports why; raised in all processes but the first.
        ProtlmError: Another process failed; raised in the first process.
    """
    task = _Embedding(folder, model, settings, start_progress)
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
            task.close()


class _Rows(IterableDataset[PortionRow]):
    """The rows of one process."""

    def __init__(self, rows: PortionRows) -> None:
        self._rows = rows

    def __iter__(self) -> Any:
        return iter(self._rows)


class _Embedding(pl.LightningModule):
    """The run as a Lightning module: each process writes the results of the rows that it computed."""

    def __init__(
        self, folder: EmbedFolder, model: Performer, settings: EmbedSettings, start_progress: StartProgress
    ) -> None:
        super().__init__()
        self.model = model
        self._folder, self._settings, self._start_progress = folder, settings, start_progress
        self._embedder = RowEmbedder(model, settings.kinds, settings.layers)
        self._writer: PortionWriter | None = None

    def predict_dataloader(self) -> DataLoader[PortionRow]:
        """Returns the rows of this process, once the first process has prepared the folder."""
        self.trainer.strategy.barrier()
        proteins = open_proteins(self._folder.proteins_path)
        plan = Plan.of(proteins, self._settings)
        waiting = self._folder.unfinished_portions(plan.num_portions)
        # No process may finish a portion before all have seen what is finished.
        self.trainer.strategy.barrier()
        rows = PortionRows(plan, proteins, waiting[self.global_rank :: self.trainer.world_size])
        advance = self._start_progress("embed", rows.num_residues)
        self._writer = PortionWriter(self._folder, proteins, plan, self._settings, advance)
        # The default collate function would turn arrays into tensors.
        return DataLoader(_Rows(rows), batch_size=None, collate_fn=lambda row: row)

    def predict_step(self, row: PortionRow, index: int) -> list[Sums | None]:
        """Returns the sums of each window of a row."""
        return row.compute(self._embedder)

    def on_predict_batch_end(self, results: Any, row: PortionRow, index: int, dataloader_index: int = 0) -> None:
        """Passes the sums of a row to the writer."""
        assert self._writer is not None
        self._writer.add(row, results)

    def on_predict_end(self) -> None:
        """Waits until all processes have written their portions."""
        self.close()
        self.trainer.strategy.barrier()

    def close(self) -> None:
        """Waits until this process has written its last portion."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
