"""`protlm train`: from datasets to a run directory with metrics, checkpoints and a model."""

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger

from protlm.config import Config
from protlm.data.dataset import Dataset, open_dataset
from protlm.data.mixture import Mixture
from protlm.errors import ConfigError, ProtlmError
from protlm.model.performer import Performer
from protlm.workflows.callbacks import Watch
from protlm.workflows.checkpoint import (
    ModelDescription,
    ValidScore,
    dataset_hash_of,
    initial_weights,
    read_description,
)
from protlm.workflows.curves import plot_curves
from protlm.workflows.devices import Devices, best_device, process_rank
from protlm.workflows.lightning import LanguageModelling, OtherProcessError, TrainingData
from protlm.workflows.run_checkpoints import WholeCheckpointIO, check_checkpoint, last_checkpoint
from protlm.workflows.run_description import TrainingSet, describe_session, write_run_description
from protlm.workflows.run_folder import check_replaceable, prepare_run_dir, resolve_settings
from protlm.workflows.stop_request import StopRequest
from protlm.workflows.train_estimate import check_fits, memory_bytes


@dataclass(frozen=True)
class TrainReport:
    """What a training run ended with.

    Attributes:
        run_dir: The run directory.
        step: Optimizer updates since step 0.
        interrupted: Whether Ctrl-C or another signal ended the run before max_steps.
        ended_early: Why it ended before max_steps, in words; None if it did not.
        seconds: Wall time of this call.
        num_parameters: Trained numbers of the model.
        model: The exported model; None in a run that was stopped before its first measurement.
        valid: What that model reached on the valid split; None where there is none.
    """

    run_dir: Path
    step: int
    interrupted: bool
    ended_early: str | None
    seconds: float
    num_parameters: int
    model: Path | None
    valid: ValidScore | None


@dataclass(frozen=True)
class TrainingSets:
    """The opened datasets of a run.

    Attributes:
        datasets: In the order given.
        train: Their train splits together.
        valid: Their valid splits together; None if all are empty.
        hash: Of all of them.
    """

    datasets: tuple[Dataset, ...]
    train: Mixture
    valid: Mixture | None
    hash: str

    @classmethod
    def open(cls, paths: Sequence[Path]) -> "TrainingSets":
        """Opens datasets and all their shards, so that what is missing is found before hours of work.

        Raises:
            ShardError: A dataset or shard that is missing or damaged, or one without a train split.
        """
        datasets = tuple(open_dataset(path) for path in paths)
        train = Mixture([dataset.split("train") for dataset in datasets])
        summaries = [dataset.manifest.splits.get("valid") for dataset in datasets]
        is_filled = [summary is not None and summary.num_records > 0 for summary in summaries]
        filled = [dataset.split("valid") for dataset in compress(datasets, is_filled)]
        valid = Mixture(filled) if filled else None
        for mixture in (train, valid):
            if mixture is not None:
                mixture.open_shards()
        return cls(datasets, train, valid, dataset_hash_of([dataset.hash for dataset in datasets]))

    def summaries(self) -> list[TrainingSet]:
        """Returns what a run remembers of each dataset."""
        return [
            TrainingSet(
                name=dataset.path.resolve().name,
                hash=dataset.hash,
                num_records=split.num_records,
                num_residues=split.summary.num_residues,
            )
            for dataset, split in zip(self.datasets, self.train.splits, strict=True)
        ]


def train(
    dataset_paths: Sequence[Path],
    run_dir: Path,
    *,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    init: Path | None = None,
    devices: Devices | None = None,
    max_seconds: float | None = None,
    wandb_project: str | None = None,
    command: Sequence[str] = (),
    resume: bool = False,
    force: bool = False,
) -> TrainReport | None:
    """Trains a language model and returns what it ended with; None in every process of the run but the first.

    Args:
        dataset_paths: Datasets of `protlm prep`, each with a train split.
        run_dir: Where the run is written; must not exist unless resume or force is given.
        config: Name of a shipped configuration or path of a TOML file.
        overrides: Texts `section.key=value` that override it.
        init: A model whose weights the run starts from.
        devices: On what to train; default: one device.
        max_seconds: When to stop, with a checkpoint.
        wandb_project: Where Weights & Biases keeps the numbers too.
        command: The words of the command, for run.json.
        resume: Continues the run in run_dir with its own settings; of those given only train.max_steps may differ.
        force: Replaces an existing run.

    Raises:
        ProtlmError: Bad settings or data, an existing run, or a loss that is not finite.
    """
    started = time.perf_counter()
    devices = devices or Devices()
    run_dir, is_first = run_dir.resolve(), process_rank() == 0
    check_apart(run_dir, dataset_paths)
    sets = TrainingSets.open(dataset_paths)
    settings = resolve_settings(run_dir, config, overrides, resume=resume)
    check_devices(settings, devices)
    # All that can be at fault is looked at before an old run is touched; only the first process touches it.
    first_step = 0
    if is_first:
        first_step = check_checkpoint(last_checkpoint(run_dir), sets.hash, settings) if resume else 0
        if first_step > settings.train.max_steps:
            raise ConfigError(
                f"{run_dir}: the run is at step {first_step} already, past max_steps = {settings.train.max_steps}; "
                "ask for more steps"
            )
        check_replaceable(run_dir, resume=resume, force=force)
    if devices.strategy != "fsdp":
        check_fits(settings, memory_bytes(best_device()))
    data = TrainingData(sets.train, settings)
    model = build_model(settings, init)
    if is_first:
        prepare_run_dir(run_dir, settings, resume=resume)
        if first_step < settings.train.max_steps:
            session = describe_session(
                command,
                devices=devices.per_node,
                num_nodes=devices.num_nodes,
                strategy=devices.strategy,
                first_step=first_step,
            )
            write_run_description(run_dir / "run.json", sets.summaries(), session)
    with StopRequest(max_seconds) as stop_request:
        task = LanguageModelling(model, settings, sets.hash, stop_request)
        watch = Watch(run_dir, settings, sets.valid, _describer(settings, sets), stop_request, first_step)
        if first_step < settings.train.max_steps:
            checkpoint = last_checkpoint(run_dir)
            with quiet_lightning():
                loggers = _loggers(run_dir, first_step, wandb_project) if is_first else []
                trainer = make_trainer(settings, devices, run_dir, [watch], loggers)
                try:
                    _fit(trainer, task, data, checkpoint if resume and checkpoint.exists() else None)
                except OtherProcessError:
                    return None
                finally:
                    watch.close()
    if not is_first:
        return None
    plot_curves(run_dir, causal=settings.model.causal)
    has_model = (run_dir / "model" / "config.json").is_file()
    return TrainReport(
        run_dir=run_dir,
        step=watch.last_step,
        interrupted=stop_request.interrupted and watch.last_step < settings.train.max_steps,
        ended_early=watch.ended_early,
        seconds=time.perf_counter() - started,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        model=run_dir / "model" if has_model else None,
        valid=read_description(run_dir / "model").valid if has_model else None,
    )


