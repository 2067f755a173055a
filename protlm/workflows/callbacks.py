"""What happens between updates: metrics, validation and the exported model, checkpoints, progress, a wished stop."""

import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from tqdm import tqdm

from protlm.config import Config
from protlm.data.dataset import Split
from protlm.workflows.checkpoint import ModelDescription, ValidScore, save_model
from protlm.workflows.lightning import MaskedLanguageModelling
from protlm.workflows.metrics import MetricsFile
from protlm.workflows.scoring import Scores, score_model


class Watch(pl.Callback):
    """After every update: one row of metrics.csv; at the steps due for it a measurement, a model and a checkpoint.

    Attributes:
        last_step: The latest update.
        best: The measurement of the exported model; None without a valid split.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        valid: Split | None,
        describe: Callable[[int, ValidScore | None], ModelDescription],
        stop_request: "StopRequest",
        first_step: int,
    ) -> None:
        self._run_dir = run_dir
        self._config = config
        self._valid = valid
        self._describe = describe
        self._stop_request = stop_request
        self._metrics: MetricsFile | None = None
        self._progress: tqdm[Any] | None = None
        self._started = 0.0
        self._num_residues = 0.0
        self._valid_perplexity = "-"
        self.last_step = first_step
        self.best: ValidScore | None = None

    @property
    def checkpoint_path(self) -> Path:
        """The one checkpoint that a run is resumed from."""
        return checkpoint_path(self._run_dir)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens metrics.csv at the step that the run starts from."""
        self._started = time.perf_counter()
        assert self.last_step == trainer.global_step
        self._metrics = MetricsFile(self._run_dir / "metrics.csv", last_step=self.last_step)
        self._progress = tqdm(
            total=self._config.train.max_steps, initial=self.last_step, unit="step", desc="train", disable=None
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Does what is due after an update; nothing between the rows of one."""
        if trainer.global_step == self.last_step:
            return
        assert isinstance(pl_module, MaskedLanguageModelling)
        assert self._metrics is not None
        self.last_step = step = trainer.global_step
        settings = self._config.train
        update = pl_module.last_update
        row: dict[str, float] = {
            "step": step,
            "epoch": int(update["epoch"]),
            "train/loss": update["loss"],
            "train/perplexity": math.exp(min(update["loss"], 700.0)),
            "lr": update["lr"],
            "grad_norm": update["grad_norm"],
        }
        is_last = step >= settings.max_steps
        stops = self._stop_request.wanted
        if is_last or step % settings.valid_every_steps == 0:
            row |= self._measure_and_export(pl_module)
        self._metrics.append(row)
        self._show(row, update["num_residues"])
        if is_last or stops or step % settings.checkpoint_every_steps == 0:
            trainer.save_checkpoint(self.checkpoint_path)
        if stops:
            trainer.should_stop = True

    def _measure_and_export(self, task: MaskedLanguageModelling) -> dict[str, float]:
        """Scores the valid split and exports the model if it is the best so far, or if there is nothing to compare."""
        if self._valid is None:
            self._export(task, None)
            return {}
        scores = score_model(
            task.model,
            self._valid,
            self._describe(self.last_step, None).residue_counts,
            mask_rate=self._config.train.mask_rate,
        )
        valid = _valid_score(scores)
        # A perplexity that is not a number is no improvement, but a run must end with a model.
        if self.best is None or not self.best.perplexity <= valid.perplexity:
            self._export(task, valid)
        return {
            "valid/loss": scores.model.loss,
            "valid/accuracy": scores.model.accuracy,
            "valid/perplexity": scores.model.perplexity,
        }

    def _export(self, task: MaskedLanguageModelling, valid: ValidScore | None) -> None:
        self.best = valid
        save_model(self._run_dir / "model", task.model, self._describe(self.last_step, valid))

    def _show(self, row: dict[str, float], num_residues: float) -> None:
        assert self._progress is not None
        self._num_residues += num_residues
        if "valid/perplexity" in row:
            self._valid_perplexity = f"{row['valid/perplexity']:.2f}"
        rate = self._num_residues / (time.perf_counter() - self._started)
        self._progress.set_postfix(
            {
                "loss": f"{row['train/loss']:.3f}",
                "perplexity": f"{row['train/perplexity']:.2f}",
                "valid": self._valid_perplexity,
                "residues/s": f"{rate:,.0f}",
            },
            refresh=False,
        )
        self._progress.update()

    def state_dict(self) -> dict[str, Any]:
        """Returns the best measurement, so that a resumed run goes on comparing with it."""
        return {"best": None if self.best is None else self.best.model_dump()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the best measurement."""
        saved = state_dict["best"]
        self.best = None if saved is None else ValidScore.model_validate(saved)

    def close(self) -> None:
        """Closes the file and the progress bar, however the run ended."""
        if self._metrics is not None:
            self._metrics.close()
        if self._progress is not None:
            self._progress.close()


class StopRequest:
    """The first Ctrl-C asks for a stop between two updates, for a whole checkpoint; the second stops at once."""

    def __init__(self) -> None:
        self.wanted = False
        self._previous: Any = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _ask(self, signal_number: int, frame: FrameType | None) -> None:
        self.wanted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def checkpoint_path(run_dir: Path) -> Path:
    """Returns where a run keeps the checkpoint that it is resumed from."""
    return run_dir / "checkpoints" / "last.ckpt"


def _valid_score(scores: Scores) -> ValidScore:
    return ValidScore(
        num_targets=scores.num_targets,
        accuracy=scores.model.accuracy,
        perplexity=scores.model.perplexity,
        empirical_accuracy=scores.empirical.accuracy,
        empirical_perplexity=scores.empirical.perplexity,
    )
