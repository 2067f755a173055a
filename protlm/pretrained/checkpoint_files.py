"""The tensors of a foreign checkpoint, whatever its format: safetensors through memory maps, pickles without code.

A tensor is read when it is asked for, as float32, so that of a checkpoint of any size little more is in memory than
what was asked for.
"""

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from protlm.errors import ModelError
from protlm.files import open_regular
from protlm.pretrained.model_files import read_json
from protlm.runtime.devices import best_device, gigabytes, memory_bytes

_CHUNK_BYTES = 1 << 20
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHOWN_LETTERS = 200
_REFUSED = re.compile(r"(?:GLOBAL|class|type) (\w+\.[\w.]+)")


class Tensors(Protocol):
    """The tensors of a checkpoint by name."""

    @property
    def path(self) -> Path:
        """The file or folder, for messages."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold them."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each."""

    def read(self, name: str) -> Tensor:
        """Returns a tensor as float32; each can be read once."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: its file, its type as safetensors writes it, and its first byte."""

    file: Path
    dtype: str
    start: int


class SafetensorsFiles:
    """The tensors of one or several safetensors files; see `Tensors`.

    What is stored as float32 stays in the file and is mapped, as in transformers: it costs no memory of its own until
    it is changed, and the file must not be overwritten meanwhile.
    """

    def __init__(self, path: Path, files: tuple[Path, ...], index: Mapping[str, str] | None = None) -> None:
        """Reads the headers of all files.

        Args:
            path: The folder, for messages.
            files: The files.
            index: The name of each tensor's file, for a checkpoint in several; None for a single file.

        Raises:
            ModelError: A file that is missing or damaged, or an index that does not fit the files.
        """
        self.path, self.files = path, files
        self.shapes: Mapping[str, tuple[int, ...]]
        shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, _Place] = {}
        self._maps: dict[Path, Any] = {}
        for file in files:
            for name, shape, place in _headers(file):
                if index is not None and index.get(name) != file.name:
                    raise ModelError(f"{file}: tensor {name!r} is not where the index says")
                shapes[name], self._places[name] = shape, place
        for name, file_name in (index or {}).items():
            if name not in shapes:
                raise ModelError(f"{path / file_name}: tensor {name!r} is missing, although the index has it here")
        self.shapes = shapes

    def read(self, name: str) -> Tensor:
        """Returns a tensor as float32: a map of the file if it is stored so, and in memory of its own otherwise."""
        place = self._places[name]
        if place.dtype != "F32":
            return _own_float32(place.file, name, self.read_as_stored(name))
        try:
            if place.file not in self._maps:
                self._maps[place.file] = safe_open(place.file, framework="pt")
            mapped: Tensor = self._maps[place.file].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, ValueError, MemoryError) as error:
            raise _unreadable(place, name, error) from None
        return mapped

    def read_as_stored(self, name: str) -> Tensor:
        """Returns a tensor of whatever type it is stored in, in memory of its own."""
        place = self._places[name]
        try:
            if place.dtype in _DTYPES:
                tensor = torch.empty(self.shapes[name], dtype=_DTYPES[place.dtype])
                _fill(place, tensor)
                return tensor
            with safe_open(place.file, framework="pt") as handle:
                mapped: Tensor = handle.get_tensor(name)
                return mapped.clone()
        except (SafetensorError, OSError, RuntimeError, ValueError, MemoryError) as error:
            raise _unreadable(place, name, error) from None


def _unreadable(place: _Place, name: str, error: BaseException) -> ModelError:
    return ModelError(f"{place.file}: tensor {name!r} cannot be read: {_short(error)}")


def _headers(file: Path) -> Iterator[tuple[str, tuple[int, ...], _Place]]:
    """Yields name, shape and place of each tensor of a file whose header the library of safetensors has checked."""
    if not file.is_file():
        raise ModelError(f"{file}: no such file; fetch the checkpoint anew")
    try:
        with safe_open(file, framework="pt") as handle:
            names = list(handle.keys())
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{file}: does not hold this model: no whole safetensors file: {_short(error)}") from None
    for name in names:
        entry = header[name]
        yield name, tuple(entry["shape"]), _Place(file, entry["dtype"], 8 + size + entry["data_offsets"][0])


def _fill(place: _Place, tensor: Tensor) -> None:
    """Reads the numbers of a tensor into it."""
    rest = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    with place.file.open("rb", buffering=0) as file:
        file.seek(place.start)
        while rest:
            count = file.readinto(rest)
            if not count:
                raise ValueError("the file was cut short")
            rest = rest[count:]


