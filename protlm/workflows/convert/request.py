"""The request of `protlm convert`, and what can be checked of it before torch is loaded, which takes seconds."""

import os
from dataclasses import dataclass
from pathlib import Path

from protlm.choices import ModelFormat
from protlm.errors import ProtlmError
from protlm.pretrained.model_files import EXPORTED_FILES, MODEL_FILES, description_of


@dataclass(frozen=True, kw_only=True)
class ConvertRequest:
    """What is asked for.

    Attributes:
        model: MODEL as users write it.
        out: The directory to make.
        to: Its format.
        force: Replace a model that is there.
    """

    model: str | Path
    out: Path
    to: ModelFormat = "protlm"
    force: bool = False


def check_request(request: ConvertRequest) -> None:
    """Raises ProtlmError if the output is in the way, or there is no such model."""
    _check_replaceable(request, Path(os.path.realpath(request.out)))
    description_of(request.model)


def _check_replaceable(request: ConvertRequest, out: Path) -> None:
    """Refuses to write over anything but a model, and over the model itself that is read."""
    if not os.path.lexists(out):
        return
    if out == Path(os.path.realpath(request.model)) or out in Path(os.path.realpath(request.model)).parents:
        raise ProtlmError(f"{request.out}: the model itself, or a folder around it; choose another --out")
    if not request.force:
        raise ProtlmError(f"{request.out}: exists already; replace it with --force")
    foreign = sorted({entry.name for entry in out.iterdir()} - {*MODEL_FILES, *EXPORTED_FILES}) if out.is_dir() else []
    if not out.is_dir() or foreign or not (out / "config.json").is_file():
        holds = f"holds {foreign[0]!r}" if foreign else "is no folder with a config.json"
        raise ProtlmError(f"{request.out}: not a converted model ({holds}), and not replaced; choose another --out")