def check_apart(run_dir: Path, dataset_paths: Sequence[Path]) -> None:
    """Raises ProtlmError where a run and a dataset would lie inside each other."""
    for path in dataset_paths:
        if run_dir.is_relative_to(path.resolve()) or path.resolve().is_relative_to(run_dir):
            raise ProtlmError(f"{run_dir}: the run and the dataset {path} lie inside each other; choose another --out")


def check_devices(settings: Config, devices: Devices) -> None:
    """Raises ConfigError unless the rows of an update can be shared out, and the devices are there."""
    if settings.train.accumulate % devices.total:
        wanted = -(-settings.train.accumulate // devices.total) * devices.total
        raise ConfigError(
            f"train.accumulate: expected a multiple of the {devices.total} devices, which share the rows of an update, "
            f"got {settings.train.accumulate}; for example --set train.accumulate={wanted}"
        )
    if devices.accelerator == "gpu" and devices.per_node > torch.cuda.device_count():
        raise ConfigError(
            f"--devices {devices.per_node}: this machine has {torch.cuda.device_count()} GPUs; ask for at most as many"
        )


def build_model(settings: Config, init: Path | None) -> Performer:
    """Returns the network with its first weights, computed in the way that the settings ask for.

    Raises:
        ProtlmError: A model that does not fit into memory, or an `init` that does not fit the settings.
    """
    try:
        model = Performer(settings.model)
        model.reset(settings.train.seed)
    except (RuntimeError, MemoryError):
        raise ConfigError("model: does not fit into the memory of this machine; make it smaller") from None
    if init is not None:
        initial_weights(model, init)
    model.checkpoint_activations = settings.train.activation_checkpointing
    if settings.train.compile:
        model.compile_layers()
    return model


def _describer(settings: Config, sets: TrainingSets) -> Callable[[int, ValidScore | None], ModelDescription]:
    def describe(step: int, valid: ValidScore | None) -> ModelDescription:
        is_concatenated = settings.data.mode == "concatenated"
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
            dataset_hash=sets.hash,
            valid=valid,
        )

    return describe


def _loggers(run_dir: Path, first_step: int, wandb_project: str | None) -> list[Logger]:
    """Returns what keeps the numbers beside our own files; TensorBoard forgets the steps past the checkpoint."""
    from pytorch_lightning.loggers import TensorBoardLogger

    loggers: list[Logger] = [TensorBoardLogger(run_dir, name="", version="tensorboard", purge_step=first_step + 1)]
    if wandb_project is not None:
        try:
            from pytorch_lightning.loggers import WandbLogger

            loggers.append(WandbLogger(project=wandb_project, save_dir=run_dir, name=run_dir.name))
        except ModuleNotFoundError:
            raise ProtlmError("--wandb: the package wandb is not installed; pip install 'protlm[wandb]'") from None
    return loggers


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hides Lightning's advice for other ways of working than ours, such as a loader with many workers."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning.*")
        warnings.filterwarnings("ignore", module="lightning_fabric.*")
        yield


def make_trainer(
    settings: Config,
    devices: Devices,
    run_dir: Path,
    callbacks: Sequence[pl.Callback] = (),
    loggers: Sequence[Logger] = (),
) -> pl.Trainer:
    """Returns the trainer of a run; what Lightning would write itself, it leaves to us."""
    return pl.Trainer(
        default_root_dir=run_dir,
        max_steps=settings.train.max_steps,
        max_epochs=-1,
        accelerator=devices.accelerator,
        devices=devices.per_node,
        num_nodes=devices.num_nodes,
        strategy=devices.lightning_strategy(),
        precision="bf16-mixed" if settings.train.precision == "bf16-mixed" else "32-true",
        accumulate_grad_batches=settings.train.accumulate // devices.total,
        callbacks=list(callbacks),
        plugins=[WholeCheckpointIO()],
        logger=list(loggers),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def _fit(trainer: pl.Trainer, task: LanguageModelling, data: TrainingData, checkpoint: Path | None) -> None:
    try:
        trainer.fit(task, data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:
        # Lightning exits on the second Ctrl-C; the command line knows what an interrupt means.
        raise KeyboardInterrupt from None
