"""The training step and its data as Lightning wants them: hides Lightning's ways from the rest of protlm.

To Lightning a run is one endless epoch over our own stream of rows. What a resumed run needs beyond Lightning's own
state (place in the stream, random generators) is put into the checkpoint here.
"""

from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from protlm.config import Config
from protlm.data.batches import Batch, Row, training_batch, training_rows
from protlm.data.dataset import Split
from protlm.errors import ProtlmError
from protlm.model.performer import Performer
from protlm.workflows.optimizer import build_optimizer, learning_rate_factor


class MaskedLanguageModelling(pl.LightningModule):
    """One update: the sum of the losses of all rows, divided by the number of all their targets.

    Attributes:
        last_update: What the latest update was made of: loss, grad_norm, lr, epoch and num_residues.
    """

    def __init__(self, model: Performer, config: Config, dataset_hash: str) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.dataset_hash = dataset_hash
        self.last_update: dict[str, float] = {}
        self._redraw_generator = torch.Generator().manual_seed(config.train.seed + 1)
        self._nll = 0.0
        self._num_targets = 0
        self._num_residues = 0
        self._epoch = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the run's optimizer."""
        return build_optimizer(self.model, self.config.train)

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        """Redraws the projections before the update that is due for it."""
        every = self.config.train.redraw_every_steps
        starts_update = self._num_targets == 0
        if every and starts_update and self.global_step and self.global_step % every == 0:
            self.model.redraw(self._redraw_generator)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Returns the sum of the negative log likelihoods of one row."""
        logits = self.model(batch.tokens, batch.cu_seqlens, batch.target_positions)
        nll = F.cross_entropy(logits.float(), batch.targets, reduction="sum")
        self._nll += nll.item()
        self._num_targets += len(batch.targets)
        self._num_residues += batch.num_residues
        self._epoch = batch.epoch
        # Lightning divides by the number of accumulated rows; the division by targets comes before the update.
        return nll * self.config.train.accumulate

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turns gradients of the sum into those of the mean, clips them and sets the learning rate."""
        settings = self.config.train
        step = self.global_step + 1
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        torch._foreach_div_(gradients, float(self._num_targets))
        norm = torch.nn.utils.get_total_norm(gradients)
        loss, grad_norm = self._nll / self._num_targets, norm.item()
        if not (torch.isfinite(torch.tensor(loss)) and torch.isfinite(norm)):
            raise ProtlmError(
                f"step {step}: the loss is {loss} and the gradient's norm {grad_norm}; expected finite numbers. "
                "A checkpoint from before is kept; try a lower train.lr or train.muon_lr"
            )
        if settings.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), settings.clip_norm, norm)
        factor = learning_rate_factor(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.last_update = {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": settings.lr * factor,
            "epoch": self._epoch,
            "num_residues": self._num_residues,
        }
        self._nll, self._num_targets, self._num_residues = 0.0, 0, 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the generators and what the run must agree on when it is resumed."""
        checkpoint["protlm"] = {
            "dataset_hash": self.dataset_hash,
            "config": self.config.model_dump(mode="json"),
            "redraw_generator": self._redraw_generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the generators."""
        saved = checkpoint["protlm"]
        self._redraw_generator.set_state(saved["redraw_generator"])
        torch.set_rng_state(saved["torch_rng"])
        if saved["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(saved["cuda_rng"])


class TrainingData(pl.LightningDataModule):
    """The endless stream of masked rows, started where the checkpoint left it."""

    def __init__(self, split: Split, config: Config) -> None:
        super().__init__()
        self._split = split
        self._config = config
        self._first_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the place in the stream; checkpoints are made between updates only."""
        assert self.trainer is not None
        return {"next_row": self.trainer.global_step * self._config.train.accumulate}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Starts the stream at a saved place; Lightning calls this before it asks for the loader."""
        self._first_row = state_dict["next_row"]

    def train_dataloader(self) -> DataLoader[Batch]:
        """Returns the loader of rows."""
        workers = self._config.data.num_workers
        loader: DataLoader[Batch] = DataLoader(
            _MaskedRows(self._split, self._config),
            batch_size=None,
            sampler=_RowSampler(self._split, self._config, self._first_row),
            num_workers=workers,
            collate_fn=_unchanged,
            # Without its own generator a loader draws a number from the global one, which dropout uses.
            generator=torch.Generator(),
            prefetch_factor=4 if workers else None,
        )
        return loader


class _RowSampler(Sampler[Row]):
    """The plan of the stream. It has no length: the number of steps ends a run."""

    def __init__(self, split: Split, config: Config, first_row: int) -> None:
        self._split, self._config, self._first_row = split, config, first_row

    def __iter__(self) -> Iterator[Row]:
        return training_rows(self._split.lengths, self._config.data, self._config.train.seed, self._first_row)


class _MaskedRows(Dataset[Batch]):
    """Makes the planned rows."""

    def __init__(self, split: Split, config: Config) -> None:
        self._split, self._config = split, config

    def __getitem__(self, row: Row) -> Batch:
        settings = self._config.train
        return training_batch(row, self._split, self._config.data, settings.seed, settings.mask_rate)


def _unchanged(batch: Any) -> Any:
    return batch
