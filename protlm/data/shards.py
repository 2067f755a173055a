"""How tokenised records lie in one shard file, so that each is read through a memory map, and how it is checked."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from protlm import vocabulary
from protlm.data import columns, files
from protlm.data.records import Record
from protlm.data.splits import SPLIT_NAMES, SplitName
from protlm.errors import ShardError

FORMAT = "protlm-shard"
FORMAT_VERSION = 1
DEFAULT_SHARD_RESIDUES = 67_108_864
VOCABULARY = " ".join(vocabulary.TOKENS)
UNKNOWN = -1
"""What stands for no value in the optional columns."""

_OPTIONAL_COLUMNS = ("cluster_size", "taxon_id")
_COUNTED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What a finished shard holds: its base name, counts, and the checksum of its columns."""

    name: str
    num_records: int
    num_residues: int
    checksum: str


class _Buffer:
    """The columns of the shard that is being filled."""

    def __init__(self) -> None:
        self.tokens = bytearray()
        self.offsets = array("q", [0])
        self.ids = bytearray()
        self.id_offsets = array("q", [0])
        self.descriptions = bytearray()
        self.description_offsets = array("q", [0])
        self.cluster_size = array("i")
        self.taxon_id = array("i")

    def add(self, record: Record, record_id: str, tokens: np.ndarray) -> None:
        self.tokens += tokens.data
        self.offsets.append(len(self.tokens))
        self.ids += record_id.encode()
        self.id_offsets.append(len(self.ids))
        self.descriptions += record.description.encode()
        self.description_offsets.append(len(self.descriptions))
        self.cluster_size.append(UNKNOWN if record.cluster_size is None else record.cluster_size)
        self.taxon_id.append(UNKNOWN if record.taxon_id is None else record.taxon_id)

    def columns(self) -> dict[str, np.ndarray]:
        """Returns all columns to write, in the order in which they are written and hashed."""
        found: dict[str, np.ndarray] = {
            "tokens": np.frombuffer(self.tokens, dtype=np.uint8),
            "offsets": np.frombuffer(self.offsets, dtype=np.int64),
            "ids/bytes": np.frombuffer(self.ids, dtype=np.uint8),
            "ids/offsets": np.frombuffer(self.id_offsets, dtype=np.int64),
            "descriptions/bytes": np.frombuffer(self.descriptions, dtype=np.uint8),
            "descriptions/offsets": np.frombuffer(self.description_offsets, dtype=np.int64),
        }
        for name in _OPTIONAL_COLUMNS:
            column = np.frombuffer(getattr(self, name), dtype=np.int32)
            if (column != UNKNOWN).any():
                found[name] = column
        return found


class ShardWriter:
    """Writes the records of one split as shards `<split>-00000.h5`, `<split>-00001.h5` and so on.

    A shard is gathered in memory and written whole once it is full: no more than `shard_residues` residues, unless a
    single record has more.

    Attributes:
        shards: The shards finished so far.
        lengths: Residues of every record added, in order.
        residue_counts: How often each letter of `vocabulary.RESIDUES` occurs in the finished shards.
    """

    def __init__(
        self, directory: str | Path, split: SplitName, *, shard_residues: int = DEFAULT_SHARD_RESIDUES
    ) -> None:
        self.shards: list[ShardInfo] = []
        self.lengths = array("i")
        self.residue_counts = np.zeros(vocabulary.NUM_RESIDUES, dtype=np.int64)
        self._directory = Path(directory)
        self._split = split
        self._shard_residues = shard_residues
        self._buffer = _Buffer()

    def add(self, record: Record, record_id: str) -> None:
        """Adds a record under an id, which the caller keeps unique."""
        tokens = vocabulary.encode(record.sequence.encode())
        held = len(self._buffer.tokens)
        if held and held + len(tokens) > self._shard_residues:
            self._finish_shard()
        self._buffer.add(record, record_id, tokens)
        self.lengths.append(len(tokens))

    def close(self) -> None:
        """Writes what is still in memory; no shard at all if nothing was added."""
        if self._buffer.tokens:
            self._finish_shard()

    def _finish_shard(self) -> None:
        found = self._buffer.columns()
        name = f"{self._split}-{len(self.shards):05d}.h5"
        info = ShardInfo(name, len(found["offsets"]) - 1, len(found["tokens"]), _checksum(found.items()))
        with files.written_whole(self._directory / name) as path, columns.create_columns(path) as file:
            for column_name, column in found.items():
                columns.write_column(file, column_name, column)
            file.attrs["format"] = FORMAT
            file.attrs["format_version"] = FORMAT_VERSION
            file.attrs["vocabulary"] = VOCABULARY
            file.attrs["split"] = self._split
            file.attrs["num_records"] = info.num_records
            file.attrs["num_residues"] = info.num_residues
            file.attrs["checksum"] = info.checksum
        self.residue_counts += _count_residues(found["tokens"])
        self.shards.append(info)
        self._buffer = _Buffer()


