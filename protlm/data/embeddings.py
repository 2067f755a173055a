"""How embeddings lie in one HDF5 file, layout `protlm`: written in any order through memory maps, read by record id."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import h5py
import numpy as np

from protlm.data import columns, files
from protlm.data.duplicates import DIGEST_BYTES
from protlm.errors import ProtlmError, ShardError

FORMAT = "protlm-embeddings"
FORMAT_VERSION = 1

Kind = Literal["per-residue", "mean", "cls"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What there can be in a file, the richest first."""

Dtype = Literal["float32", "float16"]
_LAYER_PREFIX = "layer_"


class EmbeddingsWriter:
    """Fills an embeddings file row by row, in any order; the file appears when it is complete.

    Use as a context: leaving it normally is `close()`, leaving it by an error removes what was written.
    """

    def __init__(
        self, path: Path, temporary: Path, offsets: np.ndarray, maps: dict[tuple[Kind, int], np.ndarray]
    ) -> None:
        """Takes over a prepared file; use `create`."""
        self._path = path
        self._temporary = temporary
        self._offsets = offsets
        self._maps = maps
        self._is_written = {key: np.zeros(len(offsets) - 1, dtype=bool) for key in maps}

    @classmethod
    def create(
        cls,
        path: str | Path,
        ids: Sequence[str],
        lengths: Sequence[int] | np.ndarray,
        sequence_hashes: Sequence[bytes],
        kinds: Sequence[Kind],
        layers: Sequence[int],
        dims: Sequence[int],
        dtype: Dtype,
        model_hash: str,
        *,
        force: bool = False,
    ) -> "EmbeddingsWriter":
        """Makes the file with room for everything, which needs the disk space at once rather than failing midway.

        Args:
            path: The file that `close` makes.
            ids: Record ids, all different.
            lengths: Residues of each record.
            sequence_hashes: `duplicates.sequence_digest` of each record.
            kinds: What to store.
            layers: The layers to store, by absolute number.
            dims: Size of an embedding, for each layer.
            dtype: Type of the numbers.
            model_hash: Names the model that made them.
            force: Replace an existing file.

        Raises:
            ProtlmError: The file exists already.
            ValueError: The arguments do not fit together.
        """
        path = Path(path)
        _check_arguments(ids, lengths, sequence_hashes, kinds, layers, dims, dtype)
        if path.is_dir() or (path.exists() and not force):
            raise ProtlmError(f"{path}: exists already; choose another --out, or replace a file with --force")
        path.parent.mkdir(parents=True, exist_ok=True)
        offsets = _bounds(lengths)
        temporary = files.partial_path(path)
        try:
            with columns.create_columns(temporary) as file:
                # The int64 columns come first; they are small, and the large ones after them are only allocated.
                columns.write_strings(file, "ids", "".join(ids).encode(), _bounds([len(one.encode()) for one in ids]))
                if "per-residue" in kinds:
                    columns.write_column(file, "per-residue/offsets", offsets)
                digests = np.frombuffer(b"".join(sequence_hashes), dtype=np.uint8).reshape(-1, DIGEST_BYTES)
                columns.write_column(file, "sequence_hash", digests)
                places: dict[tuple[Kind, int], tuple[int | None, tuple[int, int]]] = {}
                for kind in kinds:
                    num_rows = int(offsets[-1]) if kind == "per-residue" else len(ids)
                    for layer, dim in zip(layers, dims, strict=True):
                        name, shape = f"{kind}/{_LAYER_PREFIX}{layer}", (num_rows, dim)
                        places[kind, layer] = (columns.allocate_column(file, name, shape, dtype), shape)
                _write_header(file, dtype, model_hash)
            _reserve(temporary)
            maps = {key: _writable(temporary, offset, shape, dtype) for key, (offset, shape) in places.items()}
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return cls(path, temporary, offsets, maps)

    def write(self, kind: Kind, layer: int, index: int, embedding: np.ndarray) -> None:
        """Writes what one kind and layer has for a record.

        Args:
            kind: One of the kinds given to `create`.
            layer: One of the layers given to `create`.
            index: The record's place among `ids`.
            embedding: (num_residues, dim) for per-residue, else (dim,).

        Raises:
            ValueError: The embedding has another shape.
        """
        rows = self._maps[kind, layer]
        target = rows[self._offsets[index] : self._offsets[index + 1]] if kind == "per-residue" else rows[index]
        if embedding.shape != target.shape:
            raise ValueError(
                f"embedding: expected shape {target.shape} for {kind} of record {index}, got {embedding.shape}"
            )
        target[...] = embedding
        self._is_written[kind, layer][index] = True

    def close(self) -> None:
        """Gives the file its name.

        Raises:
            ValueError: A record was not written.
        """
        for (kind, layer), is_written in self._is_written.items():
            if not is_written.all():
                self.discard()
                raise ValueError(
                    f"{kind} of layer {layer}: expected every record, got none for {int(is_written.argmin())}"
                )
        for rows in self._maps.values():
            if isinstance(rows, np.memmap):
                rows.flush()
        self._maps = {}
        os.replace(self._temporary, self._path)

    def discard(self) -> None:
        """Removes what was written."""
        self._maps = {}
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> "EmbeddingsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


