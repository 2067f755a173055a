"""What lies at a path, whichever command made it: a dataset, an output of embed, a model or a run."""

import math
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from protlm.data.embeddings.layouts import LAYOUTS, OutputSummary
from protlm.data.storage.manifest import is_dataset
from protlm.errors import ModelError, ShardError, UsageError
from protlm.model.shapes import tensor_shapes
from protlm.pretrained.model_files import is_checkpoint_file, is_foreign, model_path, read_description
from protlm.runtime import locks
from protlm.runtime.progress import StartProgress, no_progress
from protlm.workflows.inspect import InspectReport, inspect_dataset

if TYPE_CHECKING:
    from protlm.pretrained.model_description import ModelDescription
    from protlm.workflows.train.run_description import RunDescription


_DAMAGED = (
    *(OSError, EOFError, RuntimeError, KeyError, IndexError, TypeError, ValueError),
    *(zipfile.BadZipFile, pickle.UnpicklingError),
)
"""What the libraries that read embeddings raise for a damaged file."""


@dataclass(frozen=True, kw_only=True)
class EmbeddingsReport:
    """An output of embed."""

    what: Literal["embeddings"] = field(default="embeddings", init=False)
    path: str
    layout: str
    files: tuple[str, ...]
    summary: OutputSummary


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """A model directory, or a model of another program.

    Attributes:
        what: The kind of report.
        path: The directory or file.
        num_parameters: Numbers that training changes.
        description: The content of its config.json; of a model of another program what follows from its files, with
            their hashes only if they were read.
        verified: Whether its weights were read, and are those that config.json names; of a model of another program:
            are complete and finite.
    """

    what: Literal["model"] = field(default="model", init=False)
    path: str
    num_parameters: int
    description: "ModelDescription"
    verified: bool


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A run of train.

    Attributes:
        what: The kind of report.
        path: Its folder.
        is_at_work: Whether a process works in it now.
        max_steps: The last step of its settings.
        description: The content of its run.json; None if it has none yet.
        model: Its model; None if it has none yet.
    """

    what: Literal["run"] = field(default="run", init=False)
    path: str
    is_at_work: bool
    max_steps: int
    description: "RunDescription | None"
    model: ModelReport | None


Report = InspectReport | EmbeddingsReport | ModelReport | RunReport


def identify(path: Path, *, verify: bool, start_progress: StartProgress = no_progress) -> Report:
    """Returns what lies at a path.

    Args:
        path: A dataset, an output of embed, a model directory, a run, a model of another program, or the name of the
            model that is part of protlm.
        verify: Also compare the bytes of a dataset or a model with their checksums.
        start_progress: Starts the stage `verify` (residues) of a dataset.

    Raises:
        UsageError: There is nothing to verify in embeddings.
        ProtlmError: There is none of these, or it is damaged.
    """
    path = model_path(path)
    if is_dataset(path) or not path.exists() or (path / "manifest.json").exists():
        return inspect_dataset(path, verify=verify, start_progress=start_progress)
    for name, layout in LAYOUTS.items():
        if layout.is_own(path):
            if verify:
                raise UsageError(f"{path}: --verify: embeddings have no checksums; leave it out")
            files = tuple(str(companion) for companion in layout.paths(path)[1:] if companion.exists())
            return EmbeddingsReport(path=str(path), layout=name, files=files, summary=_summary(name, path))
    if (path / "config.toml").is_file():
        return _run(path, verify=verify)
    if is_foreign(path) or (path.is_file() and is_checkpoint_file(path)):
        return _foreign_model(path, verify=verify)
    if (path / "config.json").is_file():
        return _model(path, verify=verify)
    if (path / "work.json").is_file():
        raise ShardError(f"{path}: the work of an unfinished command; go on with the same command and --resume")
    raise ShardError(f"{path}: not a protlm dataset, nor an output of protlm embed, a model or a run")


def _summary(layout: str, path: Path) -> OutputSummary:
    try:
        return LAYOUTS[layout].summary(path)
    except _DAMAGED as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ShardError(f"{path}: damaged, of layout {layout}: {reason}") from error


def _model(path: Path, *, verify: bool) -> ModelReport:
    # Imported here because these load torch, and a dataset or an output does not need it.
    from safetensors import SafetensorError, safe_open

    from protlm.pretrained.model_directory import read_model

    description = read_model(path)[1] if verify else read_description(path)
    weights = path / "model.safetensors"
    try:
        with safe_open(weights, "pt") as tensors:
            fixed = {name for name, tensor in tensor_shapes(description.model).items() if tensor.role == "fixed"}
            names = [name for name in tensors.keys() if name not in fixed]  # noqa: SIM118
            num_parameters = sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{weights}: cannot be read: {error}") from None
    return ModelReport(path=str(path), num_parameters=num_parameters, description=description, verified=verify)


def _foreign_model(path: Path, *, verify: bool) -> ModelReport:
    from protlm.pretrained import foreign
    from protlm.pretrained.model_names import read_named_model

    description = read_named_model(path)[1] if verify else foreign.describe(path)
    num_parameters = sum(tensor.size for tensor in tensor_shapes(description.model).values() if tensor.role != "fixed")
    return ModelReport(path=str(path), num_parameters=num_parameters, description=description, verified=verify)


def _run(path: Path, *, verify: bool) -> RunReport:
    from protlm.workflows.train.run_description import read_run_description
    from protlm.workflows.train.run_folder import MODEL_NAME, load_saved_settings

    about, model = path / "run.json", path / MODEL_NAME
    has_model = (model / "config.json").is_file()
    if verify and not has_model:
        raise UsageError(f"{path}: --verify: this run has no model yet; leave it out")
    return RunReport(
        path=str(path),
        is_at_work=locks.is_locked(path),
        max_steps=load_saved_settings(path / "config.toml").train.max_steps,
        description=read_run_description(about) if about.exists() else None,
        model=_model(model, verify=verify) if has_model else None,
    )


def content_of(report: Report) -> Any:
    """Returns what `--json` prints of a report."""
    return report.summary if isinstance(report, InspectReport) else report
