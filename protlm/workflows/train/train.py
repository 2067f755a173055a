"""`protlm train`: from datasets to a run directory with metrics, checkpoints and a model."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger

from protlm.errors import ModelError, RunError
from protlm.pretrained.model_description import ModelDescription, ValidScore, dataset_hash_of
from protlm.pretrained.model_files import read_description
from protlm.runtime.devices import Devices, OtherProcessError, is_lost_peer
from protlm.runtime.launch import check_processes, process_rank
from protlm.runtime.progress import StartProgress, no_progress
from protlm.workflows.train.callbacks import Watch
from protlm.workflows.train.request import TrainRequest
from protlm.workflows.train.run_checkpoints import WholeCheckpointIO, last_checkpoint, make_last
from protlm.workflows.train.run_description import (
    RUN_NAME,
    describe_session,
    write_run_description,
    write_session_end,
)
from protlm.workflows.train.run_folder import lock_existing, prepare_run_dir, remove_left_overs_in
from protlm.workflows.train.stage import write_teacher
from protlm.workflows.train.start import Start, check_precision, prepare_start
from protlm.workflows.train.stop_request import StopRequest
from protlm.workflows.train.task import LanguageModelling, TrainingData
from protlm.workflows.train.valid_baselines import baseline_perplexities
from protlm.workflows.train.weak_results import weak_results
from protlm.workflows.trainers import quiet_lightning, training_trainer


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """The outcome of a training run.

    Attributes:
        run_dir: The run directory.
        step: Optimizer updates since step 0.
        interrupted: Whether Ctrl-C or another signal ended the run before max_steps.
        ended_early: Why it ended before max_steps, in words; None if it did not.
        notes: Warnings about the files of the run that was resumed, and about a weak result.
        seconds: Wall time of this call.
        num_parameters: Trained parameters of the model.
        model: The exported model; None if there is none.
        valid: Scores of that model on the valid split; None without one, and while the model is unmeasured.
        unmeasured: Whether the run was stopped before it could measure that model on its valid split.
    """

    run_dir: Path
    step: int
    interrupted: bool
    ended_early: str | None
    notes: tuple[str, ...]
    seconds: float
    num_parameters: int
    model: Path | None
    valid: ValidScore | None
    unmeasured: bool


def train(
    request: TrainRequest,
    *,
    max_seconds: float | None = None,
    command: Sequence[str] = (),
    start_progress: StartProgress = no_progress,
) -> TrainReport | None:
    """Trains a language model and returns the outcome; None in every process of the run but the first.

    Args:
        request: The run that is asked for.
        max_seconds: Time after which to stop, with a checkpoint.
        command: Words of the command line, for run.json.
        start_progress: Starts the stage `train` (steps), in the first process only.

    Raises:
        ProtlmError: Bad settings or data, an existing run, or a loss that is not finite.
    """
    with ExitStack() as locked:
        return _train(request, max_seconds, command, start_progress, locked)


def _train(
    request: TrainRequest,
    max_seconds: float | None,
    command: Sequence[str],
    start_progress: StartProgress,
    locked: ExitStack,
) -> TrainReport | None:
    """Trains, with the run directory locked by the first process."""
    started = time.perf_counter()
    check_processes(request.devices)
    run_dir, is_first = request.run_dir, process_rank(request.devices) == 0
    # Before anything in it is read: another process may be about to change it.
    is_run = is_first and lock_existing(run_dir, locked)
    start = prepare_start(request)
    settings = start.settings
    check_precision(settings)
    has_work = start.first_step < settings.train.max_steps
    if is_run and request.resume:
        remove_left_overs_in(run_dir)
    if is_first and has_work:
        prepare_run_dir(run_dir, settings, resume=request.resume, is_run=is_run, locked=locked)
        if start.resume_point is not None:
            make_last(run_dir, start.resume_point)
        devices = request.devices
        session = describe_session(
            command,
            devices=devices.per_node,
            num_nodes=devices.num_nodes,
            strategy=devices.strategy,
            first_step=start.first_step,
            settings=settings.train,
        )
        write_run_description(run_dir / RUN_NAME, start.sets.summaries(), session, start.beginning, start.recovery)
        if start.teacher_model is not None:
            write_teacher(run_dir, start.teacher_model)
    baselines = _baselines_of(start)
    with StopRequest(max_seconds) as stop_request:
        watch = Watch(
            run_dir, settings, start.sets.valid, _describer(start), baselines, stop_request, start.first_step,
            start_progress,
        )  # fmt: skip
        if start.resume_point is not None and start.resume_point.note is not None:
            watch.notes += (start.resume_point.note,)
        if has_work:
            task = LanguageModelling(start.model, settings, start.sets.hash, stop_request, start.teacher)
            with quiet_lightning():
                loggers = _loggers(run_dir, start.first_step, request.wandb_project) if is_first else []
                trainer = training_trainer(settings, request.devices, run_dir, [watch], loggers, WholeCheckpointIO())
                checkpoint = last_checkpoint(run_dir) if start.first_step else None
                try:
                    _fit(trainer, task, start.data, checkpoint, request.devices)
                except OtherProcessError:
                    return None
                except KeyboardInterrupt:
                    watch.outcome = "interrupted"
                    raise
                finally:
                    watch.close()
                    if is_first:
                        _write_end(run_dir, watch, time.perf_counter() - started)
    if not is_first:
        return None
    model = _exported(run_dir)
    valid = None if model is None else model.valid
    if has_work:
        watch.notes += _weaknesses(start, watch, valid)
    return TrainReport(
        run_dir=run_dir,
        step=watch.last_step,
        interrupted=stop_request.interrupted and watch.last_step < settings.train.max_steps,
        ended_early=watch.ended_early,
        notes=watch.notes,
        seconds=time.perf_counter() - started,
        num_parameters=start.memory.parameters,
        model=None if model is None else run_dir / "model",
        valid=valid,
        unmeasured=model is not None and model.unmeasured,
    )


def _exported(run_dir: Path) -> ModelDescription | None:
    """Returns the description of the exported model; None if there is none."""
    folder = run_dir / "model"
    return read_description(folder) if (folder / "config.json").is_file() else None


def _weaknesses(start: Start, watch: Watch, valid: ValidScore | None) -> tuple[str, ...]:
    """Returns a line for each weakness of the result."""
    lines = weak_results(
        valid=valid,
        baselines=watch.baselines,
        num_training=start.sets.train.num_records,
        num_valid=None if start.sets.valid is None else start.sets.valid.num_records,
        epochs=watch.epoch,
    )
    return tuple(lines)


def _write_end(run_dir: Path, watch: Watch, seconds: float) -> None:
    """Writes the end of this session to run.json; where that fails, it adds a note, and the run's outcome stays."""
    try:
        write_session_end(
            run_dir / RUN_NAME,
            seconds=seconds,
            outcome=watch.outcome or "failed",
            last_step=watch.last_step,
            model=_exported(run_dir),
        )
    except (ModelError, RunError, OSError) as error:
        watch.notes += (f"the end of this session is not in run.json: {error}",)


