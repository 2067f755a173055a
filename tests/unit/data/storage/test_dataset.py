import json
import multiprocessing
import os
import pickle
import subprocess
import sys

import h5py
import numpy as np
import pytest
import xxhash

from protlm import vocabulary
from protlm.data.storage.dataset import open_dataset
from protlm.data.storage.manifest import is_dataset
from protlm.errors import ShardError
from protlm.workflows.prep.options import PrepRequest
from protlm.workflows.prep.prepare import prepare

SEQUENCES = ["MKV", "L", "ACDEFGHIKLMNPQRSTVWY", "MMMM", "WW", "KRKRKR"]


@pytest.fixture
def path(tmp_path):
    (tmp_path / "a.fasta").write_text("".join(f">id{n}\n{sequence}\n" for n, sequence in enumerate(SEQUENCES)))
    (tmp_path / "test.fasta").write_text(">same\nMKV\n")
    inputs, test_inputs = [tmp_path / "a.fasta"], [tmp_path / "test.fasta"]
    prepare(PrepRequest(inputs=inputs, out=tmp_path / "ds", test_inputs=test_inputs, shard_residues=20))
    return tmp_path / "ds"


def edit(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def sequences(split):
    return [vocabulary.decode(split.tokens(index)) for index in range(split.num_records)]


def test_records_are_reached_by_their_number_over_all_shards(path):
    split = open_dataset(path).split("train")
    assert [(shard.num_records, shard.num_residues) for shard in split.summary.shards] == [(2, 4), (1, 20), (3, 12)]
    assert sequences(split) == SEQUENCES
    assert [split.id(index) for index in range(6)] == [f"id{n}" for n in range(6)]
    assert split.lengths.tolist() == [len(sequence) for sequence in SEQUENCES]
    assert split.lengths.dtype == np.int64
    assert (split.name, split.num_records, len(split)) == ("train", 6, 6)
    assert vocabulary.decode(split.tokens(np.int64(5))) == "KRKRKR"


def test_opening_a_dataset_and_reading_from_it_imports_no_parser(path):
    code = f"""
import sys
from protlm.data.storage.dataset import open_dataset
from protlm.data.storage.manifest import is_dataset
from protlm.data.storage.mixture import Mixture
split = open_dataset({str(path)!r}).split("train")
split.shard(0).verify()
print(bytes(Mixture([split]).tokens(0)))
print(*(name for name in sys.modules if name.startswith("protlm.data.parsing.") or name in ("torch", "Bio", "isal")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    tokens, imported = done.stdout.split("\n", 1)
    assert tokens == str(vocabulary.encode(b"MKV").tobytes())
    assert imported.split() == []


@pytest.mark.parametrize("index", [-1, 6])
def test_a_number_out_of_range_is_an_index_error(path, index):
    split = open_dataset(path).split("train")
    with pytest.raises(IndexError, match=f"index: expected 0 to 5, got {index}"):
        split.tokens(index)
    with pytest.raises(IndexError, match=f"index: expected 0 to 5, got {index}"):
        split.id(index)


def test_records_are_read_only(path):
    split = open_dataset(path).split("train")
    assert not split.tokens(0).flags.writeable
    assert not split.lengths.flags.writeable


def test_a_pickled_split_is_small_and_opens_its_own_shards(path):
    split = open_dataset(path).split("train")
    before = pickle.dumps(split)
    list(map(split.tokens, range(6)))
    _ = split.lengths
    assert len(pickle.dumps(split)) == len(before) < 2_000
    assert sequences(pickle.loads(before)) == SEQUENCES


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_worker_processes_read_what_the_parent_reads(path, method):
    split = open_dataset(path).split("train")
    split.tokens(0)
    with multiprocessing.get_context(method).Pool(2) as pool:
        tokens_of_records = pool.map(split.tokens, range(6))
    assert [vocabulary.decode(tokens) for tokens in tokens_of_records] == SEQUENCES


def test_the_hash_is_that_of_the_manifest_and_names_the_content(path):
    opened = open_dataset(path)
    assert opened.hash == xxhash.xxh3_128_hexdigest((path / "manifest.json").read_bytes())
    assert [shard.checksum for shard in opened.manifest.splits["train"].shards] == [
        opened.split("train").shard(number).checksum for number in range(3)
    ]


@pytest.mark.parametrize("name", ["test", "valid", "other"])
def test_an_empty_or_absent_split_is_an_error_that_names_those_there_are(path, name):
    with pytest.raises(ShardError, match=f"no records in split '{name}'; it has train$"):
        open_dataset(path).split(name)


def test_what_is_no_dataset_is_a_clear_error(path):
    for place, message in (
        (path / "absent", "expected a dataset folder, got nothing"),
        (path / "manifest.json", "expected a dataset folder, got a file"),
        (path.parent, "not a protlm dataset: it has no manifest.json"),
    ):
        with pytest.raises(ShardError, match=message):
            open_dataset(place)


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "[1]", '{"format": "other"}', "\x00"])
def test_a_manifest_that_is_none_is_a_clear_error(path, content):
    (path / "manifest.json").write_text(content)
    with pytest.raises(ShardError, match=r"not JSON|not the manifest") as caught:
        open_dataset(path)
    assert "\n" not in str(caught.value)


def train(manifest):
    return manifest["splits"]["train"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=1), "format_version: expected 2, got 1"),
        (lambda m: m.update(extra=1), "extra: extra inputs are not permitted, got 1"),
        (lambda m: m.pop("sources"), "sources: field required$"),
        (lambda m: m["vocabulary"].reverse(), "vocabulary: not the one of this protlm"),
        (lambda m: m["splits"].update(other=train(m)), "splits"),
        (lambda m: train(m).update(num_records="6"), "num_records"),
        (lambda m: train(m).update(num_records=7), "num_records of the shards: expected a sum of 7, got 6"),
        (lambda m: train(m).update(num_residues=7), "num_residues of the shards: expected a sum of 7, got 36"),
        (lambda m: train(m)["residue_counts"].update(A=99), "residue_counts: expected a sum of 36"),
        (lambda m: train(m)["residue_counts"].pop("A"), "residue_counts: expected the letters"),
        (lambda m: train(m)["length_quantiles"].pop("p99"), "length_quantiles: expected"),
        (lambda m: train(m)["shards"][0].update(name="../train-00000.h5"), "name"),
        (lambda m: train(m)["shards"][0].update(name="/train-00000.h5"), "name"),
        (lambda m: train(m)["shards"][0].update(name="train-00000.h5\n"), "name"),
        (lambda m: train(m)["shards"][0].update(checksum="0"), "checksum"),
    ],
)
def test_a_manifest_that_breaks_the_contract_is_refused(path, change, message):
    edit(path, change)
    with pytest.raises(ShardError, match=message) as caught:
        open_dataset(path)
    assert str(caught.value).startswith(f"{path / 'manifest.json'}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shards: shards[0].update(checksum="0" * 32), "checksum: expected 0000.* as in manifest.json"),
        (lambda shards: shards[0].update(name="test-00000.h5"), "no such file"),
        (lambda shards: shards.reverse(), "num_records: expected 3"),
    ],
)
def test_a_shard_that_is_not_the_one_in_the_manifest_is_refused(path, change, message):
    def swap(manifest):
        shards = train(manifest)["shards"]
        names = [shard["name"] for shard in shards]
        change(shards)
        if [shard["name"] for shard in shards] == names[::-1]:
            for shard, name in zip(shards, names, strict=True):
                shard["name"] = name

    edit(path, swap)
    with pytest.raises(ShardError, match=message):
        open_dataset(path).split("train").tokens(0)


def test_a_shard_of_another_split_is_refused(path):
    def move(manifest):
        manifest["splits"]["valid"] = manifest["splits"].pop("train")

    edit(path, move)
    with pytest.raises(ShardError, match=r"split: expected valid as in manifest\.json, got train"):
        open_dataset(path).split("valid").tokens(0)


def test_only_a_folder_that_says_so_is_a_dataset(path):
    assert is_dataset(path)
    assert not is_dataset(path.parent)
    edit(path, lambda manifest: manifest.update(format_version=99))
    assert is_dataset(path)
    edit(path, lambda manifest: manifest.update(format="other"))
    assert not is_dataset(path)


def test_labels_are_those_of_the_record_in_every_shard(tmp_path):
    ids = [f"UniRef100_{name}" for name in "ABCDEF"]
    headers = [f">{name} Protein n=1 Tax=Bacteria TaxID={562 + number}" for number, name in enumerate(ids[:4])]
    lines = zip([*headers, *(f">{name}" for name in ids[4:])], SEQUENCES, strict=True)
    (tmp_path / "a.fasta").write_text("".join(f"{header}\n{sequence}\n" for header, sequence in lines))
    clusters, families = {0: "c1", 1: "c2", 3: "c1"}, [(0, "PF1"), (3, "PF2"), (3, "PF1"), (5, "PF3")]
    (tmp_path / "c.tsv").write_text("".join(f"{name}\t{ids[record]}\n" for record, name in clusters.items()))
    (tmp_path / "f.tsv").write_text("".join(f"{ids[record]}\t{name}\n" for record, name in families))
    labels = {"clusters": tmp_path / "c.tsv", "families": tmp_path / "f.tsv"}
    fractions = {"valid_fraction": 0, "test_fraction": 0, "shard_residues": 20}
    prepare(PrepRequest(inputs=[tmp_path / "a.fasta"], out=tmp_path / "ds", **labels, **fractions))
    split = open_dataset(tmp_path / "ds").split("train")
    assert len(split.summary.shards) == 3
    for record in range(6):
        got = split.labels(np.int64(record))
        assert got.clusters == ((clusters[record],) if record in clusters else ())
        assert sorted(got.families) == sorted(name for of, name in families if of == record)
        assert got.taxa == ((str(562 + record),) if record < 4 else ())
    for record in (-1, 6):
        with pytest.raises(IndexError, match=f"index: expected 0 to 5, got {record}"):
            split.labels(record)


def test_a_dataset_without_labels_has_none(path):
    assert [tuple(open_dataset(path).split("train").labels(record)) for record in range(6)] == [((), (), ())] * 6


@pytest.mark.parametrize("target", ["pipe", "/dev/zero", "loop", "large"])
def test_a_manifest_that_is_no_regular_file_or_too_large_is_refused_at_once(path, target):
    os.mkfifo(path / "pipe")
    (path / "loop").symlink_to("loop")
    with (path / "large").open("wb") as file:
        file.truncate((64 << 20) + 1)
    (path / "manifest.json").unlink()
    (path / "manifest.json").symlink_to(target)
    assert not is_dataset(path)
    with pytest.raises(OSError, match=r"expected a regular file|expected at most|Too many levels") as caught:
        open_dataset(path)
    assert caught.value.filename == str(path / "manifest.json")


def test_counts_are_those_that_64_bits_hold(path):
    edit(path, lambda manifest: manifest["rejects"].update(x=2**63 - 1))
    assert open_dataset(path).manifest.rejects["x"] == 2**63 - 1
    edit(path, lambda manifest: manifest["rejects"].update(x=2**63))
    with pytest.raises(ShardError, match=r"rejects\.x: input should be less than"):
        open_dataset(path)


def test_tokens_are_checked_where_asked_for(path):
    split = open_dataset(path).split("train")
    assert np.array_equal(split.checked_tokens(1), split.tokens(1))
    with h5py.File(path / split.summary.shards[0].name, "r+") as file:
        file["tokens"][0] = 33
    split = open_dataset(path).split("train")
    assert split.tokens(0)[0] == 33
    with pytest.raises(ShardError, match="record 0 of train holds tokens that stand for no residue"):
        split.checked_tokens(0)
