"""The model directory: a saved model as config.json, model.safetensors and README.md, read without any pickle."""

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import save
from torch import Tensor

from protlm import files
from protlm.errors import ModelError
from protlm.model.performer import Performer
from protlm.model.skeleton import skeleton
from protlm.pretrained.checkpoint_files import SafetensorsFiles, check_fits, file_hash
from protlm.pretrained.model_card import model_card
from protlm.pretrained.model_description import ModelDescription
from protlm.pretrained.model_files import find_model, keep_others, read_description, remove_left_overs_of_model

_HEADER_BYTES, _HEADER_BYTES_PER_TENSOR = 1 << 20, 1 << 10
"""Most bytes of the header of model.safetensors, besides which it holds the numbers alone."""


def save_model(folder: Path, weights: Performer | Mapping[str, Tensor], description: ModelDescription) -> None:
    """Writes config.json, model.safetensors and README.md as one: a model that was there is replaced in one step.

    Other files in the folder stay in it.

    Args:
        folder: The model directory; made if it does not exist.
        weights: The network, or for a sharded network its gathered tensors by name; they may be float16 or bfloat16,
            which is what is stored then.
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
    keep_others(replaced, folder)
    files.discard(replaced)


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
    check_fits(folder, num_bytes)
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
        tensors = {name: _widened(stored.read_as_stored(name)) for name in stored.shapes}
    except (RuntimeError, MemoryError) as error:
        raise ModelError(
            f"{weights_path}: does not hold this model: {str(error)[:200] or 'not enough memory'}"
        ) from None
    _check_tensors(weights_path, tensors, expected)
    model.load_state_dict(tensors, assign=True)
    return model.eval(), description


def _widened(tensor: Tensor) -> Tensor:
    """Returns a tensor in float32 if it was stored in half as many bytes, as those of the model in protlm are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


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
