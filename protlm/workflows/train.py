"""`protlm train`: from a dataset to a run directory with metrics, checkpoints and a model."""

import logging
import pickle
import shutil
import time
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from protlm.config import Config, dump_config, load_config, parse_config
from protlm.data import files
from protlm.data.dataset import Dataset, Split, open_dataset
from protlm.errors import CheckpointError, ConfigError, ProtlmError
from protlm.model.performer import Performer
from protlm.workflows.callbacks import StopRequest, Watch, checkpoint_path
from protlm.workflows.checkpoint import ModelDescription, ValidScore, read_description
from protlm.workflows.lightning import MaskedLanguageModelling, TrainingData
from protlm.workflows.metrics import plot_curves

RUN_FILES = frozenset({"config.toml", "metrics.csv", "curves.png", "checkpoints", "model"})
"""What a run directory may hold, so that nothing else is ever replaced with it."""


@dataclass(frozen=True)
class TrainReport:
    """What a training run ended with.

    Attributes:
        run_dir: The run directory.
        step: Optimizer updates since step 0.
        interrupted: Whether Ctrl-C ended the run before max_steps.
        seconds: Wall time of this call.
        num_parameters: Trained numbers of the model.
        model: The exported model; None in a run that was stopped before its first measurement.
        valid: What that model reached on the valid split; None where there is none.
    """

    run_dir: Path
    step: int
    interrupted: bool
    seconds: float
    num_parameters: int
    model: Path | None
    valid: ValidScore | None


def train(
    dataset_path: Path,
    run_dir: Path,
    *,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    max_steps: int | None = None,
    seed: int | None = None,
    resume: bool = False,
    force: bool = False,
) -> TrainReport:
    """Trains a masked language model and returns what it ended with.

    Args:
        dataset_path: A dataset of `protlm prep` with a train split.
        run_dir: Where the run is written; must not exist unless resume or force is given.
        config: Name of a shipped configuration or path of a TOML file.
        overrides: Texts `section.key=value` that override it.
        max_steps: Overrides train.max_steps.
        seed: Overrides train.seed.
        resume: Continues the run in run_dir with its own settings; of those given only max_steps may differ.
        force: Replaces an existing run.

    Raises:
        ProtlmError: Bad settings or data, an existing run, or a loss that is not finite.
    """
    started = time.perf_counter()
    wanted = [*overrides]
    wanted += [f"train.max_steps={max_steps}"] if max_steps is not None else []
    wanted += [f"train.seed={seed}"] if seed is not None else []
    run_dir = run_dir.resolve()
    if run_dir.is_relative_to(dataset_path.resolve()) or dataset_path.resolve().is_relative_to(run_dir):
        raise ProtlmError(
            f"{run_dir}: the run and the dataset {dataset_path} lie inside each other; choose another --out"
        )
    dataset = open_dataset(dataset_path)
    train_split, valid_split = dataset.split("train"), _split_or_none(dataset, "valid")
    settings = _resolve(run_dir, config, wanted, resume=resume)
    first_step = _check_checkpoint(checkpoint_path(run_dir), dataset.hash, settings) if resume else 0
    if first_step > settings.train.max_steps:
        raise ConfigError(
            f"{run_dir}: the run is at step {first_step} already, past max_steps = {settings.train.max_steps}; "
            "ask for more steps"
        )
    _check_replaceable(run_dir, resume=resume, force=force)
    # All that can be at fault is looked at before an old run is touched.
    for split in (train_split, valid_split):
        if split is not None:
            split.open_shards()
    model = _build_model(settings)
    torch.manual_seed(settings.train.seed)
    _prepare_run_dir(run_dir, settings, resume=resume)
    task = MaskedLanguageModelling(model, settings, dataset.hash)

    def describe(step: int, valid: ValidScore | None) -> ModelDescription:
        return ModelDescription(
            model=settings.model,
            mask_rate=settings.train.mask_rate,
            redraw_every_steps=settings.train.redraw_every_steps,
            seed=settings.train.seed,
            step=step,
            residue_counts=dict(dataset.manifest.splits["train"].residue_counts),
            dataset_hash=dataset.hash,
            valid=valid,
        )

    with StopRequest() as stop_request:
        watch = Watch(run_dir, settings, valid_split, describe, stop_request, first_step)
        if first_step < settings.train.max_steps:
            _fit(task, TrainingData(train_split, settings), watch, settings)
    plot_curves(run_dir / "metrics.csv", run_dir / "curves.png")
    has_model = (run_dir / "model" / "config.json").is_file()
    return TrainReport(
        run_dir=run_dir,
        step=watch.last_step,
        interrupted=watch.last_step < settings.train.max_steps,
        seconds=time.perf_counter() - started,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        model=run_dir / "model" if has_model else None,
        valid=read_description(run_dir / "model").valid if has_model else None,
    )


def _split_or_none(dataset: Dataset, name: str) -> Split | None:
    is_filled = any(found == name and summary.num_records for found, summary in dataset.manifest.splits.items())
    return dataset.split(name) if is_filled else None


