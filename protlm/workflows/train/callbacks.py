"""The work between updates: measurements, the exported model, checkpoints, and stopping early."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from protlm.config import Config
from protlm.data.batching.batches import Proteins
from protlm.errors import ModelError, RunError
from protlm.inference.metrics import MetricSums, Score
from protlm.inference.scoring import score_split
from protlm.model.health import attention_health
from protlm.pretrained.model_description import ModelDescription, Targets, ValidScore, targets_of
from protlm.pretrained.model_directory import save_model
from protlm.pretrained.model_files import read_description
from protlm.runtime.devices import OtherProcessError
from protlm.runtime.progress import StartProgress
from protlm.workflows.train import run_checkpoints
from protlm.workflows.train.divergence import diverged, find_fault
from protlm.workflows.train.gradual_swap import is_converted, set_kinds
from protlm.workflows.train.run_description import Outcome
from protlm.workflows.train.run_log import RunLog
from protlm.workflows.train.stop_request import StopRequest
from protlm.workflows.train.task import LanguageModelling, Update

_OTHER_MEASUREMENT = (
    "up to step {step} the valid split was masked as in training, and from now on it is measured on hidden residues, "
    "which are harder: the search for the best model begins anew"
)
_SECONDS_TO_MEASURE = 20.0
"""Most time that a run which is stopped takes to measure its model: SLURM kills a job 30 seconds after SIGTERM."""


class _TimeToMeasureIsOverError(Exception):
    """Ends a measurement in all processes."""


class Watch(pl.Callback):
    """The work after every update: a row in the tables, and the measurement, model and checkpoint that are due.

    All processes of a run take the same steps; only the first one writes.

    Attributes:
        last_step: Number of the latest update.
        best: The measurement of the exported model; None without a valid split.
        baselines: Perplexities of the baselines on the valid split, as the latest picture has them; empty without.
        outcome: How the run ended; None while it goes on.
        epoch: Passes over the data that are behind the run; 0 before its first update here.
        notes: Warnings about the files of the run that is resumed.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        valid: Proteins | None,
        describe: Callable[[int], ModelDescription],
        baselines: Callable[[], Mapping[str, float]],
        stop_request: StopRequest,
        first_step: int,
        start_progress: StartProgress,
    ) -> None:
        self._run_dir = run_dir
        self._config = config
        self._valid = valid
        self._describe = describe
        self._measure_baselines = baselines
        self.baselines: Mapping[str, float] = {}
        self._stop_request = stop_request
        self._start_progress = start_progress
        self._log: RunLog | None = None
        self._num_without_improvement = 0
        self._update_began = self._batch_asked_for = 0.0
        self._seconds_waited = 0.0
        self.last_step = first_step
        self.best: ValidScore | None = None
        self.outcome: Outcome | None = None
        self.epoch = 0
        self.notes: tuple[str, ...] = ()

    @property
    def ended_early(self) -> str | None:
        """Why the run ended before max_steps, in words; None if it did not."""
        words = {
            "interrupted": "interrupted",
            "out of time": "its time is over",
            "out of patience": f"no lower perplexity on valid in {self._config.train.patience} measurements",
        }
        return None if self.outcome is None else words.get(self.outcome)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the files at the step that the run starts from."""
        # Lightning has installed its own handler for SIGTERM by now, which would end the run within an update.
        self._stop_request.listen()
        self.last_step = trainer.global_step
        # Each process has chosen the checkpoint by itself, from files that all of them see.
        is_same = trainer.strategy.broadcast(self.last_step) == self.last_step
        if not trainer.strategy.reduce_boolean_decision(is_same, all=True):
            if trainer.global_rank:
                raise OtherProcessError
            raise RunError(f"{self._run_dir}: the processes see different checkpoints; is the folder shared by all?")
        if trainer.is_global_zero:
            self._log = RunLog(
                self._run_dir, self._config, self.last_step, trainer.loggers, start_progress=self._start_progress
            )
            self.notes += self._log.notes
        self._update_began = self._batch_asked_for = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Adds the time that the loop waited for this row."""
        self._seconds_waited += time.perf_counter() - self._batch_asked_for

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Finishes an update after its last row; does nothing after the others."""
        if trainer.global_step > self.last_step:
            assert isinstance(pl_module, LanguageModelling)
            self.last_step = trainer.global_step
            self._after_update(trainer, pl_module)
            self._update_began, self._seconds_waited = time.perf_counter(), 0.0
        self._batch_asked_for = time.perf_counter()

    def _after_update(self, trainer: pl.Trainer, task: LanguageModelling) -> None:
        step, settings, update = self.last_step, self._config.train, task.last_update
        assert update is not None
        self.epoch = update.epoch
        seconds = time.perf_counter() - self._update_began
        is_last = step >= settings.max_steps
        is_measured = is_last or step % settings.valid_every_steps == 0
        reason = _reason_to_stop(update, is_patience_over=False)
        valid: dict[str, float] = {}
        has_improved = is_patience_over = False
        assert task.first_batch is not None
        fault = None
        if is_measured or reason is not None or self._is_due(step):
            # What is not finite is neither measured nor exported nor kept as a checkpoint.
            fault = find_fault(trainer, task.model, task.first_batch)
        if is_measured and fault is None:
            valid, has_improved = self._measure(trainer, task)
            is_patience_over = 0 < settings.patience <= self._num_without_improvement
        outcome = "finished" if is_last else _reason_to_stop(update, is_patience_over=is_patience_over)
        if self._log is not None:
            self._log.update(step, update, valid, seconds, self._seconds_waited)
        if fault is not None:
            raise diverged(step, fault, trainer.global_rank)
        if settings.health_every_steps and step % settings.health_every_steps == 0:
            layers = attention_health(task.model, task.first_batch.tokens, task.first_batch.cu_seqlens)
            if self._log is not None:
                self._log.health(step, layers)
        ends = outcome is not None
        if ends or has_improved or self._is_due(step):
            self._save_checkpoints(trainer, has_improved=has_improved)
            is_stopped = ends and not (is_measured and self._is_converted)
            if is_stopped:
                self._leave_a_model(trainer, task)
            if self._log is not None:
                # Who is stopped has no time to measure baselines, which takes as long as the valid split is large.
                self._log.draw_curves(self._drawn if is_stopped else self._measured, is_last=ends)
        if ends and valid and self.best is None and self._is_converted:
            message = f"the perplexity on valid is {valid['valid/perplexity']}, and so no model was exported"
            raise diverged(step, message, trainer.global_rank)
        # Only now: what fails above ends the run otherwise.
        self.outcome = outcome
        if ends:
            trainer.should_stop = True

    def _drawn(self) -> Mapping[str, float]:
        return self.baselines

    def _measured(self) -> Mapping[str, float]:
        self.baselines = self._measure_baselines()
        return self.baselines

    @property
    def _is_converted(self) -> bool:
        """Whether all layers are those of the model that would be exported, which a gradual conversion changes."""
        return is_converted(self._config, self.last_step)

    def _is_due(self, step: int) -> bool:
        settings = self._config.train
        return step % settings.checkpoint_every_steps == 0 or (
            settings.keep_every_steps > 0 and step % settings.keep_every_steps == 0
        )

    def _measure(self, trainer: pl.Trainer, task: LanguageModelling) -> tuple[dict[str, float], bool]:
        """Scores the valid split; exports the model if it is the best so far, or if there is no valid split.

        While a gradual conversion goes on the scores are those of another model, and so none is exported.

        Returns:
            The columns of metrics.csv, and whether the model is the best so far.
        """
        description = self._describe(self.last_step)
        if self._valid is None:
            if self._is_converted:
                self._export(trainer, task, description)
            return {}, False
        score, valid = self._score(trainer, task, description)
        columns = {
            "valid/loss": score.loss,
            "valid/accuracy": score.accuracy,
            "valid/perplexity": score.perplexity,
        }
        if not self._is_converted:
            return columns, False
        has_improved = math.isfinite(valid.perplexity) and (
            self.best is None or valid.perplexity < self.best.perplexity
        )
        self._num_without_improvement = 0 if has_improved else self._num_without_improvement + 1
        if has_improved:
            self.best = valid
            self._export(trainer, task, description.model_copy(update={"valid": valid}))
        return columns, has_improved

    def _score(
        self, trainer: pl.Trainer, task: LanguageModelling, description: ModelDescription, deadline: float = math.inf
    ) -> tuple[Score, ValidScore]:
        """Scores the valid split; raises _TimeToMeasureIsOverError, in all processes, at a `time.monotonic()`."""
        assert self._valid is not None

        def advance(_: int) -> None:
            if self._log is not None:
                self._log.measuring()
            if deadline < math.inf:
                is_over = time.monotonic() >= deadline
                if trainer.strategy.reduce_boolean_decision(is_over, all=False):
                    raise _TimeToMeasureIsOverError

        sums = score_split(
            task.model,
            description,
            self._valid,
            advance=advance,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        return sums["model"].score(), _valid_score(sums, targets_of(description.objective.hiding_all()))

    def _leave_a_model(self, trainer: pl.Trainer, task: LanguageModelling) -> None:
        """Exports the model of a run that is stopped between two measurements, unless a measured one is there.

        It is exported as it is, in case that the job is killed meanwhile, and then measured if there is time. Neither
        tables nor checkpoint know of this, so that a resumed run does what one does that was never stopped.
        """
        if self.best is not None:
            return
        set_kinds(task.model, self._config.model.kinds)
        description = self._describe(self.last_step)
        if self._valid is None:
            self._export(trainer, task, description)
            return
        earlier = self._score_of_export()
        self._export(trainer, task, description.model_copy(update={"unmeasured": True}), is_wanted=earlier is None)
        try:
            _, valid = self._score(trainer, task, description, time.monotonic() + _SECONDS_TO_MEASURE)
        except _TimeToMeasureIsOverError:
            return
        if not math.isfinite(valid.perplexity):
            message = f"the perplexity on valid is {valid.perplexity}, and so the exported model is of no use"
            raise diverged(self.last_step, message, trainer.global_rank)
        is_better = earlier is None or earlier.targets != valid.targets or valid.perplexity < earlier.perplexity
        self._export(trainer, task, description.model_copy(update={"valid": valid}), is_wanted=is_better)

    def _score_of_export(self) -> ValidScore | None:
        """Returns the scores of the model that was exported before; None if there is none or it is unmeasured."""
        try:
            return read_description(self._run_dir / "model").valid
        except ModelError:
            return None

    def _export(
        self, trainer: pl.Trainer, task: LanguageModelling, description: ModelDescription, *, is_wanted: bool = True
    ) -> None:
        """Writes model/ if it is wanted in the first process; all processes must call it together."""
        state = task.full_state()
        if trainer.is_global_zero and is_wanted:
            save_model(self._run_dir / "model", state, description)

    def _save_checkpoints(self, trainer: pl.Trainer, *, has_improved: bool) -> None:
        trainer.save_checkpoint(run_checkpoints.new_checkpoint(self._run_dir))
        if not trainer.is_global_zero:
            return
        every = self._config.train.keep_every_steps
        copies = []
        if every and self.last_step % every == 0:
            copies.append(run_checkpoints.kept_checkpoint(self._run_dir, self.last_step))
        if has_improved:
            copies.append(run_checkpoints.best_checkpoint(self._run_dir))
        run_checkpoints.replace_last(self._run_dir, copies)

    def state_dict(self) -> dict[str, Any]:
        """Returns the best measurement and the number of measurements since, with which a resumed run compares."""
        return {
            "best": None if self.best is None else self.best.model_dump(),
            "num_without_improvement": self._num_without_improvement,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the best measurement and the number of measurements since, unless they were of another kind."""
        self.best, self._num_without_improvement = None, 0
        saved = state_dict["best"]
        # Earlier versions kept a perplexity that was not finite too.
        if saved is None or not math.isfinite(saved["perplexity"]):
            return
        description = self._describe(self.last_step)
        # Before protlm wrote how it had measured, the valid split was masked as in training.
        measured = saved.get("targets", targets_of(description.objective))
        if measured != targets_of(description.objective.hiding_all()):
            self.notes += (_OTHER_MEASUREMENT.format(step=self.last_step),)
            return
        self.best = ValidScore.model_validate({**saved, "targets": measured})
        self._num_without_improvement = state_dict["num_without_improvement"]

    def close(self) -> None:
        """Closes the files."""
        if self._log is not None:
            self._log.close()


def _reason_to_stop(update: Update, *, is_patience_over: bool) -> Outcome | None:
    if update.interrupted:
        return "interrupted"
    if update.time_is_over:
        return "out of time"
    return "out of patience" if is_patience_over else None


def _valid_score(sums: Mapping[str, MetricSums], targets: Targets) -> ValidScore:
    model, empirical = sums["model"].score(), sums["empirical"].score()
    return ValidScore(
        targets=targets,
        num_targets=sums["model"].num_targets,
        accuracy=model.accuracy,
        perplexity=model.perplexity,
        empirical_accuracy=empirical.accuracy,
        empirical_perplexity=empirical.perplexity,
    )
