"""What lies at a MODEL, as users write it, and what is known of it without its weights: hides which files tell it.

Nothing here needs torch, so that a model that is not there is told before that is loaded, which takes seconds.
"""

import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from protlm import files
from protlm.errors import ModelError, validation_fault
from protlm.pretrained import hub
from protlm.pretrained.model_description import (
    MODEL_FORMAT,
    MODEL_FORMAT_VERSION,
    READABLE_VERSIONS,
    ModelDescription,
    upgrade,
)
from protlm.vocabulary import TOKENS

MODEL_FILES = ("config.json", "model.safetensors", "README.md")
"""The files of a model directory."""
_MOST_DESCRIPTION_BYTES = 1 << 20
EXPORTED_FILES = (
    "model.safetensors", "config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json", "README.md",
)  # fmt: skip
"""The files of a directory that `protlm convert --to hf` writes."""
FAMILIES = ("esm", "esmc", "bert", "roberta", "AMPLIFY")
"""The families of transformers that protlm runs, by `model_type`."""
SHIPPED = ("starter",)
"""The names of the models that are part of protlm."""
_SHIPPED_FOLDER = Path(__file__).resolve().parents[1] / "models"
_REFUSED = {
    "t5": "its encoder has relative positions (ProtT5, IgT5)",
    "gLM2": "it reads genomes, not only proteins",
    "ProSST": "it reads structures",
    "carp": "it is made of convolutions",
    "E1": "its attention crosses proteins",
}
"""Families that are met beside these, by `model_type`, and why protlm does not run them."""
_FAIRSEQ_SUFFIXES = (".pt", ".pth")
_MOST_JSON_BYTES = 64 << 20
_SHOWN_LETTERS = 200


def model_path(model: str | Path) -> Path:
    """Returns the path of a MODEL: for the name of one that is part of protlm its folder, unless a path has that name.

    A model of the hub has no path; see `hub_name_of`.
    """
    path = Path(model)
    if str(model) in SHIPPED and not os.path.lexists(path):
        return _SHIPPED_FOLDER / str(model)
    return path


def description_of(model: str | Path) -> ModelDescription | None:
    """Returns the description of a model of ours; None for one of another program, which only its weights describe.

    A model of the hub is fetched.

    Raises:
        ModelError: There is no such model, or none that protlm reads.
    """
    name = hub_name_of(model)
    if name is not None:
        hub.fetch(name)
        return None
    path = model_path(model)
    if path.is_file():
        check_checkpoint_file(path)
        return None
    if is_foreign(path):
        family_of(path)
        return None
    return read_description(find_model(path))


def hub_name_of(model: str | Path) -> hub.HubName | None:
    """Returns the name on the hub, unless there is such a path or the text is no such name."""
    text = str(model)
    return hub.hub_name(text) if text.startswith("hf:") or not Path(text).exists() else None


def is_checkpoint_file(path: Path) -> bool:
    """Returns whether the name of a file is that of a checkpoint of fairseq."""
    return path.suffix in _FAIRSEQ_SUFFIXES


def check_checkpoint_file(path: Path) -> None:
    """Raises ModelError if the name of a file is not that of a checkpoint of fairseq."""
    if not is_checkpoint_file(path):
        raise ModelError(f"{path}: expected a folder, or a checkpoint .pt of fairseq, got another file")


def is_foreign(folder: Path) -> bool:
    """Returns whether a folder has a config.json of transformers."""
    path = folder / "config.json"
    try:
        return path.is_file() and "model_type" in read_json(path)
    except ModelError:
        # The reader of our own models says what is wrong with it.
        return False


def family_of(folder: Path) -> tuple[str, dict[str, Any]]:
    """Returns the family of a directory of transformers, and the content of its config.json.

    Raises:
        ModelError: A family that protlm does not run.
    """
    content = read_json(folder / "config.json")
    family = content.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        why = f" ({_REFUSED[family]})" if isinstance(family, str) and family in _REFUSED else ""
        raise ModelError(f"{folder}: model_type: expected {', '.join(FAMILIES)}, got {str(family)[:40]!r}{why}")
    return family, content


def short_name(model: str | Path) -> str:
    """Returns a name for readers: the last part of the path or of the name on the hub, of a run the run's."""
    name = hub_name_of(model)
    if name is not None:
        return name.name.rpartition("/")[2]
    path = Path(os.path.realpath(model_path(model)))
    if path.is_file():
        return path.stem
    folder = path if is_foreign(path) else find_model(path)
    return folder.parent.name if folder.name == "model" else folder.name


def find_model(path: Path) -> Path:
    """Returns the model directory at a path: the path itself, or `model/` inside a run.

    Raises:
        ModelError: Neither is a model directory.
    """
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    if (path / "checkpoints").is_dir():
        raise ModelError(f"{path}: this run has no model yet; let protlm train reach its first measurement")
    reason = "no config.json in it or in its model/" if path.is_dir() else "no such directory"
    raise ModelError(f"{path}: expected a model directory or a run of protlm train, got {reason}")


def read_description(folder: Path) -> ModelDescription:
    """Returns the description in a model directory.

    Raises:
        ModelError: A file that cannot be read, is of another version, or does not describe a protlm model.
    """
    path = folder / "config.json"
    try:
        text = files.read_regular(path, max_bytes=_MOST_DESCRIPTION_BYTES).decode()
        content = json.loads(text)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict) or content.get("format") != MODEL_FORMAT:
        raise ModelError(f"{path}: expected a protlm model, got another JSON file")
    version = content.get("format_version")
    if version not in READABLE_VERSIONS:
        raise ModelError(
            f"{path}: expected format version {READABLE_VERSIONS[0]} to {READABLE_VERSIONS[-1]}, got {version!r:.40}; "
            "use the protlm that wrote it"
        )
    try:
        # Text, not the content: a strict model takes JSON's lists for tuples only where it reads JSON itself.
        description = ModelDescription.model_validate_json(
            text if version == MODEL_FORMAT_VERSION else json.dumps(upgrade(content))
        )
    except ValidationError as error:
        raise ModelError(f"{path}: {validation_fault(error)}") from None
    if description.vocabulary != list(TOKENS):
        raise ModelError(f"{path}: the model has another vocabulary than this protlm")
    return description


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ModelError: The file cannot be read or holds something else.
    """
    try:
        content = json.loads(files.read_regular(path, max_bytes=_MOST_JSON_BYTES))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not a JSON file: {' '.join(str(error).split())[:_SHOWN_LETTERS]}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def remove_left_overs_of_model(folder: Path) -> None:
    """Removes what a killed `save_model` left beside a model directory; other files in it return to the directory."""
    replaced = files.replaced_path(folder)
    for left_over in (*files.left_overs(folder), *([replaced] if folder.is_dir() and replaced.is_dir() else [])):
        if left_over.is_dir() and any(entry.name not in MODEL_FILES for entry in left_over.iterdir()):
            folder.mkdir(exist_ok=True)
            keep_others(left_over, folder)
        files.discard(left_over)
    files.restore(folder)


def keep_others(replaced: Path, folder: Path) -> None:
    """Moves what is no part of a model from the folder that was replaced to the one that took its place."""
    for entry in replaced.iterdir():
        if entry.name not in MODEL_FILES and not os.path.lexists(folder / entry.name):
            entry.rename(folder / entry.name)
