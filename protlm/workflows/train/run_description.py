"""run.json: the datasets of a run; the programs, devices, command and outcome of each of its starts.

It is for people who must repeat or explain a run. It holds no path, no host name and no environment variable.
"""

import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import protlm
from protlm import files
from protlm.choices import Stage
from protlm.config import TrainConfig
from protlm.errors import RunError, validation_fault
from protlm.pretrained.model_description import ModelDescription, Origin, Swap, ValidScore
from protlm.runtime.devices import device_name

RUN_NAME = "run.json"
RUN_FORMAT: Literal["protlm-run"] = "protlm-run"
RUN_FORMAT_VERSION: Literal[5] = 5

_LIBRARIES = ("torch", "pytorch-lightning", "numpy")
_GIT_SECONDS = 10

Count = Annotated[int, Field(ge=0, lt=2**63)]
_MOST_FILE_BYTES = 64 << 20
"""A session takes about a kilobyte."""

Outcome = Literal["finished", "interrupted", "out of time", "out of patience", "failed"]
"""How a session ended: `finished` at train.max_steps, or before it for one of the other reasons."""


ModelState = Literal["measured", "unmeasured", "without valid split"]
"""How far the exported model is measured."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", ser_json_inf_nan="constants")


class TrainingSet(_Strict):
    """One dataset of a run: its base name, its hash, and the size of its train split."""

    name: str
    hash: str
    num_records: Count
    num_residues: Count


class Beginning(NamedTuple):
    """The weights that a run began with.

    Attributes:
        init_hash: Hash of the weights of --init; None if they were drawn.
        origin: Their origin, or that of those which they were made of; None if no other program had trained them.
        swap: The attention that took the place of their exact one, by `protlm convert`; None if none did.
    """

    init_hash: str | None = None
    origin: Origin | None = None
    swap: Swap | None = None

    @classmethod
    def of(cls, init: ModelDescription | None) -> Self:
        """Returns the beginning with the weights of a model, or with drawn ones."""
        return cls() if init is None else cls(init.weights_hash, init.origin or init.fine_tuned_from, init.swap)


class Recovery(_Strict):
    """The stage in which a converted model learns from a teacher.

    Attributes:
        stage: The stage.
        teacher: Base name of the teacher, or its name on the hub.
        teacher_hash: Hash of its weights.
    """

    stage: Stage
    teacher: str
    teacher_hash: str


class SessionEnd(_Strict):
    """The end of a session.

    Attributes:
        time: UTC time, ISO 8601, to the second.
        seconds: Duration of the session.
        outcome: How it ended.
        last_step: Updates of the run by then.
        valid: Scores of the exported model on the valid split; None if there is no model or no valid split, and if the
            model is unmeasured.
        model: Whether the exported model is `measured` on the valid split; `unmeasured` if the run was stopped before
            that, `without valid split` if there is none; None if there is no model, or an earlier protlm wrote it.
    """

    time: str
    seconds: float
    outcome: Outcome
    last_step: Count
    valid: ValidScore | None
    model: ModelState | None = None


class Session(_Strict):
    """One start of a run.

    Attributes:
        started: UTC time, ISO 8601, to the second.
        versions: Of protlm and the numerical libraries.
        python: Version of Python.
        platform: Operating system and kind of processor.
        commit: Of the checkout that protlm runs from, with `+changes` if its files differ; None for an installed
            protlm.
        command: Words of the command line; absolute paths by their base name.
        device: Model of the first process's GPU, or of its processor; None if an earlier protlm wrote it.
        threads: Threads of each process for the work on a CPU; None if an earlier protlm wrote it.
        devices: Devices per node.
        num_nodes: Nodes.
        strategy: How devices share the work.
        first_step: Updates before this start.
        lr: Peak learning rate of AdamW, which a resumed run may lower; None if an earlier protlm wrote it.
        muon_lr: That of Muon; None without it too.
        end: Its end; None while it goes on, and for good if it was killed.
    """

    started: str
    versions: dict[str, str]
    python: str
    platform: str
    commit: str | None
    command: list[str]
    device: str | None = None
    threads: Count | None = None
    devices: Count
    num_nodes: Count
    strategy: str
    first_step: Count
    lr: float | None = None
    muon_lr: float | None = None
    end: SessionEnd | None = None


class RunDescription(_Strict):
    """The content of run.json.

    In version 1 a session had no `device`, `threads` and `end`, in version 2 no `lr` and `muon_lr`; before version 4
    there was no `init_origin`, and an end had no `model`, and before version 5 no run had `init_swap` or `recovery`.

    Attributes:
        format: Marks the file as the description of a run.
        format_version: Version of this file.
        datasets: The datasets.
        init_hash: Hash of the weights given with --init; None if they were drawn.
        init_origin: Their origin, if another program trained them.
        init_swap: The attention that took the place of their exact one, if one did.
        recovery: The stage of a converted model; None for other runs.
        sessions: All starts of the run.
    """

    format: Literal["protlm-run"] = RUN_FORMAT
    format_version: Literal[1, 2, 3, 4, 5] = RUN_FORMAT_VERSION
    datasets: list[TrainingSet]
    init_hash: str | None = None
    init_origin: Origin | None = None
    init_swap: Swap | None = None
    recovery: Recovery | None = None
    sessions: Annotated[list[Session], Field(min_length=1)]

    @property
    def beginning(self) -> Beginning:
        """The weights that the run began with."""
        return Beginning(self.init_hash, self.init_origin, self.init_swap)


_DRAWN = Beginning()


def describe_session(
    command: Sequence[str], *, devices: int, num_nodes: int, strategy: str, first_step: int, settings: TrainConfig
) -> Session:
    """Returns the record of a start that happens now.

    Args:
        command: Words of the command line.
        devices: Devices per node.
        num_nodes: Nodes.
        strategy: How devices share the work.
        first_step: Updates before this start.
        settings: Those of the training.
    """
    import torch

    return Session(
        started=_now(),
        versions={"protlm": protlm.__version__, **{name: metadata.version(name) for name in _LIBRARIES}},
        python=platform.python_version(),
        platform=platform.platform(),
        commit=checkout_commit(Path(protlm.__file__).parent),
        command=[files.as_text(_without_folders(word)) for word in command],
        device=device_name(),
        threads=torch.get_num_threads(),
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        first_step=first_step,
        lr=settings.lr,
        muon_lr=settings.muon_lr if settings.optimizer == "muon" else None,
    )


def write_run_description(
    path: Path,
    datasets: Sequence[TrainingSet],
    session: Session,
    beginning: Beginning = _DRAWN,
    recovery: Recovery | None = None,
) -> None:
    """Writes run.json, whole or not at all, with this session after the earlier ones.

    Raises:
        RunError: The file exists and is not a run.json.
    """
    earlier = read_run_description(path).sessions if path.exists() else []
    init_hash, origin, swap = beginning
    description = RunDescription(
        datasets=list(datasets), init_hash=init_hash, init_origin=origin, init_swap=swap, recovery=recovery,
        sessions=[*earlier, session],
    )  # fmt: skip
    _write(path, description)


def write_session_end(
    path: Path, *, seconds: float, outcome: Outcome, last_step: int, model: ModelDescription | None
) -> None:
    """Writes run.json, whole or not at all, with the end, which is now, of its last session.

    Args:
        path: The file, with the session.
        seconds: Duration of the session.
        outcome: How it ended.
        last_step: Updates of the run by now.
        model: Description of the exported model; None if there is none.

    Raises:
        RunError: The file is gone or is not a run.json.
    """
    description = read_run_description(path)
    end = SessionEnd(
        time=_now(),
        seconds=round(seconds, 3),
        outcome=outcome,
        last_step=last_step,
        valid=None if model is None else model.valid,
        model=None if model is None else _state_of(model),
    )
    ended = description.sessions[-1].model_copy(update={"end": end})
    _write(path, description.model_copy(update={"sessions": [*description.sessions[:-1], ended]}))


def _state_of(model: ModelDescription) -> ModelState:
    if model.valid is not None:
        return "measured"
    return "unmeasured" if model.unmeasured else "without valid split"


def _write(path: Path, description: RunDescription) -> None:
    with files.written_whole(path) as partial:
        partial.write_text(description.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_run_description(path: Path) -> RunDescription:
    """Returns the content of a run.json.

    Raises:
        RunError: The file cannot be read, or is of another kind or version.
    """
    try:
        return RunDescription.model_validate_json(files.read_regular(path, max_bytes=_MOST_FILE_BYTES))
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        raise RunError(
            f"{path}: not the description of a run by this protlm ({validation_fault(error)}); move the file away"
        ) from None


def checkout_commit(folder: Path) -> str | None:
    """Returns the commit of the git checkout whose code lies in a folder, or None if the folder is in no checkout."""
    # A virtual environment may lie inside the checkout of another project.
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--", ".")
    return commit if commit is None or changes == "" else f"{commit}+changes"


def _git(folder: Path, *words: str) -> str | None:
    """Returns the output of a git command, or None if it fails or there is no git."""
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _without_folders(word: str) -> str:
    """Returns a word of a command line with absolute paths, also in `--option=PATH`, cut to their base names."""
    name, equals, value = word.partition("=")
    if equals and value.startswith(("/", "~")):
        return f"{name}={Path(value).name}"
    return Path(word).name if word.startswith(("/", "~")) else word
