"""The checks before a run starts: anything wrong with the request or the data ends it before a file is touched.

`protlm train` and its dry run make the same checks. Every process of a run makes them, and so all come to the same end;
only the first one, which will write the run directory, checks that it may.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import compress
from pathlib import Path

import torch

from protlm import files
from protlm.config import Config
from protlm.data.storage.dataset import Dataset, open_dataset
from protlm.data.storage.mixture import Mixture
from protlm.errors import ConfigError, ProtlmError, RunError
from protlm.model.performer import Performer
from protlm.pretrained.initial_weights import load_initial_weights
from protlm.pretrained.model_directory import dataset_hash_of
from protlm.pretrained.model_names import describe_named_model
from protlm.runtime.devices import Devices, best_device, memory_bytes, process_rank
from protlm.workflows.train.frozen import freeze
from protlm.workflows.train.memory import MemoryEstimate, check_can_be_built, check_fits, estimate_memory
from protlm.workflows.train.run_checkpoints import ResumePoint, find_resume_point
from protlm.workflows.train.run_description import RUN_NAME, TrainingSet, read_run_description
from protlm.workflows.train.run_folder import check_replaceable, resolve_settings
from protlm.workflows.train.task import TrainingData


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """The run that was asked for.

    Attributes:
        dataset_paths: Datasets of `protlm prep`, each with a train split.
        run_dir: The run directory; must not exist unless resume or force is given.
        config: Name of a shipped configuration or path of a TOML file.
        overrides: Settings `section.key=value` that override it.
        init: A model whose weights the run starts from.
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
class Start:
    """A checked run that is ready to start.

    Attributes:
        sets: Its datasets.
        settings: Its resolved settings.
        data: Its stream of rows.
        model: The network with its first weights.
        memory: Estimated memory of a step.
        resume_point: The checkpoint that it goes on from; None for a new run.
        first_step: Updates made before; 0 for a new run.
        init_hash: Hash of the weights of --init that it begins with; None if they are drawn.
    """

    sets: TrainingSets
    settings: Config
    data: TrainingData
    model: Performer
    memory: MemoryEstimate
    resume_point: ResumePoint | None
    first_step: int
    init_hash: str | None


def prepare_start(request: TrainRequest) -> Start:
    """Checks everything that can keep a run from starting, and changes no file.

    Raises:
        ProtlmError: The run cannot start.
    """
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
    init = None if request.init is None else describe_named_model(request.init)
    settings = resolve_settings(run_dir, request.config, request.overrides, resume=request.resume, init=init)
    _check_devices(settings, request.devices)
    if settings.train.patience and sets.valid is None:
        raise ConfigError("train.patience: expected 0 without a valid split, which it would measure")
    memory = estimate_memory(settings, in_place=best_device().type == "cpu")
    check_can_be_built(memory, memory_bytes(torch.device("cpu")))
    if request.devices.strategy != "fsdp":
        check_fits(memory, memory_bytes(best_device()))
    resume_point = find_resume_point(run_dir, sets.hash, settings) if request.resume else None
    first_step = 0 if resume_point is None else resume_point.step
    if first_step > settings.train.max_steps:
        raise ConfigError(
            f"{run_dir}: the run is at step {first_step} already, past max_steps = {settings.train.max_steps}; "
            "ask for more steps"
        )
    init_hash = _resolve_init(request, None if init is None else init.weights_hash, has_checkpoint=first_step > 0)
    if process_rank() == 0:
        check_replaceable(run_dir, resume=request.resume, force=request.force)
    data = TrainingData(sets.train, settings)
    model = build_model(settings, None if first_step else request.init)
    return Start(
        sets=sets, settings=settings, data=data, model=model, memory=memory, resume_point=resume_point,
        first_step=first_step, init_hash=init_hash,
    )  # fmt: skip


def build_model(settings: Config, init: Path | None) -> Performer:
    """Returns the network with its first weights, compiled and with activation checkpointing as set.

    Raises:
        ProtlmError: The model does not fit into memory, or `init` does not fit the settings.
    """
    try:
        model = Performer(settings.model)
        model.reset(settings.train.seed)
    except (RuntimeError, MemoryError):
        raise ConfigError("model: does not fit into the memory of this machine; make it smaller") from None
    if init is not None:
        load_initial_weights(model, init)
    freeze(model, settings.train.freeze)
    model.checkpoint_activations = settings.train.activation_checkpointing
    if settings.train.compile:
        model.compile_layers()
    return model


def _check_devices(settings: Config, devices: Devices) -> None:
    """Raises ConfigError unless the devices exist and can share the rows of an update evenly."""
    if settings.train.accumulate % devices.total:
        wanted = -(-settings.train.accumulate // devices.total) * devices.total
        raise ConfigError(
            f"train.accumulate: expected a multiple of the {devices.total} devices, which share the rows of an update, "
            f"got {settings.train.accumulate}; for example --set train.accumulate={wanted}"
        )
    if best_device().type == "cuda" and devices.per_node > torch.cuda.device_count():
        raise ConfigError(
            f"--devices {devices.per_node}: this machine has {torch.cuda.device_count()} GPUs; ask for at most as many"
        )


def _resolve_init(request: TrainRequest, given: str | None, *, has_checkpoint: bool) -> str | None:
    """Returns the hash of the weights of --init that the run begins with; a resumed run must keep those of its start.

    Args:
        request: The run that was asked for.
        given: The hash of the weights of the --init that was given.
        has_checkpoint: Whether the run has made updates.

    Raises:
        RunError: The run began with other weights.
    """
    path = request.run_dir / RUN_NAME
    if not (request.resume and path.exists()):
        return given
    began_with = read_run_description(path).init_hash
    if given is None and (has_checkpoint or began_with is None):
        return began_with
    if given != began_with:
        raise RunError(
            f"{request.run_dir}: the run began with {_name_of(began_with)} and goes on with {_name_of(given)}; "
            "give the same --init as at its start"
        )
    return given


def _name_of(init_hash: str | None) -> str:
    return "drawn weights (no --init)" if init_hash is None else f"the weights {init_hash[:12]}… of an --init"
