"""The request of a run, and what can be checked of it before torch and Lightning are loaded, which takes seconds.

Anything wrong with the settings, the paths or the datasets is told at once. What depends on a GPU or on weights is
checked in `start`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import compress
from pathlib import Path

from protlm import files
from protlm.config import Config, ModelConfig
from protlm.config_files import check_keys
from protlm.data.storage.dataset import Dataset, open_dataset
from protlm.data.storage.mixture import Mixture
from protlm.errors import ConfigError, ModelError, ProtlmError, RunError
from protlm.pretrained.model_description import ModelDescription, dataset_hash_of
from protlm.pretrained.model_files import description_of
from protlm.runtime.devices import Devices, machine_memory_bytes
from protlm.runtime.launch import check_processes, process_rank
from protlm.workflows.train.gradual_swap import check_gradual_swap
from protlm.workflows.train.memory import check_can_be_built, estimate_memory
from protlm.workflows.train.run_description import RUN_NAME, TrainingSet
from protlm.workflows.train.run_folder import CONFIG_NAME, check_replaceable, resolve_settings
from protlm.workflows.train.stage import (
    check_not_itself,
    check_same_teacher,
    check_stage,
    check_teacher,
    missing_teacher,
    teacher_of_run,
)


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """The run that was asked for.

    Attributes:
        dataset_paths: Datasets of `protlm prep`, each with a train split.
        run_dir: The run directory; must not exist unless resume or force is given.
        config: Name of a shipped configuration or path of a TOML file.
        overrides: Settings `section.key=value` that override it.
        init: A model whose weights the run starts from.
        teacher: A model that the run learns from in its stage, `train.stage`; a resumed run knows its own.
        devices: The devices to train on.
        wandb_project: Project of Weights & Biases that gets the numbers too.
        resume: Continues the run in run_dir with its own settings; train.max_steps may be given anew, and lower rates.
        force: Replaces an existing run.
    """

    dataset_paths: Sequence[Path]
    run_dir: Path
    config: str | Path | None = None
    overrides: Sequence[str] = ()
    init: Path | None = None
    teacher: Path | None = None
    devices: Devices = field(default_factory=Devices)
    wandb_project: str | None = None
    resume: bool = False
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingSets:
    """The opened datasets of a run.

    Attributes:
        datasets: The datasets in the order given.
        train: Their train splits together.
        valid: Their valid splits together; None if all are empty.
        hash: Hash of all datasets.
    """

    datasets: tuple[Dataset, ...]
    train: Mixture
    valid: Mixture | None
    hash: str

    @classmethod
    def open(cls, paths: Sequence[Path]) -> "TrainingSets":
        """Opens datasets and all their shards, so that a missing one is noticed before hours of work.

        Raises:
            ShardError: A dataset or shard is missing or damaged, or a dataset has no train split.
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
        digest = dataset_hash_of([dataset.hash for dataset in datasets])
        return cls(datasets=datasets, train=train, valid=valid, hash=digest)

    def summaries(self) -> list[TrainingSet]:
        """Returns the entries of the datasets in run.json."""
        return [
            TrainingSet(
                name=files.as_text(dataset.path.resolve().name),
                hash=dataset.hash,
                num_records=split.num_records,
                num_residues=split.summary.num_residues,
            )
            for dataset, split in zip(self.datasets, self.train.splits, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class CheckedRequest:
    """A request in which nothing was found wrong so far.

    Attributes:
        request: The request.
        sets: Its datasets.
        settings: Its resolved settings; None if they follow from a model of another program, which is not read yet.
        teacher: The shape of its teacher; None without one, and for one of another program.
    """

    request: TrainRequest
    sets: TrainingSets
    settings: Config | None
    teacher: ModelConfig | None


def check_request(request: TrainRequest, *, runs_here: bool = True) -> CheckedRequest:
    """Checks all that needs no torch, and changes no file.

    Args:
        request: The request.
        runs_here: Whether the run would be on this machine; otherwise its memory is no limit.

    Raises:
        ProtlmError: The run cannot start.
    """
    if runs_here:
        check_processes(request.devices)
    run_dir = request.run_dir
    if not files.is_text(run_dir):
        raise RunError(
            f"{run_dir}: a name that is no UTF-8 text, in which TensorBoard cannot write; rename it, or choose another "
            "--out"
        )
    for path in request.dataset_paths:
        # Not Path.resolve, which fails on a link to itself.
        folder = Path(os.path.realpath(path))
        if run_dir.is_relative_to(folder) or folder.is_relative_to(run_dir):
            raise ProtlmError(f"{run_dir}: the run and the dataset {path} lie inside each other; choose another --out")
    if request.wandb_project is not None and find_spec("wandb") is None:
        raise ProtlmError("--wandb: the package wandb is not installed; pip install 'protlm[wandb]'")
    sets = TrainingSets.open(request.dataset_paths)
    settings = _settings(request)
    teacher = None
    if settings is not None:
        check_settings(settings, request, sets)
        teacher = _teacher(request, settings)
        memory = estimate_memory(settings, teacher=teacher)
        if runs_here:
            check_can_be_built(memory, machine_memory_bytes())
    if process_rank(request.devices) == 0:
        check_replaceable(run_dir, resume=request.resume, force=request.force)
    return CheckedRequest(request=request, sets=sets, settings=settings, teacher=teacher)


def check_settings(settings: Config, request: TrainRequest, sets: TrainingSets) -> None:
    """Raises ConfigError unless the settings fit the datasets, and the devices can share the rows of an update."""
    num_devices = request.devices.total
    if settings.train.accumulate % num_devices:
        wanted = -(-settings.train.accumulate // num_devices) * num_devices
        raise ConfigError(
            f"train.accumulate: expected a multiple of the {num_devices} devices, which share the rows of an update, "
            f"got {settings.train.accumulate}; for example --set train.accumulate={wanted}"
        )
    if settings.train.patience and sets.valid is None:
        raise ConfigError("train.patience: expected 0 without a valid split, which it would measure")
    goes_on = request.resume and (request.run_dir / CONFIG_NAME).exists()
    if settings.train.stage is not None and request.init is None and not goes_on:
        raise ConfigError(f"train.stage: {settings.train.stage} trains a converted model; give it with --init")
    check_stage(settings, teacher_name(request))
    check_gradual_swap(settings)


def teacher_name(request: TrainRequest) -> str | Path | None:
    """Returns MODEL of the teacher, as it is given or as a run that is resumed knows it; None without one.

    Raises:
        RunError: As `teacher_of_run`.
    """
    if request.teacher is None and request.resume:
        return teacher_of_run(request.run_dir)
    return request.teacher


def _teacher(request: TrainRequest, settings: Config) -> ModelConfig | None:
    """Returns the shape of the teacher; None without one, and for one of another program, which is read later.

    Raises:
        ProtlmError: It is not there, does not fit, or is not the one that a resumed run began with.
    """
    name = teacher_name(request)
    if name is None:
        return None
    try:
        description = description_of(name)
    except ModelError as error:
        raise error if request.teacher is not None else missing_teacher(request.run_dir, error) from None
    if description is None:
        return None
    check_teacher(settings.model, description.model, name)
    check_not_itself(None if request.init is None else description_of(request.init), description, name)
    if request.resume:
        check_same_teacher(request.run_dir / RUN_NAME, name, description)
    return description.model


def settings_with(request: TrainRequest, init: ModelDescription | None) -> Config:
    """Returns the settings of a run that begins with the weights of a model, or with drawn ones.

    Raises:
        ConfigError: Bad settings, or others than those of the run that is resumed.
    """
    return resolve_settings(request.run_dir, request.config, request.overrides, resume=request.resume, init=init)


def _settings(request: TrainRequest) -> Config | None:
    """Returns the settings, as far as they are known without weights; raises as `settings_with`."""
    init = None if request.init is None else description_of(request.init)
    if request.init is not None and init is None:
        check_keys(request.overrides)
        has_own = request.config is not None or (request.resume and (request.run_dir / CONFIG_NAME).exists())
        if not has_own:
            return None
    return settings_with(request, init)
