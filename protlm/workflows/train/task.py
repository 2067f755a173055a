"""The training step and its data as Lightning wants them, so that the rest of protlm need not know its hooks.

To Lightning a run is one endless epoch over our own stream of rows. An update takes the next `train.accumulate` rows,
which the devices share out among themselves, so that their number changes neither the rows nor the loss.
"""

import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed
import xxhash
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from protlm.config import Config
from protlm.data.batching.batches import Batch, training_batch
from protlm.data.batching.draws import Draws
from protlm.data.batching.masking import MaskRates, Objective
from protlm.data.batching.rows import Row, training_rows
from protlm.data.storage.mixture import Mixture
from protlm.errors import ProtlmError
from protlm.model.performer import Performer
from protlm.workflows.train.divergence import diverged
from protlm.workflows.train.gradual_swap import kinds_at, set_kinds
from protlm.workflows.train.optimizer import build_optimizer, clip_gradients, gradient_norm, learning_rate_factor
from protlm.workflows.train.row_losses import row_loss_of
from protlm.workflows.train.stop_request import SIGNALS, StopRequest

_NUM_COUNTS = 4


@dataclass(frozen=True)
class Update:
    """The numbers of one update of all devices together.

    Attributes:
        loss: Mean negative log likelihood of its targets, in nats; None in `transfer`, which predicts nothing.
        accuracy: Fraction of the targets that the model ranked first; likewise.
        stage_loss: The loss of the stage, in the mean over its rows; None without a stage.
        grad_norm: Norm of the whole gradient before clipping.
        lr: Learning rate of AdamW.
        muon_lr: Learning rate of Muon; None without it.
        epoch: Passes over the data before its first row.
        num_tokens: Tokens of all rows so far, special tokens included; None if an earlier protlm, which did not count
            them, began the run.
        num_residues: Residues in its rows.
        interrupted: Whether a signal asks one of the processes to stop.
        time_is_over: Whether one of the processes has reached its time limit.
    """

    loss: float | None
    accuracy: float | None
    stage_loss: float | None
    grad_norm: float
    lr: float
    muon_lr: float | None
    epoch: int
    num_tokens: int | None
    num_residues: int
    interrupted: bool
    time_is_over: bool


