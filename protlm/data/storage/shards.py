"""One shard, an HDF5 file of tokenised records: hides its columns, its checksum and the memory map they are read by."""

import functools
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import xxhash

from protlm import files, vocabulary
from protlm.choices import SplitName
from protlm.data.residue_counts import count_residues
from protlm.data.splits import SPLIT_NAMES
from protlm.data.storage import columns
from protlm.data.strings import Strings
from protlm.errors import ShardError

FORMAT = "protlm-shard"
FORMAT_VERSION = 2
DEFAULT_SHARD_RESIDUES = 67_108_864
VOCABULARY = " ".join(vocabulary.TOKENS)

NUMBER_COLUMNS = ("cluster_size", "taxon_id")
"""Optional columns of numbers; `records.UNKNOWN` stands for no value."""
LABEL_COLUMNS = ("cluster_id", "family")
"""Optional columns of strings; an empty string stands for no value, and several families are joined by `;`."""
TOKENS = "tokens"
REQUIRED_COLUMNS = (
    "offsets", "ids/bytes", "ids/offsets", "descriptions/bytes", "descriptions/offsets",
)  # fmt: skip
OPTIONAL_COLUMNS = (
    *NUMBER_COLUMNS, *(f"{name}/{column}" for name in LABEL_COLUMNS for column in ("bytes", "offsets")),
)  # fmt: skip
"""After the tokens, the required columns and then these are written and hashed in order."""

_BATCH_BYTES = 1 << 20
_BOUNDS = struct.Struct("=qq")
"""Two consecutive values of the column `offsets`."""
_OPEN_SHARDS = 2
"""Shards that `LazyShards` keeps open."""


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """The summary of a finished shard: its base name, counts, and the checksum of its columns."""

    name: str
    num_records: int
    num_residues: int
    checksum: str


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """A finished shard with the counts that its split is summarised from.

    Attributes:
        split: Its split.
        info: Its entry in the manifest.
        residue_counts: Count of each letter of `vocabulary.RESIDUES`, int64 (25).
        lengths: The distinct lengths of its records, ascending, int64.
        length_counts: Number of records with each of them, int64.
    """

    split: SplitName
    info: ShardInfo
    residue_counts: np.ndarray
    lengths: np.ndarray
    length_counts: np.ndarray


def write_shard(
    directory: Path,
    name: str,
    split: SplitName,
    num_residues: int,
    tokens: Iterable[np.ndarray],
    other_columns: Mapping[str, np.ndarray],
) -> tuple[ShardInfo, np.ndarray]:
    """Writes one shard, whole or not at all; the tokens are never all in memory.

    Args:
        directory: The folder to write it to.
        name: Its base name.
        split: The split that its records belong to.
        num_residues: Residues of its records.
        tokens: Stretches of the tokens of its records, in order; iterated over once.
        other_columns: Columns by name: all of `REQUIRED_COLUMNS` and any of `OPTIONAL_COLUMNS`.

    Returns:
        Its entry in the manifest, and the count of each letter of `vocabulary.RESIDUES`, int64 (25).
    """
    all_names = (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS)
    ordered = {column: other_columns[column] for column in all_names if column in other_columns}
    residue_counts = np.zeros(vocabulary.NUM_RESIDUES, dtype=np.int64)
    digest = xxhash.xxh3_128(_column_mark(TOKENS, num_residues))
    with files.written_whole(directory / name) as path:
        with columns.create_columns(path) as file:
            offset = columns.allocate_column(file, TOKENS, (num_residues,), np.uint8)
            for column_name, column in ordered.items():
                columns.write_column(file, column_name, column)
            file.attrs["format"] = FORMAT
            file.attrs["format_version"] = FORMAT_VERSION
            file.attrs["vocabulary"] = VOCABULARY
            file.attrs["split"] = split
            file.attrs["num_records"] = num_records = len(other_columns["offsets"]) - 1
            file.attrs["num_residues"] = num_residues
        with path.open("r+b") as raw:
            raw.seek(offset or 0)
            for batch in _batches(tokens):
                digest.update(batch.data)
                residue_counts += count_residues(batch)
                raw.write(batch.data)
        checksum = _add_columns(digest, ordered.items())
        with columns.change_columns(path) as file:
            file.attrs["checksum"] = checksum
    return ShardInfo(name, num_records, num_residues, checksum), residue_counts


