"""A temporary store of proteins on disk: written once as a stream, then read in any order, in bounded memory.

A store is a folder of plain little-endian columns and `store.json`, which is written last: without it the store is
incomplete. It also records which proteins have the same sequence, and a hash of its whole content.
"""

import contextlib
import itertools
import json
import os
import shutil
import weakref
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import DTypeLike

from protlm import files, vocabulary
from protlm.data.digests import DIGEST_BYTES, Digests, firsts, repeats, sequence_digest
from protlm.data.numbered_ids import NumberedIds, number_suffix, numbered_id
from protlm.data.records import shown
from protlm.data.strings import Strings, bounds_of
from protlm.errors import ShardError

_FORMAT = "protlm-protein-store"
_FORMAT_VERSION = 1
_ABOUT = "store.json"
_TOKENS, _OFFSETS, _DIGESTS, _FIRST = "tokens.bin", "offsets.bin", "digests.bin", "first.bin"
_IDS, _ID_OFFSETS = "ids.bin", "id_offsets.bin"
# These exist only while a store is written.
_GIVEN_IDS, _GIVEN_ID_OFFSETS, _ID_DIGESTS = "given_ids.bin", "given_id_offsets.bin", "id_digests.bin"

_OFFSET = np.dtype("<i8")
_COPY_BYTES = 1 << 20
# Every range is a pass over all digests.
_MOST_RANGES = 64
_HASHES = 2**64


class ProteinStore:
    """Proteins on disk, in order; see `write_proteins`. Forked processes may share one.

    Attributes:
        path: The folder.
        num_records: Number of proteins.
        num_renamed: Number of proteins that got a `#n` because an earlier one has their id.
        hash: xxh3-128, hex, of all given ids and all tokens, in order.
        lengths: Number of residues of each, int64 (records).
        first: For each protein the first one with the same sequence, possibly itself; int64 (records).
        digests: `digests.sequence_digest` of each, uint8 (records, 16).
        ids: Final ids, all different.
    """

    def __init__(self, path: Path) -> None:
        """Opens a finished store; see `open_proteins`."""
        self.path = path
        about = _read_about(path)
        self.num_records: int = about["num_records"]
        self.num_renamed: int = about["num_renamed"]
        self.hash: str = about["hash"]
        num_records = self.num_records
        self._offsets = _column(path / _OFFSETS, _OFFSET, (num_records + 1,))
        self.lengths: np.ndarray = np.diff(self._offsets)
        self.first = _column(path / _FIRST, _OFFSET, (num_records,))
        self.digests = _column(path / _DIGESTS, np.uint8, (num_records, DIGEST_BYTES))
        id_offsets = _column(path / _ID_OFFSETS, _OFFSET, (num_records + 1,))
        self.ids = Strings(_column(path / _IDS, np.uint8, (int(id_offsets[-1]),)), id_offsets)
        _check_size(path / _TOKENS, int(self._offsets[-1]))
        # Tokens are read and not mapped: the pages of a map would gradually add to the memory of this process.
        self._tokens = os.open(path / _TOKENS, os.O_RDONLY)
        weakref.finalize(self, os.close, self._tokens)

    def __len__(self) -> int:
        return self.num_records

    def tokens(self, record: int) -> np.ndarray:
        """Returns the residue tokens of a protein, uint8 (num_residues,), read-only."""
        start, size = int(self._offsets[record]), int(self.lengths[record])
        content = os.pread(self._tokens, size, start)
        if len(content) != size:
            raise ShardError(f"{self.path / _TOKENS}: cut short while it was read; start again without it")
        return np.frombuffer(content, dtype=np.uint8)

    def id(self, record: int) -> str:
        """Returns the final id of a protein."""
        return self.ids[record]

    def residues(self, record: int) -> bytes:
        """Returns the letters of a protein."""
        return vocabulary.decode(self.tokens(record)).encode()


def open_proteins(path: Path) -> ProteinStore:
    """Opens a store that `write_proteins` made, in any process. Checks sizes, reads no contents.

    Raises:
        ShardError: There is no store, it is incomplete, or the size of a file was altered.
    """
    return ProteinStore(path)