class PickledTensors:
    """Tensors that were unpickled; see `Tensors`."""

    def __init__(self, path: Path, files: tuple[Path, ...], tensors: Mapping[str, Any]) -> None:
        """Checks that they are tensors.

        Raises:
            ModelError: One of the values is none.
        """
        self.path, self.files = path, files
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise ModelError(f"{path}: expected tensors by name, got {_short(type(tensor).__name__)} for {name!r}")
        self._tensors: dict[str, Tensor] = dict(tensors)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """Returns a tensor as float32, in memory of its own."""
        # A tensor may lie in a map of the file, or share its memory with a tied one.
        return _own_float32(self.path, name, self._tensors.pop(name).clone())


def open_tensors(folder: Path) -> Tensors:
    """Returns the tensors of a Hugging Face directory: of its safetensors, or where there are none of its pickles.

    Raises:
        ModelError: There are none, or a file is missing, damaged or more than tensors.
    """
    if (folder / "model.safetensors").is_file():
        return SafetensorsFiles(folder, (folder / "model.safetensors",))
    if (folder / "model.safetensors.index.json").is_file():
        index = _read_index(folder / "model.safetensors.index.json")
        return SafetensorsFiles(folder, _shards(folder, index), index)
    if (folder / "pytorch_model.bin").is_file():
        files: tuple[Path, ...] = (folder / "pytorch_model.bin",)
    elif (folder / "pytorch_model.bin.index.json").is_file():
        files = _shards(folder, _read_index(folder / "pytorch_model.bin.index.json"))
    else:
        raise ModelError(
            f"{folder}: expected model.safetensors, its index with the shards, or pytorch_model.bin, got none of them"
        )
    tensors: dict[str, Any] = {}
    for file in files:
        content = read_pickle(file)
        if not isinstance(content, dict):
            raise ModelError(f"{file}: expected tensors by name, got {_short(type(content).__name__)}")
        tensors |= content
    return PickledTensors(folder, files, tensors)


def read_pickle(path: Path, *, allows_namespace: bool = False) -> Any:
    """Returns the content of a file of `torch.save`: tensors and plain values; no code in it is run.

    Args:
        path: The file.
        allows_namespace: Whether it may hold `argparse.Namespace`, as checkpoints of fairseq do.

    Raises:
        ModelError: It is damaged, or holds anything else.
    """
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_archive(path)
    elif path.is_file():
        # The older format cannot be mapped: all of it comes into memory at once.
        check_fits(path, path.stat().st_size)
    allowed: list[Any] = [argparse.Namespace] if allows_namespace else []
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        found = _REFUSED.search(str(error))
        if found is None:
            raise ModelError(f"{path}: not a checkpoint of torch, or a damaged one; fetch it anew") from None
        raise ModelError(
            f"{path}: refused: its pickle asks for {found[1]}, and protlm reads only tensors and plain values "
            "from one; save the weights as safetensors"
        ) from None
    except Exception as error:  # foreign bytes make an unpickler raise errors of every kind
        raise ModelError(
            f"{path}: not a checkpoint of torch, or a damaged one ({type(error).__name__}); fetch it anew"
        ) from None


def check_fits(path: Path, num_bytes: int) -> None:
    """Refuses a model whose numbers do not fit into memory, the machine's and a GPU's.

    Raises:
        ModelError: They need more.
    """
    for device in (torch.device("cpu"), best_device()):
        if num_bytes > (available := memory_bytes(device)):
            where = "this machine" if device.type == "cpu" else "the GPU"
            raise ModelError(
                f"{path}: to read this model needs {gigabytes(num_bytes)} of memory, and {where} has "
                f"{gigabytes(available)}"
            )


def file_hash(path: Path) -> str:
    """Returns the xxh3-128 of a file."""
    digest, buffer = xxhash.xxh3_128(), bytearray(_CHUNK_BYTES)
    with open_regular(path) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _read_index(path: Path) -> dict[str, str]:
    """Returns the name of each tensor's file, each a plain name in the folder of the index."""
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{path}: expected weight_map with the file of each tensor")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{path}: expected names of files in the same folder, got {_short(repr(name))}")
    return names


def _shards(folder: Path, index: Mapping[str, str]) -> tuple[Path, ...]:
    files = tuple(folder / name for name in sorted(set(index.values())))
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file}: missing, although the index of {folder} has tensors in it; fetch it anew")
    return files


def _check_archive(path: Path) -> None:
    """Raises ModelError unless the members of an archive lie in it as they are; torch compresses none."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED or member.file_size > path.stat().st_size:
                    raise ModelError(f"{path}: expected an archive of torch, got one with compressed members")
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:  # a name no UTF-8; a later format
        raise ModelError(f"{path}: a damaged archive: {_short(error)}; fetch it anew") from None


def _own_float32(path: Path, name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or tensor.is_sparse:
        raise ModelError(f"{path}: tensor {name!r}: expected floating-point numbers, got {tensor.dtype}")
    return tensor.to(torch.float32, memory_format=torch.contiguous_format)


def _short(error: object) -> str:
    return " ".join(str(error).split())[:_SHOWN_LETTERS]