def _describer(start: Start) -> Callable[[int], ModelDescription]:
    settings, sets = start.settings, start.sets
    is_concatenated = settings.data.mode == "concatenated"
    longest = min(settings.data.window, int(sets.train.lengths.max()))
    # A model that began with other weights knows what those were trained on too.
    init_hash, origin, swap = start.beginning
    seen = sets.hash if init_hash is None else dataset_hash_of([init_hash, sets.hash])

    def describe(step: int) -> ModelDescription:
        return ModelDescription(
            model=settings.model,
            mask_rate=settings.train.mask_rate,
            mask_share=settings.train.mask_share,
            random_share=settings.train.random_share,
            data_mode=settings.data.mode,
            window_tokens=settings.data.window_tokens if is_concatenated else None,
            redraw_every_steps=settings.train.redraw_every_steps,
            seed=settings.train.seed,
            step=step,
            residue_counts=sets.train.residue_counts,
            dataset_hash=seen,
            trained_residues=None if is_concatenated or init_hash is not None else longest,
            fine_tuned_from=origin,
            swap=swap if settings.model.estimator else None,
        )

    return describe


def _baselines_of(start: Start) -> Callable[[], dict[str, float]]:
    """Returns what measures the baselines on the valid split, once, when it is first called; none without one."""
    sets = start.sets

    @cache
    def baselines() -> dict[str, float]:
        if sets.valid is None:
            return {}
        return baseline_perplexities(sets.train, sets.valid, _describer(start)(start.first_step))

    return baselines


def _loggers(run_dir: Path, first_step: int, wandb_project: str | None) -> list[Logger]:
    """Returns the loggers besides our own files; TensorBoard drops the steps past the checkpoint."""
    from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

    folder = _tensorboard_folder(run_dir)
    loggers: list[Logger] = [TensorBoardLogger(folder.parent, name="", version=folder.name, purge_step=first_step + 1)]
    if wandb_project is not None:
        loggers.append(WandbLogger(project=wandb_project, save_dir=run_dir, name=run_dir.name))
    return loggers


def _tensorboard_folder(run_dir: Path) -> Path:
    """Returns the folder of the events, whose name TensorBoard shows: the run's, or that of its earlier events."""
    folder = run_dir / "tensorboard"
    earlier = sorted(path.parent for path in folder.rglob("events.out.tfevents.*"))
    return earlier[-1] if earlier else folder / run_dir.name


def _fit(
    trainer: pl.Trainer, task: LanguageModelling, data: TrainingData, checkpoint: Path | None, devices: Devices
) -> None:
    try:
        with _failed_writes_of_threads_untold():
            trainer.fit(task, data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:
        # Lightning exits on the second Ctrl-C; the command line expects a KeyboardInterrupt.
        raise KeyboardInterrupt from None
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        if process_rank(devices):
            raise OtherProcessError from None
        raise RunError(
            "another process of this run ended early, and its own message says why; go on from the last checkpoint "
            "with the same command and --resume"
        ) from None


@contextmanager
def _failed_writes_of_threads_untold() -> Iterator[None]:
    """Silences what TensorBoard's thread prints where the disk is full: its writer raises the error in the run too."""
    hook = threading.excepthook

    def untold(arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.exc_value, OSError):
            hook(arguments)

    threading.excepthook = untold
    try:
        yield
    finally:
        threading.excepthook = hook
