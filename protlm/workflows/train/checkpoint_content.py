"""The content of a checkpoint, checked before anything of it is used: hides its sections and what each may hold.

A checkpoint may be damaged, or come from anywhere. It is read as a regular file of a bounded size, whose members are
stored as they are and match their checksums, without running any code; then every section is compared with what this
run itself would have written at that step. What Lightning keeps of its loops is not used, see `task.loops_at`.
"""

import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from pydantic import ValidationError
from torch import Tensor

from protlm.config import Config, TrainConfig
from protlm.errors import CheckpointError, first_fault
from protlm.files import open_regular
from protlm.model.performer import Performer
from protlm.model.skeleton import skeleton
from protlm.pretrained.model_description import ValidScore
from protlm.workflows.train.frozen import choose_parameters
from protlm.workflows.train.optimizer import STATE_OF_RULE, build_optimizer
from protlm.workflows.train.resumed_settings import first_difference, is_same

SECTIONS = (
    "epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "callbacks", "optimizer_states",
    "lr_schedulers", "TrainingData", "protlm",
)  # fmt: skip
"""The keys of a checkpoint; others are neither written nor read."""

_OLDEST_LIGHTNING = Version("2.0")
_LARGEST_COUNT = 2**53
_SHOWN_LETTERS = 60
_BYTES_PER_NUMBER = 4
_SPARE_BYTES = 2**26


class DamagedCheckpointError(CheckpointError):
    """A file that is not a whole checkpoint of this run's model; an earlier one may be."""


def read_step(path: Path, dataset_hash: str, settings: Config) -> int:
    """Returns the step of a checkpoint, all of which was found usable by a run.

    Raises:
        DamagedCheckpointError: The file is damaged, or not a checkpoint of this model.
        CheckpointError: It cannot be opened, or was made with other settings or another dataset.
    """
    model = skeleton(settings.model)
    choose_parameters(model, settings)
    try:
        content = _read(path, most_bytes(model))
        return _checked_step(content, dataset_hash, settings, model)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{path}: damaged, or not a checkpoint of protlm train ({error})") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def most_bytes(model: Performer) -> int:
    """Returns the most bytes that a checkpoint of a model may have: its numbers, two moments of each, and some room."""
    numbers: int = sum(tensor.numel() for tensor in model.state_dict().values())
    return 4 * _BYTES_PER_NUMBER * numbers + _SPARE_BYTES


def _read(path: Path, largest: int) -> Any:
    """Returns what a checkpoint holds; its tensors are mapped from the file."""
    try:
        file = open_regular(path, max_bytes=largest)
    except PermissionError as error:
        raise CheckpointError(
            f"{error.strerror}; make it readable, or move it away to go on from an earlier one"
        ) from None
    except OSError as error:
        raise DamagedCheckpointError(error.strerror) from None
    try:
        with file, zipfile.ZipFile(file) as archive:
            # torch stores its members as they are; a compressed one could be of any size.
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise DamagedCheckpointError("a compressed member")
            if sum(member.file_size for member in archive.infolist()) > largest:
                raise DamagedCheckpointError("members that lie over each other")
            if archive.testzip() is not None:
                raise DamagedCheckpointError("a checksum differs")
        with warnings.catch_warnings(action="ignore"):
            # weights_only: tensors and plain values, never code.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # bytes that nobody vouches for: a parser has no list of its errors
        raise DamagedCheckpointError(f"unreadable: {type(error).__name__}") from None


def _checked_step(content: Any, dataset_hash: str, settings: Config, model: Performer) -> int:
    try:
        _check_keys("its sections", content, SECTIONS)
        _check_settings(content["protlm"], dataset_hash, settings)
        step = _count("global_step", content["global_step"], least=1)
        _count("epoch", content["epoch"])
        _check_version(content["pytorch-lightning_version"])
        _check_keys("TrainingData", content["TrainingData"], ["next_row"])
        next_row = _count("TrainingData.next_row", content["TrainingData"]["next_row"])
        if next_row != step * settings.train.accumulate:
            raise _fault("TrainingData.next_row", f"{step * settings.train.accumulate} at step {step}", next_row)
        _check_watch(content["callbacks"])
        if content["lr_schedulers"] != []:
            raise _fault("lr_schedulers", "an empty list", content["lr_schedulers"])
        _check_weights(content["state_dict"], model)
        _check_optimizer(content["optimizer_states"], model, settings.train, step)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # a value that cannot even be compared or shown
        raise DamagedCheckpointError(f"strange values: {type(error).__name__}") from None
    return step


def _check_settings(section: Any, dataset_hash: str, settings: Config) -> None:
    required = ["dataset_hash", "config", "redraw_generator"]
    # Earlier versions did not count the tokens.
    has_tokens = type(section) is dict and "num_tokens" in section
    _check_keys("protlm", section, [*required, "num_tokens"] if has_tokens else required)
    saved, config = section["dataset_hash"], section["config"]
    if type(saved) is not str:
        raise _fault("protlm.dataset_hash", "a text", saved)
    _check_plain_sections(config)
    difference = first_difference(config, settings.model_dump(mode="json"))
    if difference is not None:
        key, ours, theirs = difference
        raise CheckpointError(
            f"made with {_shown(key)[1:-1]} = {_shown(ours)}, but the run's config.toml now says {_shown(theirs)}; "
            "put it back"
        )
    if saved != dataset_hash:
        raise CheckpointError(
            f"the run was trained on another dataset (hash {_shown(saved)[1:-1]}, now {dataset_hash}); "
            "resume with the dataset it began with"
        )
    if section.get("num_tokens") is not None:
        _count("protlm.num_tokens", section["num_tokens"])
    state = section["redraw_generator"]
    _check_tensor("protlm.redraw_generator", state, torch.Generator().get_state())
    try:
        torch.Generator().set_state(state)
    except RuntimeError:
        raise _fault("protlm.redraw_generator", "the state of a generator", state) from None


