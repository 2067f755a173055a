"""The stages in which a converted model recovers: their settings, the parameters that each trains, and their teachers.

The teacher is named in a file of its own: run.json, which people pass on, holds no path.
"""

from collections.abc import Collection
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from protlm import files
from protlm.choices import Stage
from protlm.config import Config, ModelConfig
from protlm.errors import ConfigError, ModelError, RunError, validation_fault
from protlm.pretrained.model_description import ModelDescription
from protlm.pretrained.model_files import hub_name_of, short_name
from protlm.workflows.train.run_description import Recovery, read_run_description

TEACHER_NAME = "teacher.json"
"""The file in a run that says where its teacher is."""

STAGE_DEFAULTS: dict[Stage, dict[str, Any]] = {
    "transfer": {
        "optimizer": "adamw", "lr": 2e-3, "schedule": "cosine", "warmup_steps": 10, "weight_decay": 0.0,
        "clip_norm": 1.0, "max_steps": 100, "valid_every_steps": 25, "checkpoint_every_steps": 25,
        "health_every_steps": 25,
    },
    "distill": {
        "optimizer": "adamw", "lr": 1e-4, "schedule": "cosine", "warmup_steps": 10, "weight_decay": 0.01,
        "clip_norm": 1.0, "max_steps": 200, "valid_every_steps": 50, "checkpoint_every_steps": 50,
        "health_every_steps": 50,
    },
}  # fmt: skip
"""Settings of training that take the place of the defaults in a stage: those with which models were seen to recover."""

_TRANSFERRED = (
    "query.weight", "query.bias", "key.weight", "key.bias", "temperature_logit", "log_temperature",
)  # fmt: skip
"""The parameters of an attention that decide on its weights, and so are trained in `transfer`."""
_FEATURES = ("projection", "feature_bias")
_MOST_FILE_BYTES = 1 << 16


