import itertools
import os
import pickle
import tracemalloc

import h5py
import numpy as np
import pytest

from protlm import vocabulary
from protlm.data.records import Record
from protlm.data.storage import columns
from protlm.data.storage.shards import ShardReader, write_shard
from protlm.errors import ShardError
from tests.hdf5_edits import edit, replace
from tests.unit.data.storage.shard_columns import columns_of

RECORDS = [
    Record("a", "first é", "MKV", 7, 562, cluster_id="UniRef50_A"),
    Record("b|c", "", "L", families=("PF00012", "IPR000001")),
    Record("d", "x y", "ACDEFGHIKLMNPQRSTVWYXBUZO", None, 9606),
]


def write(directory, records=RECORDS):
    return write_shard(directory, "train-00000.h5", "train", *columns_of(records))


@pytest.fixture
def path(tmp_path):
    write(tmp_path)
    return tmp_path / "train-00000.h5"


def set_attribute(name, value):
    return lambda file: file.attrs.__setitem__(name, value)


def test_what_was_written_is_read(path):
    shard = ShardReader(path)
    assert (shard.split, shard.num_records, shard.num_residues) == ("train", 3, 29)
    bounds = shard.offsets.tolist()
    assert [vocabulary.decode(shard.tokens[a:b]) for a, b in itertools.pairwise(bounds)] == [
        record.sequence for record in RECORDS
    ]
    assert shard.ids.to_list() == ["a", "b|c", "d"]
    assert [shard.descriptions[index] for index in range(3)] == ["first é", "", "x y"]
    assert shard.ids[-1] == "d"
    assert (shard.cluster_size.tolist(), shard.taxon_id.tolist()) == ([7, -1, -1], [562, -1, 9606])
    assert (shard.cluster_id.to_list(), shard.family.to_list()) == (
        ["UniRef50_A", "", ""],
        ["", "PF00012;IPR000001", ""],
    )
    assert not shard.tokens.flags.writeable
    shard.verify()


def test_the_checksum_of_given_records_never_changes(path):
    # Stored datasets rely on it.
    assert ShardReader(path).checksum == "95b736e8795f89a9aa9bfa2894bda3f8"


def test_optional_columns_are_written_only_if_a_record_has_them(tmp_path):
    write(tmp_path, [Record("a", "", "M"), Record("b", "", "K")])
    shard = ShardReader(tmp_path / "train-00000.h5")
    assert shard.cluster_size is None
    assert shard.taxon_id is None
    assert shard.cluster_id is None
    assert shard.family is None
    shard.verify()


def test_columns_are_contiguous_and_aligned(path):
    with h5py.File(path) as file:
        for name in ("tokens", "offsets", "ids/bytes", "ids/offsets", "descriptions/offsets", "taxon_id"):
            assert file[name].id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
            assert file[name].id.get_offset() % columns.ALIGNMENT_BYTES == 0


def test_equal_records_give_equal_bytes(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    assert (tmp_path / "one/train-00000.h5").read_bytes() == (tmp_path / "two/train-00000.h5").read_bytes()


def test_a_pickled_shard_is_only_a_path(path):
    shard = ShardReader(path)
    pickled = pickle.dumps(shard)
    assert len(pickled) < 300
    assert np.array_equal(pickle.loads(pickled).tokens, shard.tokens)


def test_the_maps_outlive_the_closed_hdf5_file(path):
    shard = ShardReader(path)
    path.unlink()
    assert shard.tokens.tolist()[:3] == vocabulary.encode(b"MKV").tolist()


@pytest.mark.parametrize(
    "name",
    [
        "tokens",
        "offsets",
        "ids/bytes",
        "descriptions/bytes",
        "taxon_id",
        "cluster_size",
        "cluster_id/bytes",
        "family/bytes",
    ],
)
def test_verify_finds_a_flipped_bit_in_any_column(path, name):
    with h5py.File(path) as file:
        place = file[name].id.get_offset()
    content = bytearray(path.read_bytes())
    content[place if name != "offsets" else place + 8] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match="checksum: expected"):
        ShardReader(path).verify()


