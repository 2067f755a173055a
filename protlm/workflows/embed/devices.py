"""Embedding on several devices: hides Lightning, which starts the processes and tells each which it is.

Each process computes every n-th of the parts that are not finished and writes them by itself; the first one puts them
together. With several machines the folder must lie where all of them can reach it.
"""

from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader, IterableDataset

from protlm.data.storage.protein_store import open_proteins
from protlm.errors import ProtlmError
from protlm.inference.row_embeddings import RowEmbedder, Sums
from protlm.model.performer import Performer
from protlm.runtime.devices import Devices, OtherProcessError, is_lost_peer, process_rank
from protlm.runtime.progress import StartProgress
from protlm.workflows.embed.folder import EmbedFolder
from protlm.workflows.embed.portions import PartRow, PartRows, PartWriter
from protlm.workflows.embed.plan import Plan
from protlm.workflows.embed.settings import EmbedSettings
from protlm.workflows.trainers import inference_trainer, quiet_lightning


def compute_on_devices(
    folder: EmbedFolder,
    model: Performer,
    settings: EmbedSettings,
    devices: Devices,
    start_progress: StartProgress,
) -> None:
    """Computes what is not finished; called by every process, and returns when all parts of all of them are there.

    Raises:
        OtherProcessError: In any but the first process: another one failed, and tells why.
        ProtlmError: In the first process: another one failed.
    """
    task = _Embedding(folder, model, settings, start_progress)
    with quiet_lightning():
        trainer = inference_trainer(devices)
        try:
            trainer.predict(task, return_predictions=False)
        except SystemExit:
            # Lightning's answer to Ctrl-C; the command line knows what an interrupt means.
            raise KeyboardInterrupt from None
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            if process_rank():
                raise OtherProcessError from None
            raise ProtlmError(
                "another process of this run ended early, and its own message says why; what is finished is kept: go "
                "on with the same command and --resume"
            ) from None
        finally:
            task.close()


class _Rows(IterableDataset[PartRow]):
    """The rows of one process."""

    def __init__(self, rows: PartRows) -> None:
        self._rows = rows

    def __iter__(self) -> Any:
        return iter(self._rows)


class _Embedding(pl.LightningModule):
    """Lightning's view of a run: rows in, and what they give is written by the process that computed it."""

    def __init__(
        self, folder: EmbedFolder, model: Performer, settings: EmbedSettings, start_progress: StartProgress
    ) -> None:
        super().__init__()
        self.model = model
        self._folder, self._settings, self._start_progress = folder, settings, start_progress
        self._embedder = RowEmbedder(model, settings.kinds, settings.layers)
        self._writer: PartWriter | None = None

    def predict_dataloader(self) -> DataLoader[PartRow]:
        """Returns the rows of this process; by now the first one has prepared the folder."""
        self.trainer.strategy.barrier()
        proteins = open_proteins(self._folder.proteins_path)
        plan = Plan.of(proteins, self._settings)
        waiting = self._folder.unfinished_parts(plan.num_parts)
        # No process may finish a part before all have seen what is finished.
        self.trainer.strategy.barrier()
        rows = PartRows(plan, proteins, waiting[self.global_rank :: self.trainer.world_size])
        advance = self._start_progress("embed", rows.num_residues)
        self._writer = PartWriter(self._folder, proteins, plan, self._settings, advance)
        # As they are: by default arrays would become tensors.
        return DataLoader(_Rows(rows), batch_size=None, collate_fn=lambda row: row)

    def predict_step(self, row: PartRow, index: int) -> list[Sums | None]:
        """Returns what a row gives."""
        return row.computed(self._embedder)

    def on_predict_batch_end(self, results: Any, row: PartRow, index: int, dataloader_index: int = 0) -> None:
        """Takes what a row gave."""
        assert self._writer is not None
        self._writer.add(row, results)

    def on_predict_end(self) -> None:
        """Waits for the parts of all processes."""
        self.close()
        self.trainer.strategy.barrier()

    def close(self) -> None:
        """Waits for the last part of this process."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