class ShardReader:
    """One shard, memory mapped and read-only; pickles as its path.

    Attributes:
        path: The file.
        split: The split that its records belong to.
        num_records: Number of records.
        num_residues: Number of residues of all records.
        checksum: The checksum that its writer noted.
        tokens: Residue tokens of all records back to back.
        offsets: The bounds of each record in `tokens`, (num_records + 1).
        ids: Record ids.
        descriptions: Record descriptions.
        cluster_size: Per record, `UNKNOWN` if not told; None if told for none.
        taxon_id: Per record, `UNKNOWN` if not told; None if told for none.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens a shard and checks its header, sizes and offsets, but not yet its bytes.

        Raises:
            ShardError: The file is missing, damaged, of another format or version.
        """
        self.path = Path(path)
        with columns.open_columns(self.path) as file:
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
            file.check_offsets("offsets", self.offsets, self.num_residues)
            self.ids = file.strings("ids")
            self.descriptions = file.strings("descriptions")
            file.check_size("ids", self.ids, self.num_records)
            file.check_size("descriptions", self.descriptions, self.num_records)
            self.cluster_size = self._optional_column(file, "cluster_size")
            self.taxon_id = self._optional_column(file, "taxon_id")

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.path,)

    def verify(self) -> None:
        """Reads every byte and compares the checksum.

        Raises:
            ShardError: The bytes are not those that were written, or a token stands for no residue.
        """
        found: dict[str, np.ndarray] = {
            "tokens": self.tokens,
            "offsets": self.offsets,
            "ids/bytes": self.ids.text,
            "ids/offsets": self.ids.offsets,
            "descriptions/bytes": self.descriptions.text,
            "descriptions/offsets": self.descriptions.offsets,
        }
        for name in _OPTIONAL_COLUMNS:
            if (column := getattr(self, name)) is not None:
                found[name] = column
        checksum = _checksum(found.items())
        if checksum != self.checksum:
            raise ShardError(f"{self.path}: checksum: expected {self.checksum}, got {checksum}; the file is damaged")
        if not vocabulary.are_residues(self.tokens):
            raise ShardError(f"{self.path}: tokens: expected residues only, got another token")

    def _optional_column(self, file: columns.ColumnFile, name: str) -> np.ndarray | None:
        if name not in file.names():
            return None
        column = file.column(name, np.int32)
        file.check_size(name, column, self.num_records)
        return column


def _checksum(named_columns: Iterable[tuple[str, np.ndarray]]) -> str:
    digest = xxhash.xxh3_128()
    for name, column in named_columns:
        # The size keeps bytes from moving between neighbouring columns unnoticed.
        digest.update(f"{name} {column.nbytes}\n".encode())
        digest.update(column.data)
    return digest.hexdigest()


def _count_residues(tokens: np.ndarray) -> np.ndarray:
    counts = np.zeros(vocabulary.NUM_RESIDUES, dtype=np.int64)
    # bincount makes int64 of its input: in pieces that stays small.
    for start in range(0, len(tokens), _COUNTED_AT_ONCE):
        piece = np.bincount(tokens[start : start + _COUNTED_AT_ONCE], minlength=vocabulary.VOCABULARY_SIZE)
        counts += piece[vocabulary.FIRST_RESIDUE : vocabulary.FIRST_RESIDUE + vocabulary.NUM_RESIDUES]
    return counts