def _resolve(run_dir: Path, config: str | Path | None, overrides: Sequence[str], *, resume: bool) -> Config:
    """Returns the settings of the run: its own when it is resumed, with a new max_steps if that is wanted."""
    saved_path = run_dir / "config.toml"
    if not (resume and saved_path.exists()):
        settings = load_config(config, overrides)
        horizon = settings.train.schedule_steps or settings.train.max_steps
        return _with_train(settings, schedule_steps=horizon)
    saved = load_config(saved_path)
    asked = load_config(saved_path if config is None else config, overrides)
    asked = _with_train(asked, schedule_steps=asked.train.schedule_steps or saved.train.schedule_steps)
    if any(override.partition("=")[0].strip() == "train.max_steps" for override in overrides):
        saved = _with_train(saved, max_steps=asked.train.max_steps)
    difference = _first_difference(saved.model_dump(), asked.model_dump())
    if difference is not None:
        key, ours, theirs = difference
        raise ConfigError(
            f"{saved_path}: {key} is {ours!r} in this run and cannot become {theirs!r} on --resume; "
            "only train.max_steps may change"
        )
    return saved


def _first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, object, object] | None:
    """Returns key and both values of the first setting that differs, max_steps apart."""
    for section in ours:
        for key, value in ours[section].items():
            if value != theirs.get(section, {}).get(key) and (section, key) != ("train", "max_steps"):
                return f"{section}.{key}", value, theirs.get(section, {}).get(key)
    return None


def _build_model(settings: Config) -> Performer:
    try:
        model = Performer(settings.model)
        model.reset(settings.train.seed)
    except (RuntimeError, MemoryError):
        raise ConfigError("model: does not fit into the memory of this machine; make it smaller") from None
    return model


def _check_checkpoint(path: Path, dataset_hash: str, settings: Config) -> int:
    """Returns the step to resume from, 0 without a checkpoint; raises CheckpointError for one that is unusable."""
    if not path.exists():
        return 0
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("checksum differs")
        # Only tensors and plain values are ever loaded, never code.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved, config = checkpoint["protlm"]["dataset_hash"], dict(checkpoint["protlm"]["config"])
        step = int(checkpoint["global_step"])
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, LookupError, TypeError, ValueError,
            AttributeError):  # fmt: skip
        raise CheckpointError(
            f"{path}: damaged, or not a checkpoint of protlm train; delete it to start the run afresh"
        ) from None
    difference = _first_difference(config, settings.model_dump(mode="json"))
    if difference is not None:
        key, ours, theirs = difference
        raise CheckpointError(
            f"{path}: made with {key} = {ours!r}, but the run's config.toml now says {theirs!r}; put it back"
        )
    if saved != dataset_hash:
        raise CheckpointError(
            f"{path}: the run was trained on another dataset (hash {saved}, now {dataset_hash}); "
            "resume with the dataset it began with"
        )
    return step


def _with_train(settings: Config, **changes: int | None) -> Config:
    content = settings.model_dump()
    content["train"] |= changes
    return parse_config(content, "settings")


def _check_replaceable(run_dir: Path, *, resume: bool, force: bool) -> None:
    """Raises an error unless the run may be written: to a new or empty folder, or to an old run where that is asked."""
    if not run_dir.exists() or (run_dir.is_dir() and not any(run_dir.iterdir())):
        return
    if not (resume or force):
        raise ProtlmError(f"{run_dir}: exists already; continue it with --resume or replace it with --force")
    foreign = [] if run_dir.is_dir() else [run_dir.name]
    if not foreign:
        names = sorted(path.name for path in run_dir.iterdir() if path.suffix != files.PARTIAL_SUFFIX)
        foreign = [name for name in names if name not in RUN_FILES]
    if foreign or not (run_dir / "config.toml").is_file():
        holds = f"holds {foreign[0]!r}" if foreign else "has no config.toml"
        raise CheckpointError(f"{run_dir}: is no run of protlm train ({holds}); choose another --out")
    load_config(run_dir / "config.toml")


def _prepare_run_dir(run_dir: Path, settings: Config, *, resume: bool) -> None:
    if run_dir.exists() and not resume:
        shutil.rmtree(run_dir)
    checkpoint_path(run_dir).parent.mkdir(parents=True, exist_ok=True)
    with files.written_whole(run_dir / "config.toml") as partial:
        partial.write_text(dump_config(settings), encoding="utf-8")


def _fit(task: MaskedLanguageModelling, data: TrainingData, watch: Watch, settings: Config) -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    checkpoint = watch.checkpoint_path
    with warnings.catch_warnings():
        # Advice for other ways of working than ours: a sampler of our own, batches made in the training process.
        warnings.filterwarnings("ignore", module="pytorch_lightning.*")
        trainer = pl.Trainer(
            max_steps=settings.train.max_steps,
            max_epochs=-1,
            accelerator="auto",
            devices=1,
            accumulate_grad_batches=settings.train.accumulate,
            callbacks=[watch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        try:
            trainer.fit(task, data, ckpt_path=str(checkpoint) if checkpoint.exists() else None, weights_only=True)
        except SystemExit:
            # Lightning exits on the second Ctrl-C; the command line knows what an interrupt means.
            raise KeyboardInterrupt from None
        finally:
            watch.close()
