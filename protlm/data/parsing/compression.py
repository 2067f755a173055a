"""Compressed data as blocks of plain bytes: hides the kinds of compression, their libraries and their damages."""

import bz2
import lzma
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from isal import igzip_lib

from protlm.errors import ProtlmError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_BLOCK_BYTES = 4 << 20
_LEAST_BLOCK_BYTES = 1 << 16
# Of the longest mark.
_MARK_BYTES = 6
_SHOWN_BYTES = 30
# The dictionaries of xz files have up to 64 MiB unless someone asked for more.
_XZ_MEMORY_BYTES = 256 << 20


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Compression:
    """One kind of compression: how it is recognised and unpacked, and whether zeros may follow its last member."""

    name: str
    mark: bytes
    magic: re.Pattern[bytes]
    new: Callable[[], Any]
    error: tuple[type[Exception], ...]
    padding: bool

    def may_begin(self, data: bytes) -> bool:
        """Returns whether a member begins so, as far as these bytes go."""
        return self.magic.match(data + self.mark[len(data) :]) is not None


COMPRESSIONS = (
    Compression(
        "gzip", b"\x1f\x8b", re.compile(rb"\x1f\x8b"), partial(igzip_lib.IgzipDecompressor, flag=igzip_lib.DECOMP_GZIP),
        # The stub of isal declares its error as an instance.
        (igzip_lib.IsalError, ValueError), padding=True,  # type: ignore[arg-type]
    ),
    Compression("bzip2", b"BZh9", re.compile(rb"BZh[1-9]"), bz2.BZ2Decompressor, (OSError, ValueError), padding=False),
    Compression(
        "xz", b"\xfd7zXZ\x00", re.compile(rb"\xfd7zXZ\x00"),
        partial(lzma.LZMADecompressor, format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES),
        (lzma.LZMAError, ValueError), padding=True,
    ),
    # The second mark is that of a skippable frame, which some programs write first.
    Compression(
        "zstd", b"\x28\xb5\x2f\xfd", re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), zstd.ZstdDecompressor,
        (zstd.ZstdError, ValueError), padding=False,
    ),
)  # fmt: skip


def compression_of(beginning: bytes) -> Compression | None:
    """Returns the compression of data by their first bytes, None for plain ones."""
    return next((kind for kind in COMPRESSIONS if kind.magic.match(beginning)), None)


def decompressed(path: str | Path, compression: Compression, feed: Iterator[bytes]) -> Iterator[bytes]:
    """Yields the plain bytes of all members, in blocks of bounded size.

    Args:
        path: The file, for messages.
        compression: Its compression.
        feed: The compressed bytes.

    Raises:
        ProtlmError: Data that are damaged or end too early, or other bytes after them.
    """
    member: _Decompressor = compression.new()
    data = next(feed, b"")
    while True:
        try:
            # Bounded, because a small file may expand to terabytes.
            block = member.decompress(data, _BLOCK_BYTES)
        except compression.error as error:
            raise _damaged(path, compression.name, error) from error
        data = b""
        if block:
            yield block
        if member.eof:
            # Another member may follow, as in files joined with cat.
            data = member.unused_data
            while not (data := data.lstrip(b"\0") if compression.padding else data):
                if not (data := next(feed, b"")):
                    return
            while len(data) < _MARK_BYTES and (more := next(feed, b"")):
                data += more
            if not compression.may_begin(data):
                _check_nothing_follows(path, compression.name, data, feed)
                return
            member = compression.new()
        elif member.needs_input and not (data := next(feed, b"")):
            raise ProtlmError(f"{path}: the {compression.name} data end too early; copy or download the file again")


def _check_nothing_follows(path: str | Path, name: str, data: bytes, feed: Iterator[bytes]) -> None:
    """Raises the error of bytes after the last member of compressed data; line ends are none."""
    while data:
        if following := data.strip():
            got = repr(following[:_SHOWN_BYTES])[1:]
            raise ProtlmError(
                f"{path}: bytes after the end of the {name} data, which begin {got}: another file was added, or this "
                "one is damaged; unpack it yourself, or copy or download it again"
            )
        data = next(feed, b"")


def gathered(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yields the same bytes in blocks that are not small, because a file may consist of members of one byte."""
    held: list[bytes] = []
    num_bytes = 0
    for block in blocks:
        held.append(block)
        num_bytes += len(block)
        if num_bytes >= _LEAST_BLOCK_BYTES:
            yield b"".join(held)
            held, num_bytes = [], 0
    if held:
        yield b"".join(held)


def _damaged(path: str | Path, name: str, error: Exception) -> ProtlmError:
    reason = " ".join(str(error).split())
    if "emory" in reason:
        return ProtlmError(f"{path}: {name} data that need too much memory ({reason}); unpack the file yourself")
    return ProtlmError(f"{path}: damaged {name} data ({reason}); copy or download the file again")