def _batches(stretches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields the same bytes in fewer arrays; an array is valid only until the next one.

    No stretch is kept, since each may hold a file open.
    """
    buffer = np.empty(_BATCH_BYTES, dtype=np.uint8)
    size = 0
    for stretch in stretches:
        if size + len(stretch) > _BATCH_BYTES:
            yield buffer[:size]
            size = 0
        if len(stretch) > _BATCH_BYTES:
            yield stretch
        else:
            buffer[size : size + len(stretch)] = stretch
            size += len(stretch)
    yield buffer[:size]


class ShardReader:
    """One shard, memory mapped and read-only; pickles as its path.

    Attributes:
        path: The file.
        split: The split that its records belong to.
        num_records: Number of records.
        num_residues: Number of residues of all records.
        checksum: The checksum in its attributes.
        tokens: Residue tokens of all records back to back.
        offsets: The bounds of each record in `tokens`, (num_records + 1).
        ids: Record ids.
        descriptions: Record descriptions.
        cluster_size: Per record, `records.UNKNOWN` if not given; None if no record has one.
        taxon_id: Per record, `records.UNKNOWN` if not given; None if no record has one.
        cluster_id: Per record, empty if not given; None if no record has one.
        family: Per record, several joined by `;`, empty if not given; None if no record has one.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens a shard and checks its header, sizes and offsets, but not its checksum.

        Raises:
            ShardError: The file is missing, damaged, of another format or version.
        """
        self.path = Path(path)
        with columns.open_columns(self.path) as file:
            self._name = str(self.path)
            self._state = os.stat(self._name)
            file.check_format(FORMAT, FORMAT_VERSION)
            if file.attribute("vocabulary", str) != VOCABULARY:
                raise ShardError(f"{path}: its vocabulary is not the one of this protlm; prepare the dataset again")
            self.split = file.attribute("split", str)
            if self.split not in SPLIT_NAMES:
                raise ShardError(f"{path}: split: expected one of {', '.join(SPLIT_NAMES)}, got {self.split!r}")
            self.num_records = file.attribute("num_records", int)
            self.num_residues = file.attribute("num_residues", int)
            self.checksum = file.attribute("checksum", str)
            self.tokens = file.column("tokens", np.uint8)
            self.offsets = file.column("offsets", np.int64)
            file.check_size("tokens", self.tokens, self.num_residues)
            file.check_size("offsets", self.offsets, self.num_records + 1)
            file.check_offsets("offsets", self.offsets, self.num_residues, rising=True)
            self._parts = file.parts()
            self._tokens_place, self._offsets_place = file.place("tokens") or 0, file.place("offsets") or 0
            self.ids = file.strings("ids")
            self.descriptions = file.strings("descriptions")
            file.check_size("ids", self.ids, self.num_records)
            file.check_size("descriptions", self.descriptions, self.num_records)
            self.cluster_size = self._optional_numbers(file, "cluster_size")
            self.taxon_id = self._optional_numbers(file, "taxon_id")
            self.cluster_id = self._optional_strings(file, "cluster_id")
            self.family = self._optional_strings(file, "family")

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.path,)

    def record_tokens(self, record: int) -> np.ndarray:
        """Returns the residue tokens of a record, read-only uint8 of shape (num_residues,), read from the file.

        Records are read one after the other while a run lasts, so there is always one at hand when the file is cut
        short. Tokens from the map would then end the process, now or later.

        Raises:
            ShardError: The file was cut short, even after `check_unchanged`, which is to be called before.
        """
        start, end = _BOUNDS.unpack(self._part(self._offsets_place + record * self.offsets.itemsize, _BOUNDS.size))
        if not 0 <= start < end <= self.num_residues:
            raise ShardError(f"{self.path}: written to while it was in use; prepare it again, then go on")
        return np.frombuffer(self._part(self._tokens_place + start, end - start), dtype=np.uint8)

    def _part(self, start: int, num_bytes: int) -> bytes:
        content = self._parts.read(start, num_bytes)
        if content is None:
            self.check_unchanged()
            # It was cut short, and has its size again.
            raise ShardError(f"{self.path}: written to while it was in use; prepare it again, then go on")
        return content

    def check_unchanged(self) -> None:
        """Refuses a shard that was cut short or written to since it was opened.

        Call it before each use: what is mapped shows every change, and reading past the new end would end the process
        without a word. A file that was put in the place of this one, or removed, leaves the mapped one as it was.

        Raises:
            ShardError: The file is shorter, or its content is another.
        """
        # This is done for every record, and takes a microsecond.
        opened = self._state
        try:
            state = os.stat(self._name)
        except OSError:
            return
        if (
            state.st_mtime_ns == opened.st_mtime_ns and state.st_size == opened.st_size
        ) or state.st_ino != opened.st_ino:
            return
        if state.st_size < opened.st_size:
            raise ShardError(
                f"{self.path}: cut short while it was in use, from {opened.st_size:,} bytes to {state.st_size:,}; "
                "copy or prepare it again, then go on"
            )
        # Touched, copied onto itself, or damaged.
        self._verify()
        self._state = state

    def verify(self) -> None:
        """Reads every byte and compares the checksum.

        Raises:
            ShardError: The checksum differs, or a token does not stand for a residue.
        """
        self.check_unchanged()
        self._verify()

    def _verify(self) -> None:
        other_columns: dict[str, np.ndarray] = {"offsets": self.offsets}
        for name, strings in (("ids", self.ids), ("descriptions", self.descriptions)):
            other_columns |= {f"{name}/bytes": strings.text, f"{name}/offsets": strings.offsets}
        for name in NUMBER_COLUMNS:
            if (numbers := getattr(self, name)) is not None:
                other_columns[name] = numbers
        for name in LABEL_COLUMNS:
            if (labels := getattr(self, name)) is not None:
                other_columns |= {f"{name}/bytes": labels.text, f"{name}/offsets": labels.offsets}
        digest = xxhash.xxh3_128(_column_mark(TOKENS, len(self.tokens)))
        digest.update(self.tokens.data)
        checksum = _add_columns(digest, other_columns.items())
        if checksum != self.checksum:
            raise ShardError(f"{self.path}: checksum: expected {self.checksum}, got {checksum}; the file is damaged")
        if not vocabulary.are_residues(self.tokens):
            raise ShardError(f"{self.path}: tokens: expected residues only, got another token")

    def _optional_numbers(self, file: columns.ColumnFile, name: str) -> np.ndarray | None:
        if name not in file.names():
            return None
        column = file.column(name, np.int32)
        file.check_size(name, column, self.num_records)
        return column

    def _optional_strings(self, file: columns.ColumnFile, name: str) -> Strings | None:
        if name not in file.names():
            return None
        column = file.strings(name)
        file.check_size(name, column, self.num_records)
        return column


def _column_mark(name: str, num_bytes: int) -> bytes:
    """Returns the bytes hashed before a column: with its size, no byte can move to the next column unnoticed."""
    return f"{name} {num_bytes}\n".encode()


def _add_columns(digest: Any, named_columns: Iterable[tuple[str, np.ndarray]]) -> str:
    for name, column in named_columns:
        digest.update(_column_mark(name, column.nbytes))
        digest.update(column.data)
    checksum: str = digest.hexdigest()
    return checksum


class LazyShards(Sequence[ShardReader]):
    """Shards that are opened on access: a dataset may have more of them than the system allows open files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        # Shards are read one after the other.
        self._open = functools.lru_cache(maxsize=_OPEN_SHARDS)(ShardReader)

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> ShardReader: ...

    @overload
    def __getitem__(self, index: slice) -> "LazyShards": ...

    def __getitem__(self, index: int | slice) -> "ShardReader | LazyShards":
        return LazyShards(self._paths[index]) if isinstance(index, slice) else self._open(self._paths[index])