class _TeacherFile(BaseModel):
    """The content of teacher.json."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    model: str


def check_stage(settings: Config, teacher: str | Path | None) -> None:
    """Checks that a stage has a teacher, something to transfer, and no setting that it cannot obey.

    Args:
        settings: Those of the run.
        teacher: MODEL of the teacher; None if none is given.

    Raises:
        ConfigError: One of them is amiss, or there is a teacher without a stage.
    """
    train = settings.train
    if (train.stage is None) != (teacher is None):
        lacks = "--teacher without --stage" if train.stage is None else f"--stage {train.stage} without --teacher"
        raise ConfigError(f"train.stage: expected a stage and a teacher, or none of them, got {lacks}")
    if train.stage is None:
        return
    if train.stage == "transfer" and not settings.model.feature_maps:
        raise ConfigError(
            f"train.stage: nothing to recover: the model has no layer with random features, but "
            f"{settings.model.attention_name}; convert it first, with protlm convert --attention"
        )
    if train.redraw_every_steps:
        raise ConfigError(
            f"train.redraw_every_steps: expected 0 in a stage, which fits a model to its random features, got "
            f"{train.redraw_every_steps}"
        )
    if train.stage == "transfer" and train.compile:
        raise ConfigError("train.compile: expected false in transfer, which runs no whole layers")


def check_teacher(student: ModelConfig, teacher: ModelConfig, name: str | Path) -> None:
    """Raises ConfigError unless the layers, tokens and positions of a teacher are those of the student."""
    facts: dict[str, tuple[object, object]] = {
        "model.num_layers": (student.num_layers, teacher.num_layers),
        "model.model_dim": (student.model_dim, teacher.model_dim),
        "model.num_heads": (student.num_heads, teacher.num_heads),
        "model.causal": (student.causal, teacher.causal),
        "model.positions": (student.positions, teacher.positions),
        "model.residues_as_x": (student.residues_as_x, teacher.residues_as_x),
    }
    if student.positions == teacher.positions == "learned":
        facts["model.max_positions"] = (student.max_positions, teacher.max_positions)
    own_tokens, other_tokens = student.tokens().tokens, teacher.tokens().tokens
    # The first token that differs says more than two lists.
    differs = next((pair for pair in zip_longest(own_tokens, other_tokens) if pair[0] != pair[1]), None)
    if differs is not None:
        facts["model.vocabulary"] = differs
    for key, (own, other) in facts.items():
        if own != other:
            raise ConfigError(
                f"--teacher {name}: {key}: expected {own!r} as in the model that is trained, got {other!r}"
            )


def check_not_itself(init: ModelDescription | None, teacher: ModelDescription, name: str | Path) -> None:
    """Raises ConfigError if the teacher has the weights with which a run begins: it would teach nothing."""
    if init is not None and init.weights_hash and init.weights_hash == teacher.weights_hash:
        raise ConfigError(
            f"--teacher {name}: the model that is trained itself, which teaches nothing; give the model with exact "
            "attention that it was made of"
        )


def recovery_of(settings: Config, name: str | Path, teacher: ModelDescription) -> Recovery:
    """Returns what run.json says of a stage and its teacher."""
    assert settings.train.stage is not None
    hub_name = hub_name_of(name)
    source = short_name(name) if hub_name is None else hub_name.name
    return Recovery(stage=settings.train.stage, teacher=source, teacher_hash=teacher.weights_hash)


def check_same_teacher(run_json: Path, name: str | Path, teacher: ModelDescription) -> None:
    """Raises RunError if a run that is resumed began with the weights of another teacher."""
    recovery = read_run_description(run_json).recovery if run_json.exists() else None
    if recovery is not None and recovery.teacher_hash != teacher.weights_hash:
        raise RunError(
            f"--teacher {name}: its weights are {teacher.weights_hash[:12]}…, expected those of {recovery.teacher} "
            f"with which the run began, {recovery.teacher_hash[:12]}…; give the same model with --teacher"
        )


def teacher_of_run(run_dir: Path) -> str | None:
    """Returns MODEL of the teacher of a run that is resumed; None if it has none.

    Raises:
        RunError: A file that does not say it.
    """
    path = run_dir / TEACHER_NAME
    try:
        return _TeacherFile.model_validate_json(files.read_regular(path, max_bytes=_MOST_FILE_BYTES)).model
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; give the teacher with --teacher") from None
    except ValidationError as error:
        raise RunError(
            f"{path}: does not name a teacher ({validation_fault(error)}); move the file away and give --teacher"
        ) from None


def write_teacher(run_dir: Path, name: str | Path) -> None:
    """Writes where the teacher of a run is, so that it can be resumed from any folder."""
    model = str(name) if hub_name_of(name) is not None else str(Path(name).absolute())
    with files.written_whole(run_dir / TEACHER_NAME) as partial:
        partial.write_text(_TeacherFile(model=files.as_text(model)).model_dump_json(indent=2) + "\n", encoding="utf-8")


def missing_teacher(run_dir: Path, error: ModelError) -> RunError:
    """Returns the error of a run that is resumed and whose teacher cannot be read where it was."""
    return RunError(f"{run_dir}: its teacher cannot be read: {error}; give the same model with --teacher")


def layers_with_features(model: ModelConfig) -> list[int]:
    """Returns the numbers, from 0, of the layers with random features."""
    return [number for number, kind in enumerate(model.kinds) if model.feature_map_of(kind) is not None]


def learned_features(settings: Config) -> list[str]:
    """Returns the names of the tensors that are parameters in this run alone: in `transfer` the random features."""
    if settings.train.stage != "transfer" or not settings.train.transfer_features:
        return []
    return _of_layers(settings.model, _FEATURES)


def untrained_in_stage(names: Collection[str], settings: Config) -> set[str]:
    """Returns the names of the parameters that the stage of a run leaves as they are; none without a stage."""
    if settings.train.stage != "transfer":
        return set()
    return set(names) - {*_of_layers(settings.model, _TRANSFERRED), *learned_features(settings)}


def _of_layers(model: ModelConfig, names: Collection[str]) -> list[str]:
    return [f"layers.{number}.attention.{name}" for number in layers_with_features(model) for name in names]
