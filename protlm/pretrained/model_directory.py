"""The model directory: a saved model as config.json, model.safetensors and README.md, read without any pickle."""

import errno
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from pydantic import ValidationError
from safetensors.torch import save
from torch import Tensor

from protlm import files
from protlm.errors import ModelError, validation_fault
from protlm.model.performer import Performer
from protlm.model.skeleton import skeleton
from protlm.pretrained.checkpoint_files import SafetensorsFiles, file_hash
from protlm.pretrained.model_card import model_card
from protlm.pretrained.model_description import (
    MODEL_FORMAT,
    MODEL_FORMAT_VERSION,
    READABLE_VERSIONS,
    ModelDescription,
    upgrade,
)
from protlm.runtime.devices import best_device, gigabytes, memory_bytes
from protlm.vocabulary import TOKENS

MODEL_FILES = ("config.json", "model.safetensors", "README.md")
"""The files of a model directory."""
_MOST_DESCRIPTION_BYTES = 1 << 20
_HEADER_BYTES, _HEADER_BYTES_PER_TENSOR = 1 << 20, 1 << 10
"""Most bytes of the header of model.safetensors, besides which it holds the numbers alone."""


def dataset_hash_of(hashes: Sequence[str]) -> str:
    """Returns the hash of a dataset, or for several the xxh3-128 of their concatenated hashes."""
    return hashes[0] if len(hashes) == 1 else xxhash.xxh3_128_hexdigest("".join(hashes).encode())


def save_model(folder: Path, weights: Performer | Mapping[str, Tensor], description: ModelDescription) -> None:
    """Writes config.json, model.safetensors and README.md as one: a model that was there is replaced in one step.

    Other files in the folder stay in it.

    Args:
        folder: The model directory; made if it does not exist.
        weights: The network, or for a sharded network its gathered tensors by name.
        description: The description; the hash of the weights is filled in.
    """
    # Through a link the folder it leads to is replaced, not the link.
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_left_overs_of_model(folder)
    state = weights.state_dict() if isinstance(weights, Performer) else weights
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    content = save(tensors)
    description = description.model_copy(update={"weights_hash": xxhash.xxh3_128_hexdigest(content)})
    partial = files.partial_path(folder)
    partial.mkdir()
    try:
        for name, data in (
            ("model.safetensors", content),
            ("config.json", (description.model_dump_json(indent=2) + "\n").encode()),
            ("README.md", model_card(description).encode()),
        ):
            (partial / name).write_bytes(data)
        if not folder.is_dir():
            partial.rename(folder)
            return
        replaced = files.replace_folder(partial, folder)
    except BaseException:
        # It may be the replaced one already, with files of others.
        remove_left_overs_of_model(folder)
        raise
    _keep_others(replaced, folder)
    files.discard(replaced)


def remove_left_overs_of_model(folder: Path) -> None:
    """Removes what a killed `save_model` left beside a model directory; other files in it return to the directory."""
    replaced = files.replaced_path(folder)
    for left_over in (*files.left_overs(folder), *([replaced] if folder.is_dir() and replaced.is_dir() else [])):
        if left_over.is_dir() and any(entry.name not in MODEL_FILES for entry in left_over.iterdir()):
            folder.mkdir(exist_ok=True)
            _keep_others(left_over, folder)
        files.discard(left_over)
    files.restore(folder)


def _keep_others(replaced: Path, folder: Path) -> None:
    """Moves what is no part of a model from the folder that was replaced to the one that took its place."""
    for entry in replaced.iterdir():
        if entry.name not in MODEL_FILES and not os.path.lexists(folder / entry.name):
            entry.rename(folder / entry.name)


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


def read_model(path: Path) -> tuple[Performer, ModelDescription]:
    """Returns the network, in evaluation mode on the CPU, and its description.

    Raises:
        ModelError: Files that are missing, altered, of another version, or not of a protlm model.
    """
    folder = find_model(path)
    description = read_description(folder)
    model = skeleton(description.model)
    expected = model.state_dict()
    num_bytes = sum(tensor.numel() * tensor.itemsize for tensor in expected.values())
    _check_fits(folder, num_bytes)
    weights_path = folder / "model.safetensors"
    try:
        most_bytes = num_bytes + _HEADER_BYTES + _HEADER_BYTES_PER_TENSOR * len(expected)
        with files.open_regular(weights_path, max_bytes=most_bytes):
            digest = file_hash(weights_path)
    except OSError as error:
        reason = f"does not hold this model: {error.strerror}" if error.errno == errno.EFBIG else error.strerror
        raise ModelError(f"{weights_path}: {reason}") from None
    if digest != description.weights_hash:
        raise ModelError(
            f"{weights_path}: not the weights that config.json names (hash differs); copy the model directory anew"
        )
    try:
        stored = SafetensorsFiles(folder, (weights_path,))
        tensors = {name: stored.read_as_stored(name) for name in stored.shapes}
    except (RuntimeError, MemoryError) as error:
        raise ModelError(
            f"{weights_path}: does not hold this model: {str(error)[:200] or 'not enough memory'}"
        ) from None
    _check_tensors(weights_path, tensors, expected)
    model.load_state_dict(tensors, assign=True)
    return model.eval(), description


def _check_fits(folder: Path, num_bytes: int) -> None:
    """Raises ModelError if the numbers of a model do not fit into memory, the machine's and a GPU's."""
    for device in (torch.device("cpu"), best_device()):
        if num_bytes > (available := memory_bytes(device)):
            where = "this machine" if device.type == "cpu" else "the GPU"
            raise ModelError(
                f"{folder}: to read this model needs {gigabytes(num_bytes)} of memory, and {where} has "
                f"{gigabytes(available)}"
            )


def _check_tensors(path: Path, tensors: dict[str, Tensor], expected: dict[str, Any]) -> None:
    """Raises ModelError at the first tensor that is missing, unknown, of another shape or dtype, or not finite."""
    for name in sorted(tensors.keys() ^ expected.keys()):
        state = "is missing" if name in expected else "is not part of this model"
        raise ModelError(f"{path}: does not hold this model: tensor {name!r} {state}")
    for name, tensor in tensors.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise ModelError(
                f"{path}: does not hold this model: tensor {name!r}: expected {wanted.dtype} {tuple(wanted.shape)}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{path}: tensor {name!r} holds numbers that are not finite; the model is of no use")


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