def write_proteins(
    path: Path, proteins: Iterable[tuple[str, np.ndarray]], *, compared_at_once: int = 1 << 18
) -> ProteinStore:
    """Writes proteins into a new store, in order, and gives each an id of its own.

    The n-th repeat of an id gets `#n`, n ≥ 2, or the next number that gives an unused id. A given id keeps its name
    even if it looks like a numbered one, wherever it occurs.

    Memory: some 40 bytes a protein; up to 100 for a repeated sequence or id; a few hundred for an id that ends in `#n`
    if the id before the `#` repeats; and the longest protein.

    Args:
        path: The folder to make; it is removed again if anything fails.
        proteins: Id and residue tokens (uint8) of each protein.
        compared_at_once: About how many proteins to look for repeats among at a time.

    Raises:
        ShardError: A protein without residues, or with a token that does not stand for one.
        FileExistsError: The folder exists already.
        OSError: The disk is full.
    """
    path.mkdir(parents=True)
    try:
        content_hash, with_number_sign = _write_columns(path, proteins)
        num_records = (path / _OFFSETS).stat().st_size // _OFFSET.itemsize - 1
        _write_first(path, num_records, compared_at_once)
        num_renamed = _write_ids(path, num_records, with_number_sign, compared_at_once)
        for name in (_GIVEN_IDS, _GIVEN_ID_OFFSETS, _ID_DIGESTS):
            (path / name).unlink()
        about = {"format": _FORMAT, "format_version": _FORMAT_VERSION, "num_records": num_records,
                 "num_renamed": num_renamed, "hash": content_hash}  # fmt: skip
        with files.written_whole(path / _ABOUT) as temporary:
            temporary.write_text(json.dumps(about) + "\n", encoding="utf-8")
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return open_proteins(path)


def _write_columns(path: Path, proteins: Iterable[tuple[str, np.ndarray]]) -> tuple[str, "array[int]"]:
    """Writes the columns that do not depend on other proteins.

    Returns:
        The hash of the content, and the numbers of the records whose id holds a `#`.
    """
    content_hash = xxhash.xxh3_128()
    with_number_sign = array("q")
    with contextlib.ExitStack() as stack:
        tokens_file, offsets, digests, ids, id_offsets, id_digests = (
            stack.enter_context(_written(path / name))
            for name in (_TOKENS, _OFFSETS, _DIGESTS, _GIVEN_IDS, _GIVEN_ID_OFFSETS, _ID_DIGESTS)
        )
        end = id_end = 0
        offsets.write(_bytes(end))
        id_offsets.write(_bytes(id_end))
        for number, (record_id, tokens) in enumerate(proteins):
            name, content = record_id.encode(), tokens.tobytes()
            end += len(content)
            id_end += len(name)
            tokens_file.write(content)
            offsets.write(_bytes(end))
            digests.write(sequence_digest(_letters(record_id, tokens)))
            ids.write(name)
            id_offsets.write(_bytes(id_end))
            id_digests.write(xxhash.xxh3_128_digest(name))
            # Sizes are hashed too, so that no letter can move to the next protein or id unnoticed.
            content_hash.update(b"".join((_bytes(len(name)), name, _bytes(len(content)), content)))
            if b"#" in name:
                with_number_sign.append(number)
    return content_hash.hexdigest(), with_number_sign


def _letters(record_id: str, tokens: np.ndarray) -> bytes:
    """Returns the letters of a protein; raises ShardError for tokens that have none."""
    if tokens.dtype != np.uint8 or tokens.ndim != 1:
        raise ValueError(f"tokens: expected uint8 (num_residues,), got {tokens.dtype} {tokens.shape}")
    if not tokens.size:
        raise ShardError(f"{shown(record_id)}: a protein without residues; leave it out")
    try:
        return vocabulary.decode(tokens).encode()
    except ValueError:
        raise ShardError(
            f"{shown(record_id)}: a token that stands for no residue; the input is damaged: look at a dataset with "
            "protlm inspect --verify"
        ) from None


def _write_first(path: Path, num_records: int, compared_at_once: int) -> None:
    first = np.arange(num_records, dtype=_OFFSET)
    for digests in _digest_ranges(path / _DIGESTS, num_records, compared_at_once):
        repeated, of = firsts(digests)
        first[repeated] = of
    with _written(path / _FIRST) as file:
        file.write(first.data)