def test_verify_finds_a_token_that_is_no_residue(path):
    with h5py.File(path, "r+") as file:
        file["tokens"][0] = 32
    with pytest.raises(ShardError) as caught:
        ShardReader(path).verify()
    # Even where the checksum was made to fit.
    edit(path, set_attribute("checksum", str(caught.value).split("got ")[1].split(";")[0]))
    with pytest.raises(ShardError, match="expected residues only"):
        ShardReader(path).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_attribute("format", "other"), "not a protlm-shard file"),
        (set_attribute("format", np.arange(3)), "not a protlm-shard file"),
        (set_attribute("format_version", 1), "format_version: expected 2, got 1"),
        (set_attribute("format_version", "1"), "attribute 'format_version': expected int, got str"),
        (set_attribute("vocabulary", "A C D"), "vocabulary"),
        (set_attribute("split", "other"), "split: expected one of train"),
        (set_attribute("num_records", 4), "offsets: expected 5 rows, got 4"),
        (set_attribute("num_residues", 30), "tokens: expected 30 rows, got 29"),
        (lambda file: file.attrs.__delitem__("checksum"), "attribute 'checksum': expected str, got none"),
        (lambda file: file.__delitem__("tokens"), "tokens: expected uint8 column, got nothing"),
        (lambda file: file.__delitem__("ids"), "ids/bytes: expected uint8 column, got nothing"),
        (replace("ids/bytes", data=np.zeros((4, 1), np.uint8)), "ids/bytes: expected 1 axes"),
        (replace("ids", data=np.zeros(4, np.uint8)), "ids/bytes: expected uint8 column, got nothing"),
        (lambda file: (file.__delitem__("tokens"), file.create_group("tokens")), "tokens: expected uint8 .* a group"),
        (replace("tokens", data=np.zeros(29, np.int8)), "tokens: expected uint8, got int8"),
        (replace("offsets", data=np.zeros(4, ">i8")), "offsets: expected int64, got >i8"),
        (replace("tokens", data=h5py.Empty("u1")), "tokens: expected 1 axes, got shape None"),
        (replace("tokens", data=np.zeros(29, np.uint8), chunks=(29,)), "another storage layout"),
        (replace("tokens", data=np.zeros(29, np.uint8), compression="gzip"), "another storage layout"),
        (replace("tokens", shape=29, dtype="u1", external=[("/etc/passwd", 0, 29)]), "another storage layout"),
        (replace("tokens", shape=29, dtype="u1"), "tokens: expected a place within .* got no place"),
        (replace("offsets", data=np.array([0, 5, 4, 29])), "offsets: expected offsets that never fall"),
        (replace("offsets", data=np.array([0, 4, 4, 29])), "offsets: expected records of at least one residue"),
        (set_attribute("split", "x" * 501), "attribute 'split': expected str, got none"),
        (set_attribute("split", np.bytes_(b"x" * 501)), "attribute 'split': expected str, got none"),
        (set_attribute("checksum", np.zeros(3)), "attribute 'checksum': expected str, got none"),
        (replace("offsets", data=np.array([0, 3, 4, 28])), "offsets: expected offsets from 0 to 29, got 0 to 28"),
        (replace("offsets", data=np.array([1, 3, 4, 29])), "offsets: expected offsets from 0 to 29, got 1 to 29"),
        (replace("ids/offsets", data=np.zeros(0, np.int64)), "ids/offsets: expected offsets from 0 to 5, got none"),
        (replace("ids/offsets", data=np.array([0, 5])), "ids: expected 3 rows, got 1"),
        (replace("descriptions/offsets", data=np.array([0, 11])), "descriptions: expected 3 rows, got 1"),
        (replace("taxon_id", data=np.zeros(2, np.int32)), "taxon_id: expected 3 rows, got 2"),
        (replace("family/offsets", data=np.array([0, 17])), "family: expected 3 rows, got 1"),
        (lambda file: file.__delitem__("cluster_id/offsets"), "cluster_id/offsets: expected int64 column, got nothing"),
    ],
)
def test_a_shard_that_breaks_the_contract_is_refused_at_opening(path, change, message):
    edit(path, change)
    with pytest.raises(ShardError, match=message) as caught:
        ShardReader(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("link", [h5py.SoftLink("/offsets"), h5py.ExternalLink("other.h5", "/tokens")])
def test_links_are_not_followed(path, link):
    def change(file):
        del file["tokens"]
        file["tokens"] = link

    edit(path, change)
    with pytest.raises(ShardError, match="tokens: expected a column inside the file, got a link"):
        ShardReader(path)


def test_a_virtual_column_is_refused(path):
    def change(file):
        del file["tokens"]
        layout = h5py.VirtualLayout(shape=(29,), dtype="u1")
        layout[:] = h5py.VirtualSource("other.h5", "tokens", shape=(29,))
        file.create_virtual_dataset("tokens", layout)

    edit(path, change)
    with pytest.raises(ShardError, match="another storage layout"):
        ShardReader(path)


def test_text_that_is_not_utf8_is_a_clear_error_when_it_is_read(path):
    edit(path, replace("ids/bytes", data=np.full(5, 0xFF, np.uint8)))
    shard = ShardReader(path)
    with pytest.raises(ShardError, match="ids: expected UTF-8 text"):
        shard.ids[0]


def test_missing_empty_foreign_and_cut_files_are_clear_errors(path):
    with pytest.raises(ShardError, match="no such file"):
        ShardReader(path.with_name("absent.h5"))
    content = path.read_bytes()
    for damaged in (b"", b"not HDF5 at all", content[: len(content) // 2], content[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match="not a readable HDF5 file") as caught:
            ShardReader(path)
        assert "\n" not in str(caught.value)


def test_a_shard_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(columns, "write_column", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_column_said_to_lie_beyond_the_end_of_the_file_is_refused(path):
    with h5py.File(path) as file:
        offset = file["tokens"].id.get_offset()
    content = path.read_bytes()
    size = (29).to_bytes(8, "little")
    layout = offset.to_bytes(8, "little") + size
    assert content.count(layout) == 1
    for place in (len(content) - 10, 2**62):
        path.write_bytes(content.replace(layout, place.to_bytes(8, "little") + size))
        # Newer HDF5 finds it before we do.
        with pytest.raises(ShardError, match=r"tokens: expected a place within the \d+ bytes|not a readable HDF5 file"):
            ShardReader(path)


def test_an_attribute_said_to_be_huge_takes_no_memory(path):
    edit(path, set_attribute("num_records", np.arange(7)))
    content = path.read_bytes()
    claimed = content.replace((7).to_bytes(8, "little"), (2**33).to_bytes(8, "little"))
    assert claimed != content
    path.write_bytes(claimed)
    tracemalloc.start()
    with pytest.raises(ShardError, match=r"num_records'?: expected|not a readable HDF5 file"):
        ShardReader(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("target", ["pipe", "/dev/zero", "loop", "."])
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path, target):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "train-00000.h5").symlink_to(target)
    with pytest.raises(ShardError, match=r"not a readable HDF5 file: (expected a regular|Too many levels|Is a dir)"):
        ShardReader(tmp_path / "train-00000.h5")


def test_a_file_without_a_size_is_never_given_to_hdf5(tmp_path, monkeypatch):
    (tmp_path / "train-00000.h5").touch()
    monkeypatch.setattr(h5py, "File", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(ShardError, match="cannot mmap an empty file"):
        ShardReader(tmp_path / "train-00000.h5")
