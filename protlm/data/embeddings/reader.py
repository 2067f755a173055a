"""The reader of layout `protlm`: hides how an embedding is found by record id in a memory map."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import xxhash

from protlm.data.embeddings.kinds import KINDS, LAYER_PREFIX, RESIDUE_KINDS, Dtype, Kind
from protlm.data.storage import columns
from protlm.data.strings import Strings
from protlm.errors import ShardError

FORMAT = "protlm-embeddings"
FORMAT_VERSION = 1


class EmbeddingsFile(Mapping[str, np.ndarray]):
    """The embeddings of one kind and layer by record id, in file order; read-only views of a memory map.

    Opening does not read the ids; the first look-up does.

    Attributes:
        path: The file.
        kinds: The kinds in the file, in the order of `KINDS`.
        layers: The layers of the chosen kind in the file, ascending.
        kind: The chosen kind.
        layer: The chosen layer.
        dim: Numbers in a row of this kind.
        dtype: Type of the stored numbers.
        num_rows: Rows of this kind: residues or records.
        model_hash: Hash of the model that made them.
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
            layers = {stored: _layers(file, stored) for stored in KINDS}
            self.kinds: tuple[Kind, ...] = tuple(stored for stored in KINDS if layers[stored])
            self.kind = self._choose_kind(kind)
            self.layers = layers[self.kind]
            self.layer = self.layers[-1] if layer is None else layer
            if self.layer not in self.layers:
                stored_layers = ", ".join(map(str, self.layers))
                raise ShardError(f"{path}: no layer {layer} of kind {self.kind!r}; it has {stored_layers}")
            self._ids = file.strings("ids")
            self.sequence_hashes = file.column("sequence_hash", np.uint8, ndim=2)
            file.check_size("sequence_hash", self.sequence_hashes, len(self._ids))
            name = f"{self.kind}/{LAYER_PREFIX}{self.layer}"
            self._rows = file.column(name, dtype, ndim=2)
            self.num_rows, self.dim = self._rows.shape
            self.dtype = dtype
            self._offsets: np.ndarray | None = None
            if self.kind in RESIDUE_KINDS:
                bounds = f"{self.kind}/offsets"
                self._offsets = file.column(bounds, np.int64)
                file.check_size(bounds, self._offsets, len(self._ids) + 1)
                file.check_offsets(bounds, self._offsets, len(self._rows))
            else:
                file.check_size(name, self._rows, len(self._ids))

    def __getitem__(self, record_id: str) -> np.ndarray:
        number = self._numbers.find(record_id)
        if number is None:
            raise KeyError(record_id)
        if self._offsets is not None:
            return self._rows[self._offsets[number] : self._offsets[number + 1]]
        embedding: np.ndarray = self._rows[number]
        return embedding

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, record_id: object) -> bool:
        return self._numbers.find(record_id) is not None

    def __repr__(self) -> str:
        return f"<embeddings of {len(self)} records, {self.kind} of layer {self.layer}, in {self.path}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return EmbeddingsFile, (self.path, self.kind, self.layer)

    @functools.cached_property
    def _numbers(self) -> "_IdIndex":
        return _IdIndex(self._ids)

    def _choose_kind(self, wanted: str | None) -> Kind:
        if not self.kinds:
            raise ShardError(f"{self.path}: no embeddings in it")
        for kind in self.kinds:
            if wanted in (None, kind):
                return kind
        raise ShardError(f"{self.path}: no embeddings of kind {wanted!r}; it has {', '.join(self.kinds)}")


def open_embeddings(path: str | Path, kind: str | None = None, layer: int | None = None) -> EmbeddingsFile:
    """Opens an embeddings file: a mapping from record id to its embedding, (num_residues, dim) or (dim,).

    Args:
        path: A file of layout `protlm`.
        kind: `per-residue`, `mean`, `cls` or `logits`; by default the first of these in the file.
        layer: The layer, by absolute number; by default the last in the file.

    Raises:
        ShardError: The file is missing or damaged, or has no such kind or layer. An id that occurs twice is an error of
            the first look-up.
    """
    return EmbeddingsFile(path, kind, layer)


class _IdIndex:
    """The numbers of records by id, in 16 bytes a record, a tenth of the memory of a dictionary of strings."""

    def __init__(self, ids: Strings) -> None:
        self._ids = ids
        hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, ids.encoded()), dtype=np.uint64, count=len(ids))
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        is_equal = self._hashes[1:] == self._hashes[:-1]
        shares_hash = np.zeros(len(ids), dtype=bool)
        shares_hash[1:] |= is_equal
        shares_hash[:-1] |= is_equal
        texts = [ids[number] for number in self._order[shares_hash]]
        if len(set(texts)) != len(texts):
            raise ShardError(f"{ids.where}: expected all different, got a repeated one")

    def find(self, record_id: object) -> int | None:
        """Returns the number of a record, None if no record has this id."""
        if not isinstance(record_id, str):
            return None
        # A string with lone surrogates has no UTF-8 form; encoded like this, it equals no id.
        wanted = np.uint64(xxhash.xxh3_64_intdigest(record_id.encode(errors="surrogatepass")))
        start = int(np.searchsorted(self._hashes, wanted))
        for place in range(start, len(self._hashes)):
            if self._hashes[place] != wanted:
                break
            number = int(self._order[place])
            if self._ids[number] == record_id:
                return number
        return None


def _layers(file: columns.ColumnFile, kind: Kind) -> tuple[int, ...]:
    numbers = (name.removeprefix(LAYER_PREFIX) for name in file.names(kind) if name.startswith(LAYER_PREFIX))
    return tuple(sorted(int(number) for number in numbers if number.isdecimal() and number.isascii()))