class EmbeddingsFile(Mapping[str, np.ndarray]):
    """The embeddings of one kind and layer by record id, in file order; read-only views of a memory map.

    Attributes:
        path: The file.
        kinds: The kinds in the file, the richest first.
        layers: The layers in the file of the chosen kind, ascending.
        kind: The chosen kind.
        layer: The chosen layer.
        model_hash: Names the model that made them.
        sequence_hashes: The digest of each record's sequence, uint8 of shape (records, 16).
    """

    def __init__(self, path: str | Path, kind: str | None = None, layer: int | None = None) -> None:
        """Opens a file; see `open_embeddings`."""
        self.path = Path(path)
        with columns.open_columns(self.path) as file:
            file.check_format(FORMAT, FORMAT_VERSION)
            self.model_hash = file.attribute("model_hash", str)
            dtype = file.attribute("dtype", str)
            if dtype not in get_args(Dtype):
                raise ShardError(f"{path}: dtype: expected one of {', '.join(get_args(Dtype))}, got {dtype!r}")
            layers = {found: _layers(file, found) for found in KINDS}
            self.kinds: tuple[Kind, ...] = tuple(found for found in KINDS if layers[found])
            self.kind = self._choose_kind(kind)
            self.layers = layers[self.kind]
            self.layer = self.layers[-1] if layer is None else layer
            if self.layer not in self.layers:
                there = ", ".join(map(str, self.layers))
                raise ShardError(f"{path}: no layer {layer} of kind {self.kind!r}; it has {there}")
            ids = file.strings("ids").to_list()
            self._numbers = {record_id: number for number, record_id in enumerate(ids)}
            if len(self._numbers) != len(ids):
                raise ShardError(f"{path}: ids: expected all different, got a repeated one")
            self.sequence_hashes = file.column("sequence_hash", np.uint8, ndim=2)
            file.check_size("sequence_hash", self.sequence_hashes, len(ids))
            name = f"{self.kind}/{_LAYER_PREFIX}{self.layer}"
            self._rows = file.column(name, dtype, ndim=2)
            self._offsets: np.ndarray | None = None
            if self.kind == "per-residue":
                self._offsets = file.column("per-residue/offsets", np.int64)
                file.check_size("per-residue/offsets", self._offsets, len(ids) + 1)
                file.check_offsets("per-residue/offsets", self._offsets, len(self._rows))
            else:
                file.check_size(name, self._rows, len(ids))

    def __getitem__(self, record_id: str) -> np.ndarray:
        number = self._numbers[record_id]
        if self._offsets is not None:
            return self._rows[self._offsets[number] : self._offsets[number + 1]]
        embedding: np.ndarray = self._rows[number]
        return embedding

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, record_id: object) -> bool:
        return record_id in self._numbers

    def __repr__(self) -> str:
        return f"<embeddings of {len(self)} records, {self.kind} of layer {self.layer}, in {self.path}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return EmbeddingsFile, (self.path, self.kind, self.layer)

    def _choose_kind(self, wanted: str | None) -> Kind:
        if not self.kinds:
            raise ShardError(f"{self.path}: no embeddings in it")
        for found in self.kinds:
            if wanted in (None, found):
                return found
        raise ShardError(f"{self.path}: no embeddings of kind {wanted!r}; it has {', '.join(self.kinds)}")


def open_embeddings(path: str | Path, kind: str | None = None, layer: int | None = None) -> EmbeddingsFile:
    """Opens an embeddings file: a mapping from record id to its embedding, (num_residues, dim) or (dim,).

    Args:
        path: A file of layout `protlm`.
        kind: `per-residue`, `mean` or `cls`; by default the richest in the file.
        layer: The layer, by absolute number; by default the last in the file.

    Raises:
        ShardError: The file is missing or damaged, or has no such kind or layer.
    """
    return EmbeddingsFile(path, kind, layer)


def _layers(file: columns.ColumnFile, kind: Kind) -> tuple[int, ...]:
    numbers = (name.removeprefix(_LAYER_PREFIX) for name in file.names(kind) if name.startswith(_LAYER_PREFIX))
    return tuple(sorted(int(number) for number in numbers if number.isdecimal() and number.isascii()))


def _write_header(file: h5py.File, dtype: Dtype, model_hash: str) -> None:
    file.attrs["format"] = FORMAT
    file.attrs["format_version"] = FORMAT_VERSION
    file.attrs["model_hash"] = model_hash
    file.attrs["dtype"] = dtype


def _reserve(path: Path) -> None:
    """Claims the disk space of a sparse file: a full disk is an error now, and not a bus error at some later write."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _writable(path: Path, offset: int | None, shape: tuple[int, int], dtype: Dtype) -> np.ndarray:
    if offset is None:
        return np.zeros(shape, dtype=dtype)
    rows: np.ndarray = np.memmap(path, dtype=dtype, mode="r+", offset=offset, shape=shape)
    return rows


def _bounds(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    bounds = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=bounds[1:])
    return bounds


def _check_arguments(
    ids: Sequence[str],
    lengths: Sequence[int] | np.ndarray,
    sequence_hashes: Sequence[bytes],
    kinds: Sequence[Kind],
    layers: Sequence[int],
    dims: Sequence[int],
    dtype: Dtype,
) -> None:
    if not len(ids) == len(lengths) == len(sequence_hashes):
        sizes = (len(ids), len(lengths), len(sequence_hashes))
        raise ValueError(f"ids, lengths, sequence_hashes: expected equal numbers, got {sizes}")
    if len(set(ids)) != len(ids):
        raise ValueError("ids: expected all different, got a repeated one")
    if not kinds or len(set(kinds)) != len(kinds) or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds: expected some of {KINDS}, each once, got {tuple(kinds)}")
    if not layers or len(set(layers)) != len(layers) or min(layers) < 0 or len(dims) != len(layers):
        raise ValueError(f"layers, dims: expected different layers and a size for each, got {layers} and {dims}")
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype: expected one of {get_args(Dtype)}, got {dtype!r}")