def _check_plain_sections(config: Any) -> None:
    """Raises unless these are sections of settings, whose values are what JSON knows."""
    _check_keys("protlm.config", config, Config.model_fields)
    for section in config.values():
        if type(section) is not dict:
            raise _fault("protlm.config", "sections", section)
        for key, value in section.items():
            values = value if type(value) is list else [value]
            if type(key) is not str or any(type(item) not in (str, int, float, bool, type(None)) for item in values):
                raise _fault("protlm.config", "plain values", value)


def _check_version(version: Any) -> None:
    try:
        is_known = type(version) is str and len(version) <= _SHOWN_LETTERS and Version(version) >= _OLDEST_LIGHTNING
    except InvalidVersion:
        is_known = False
    if not is_known:
        raise _fault("pytorch-lightning_version", f"a version from {_OLDEST_LIGHTNING} on", version)


def _check_watch(callbacks: Any) -> None:
    _check_keys("callbacks", callbacks, ["Watch"])
    watch = callbacks["Watch"]
    _check_keys("callbacks.Watch", watch, ["best", "num_without_improvement"])
    _count("callbacks.Watch.num_without_improvement", watch["num_without_improvement"])
    best = watch["best"]
    if best is None:
        return
    if type(best) is not dict:
        raise _fault("callbacks.Watch.best", "a measurement", best)
    try:
        # Earlier versions did not say what they had measured.
        ValidScore.model_validate({"targets": "hidden", **best})
    except ValidationError as error:
        fault = first_fault(error)
        raise _fault(f"callbacks.Watch.best.{_shown(fault.place)[1:-1]}", "a measurement", fault.value) from None


def _check_weights(state: Any, model: Performer) -> None:
    expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    _check_keys("state_dict", state, expected)
    for name, tensor in expected.items():
        _check_tensor(f"state_dict.{name}", state[name], tensor)
    for place, versions in getattr(state, "_metadata", {}).items():
        if type(place) is not str or type(versions) is not dict or list(versions) != ["version"]:
            raise _fault("state_dict", "the versions of modules", versions)


def _check_optimizer(states: Any, model: Performer, settings: TrainConfig, step: int) -> None:
    groups = build_optimizer(model, settings).param_groups
    if type(states) is not list or len(states) != 1:
        raise _fault("optimizer_states", "the state of one optimizer", states)
    _check_keys("optimizer_states", states[0], ["state", "param_groups"])
    state, saved_groups = states[0]["state"], states[0]["param_groups"]
    if type(saved_groups) is not list or len(saved_groups) != len(groups):
        raise _fault("param_groups", f"{len(groups)} groups", saved_groups)
    # A frozen parameter has no gradient, and so no state.
    trained = [number for number, group in enumerate(groups) if group["params"][0].requires_grad]
    _check_keys("optimizer_states.state", state, trained)
    for number, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        place = f"param_groups.{number}"
        _check_keys(place, saved, group)
        (parameter,) = group["params"]
        # The rates may have been higher; a run takes its own in any case.
        for name, value in {**group, "params": [number]}.items():
            is_rate = name in ("lr", "peak_lr")
            if not (type(saved[name]) is float if is_rate else is_same(saved[name], value)):
                raise _fault(f"{place}.{name}", _shown(value), saved[name])
        if number not in trained:
            continue
        _check_keys(f"state.{number}", state[number], STATE_OF_RULE[group["rule"]])
        for name, value in state[number].items():
            place = f"state.{number}.{name}"
            _check_tensor(place, value, torch.zeros((), device="meta") if name == "step" else parameter)
            if name == "step" and not (1 <= value <= step and value == value.round()):
                raise _fault(place, f"a number of updates up to {step}", value.item())
            if name == "exp_avg_sq" and bool((value < 0).any()):
                raise _fault(place, "squares", value)


def _check_keys(place: str, value: Any, keys: Collection[Any]) -> None:
    if type(value) not in (dict, OrderedDict):
        raise _fault(place, "a dictionary", value)
    missing = next((key for key in keys if key not in value), None)
    if missing is not None:
        raise DamagedCheckpointError(f"{place}: {_shown(missing)} is missing")
    if len(value) != len(keys):
        unknown = next(key for key in value if key not in keys)
        raise DamagedCheckpointError(f"{place}: {_shown(unknown)} is unknown")


def _check_tensor(place: str, value: Any, expected: Tensor) -> None:
    """Raises unless a value is a plain tensor of finite numbers with the shape and dtype of another."""
    if type(value) is not Tensor or value.layout != torch.strided or value.device.type != "cpu":
        raise _fault(place, "a tensor", value)
    if value.shape != expected.shape or value.dtype != expected.dtype or not value.is_contiguous():
        raise _fault(place, f"{expected.dtype} {tuple(expected.shape)}", value)
    if not bool(value.isfinite().all()):
        raise DamagedCheckpointError(f"{place}: numbers that are not finite")


def _count(place: str, value: Any, *, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= _LARGEST_COUNT:
        raise _fault(place, f"a number from {least} to {_LARGEST_COUNT}", value)
    return value


def _fault(place: str, expected: str, value: object) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"{place}: expected {expected}, got {_shown(value)}")


def _shown(value: object) -> str:
    """Returns a value of an untrusted file in a few letters."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"[:_SHOWN_LETTERS]
    if isinstance(value, str):
        return repr(value[:_SHOWN_LETTERS])
    if isinstance(value, int) and abs(value) > 2**64:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, int | float | None):
        return repr(value)
    return f"a {type(value).__name__}"