def _write_ids(path: Path, num_records: int, with_number_sign: "array[int]", compared_at_once: int) -> int:
    """Writes the final ids, the given ones with a number behind each repeat. Returns the number of repeats."""
    ranges = _digest_ranges(path / _ID_DIGESTS, num_records, compared_at_once)
    numbered = [np.stack(repeats(digests)) for digests in ranges]
    repeated, numbers = np.concatenate(numbered, axis=1)
    order = np.argsort(repeated)
    repeated, numbers = repeated[order], numbers[order]
    offsets = _column(path / _GIVEN_ID_OFFSETS, _OFFSET, (num_records + 1,))
    given = Strings(_column(path / _GIVEN_IDS, np.uint8, (int(offsets[-1]),)), offsets)
    _avoid_taken_numbers(given, repeated, numbers, with_number_sign)
    id_lengths = np.diff(offsets)
    with (path / _GIVEN_IDS).open("rb") as source, _written(path / _IDS) as file:
        done = 0
        for record, number in zip(map(int, repeated), map(int, numbers), strict=True):
            suffix = number_suffix(number).encode()
            id_lengths[record] += len(suffix)
            end = int(offsets[record + 1])
            _copy(source, file, end - done)
            file.write(suffix)
            done = end
        _copy(source, file, int(offsets[-1]) - done)
    with _written(path / _ID_OFFSETS) as file:
        file.write(bounds_of(id_lengths).astype(_OFFSET).data)
    return len(repeated)


def _avoid_taken_numbers(
    given: Strings, repeated: np.ndarray, numbers: np.ndarray, with_number_sign: "array[int]"
) -> None:
    """Changes, in place, the numbers of repeated ids for which `id#n` was given as an id."""
    if not len(repeated) or not with_number_sign:
        return
    # Most ids of the form `id#n` match no repeated id; comparing hashes first saves keeping them.
    hashes = (xxhash.xxh3_64_intdigest(given.bytes_of(int(record))) for record in repeated)
    bases = np.unique(np.fromiter(hashes, np.uint64, len(repeated)))
    taken = NumberedIds()
    for record in with_number_sign:
        numbered = numbered_id(given[int(record)])
        if numbered is not None and _holds(bases, xxhash.xxh3_64_intdigest(numbered[0].encode())):
            taken.add(*numbered)
    for place, record in enumerate(repeated):
        name = given[int(record)]
        if name in taken:
            numbers[place] = taken.next_free(name)


def _holds(ascending: np.ndarray, value: int) -> bool:
    place = int(np.searchsorted(ascending, np.uint64(value)))
    return place < len(ascending) and int(ascending[place]) == value


def _digest_ranges(path: Path, num_records: int, compared_at_once: int) -> Iterator[Digests]:
    """Yields digests by ranges of their high halves, few enough to compare at once; equal ones share a range."""
    digests = _column(path, ">u8", (num_records, 2))
    high = digests[:, 0].astype(np.uint64)
    num_ranges = min(num_records // compared_at_once + 1, _MOST_RANGES)
    bounds = [_HASHES * number // num_ranges for number in range(num_ranges + 1)]
    for start, end in itertools.pairwise(bounds):
        index = np.flatnonzero((high >= np.uint64(start)) & (high <= np.uint64(end - 1)))
        yield Digests(high[index], digests[index, 1].astype(np.uint64), index)


def _bytes(number: int) -> bytes:
    return number.to_bytes(_OFFSET.itemsize, "little")


def _copy(source: BinaryIO, target: BinaryIO, num_bytes: int) -> None:
    while num_bytes:
        content = source.read(min(num_bytes, _COPY_BYTES))
        target.write(content)
        num_bytes -= len(content)


@contextlib.contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """Opens a new file and syncs it to disk when the block ends, so that every column is there before `store.json`."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _read_about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads((path / _ABOUT).read_text(encoding="utf-8"))
        if (about["format"], about["format_version"]) != (_FORMAT, _FORMAT_VERSION):
            raise ShardError(f"{path}: proteins kept by another version of protlm; remove the folder and start again")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path}: no complete store of proteins; remove the folder and start again") from error
    assert isinstance(about, dict)
    return about


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size if path.is_file() else 0
    if size != expected or not path.is_file():
        raise ShardError(f"{path}: expected {expected:,} bytes, got {size:,}; remove its folder and start again")


def _column(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a memory-mapped column, read-only."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape, dtype=object)) * kind.itemsize
    _check_size(path, size)
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=kind, mode="r", shape=shape) if size else np.zeros(shape, dtype=kind)