class LanguageModelling(pl.LightningModule):
    """One update: the sum of the losses of all rows of all devices, divided by the sum of their weights.

    Without a teacher this is the mean over all targets, and with one over all rows: see `RowLoss`.

    Attributes:
        last_update: The latest update; None before the first.
        first_batch: The first row of the update in progress or just made.
    """

    def __init__(
        self,
        model: Performer,
        config: Config,
        dataset_hash: str,
        stop_request: StopRequest,
        teacher: Performer | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.dataset_hash = dataset_hash
        self.last_update: Update | None = None
        self.first_batch: Batch | None = None
        self._stop_request = stop_request
        self._redraw_generator = torch.Generator().manual_seed(config.train.seed + 1)
        self._num_tokens: int | None = 0
        self._num_rows = 0
        self._scores: list[Tensor] = []
        self._counts = [0] * _NUM_COUNTS
        # No module of this one: its weights are in no checkpoint, and devices do not share them.
        self._row_loss = row_loss_of(config, teacher)

    def configure_model(self) -> None:
        """Shards the model over the devices under FSDP2."""
        if self.device_mesh is not None:
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

            mesh = self.device_mesh["data_parallel"]
            for layer in self.model.encoder_layers():
                if self.config.train.stage == "transfer":
                    # It is called without its layer.
                    fully_shard(layer.attention, mesh=mesh)
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
            register_fsdp_forward_method(self.model, "attention_outputs")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the run's optimizer."""
        return build_optimizer(self.model, self.config.train)

    def on_train_start(self) -> None:
        """Gives the optimizer the rates of the settings: with a checkpoint's state it has taken those of back then."""
        optimizer: torch.optim.Optimizer = self.optimizers(use_pl_optimizer=False)  # type: ignore[assignment]
        for group, own in zip(optimizer.param_groups, self.configure_optimizers().param_groups, strict=True):
            group["peak_lr"] = own["peak_lr"]

    def on_before_batch_transfer(self, batch: Batch | ProtlmError, dataloader_idx: int) -> Batch:
        """Raises the error that came in place of a batch."""
        if isinstance(batch, ProtlmError):
            raise batch
        return batch

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        """Before an update, converts the layers that are due for it, and redraws the projections if they are."""
        if self._num_rows:
            return
        self.first_batch = batch
        if self.config.train.convert_layers:
            set_kinds(self.model, kinds_at(self.config, self.global_step + 1))
        every = self.config.train.redraw_every_steps
        if every and self.global_step and self.global_step % every == 0:
            self.model.redraw(self._redraw_generator)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Returns the weighted loss of one row; an update divides the sum of those of its rows by their weights."""
        if self.config.model.dropout:
            torch.manual_seed(self._dropout_seed())
        row = self._row_loss(self.model, batch)
        # They are read once an update: each time the host waits for the device.
        self._scores.append(torch.stack((row.loss.detach(), row.nll, row.num_correct)))
        for place, value in enumerate((row.weight, len(batch.targets), batch.num_residues, len(batch.tokens))):
            self._counts[place] += value
        self._num_rows += 1
        # Undoes Lightning's divisions: by the rows of this device, and by its strategies by the number of devices. The
        # division by the weights comes before the update.
        return row.loss * self.config.train.accumulate

    def _dropout_seed(self) -> int:
        """Returns the seed of dropout in a row, from the run's seed and the row's number, which no device changes."""
        row = self.global_step * self.config.train.accumulate + self.global_rank
        row += self._num_rows * self.trainer.world_size
        return xxhash.xxh3_64_intdigest(f"dropout {self.config.train.seed} {row}".encode()) % 2**63

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turns gradients of the sum into those of the mean, clips them and sets the learning rate."""
        settings = self.config.train
        scores, weight = torch.stack(self._scores), float(self._counts[0])
        totals: list[float] = []
        if self.trainer.world_size > 1:
            totals = self._totals(scores.tolist())
            weight = totals[3]
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        torch._foreach_div_(gradients, max(1.0, weight))
        norm = gradient_norm(self.model.parameters())
        if totals:
            grad_norm = norm.item()
        else:
            *flat, grad_norm = torch.cat((scores.flatten(), norm.detach().reshape(1))).tolist()
            totals = self._totals([flat[place : place + 3] for place in range(0, len(flat), 3)])
        total, nll, num_correct, _, num_targets, num_residues, num_tokens, *ends = totals
        loss = total / max(1.0, weight)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            message = f"the loss is {loss} and the gradient's norm {grad_norm}"
            raise diverged(self.global_step + 1, message, self.global_rank)
        if settings.clip_norm:
            clip_gradients(self.model.parameters(), settings.clip_norm, norm)
        factor = learning_rate_factor(self.global_step + 1, settings)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        if self._num_tokens is not None:
            self._num_tokens += int(num_tokens)
        assert self.first_batch is not None
        predicts = settings.stage != "transfer"
        self.last_update = Update(
            loss=nll / max(1.0, num_targets) if predicts else None,
            accuracy=num_correct / max(1.0, num_targets) if predicts else None,
            stage_loss=None if settings.stage is None else loss,
            grad_norm=grad_norm,
            lr=settings.lr * factor,
            muon_lr=settings.muon_lr * factor if settings.optimizer == "muon" else None,
            epoch=self.first_batch.epoch,
            num_tokens=self._num_tokens,
            num_residues=int(num_residues),
            interrupted=bool(ends[0]),
            time_is_over=bool(ends[1]),
        )
        self._num_rows, self._scores, self._counts = 0, [], [0] * _NUM_COUNTS

    def _totals(self, scores: list[list[float]]) -> list[float]:
        """Returns, over all processes, the sums of this update, the number interrupted and the number out of time.

        `scores` are those of the rows of this process: loss, negative log likelihood and targets ranked first.
        """
        request = self._stop_request
        sums = [sum(column) for column in zip(*scores, strict=True)]
        totals = [*sums, *map(float, self._counts), float(request.interrupted), float(request.time_is_over)]
        if self.trainer.world_size > 1:
            # All processes learn of a stop in the same update, and so they end together.
            tensor = torch.tensor(totals, dtype=torch.float64, device=self.device)
            torch.distributed.all_reduce(tensor)
            totals = tensor.tolist()
        return totals

    def full_state(self) -> dict[str, Tensor]:
        """Returns the model's weights and projections, whole and on the CPU; under FSDP2 in the first process alone.

        All processes must call it together.
        """
        if self.device_mesh is None:
            return {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Tensor] = get_model_state_dict(self.model, options=options)  # type: ignore[assignment]
        return state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the projections' generator, the tokens so far, and the settings and dataset of every resumed run."""
        checkpoint["protlm"] = {
            "dataset_hash": self.dataset_hash,
            "config": self.config.model_dump(mode="json"),
            "redraw_generator": self._redraw_generator.get_state(),
            "num_tokens": self._num_tokens,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the generator of the projections and the tokens so far, which earlier versions did not save.

        Lightning's place in its loops follows from the step: what it saved counts the rows of one device, and would end
        the next update too early where the number of devices has changed.
        """
        checkpoint["loops"] = {"fit_loop": loops_at(self.trainer, checkpoint["global_step"])}
        self._redraw_generator.set_state(checkpoint["protlm"]["redraw_generator"])
        self._num_tokens = checkpoint["protlm"].get("num_tokens")


def loops_at(trainer: pl.Trainer, step: int) -> dict[str, Any]:
    """Returns what Lightning saves of its training loop after an update, with the number of devices of this trainer."""
    state = trainer.fit_loop.state_dict()
    rows = step * trainer.accumulate_grad_batches
    # A checkpoint is made before the loop has counted the last row as completed.
    seen = {"ready": rows, "started": rows, "processed": rows, "completed": rows - 1}
    once = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    steps = {"ready": step, "started": step, "completed": step}
    optimizer = state["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for progress, counts in (
        (state["epoch_loop.batch_progress"], seen),
        (state["epoch_progress"], once),
        (optimizer["step"], steps),
        (optimizer["zero_grad"], steps),
    ):
        for kind in ("total", "current"):
            progress[kind] = {name: counts[name] for name in progress[kind]}
    state["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1
    return state


class TrainingData(pl.LightningDataModule):
    """The endless stream of rows, continued from the checkpoint's place.

    Attributes:
        draws: The order in which proteins are drawn.
        tokens_per_batch: Budget of a row; Lightning's search for the largest one sets it.
    """

    def __init__(self, proteins: Mixture, config: Config) -> None:
        """Plans the draws; raises ConfigError if the settings ask for draws that the proteins do not allow."""
        super().__init__()
        self.draws = Draws.of(proteins, config.data, config.train.seed)
        self.tokens_per_batch = config.data.tokens_per_batch
        self._proteins = proteins
        self._config = config
        self._first_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the place in the stream, which at a checkpoint lies between two updates."""
        assert self.trainer is not None
        return {"next_row": self.trainer.global_step * self._config.train.accumulate}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Sets the stream to a saved place; Lightning calls this before `train_dataloader`."""
        self._first_row = state_dict["next_row"]

    def train_dataloader(self) -> DataLoader[Batch]:
        """Returns the loader of this device's rows."""
        assert self.trainer is not None
        content = self._config.model_dump()
        content["data"]["tokens_per_batch"] = self.tokens_per_batch
        config = Config.model_validate(content)
        rows = partial(
            training_rows,
            self.draws,
            self._proteins.lengths,
            config.data,
            self._first_row + self.trainer.global_rank,
        )
        sampler = _EveryNth(rows, self.trainer.world_size)
        workers = config.data.num_workers
        loader: DataLoader[Any] = DataLoader(
            _TrainingRows(self._proteins, config),
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            collate_fn=_unchanged,
            # Without a generator of its own a loader draws from torch's global one.
            generator=torch.Generator(),
            prefetch_factor=4 if workers else None,
            # From pinned memory a row goes to a GPU while that computes the one before.
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            # Lightning ends only such workers when a run fails; others, which ignore signals, would keep it for ever.
            persistent_workers=workers > 0,
            worker_init_fn=_leave_signals_to_the_run,
        )
        return loader


class _EveryNth(Sampler[Row]):
    """Every n-th row of a stream. It has no length: the number of steps ends a run."""

    def __init__(self, rows: Callable[[], Iterator[Row]], n: int) -> None:
        self._rows, self._n = rows, n

    def __iter__(self) -> Iterator[Row]:
        return islice(self._rows(), 0, None, self._n)


class _TrainingRows(Dataset[Batch | ProtlmError]):
    """The planned rows, masked and packed."""

    def __init__(self, proteins: Mixture, config: Config) -> None:
        self._proteins, self._config = proteins, config
        self._objective = objective_of(config)

    def __getitem__(self, row: Row) -> Batch | ProtlmError:
        try:
            return training_batch(row, self._proteins, self._config.data, self._config.train.seed, self._objective)
        except ProtlmError as error:
            # Raised by the run itself: a worker of the loader would add its traceback to the message.
            return error


def objective_of(config: Config) -> Objective:
    """Returns the training objective of these settings."""
    settings = config.train
    return Objective(config.model.causal, MaskRates(settings.mask_rate, settings.mask_share, settings.random_share))


def _leave_signals_to_the_run(worker: int) -> None:
    """Ignores signals to the whole job in a worker: the run still needs rows, and ends its workers itself."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _unchanged(batch: Any) -> Any:
    return batch
