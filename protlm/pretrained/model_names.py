"""MODEL, as users write it, becomes a network: an existing path, or the name of a model on the hub."""

import os
from pathlib import Path

from protlm.errors import ModelError
from protlm.model.performer import Performer
from protlm.pretrained import foreign, hub
from protlm.pretrained.checkpoint_files import read_json
from protlm.pretrained.model_description import ModelDescription
from protlm.pretrained.model_directory import find_model, read_description, read_model

_FAIRSEQ_SUFFIXES = (".pt", ".pth")


def read_named_model(
    model: str | Path, *, revision: str | None = None, token: str | None = None, local_files_only: bool = False
) -> tuple[Performer, ModelDescription]:
    """Returns a network, in evaluation mode on the CPU, and its description.

    Args:
        model: A model directory, a run, a Hugging Face directory or a checkpoint `.pt` of fairseq; or, where there is
            no such path, `OWNER/NAME[@REVISION]` on the hub. `hf:` before the name passes over paths.
        revision: Branch, tag or commit on the hub, in place of the one in the name.
        token: For the hub.
        local_files_only: Take a model of the hub from its cache only.

    Raises:
        ModelError: There is no such model, or it cannot be read or run.
    """
    name = _hub_name(model)
    if name is not None:
        asked = hub.HubName(name.name, revision or name.revision)
        snapshot = hub.fetch(asked, token=token, local_files_only=local_files_only)
        return foreign.read_folder(snapshot.folder, asked.name, snapshot.revision)
    path = Path(model)
    if path.is_file():
        if not is_checkpoint_file(path):
            raise ModelError(f"{path}: expected a folder, or a checkpoint .pt of fairseq, got another file")
        return foreign.read_file(path)
    if _is_foreign(path):
        return foreign.read_folder(path, Path(os.path.realpath(path)).name)
    return read_model(path)


def is_checkpoint_file(path: Path) -> bool:
    """Returns whether the name of a file is that of a checkpoint of fairseq."""
    return path.suffix in _FAIRSEQ_SUFFIXES


def describe_named_model(model: str | Path) -> ModelDescription:
    """Returns the description of a model.

    Raises:
        ModelError: As `read_named_model` raises.
    """
    path = Path(model)
    if _hub_name(model) is None and path.is_dir() and not _is_foreign(path):
        return read_description(find_model(path))
    # Of a foreign model only its whole map says that it is what its config.json says.
    return read_named_model(model)[1]


def short_name(model: str | Path) -> str:
    """Returns a name for readers: the last part of the path or of the name on the hub, of a run the run's."""
    name = _hub_name(model)
    if name is not None:
        return name.name.rpartition("/")[2]
    path = Path(os.path.realpath(model))
    if path.is_file():
        return path.stem
    folder = path if _is_foreign(path) else find_model(path)
    return folder.parent.name if folder.name == "model" else folder.name


def _hub_name(model: str | Path) -> hub.HubName | None:
    """Returns the name on the hub, unless there is such a path or the text is no such name."""
    text = str(model)
    return hub.hub_name(text) if text.startswith("hf:") or not Path(text).exists() else None


def _is_foreign(folder: Path) -> bool:
    """Returns whether a folder has a config.json of transformers."""
    path = folder / "config.json"
    return path.is_file() and "model_type" in _content(path)


def _content(path: Path) -> dict[str, object]:
    try:
        return read_json(path)
    except ModelError:
        # The reader of our own models says what is wrong with it.
        return {}
