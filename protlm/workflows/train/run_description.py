"""run.json: the datasets of a run, and the programs, machines and commands of each of its starts.

It is for people who must repeat or explain a run. It holds no path, no host name and no environment variable.
"""

import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import protlm
from protlm import files
from protlm.errors import CheckpointError, validation_fault

RUN_NAME = "run.json"
RUN_FORMAT: Literal["protlm-run"] = "protlm-run"
RUN_FORMAT_VERSION: Literal[1] = 1

_LIBRARIES = ("torch", "pytorch-lightning", "numpy")
_GIT_SECONDS = 10

Count = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class TrainingSet(_Strict):
    """One dataset of a run: its base name, its hash, and the size of its train split."""

    name: str
    hash: str
    num_records: Count
    num_residues: Count


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
        devices: Devices per node.
        num_nodes: Nodes.
        strategy: How devices share the work.
        first_step: Updates before this start.
    """

    started: str
    versions: dict[str, str]
    python: str
    platform: str
    commit: str | None
    command: list[str]
    devices: Count
    num_nodes: Count
    strategy: str
    first_step: Count


class RunDescription(_Strict):
    """The content of run.json; `init_hash` is the hash of the weights given with --init, None if they were drawn."""

    format: Literal["protlm-run"] = RUN_FORMAT
    format_version: Literal[1] = RUN_FORMAT_VERSION
    datasets: list[TrainingSet]
    init_hash: str | None = None
    sessions: list[Session]


def describe_session(
    command: Sequence[str], *, devices: int, num_nodes: int, strategy: str, first_step: int
) -> Session:
    """Returns the record of a start that happens now.

    Args:
        command: Words of the command line.
        devices: Devices per node.
        num_nodes: Nodes.
        strategy: How devices share the work.
        first_step: Updates before this start.
    """
    return Session(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={"protlm": protlm.__version__, **{name: metadata.version(name) for name in _LIBRARIES}},
        python=platform.python_version(),
        platform=platform.platform(),
        commit=checkout_commit(Path(protlm.__file__).parent),
        command=[_without_folders(word) for word in command],
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        first_step=first_step,
    )


def write_run_description(
    path: Path, datasets: Sequence[TrainingSet], session: Session, init_hash: str | None = None
) -> None:
    """Writes run.json, whole or not at all, with this session after the earlier ones.

    Raises:
        CheckpointError: The file exists and is not a run.json.
    """
    earlier = read_run_description(path).sessions if path.exists() else []
    description = RunDescription(datasets=list(datasets), init_hash=init_hash, sessions=[*earlier, session])
    with files.written_whole(path) as partial:
        partial.write_text(description.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_run_description(path: Path) -> RunDescription:
    """Returns the content of a run.json.

    Raises:
        CheckpointError: The file cannot be read, or is of another kind or version.
    """
    try:
        return RunDescription.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        raise CheckpointError(
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
