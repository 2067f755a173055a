"""run.json: hides how a run remembers what it was trained on, and by which programs and machines, start after start.

It is for people who must repeat a run or explain one. It holds no path, no host name and nothing of the environment.
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


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class TrainingSet(_Part):
    """One dataset that a run is trained on: its base name, its hash, and what its train split holds."""

    name: str
    hash: str
    num_records: Count
    num_residues: Count


class Session(_Part):
    """One start of a run.

    Attributes:
        started: UTC time, ISO 8601, to the second.
        versions: Of protlm and the libraries that compute.
        python: Version of Python.
        platform: Operating system and kind of processor.
        commit: Of the checkout that protlm runs from, with `+changes` where files differ from it; None for an installed
            protlm.
        command: Words of the command line; of an absolute path the last part alone.
        devices: Devices a node.
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


class RunDescription(_Part):
    """The content of run.json; `init_hash` is that of the weights of --init, if the run began with some."""

    format: Literal["protlm-run"] = RUN_FORMAT
    format_version: Literal[1] = RUN_FORMAT_VERSION
    datasets: list[TrainingSet]
    init_hash: str | None = None
    sessions: list[Session]


def describe_session(
    command: Sequence[str], *, devices: int, num_nodes: int, strategy: str, first_step: int
) -> Session:
    """Returns what is to be remembered of a start that happens now.

    Args:
        command: Words of the command line.
        devices: Devices a node.
        num_nodes: Nodes.
        strategy: How devices share the work.
        first_step: Updates before this start.
    """
    return Session(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={"protlm": protlm.__version__, **{name: metadata.version(name) for name in _LIBRARIES}},
        python=platform.python_version(),
        platform=platform.platform(),
        commit=checkout_commit(Path(__file__).parents[1]),
        command=[_without_folders(word) for word in command],
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        first_step=first_step,
    )


def write_run_description(
    path: Path, datasets: Sequence[TrainingSet], session: Session, init_hash: str | None = None
) -> None:
    """Writes run.json whole, with this session after those that are in it already.

    Raises:
        CheckpointError: A file that is there and is no run.json.
    """
    earlier = read_run_description(path).sessions if path.exists() else []
    description = RunDescription(datasets=list(datasets), init_hash=init_hash, sessions=[*earlier, session])
    with files.written_whole(path) as partial:
        partial.write_text(description.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_run_description(path: Path) -> RunDescription:
    """Returns the content of a run.json.

    Raises:
        CheckpointError: A file that cannot be read, or is of another kind or version.
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
    """Returns the commit of the git checkout whose code lies in a folder, or None if the folder is part of none."""
    # A virtual environment inside another project's checkout is not part of that checkout.
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--", ".")
    return commit if commit is None or changes == "" else f"{commit}+changes"


def _git(folder: Path, *words: str) -> str | None:
    """Returns what git answers, or None where there is no git or it refuses."""
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _without_folders(word: str) -> str:
    """Returns a word of a command line with the base name in place of an absolute path, `--option=PATH` included."""
    name, equals, value = word.partition("=")
    if equals and value.startswith(("/", "~")):
        return f"{name}={Path(value).name}"
    return Path(word).name if word.startswith(("/", "~")) else word
