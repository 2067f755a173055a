"""The checks before a run starts: anything wrong with the request or the data ends it before a file is touched.

`protlm train` and its dry run make the same checks. Every process of a run makes them, and so all come to the same end;
only the first one, which will write the run directory, checks that it may.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from protlm.config import Config
from protlm.errors import ConfigError, ModelError, RunError
from protlm.inference.precision import emulation
from protlm.model.performer import Performer
from protlm.pretrained.initial_weights import InitialModel, find_initial_model, load_initial_weights
from protlm.pretrained.model_names import read_named_model
from protlm.runtime.devices import (
    Devices,
    best_device,
    has_half_precision_units,
    machine_memory_bytes,
    memory_bytes,
)
from protlm.workflows.train.frozen import choose_parameters
from protlm.workflows.train.memory import MemoryEstimate, check_can_be_built, check_fits, estimate_memory
from protlm.workflows.train.request import (
    TrainingSets,
    TrainRequest,
    check_request,
    check_settings,
    settings_with,
    teacher_name,
)
from protlm.workflows.train.run_checkpoints import ResumePoint, find_resume_point
from protlm.workflows.train.run_description import RUN_NAME, Beginning, Recovery, read_run_description
from protlm.workflows.train.stage import (
    check_not_itself,
    check_same_teacher,
    check_teacher,
    missing_teacher,
    recovery_of,
)
from protlm.workflows.train.task import TrainingData


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
        beginning: The weights that it began with.
        teacher: The teacher of its stage; None without a stage.
        recovery: What run.json says of the stage; likewise.
        teacher_model: MODEL of the teacher; likewise.
    """

    sets: TrainingSets
    settings: Config
    data: TrainingData
    model: Performer
    memory: MemoryEstimate
    resume_point: ResumePoint | None
    first_step: int
    beginning: Beginning
    teacher: Performer | None
    recovery: Recovery | None
    teacher_model: str | Path | None


def prepare_start(request: TrainRequest) -> Start:
    """Checks everything that can keep a run from starting, and changes no file.

    Raises:
        ProtlmError: The run cannot start.
    """
    checked = check_request(request)
    run_dir, sets = request.run_dir, checked.sets
    init = None if request.init is None else find_initial_model(request.init)
    settings = checked.settings or settings_with(request, None if init is None else init.description)
    check_settings(settings, request, sets)
    _check_gpus(request.devices)
    teacher_model = teacher_name(request)
    teacher = None if teacher_model is None else _find_teacher(request, teacher_model, settings)
    if teacher is not None and init is not None:
        check_not_itself(init.description, teacher.description, teacher.name)
    memory = estimate_memory(
        settings, in_place=best_device().type == "cpu", teacher=None if teacher is None else teacher.description.model
    )
    check_can_be_built(memory, machine_memory_bytes())
    if request.devices.strategy != "fsdp":
        check_fits(memory, memory_bytes(best_device()))
    resume_point = find_resume_point(run_dir, sets.hash, settings) if request.resume else None
    first_step = 0 if resume_point is None else resume_point.step
    if first_step > settings.train.max_steps:
        raise ConfigError(
            f"{run_dir}: the run is at step {first_step} already, past max_steps = {settings.train.max_steps}; "
            "ask for more steps"
        )
    beginning = _beginning(request, init, has_checkpoint=first_step > 0)
    data = TrainingData(sets.train, settings)
    model = build_model(settings, None if first_step else init)
    recovery = None
    if teacher is not None:
        recovery = recovery_of(settings, teacher.name, teacher.description)
    return Start(
        sets=sets, settings=settings, data=data, model=model, memory=memory, resume_point=resume_point,
        first_step=first_step, beginning=beginning, teacher=None if teacher is None else _network_of(teacher),
        recovery=recovery, teacher_model=teacher_model,
    )  # fmt: skip


def _find_teacher(request: TrainRequest, name: str | Path, settings: Config) -> InitialModel:
    """Returns the teacher, which fits the model and is the one that a resumed run began with.

    Raises:
        ProtlmError: There is no such model, or it does not fit.
    """
    try:
        teacher = find_initial_model(name)
    except ModelError as error:
        raise error if request.teacher is not None else missing_teacher(request.run_dir, error) from None
    check_teacher(settings.model, teacher.description.model, name)
    if request.resume:
        check_same_teacher(request.run_dir / RUN_NAME, name, teacher.description)
    return teacher


def _network_of(model: InitialModel) -> Performer:
    return model.network if model.network is not None else read_named_model(model.name)[0]


def build_model(settings: Config, init: InitialModel | None) -> Performer:
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
    choose_parameters(model, settings)
    model.checkpoint_activations = settings.train.activation_checkpointing
    if settings.train.compile:
        model.compile_layers()
    return model


def check_precision(settings: Config) -> None:
    """Raises ConfigError for half precision that this device would only emulate; a dry run may be for another one."""
    if settings.train.precision == "bf16-mixed" and not has_half_precision_units("bf16"):
        raise ConfigError(f"precision bf16-mixed: {emulation('bf16')}")


def _check_gpus(devices: Devices) -> None:
    """Raises ConfigError unless this machine has as many GPUs as are asked for, or none."""
    if best_device().type == "cuda" and devices.per_node > torch.cuda.device_count():
        raise ConfigError(
            f"--devices {devices.per_node}: this machine has {torch.cuda.device_count()} GPUs; ask for at most as many"
        )


def _beginning(request: TrainRequest, init: InitialModel | None, *, has_checkpoint: bool) -> Beginning:
    """Returns the weights that the run begins with; a resumed run must keep those of its start.

    Args:
        request: The run that was asked for.
        init: The --init that was given.
        has_checkpoint: Whether the run has made updates.

    Raises:
        RunError: The run began with other weights.
    """
    given = Beginning.of(None if init is None else init.description)
    path = request.run_dir / RUN_NAME
    if not (request.resume and path.exists()):
        return given
    began_with = read_run_description(path).beginning
    if given.init_hash is None and (has_checkpoint or began_with.init_hash is None):
        return began_with
    if given.init_hash != began_with.init_hash:
        raise RunError(
            f"{request.run_dir}: the run began with {_name_of(began_with.init_hash)} and goes on with "
            f"{_name_of(given.init_hash)}; give the same --init as at its start"
        )
    return given


def _name_of(init_hash: str | None) -> str:
    return "drawn weights (no --init)" if init_hash is None else f"the weights {init_hash[:12]}… of an --init"
