"""Files that are written to, cut short or replaced while they are read: an error, or all of the old content."""

import gzip
import os

import pytest

from protlm.data.labels.labels import read_clusters, read_families
from protlm.data.parsing.reader import RecordReader
from protlm.data.parsing.sources import SourceBlocks
from protlm.errors import ProtlmError
from tests.unit.data.parsing.entry_cases import ENTRY, UNIPROT, UNIREF

TEXTS = {
    "fasta": b"".join(b">p%d\nMKV\n" % number for number in range(3000)),
    "flat file": ENTRY.encode() * 100,
    "uniprot xml": b"<uniprot>" + UNIPROT.encode() * 100 + b"</uniprot>",
    "uniref xml": b"<UniRef>" + UNIREF.encode() * 100 + b"</UniRef>",
}
TEXTS["gzip"] = gzip.compress(TEXTS["fasta"], compresslevel=1, mtime=0)


def grow(path):
    with path.open("ab") as file:
        file.write(path.read_bytes())


def shrink(path):
    os.truncate(path, os.path.getsize(path) // 2)


def rewrite(path):
    with path.open("r+b") as file:
        file.write(file.read().replace(b"V", b"W"))
    os.utime(path, ns=(1, 1))


def replace(path):
    other = path.with_name("other")
    other.write_bytes(b"another file")
    os.replace(other, path)


def remove(path):
    path.unlink()


def changed_by(change, path):
    """Returns what changes the file after its first block."""
    waiting = [change]
    return lambda _: waiting.pop()(path) if waiting else None


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(SourceBlocks, "block_bytes", 1000)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("change", [grow, shrink, rewrite])
@pytest.mark.parametrize("kind", TEXTS)
def test_records_of_a_file_that_changes_meanwhile_end_in_an_error(tmp_path, kind, change):
    path = tmp_path / "a"
    path.write_bytes(TEXTS[kind])
    reader = RecordReader([path], on_bad_record="skip", advance=changed_by(change, path))
    with pytest.raises(ProtlmError, match=r"changed while it was read|gzip data (end too early)?") as caught:
        list(reader)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("change", [replace, remove])
@pytest.mark.parametrize("kind", TEXTS)
def test_a_file_that_is_replaced_meanwhile_is_read_as_it_was(tmp_path, kind, change):
    path = tmp_path / "a"
    path.write_bytes(TEXTS[kind])
    expected = list(RecordReader([path]))
    assert list(RecordReader([path], advance=changed_by(change, path))) == expected


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("change", [grow, shrink, rewrite])
@pytest.mark.parametrize(
    ("read", "text"),
    [
        (read_clusters, b"".join(b"c\tp%d\n" % number for number in range(20_000))),
        (read_families, b"".join(b"p%d\tPF1\n" % number for number in range(20_000))),
        (read_clusters, TEXTS["uniref xml"]),
    ],
)
def test_labels_of_a_file_that_changes_meanwhile_end_in_an_error(tmp_path, monkeypatch, read, text, change):
    path = tmp_path / "a"
    path.write_bytes(text)
    raw_blocks, then = SourceBlocks._raw_blocks, changed_by(change, path)

    def changing_blocks(self, file, update):
        for block in raw_blocks(self, file, update):
            yield block
            then(block)

    monkeypatch.setattr(SourceBlocks, "_raw_blocks", changing_blocks)
    with pytest.raises(ProtlmError, match=r"changed while it was read|stands in the file twice|not well-formed"):
        read(path)


@pytest.mark.parametrize("members", [40_000])
def test_members_of_a_byte_each_come_in_blocks_that_are_not_small(tmp_path, members):
    text = (b">a\n" + b"MKV" * members)[:members]
    path = tmp_path / "a.gz"
    path.write_bytes(b"".join(gzip.compress(text[place : place + 1], mtime=0) for place in range(members)))
    blocks = list(SourceBlocks(path))
    assert b"".join(blocks) == text
    assert len(blocks) == 1
