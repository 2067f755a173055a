"""The log of a run: the tables, the loggers and the progress that every update is written to."""

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path

import torch
from pytorch_lightning.loggers import Logger

from protlm.config import Config
from protlm.model.health import LayerHealth
from protlm.runtime.progress import StartProgress
from protlm.workflows.train.curves import plot_curves
from protlm.workflows.train.run_tables import ADDED_METRICS, HEALTH, METRICS, SPEED, CsvLog
from protlm.workflows.train.task import Update

# TensorBoard sorts groups by their names, and so the loss comes first.
_TAGS = {
    "train/loss": "loss/train", "train/transfer_loss": "loss/transfer", "train/distill_loss": "loss/distill",
    "valid/loss": "loss/valid",
    "lr": "optimizer/adamw_lr", "muon_lr": "optimizer/muon_lr", "grad_norm": "optimizer/grad_norm",
    "epoch": "progress/epoch", "tokens": "progress/tokens",
    "train/accuracy": "scores/accuracy_train", "valid/accuracy": "scores/accuracy_valid",
    "train/perplexity": "scores/perplexity_train", "valid/perplexity": "scores/perplexity_valid",
    **{name: f"speed/{name}" for name in SPEED[1:]},
}  # fmt: skip
"""Names in TensorBoard of the columns of metrics.csv and speed.csv."""
_HEALTH_TAG = "self_attention/{column}/layer_{layer}"

_LARGEST_EXPONENT = 700.0
_SECONDS_BETWEEN_CURVES = 60.0


class RunLog:
    """The tables, loggers and progress of a run, from the step that it starts from.

    Attributes:
        notes: Warnings about the files of the run that is resumed.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        first_step: int,
        loggers: Sequence[Logger],
        *,
        start_progress: StartProgress,
    ) -> None:
        self._run_dir = run_dir
        self._config = config
        self._loggers = loggers
        with ExitStack() as opened:
            metrics = CsvLog(run_dir / "metrics.csv", METRICS, last_step=first_step, added=ADDED_METRICS)
            self._metrics = opened.enter_context(closing(metrics))
            self._speed = opened.enter_context(closing(CsvLog(run_dir / "speed.csv", SPEED, last_step=first_step)))
            self._health = opened.enter_context(closing(CsvLog(run_dir / "health.csv", HEALTH, last_step=first_step)))
            # None of them cannot be read: they stay open.
            opened.pop_all()
        self.notes: tuple[str, ...] = ()
        if self._metrics.last_step < first_step:
            missing = f"{self._metrics.last_step + 1} to {first_step}"
            self.notes = (f"{run_dir / 'metrics.csv'}: the rows of steps {missing} are gone, and stay away",)
        self._shown = {"valid": "-"}
        self._advance = start_progress("train", config.train.max_steps, done=first_step, details=lambda: self._shown)
        self._curves_drawn_at = -math.inf

    def update(
        self, step: int, update: Update, valid: Mapping[str, float], seconds: float, seconds_waited: float
    ) -> None:
        """Adds one update.

        Args:
            step: Its number, from 1.
            update: Its loss and the like.
            valid: The columns `valid/…`; empty unless the valid split was measured.
            seconds: Its duration, without the measurements and checkpoints after it.
            seconds_waited: How long the training loop waited for data in it.
        """
        perplexity = None if update.loss is None else math.exp(min(update.loss, _LARGEST_EXPONENT))
        row: dict[str, float | None] = {
            "step": step,
            "epoch": update.epoch,
            "tokens": update.num_tokens,
            "train/loss": update.loss,
            "train/accuracy": update.accuracy,
            "train/perplexity": perplexity,
            **self._of_stage(update),
            "lr": update.lr,
            "muon_lr": update.muon_lr,
            "grad_norm": update.grad_norm,
            **valid,
        }
        speed: dict[str, float] = {
            "step": step,
            "seconds": seconds,
            "residues_per_second": update.num_residues / seconds,
            "data_wait_fraction": seconds_waited / seconds,
            "peak_memory_bytes": _peak_memory_bytes(),
        }
        self._metrics.append(row)
        self._speed.append(speed)
        self._log_metrics(step, {tag: (row | speed).get(column) for column, tag in _TAGS.items()})
        self._show(update, perplexity, valid, speed)

    def _of_stage(self, update: Update) -> dict[str, float | None]:
        """Returns the column of the loss of the stage; none without a stage."""
        stage = self._config.train.stage
        return {} if stage is None else {f"train/{stage}_loss": update.stage_loss}

    def health(self, step: int, layers: Sequence[LayerHealth]) -> None:
        """Adds the health of every layer's attention at a step."""
        numbers: dict[str, float | None] = {}
        for layer in layers:
            columns = asdict(layer)
            self._health.append({"step": step, **columns})
            del columns["layer"]
            numbers |= {_HEALTH_TAG.format(column=name, layer=layer.layer): value for name, value in columns.items()}
        self._log_metrics(step, numbers)

    def draw_curves(self, baselines: Callable[[], Mapping[str, float]], *, is_last: bool = False) -> None:
        """Draws curves.png again, unless it was drawn less than a minute ago and more updates follow.

        Args:
            baselines: Returns the perplexities of the baselines on the valid split; asked only for a picture.
            is_last: Whether this is the last picture of the run.
        """
        now = time.monotonic()
        if is_last or now - self._curves_drawn_at >= _SECONDS_BETWEEN_CURVES:
            plot_curves(self._run_dir, self._config, baselines())
            self._curves_drawn_at = now

    def close(self) -> None:
        """Closes the files."""
        for log in (self._metrics, self._speed, self._health):
            log.close()

    def _log_metrics(self, step: int, numbers: Mapping[str, float | None]) -> None:
        metrics = {name: value for name, value in numbers.items() if value is not None}
        for logger in self._loggers:
            logger.log_metrics(metrics, step=step)

    def measuring(self) -> None:
        """Shows that the run is still at work, though it makes no update."""
        self._advance(0)

    def _show(
        self, update: Update, perplexity: float | None, valid: Mapping[str, float], speed: Mapping[str, float]
    ) -> None:
        valid_perplexity = f"{valid['valid/perplexity']:.2f}" if "valid/perplexity" in valid else self._shown["valid"]
        loss = update.loss if update.stage_loss is None else update.stage_loss
        self._shown = {
            "loss": f"{loss:.3f}",
            "perplexity": "-" if perplexity is None else f"{perplexity:.2f}",
            "accuracy": "-" if update.accuracy is None else f"{update.accuracy:.3f}",
            "valid": valid_perplexity,
            "residues/s": f"{speed['residues_per_second']:,.0f}",
        }
        self._advance(1)


def _peak_memory_bytes() -> int:
    """Returns the peak memory of this process: on its GPU if it has one, else in the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024
