import pickle
from dataclasses import replace as changed

import h5py
import numpy as np
import pytest

from protlm import open_embeddings
from protlm.data.digests import sequence_digest
from protlm.data.embeddings.layouts import LAYOUTS, Contents
from protlm.data.strings import Strings
from protlm.errors import ShardError
from tests.hdf5_edits import edit, replace

IDS = ["a", "b#2", "é/c"]
LENGTHS = [3, 1, 5]
HASHES = [sequence_digest(record_id.encode()) for record_id in IDS]
ALL_KINDS = ("mean", "per-residue", "cls")
CONTENTS = Contents(
    ids=Strings.of(IDS),
    lengths=np.array(LENGTHS),
    digests=np.frombuffer(b"".join(HASHES), np.uint8).reshape(3, 16),
    residues=lambda index: b"M" * LENGTHS[index],
    kinds=ALL_KINDS,
    layers=(3, 6, 12),
    last_layer=12,
    model_dim=4,
    dtype="float32",
    model_hash="abc",
)


def create(path, **changes):
    return LAYOUTS["protlm"].open(path, changed(CONTENTS, **changes), resume=False)


def value(kind, layer, index):
    seed = [*kind.encode(), layer, index]
    shape = (LENGTHS[index], 4) if kind == "per-residue" else (4,)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def fill(writer):
    # Out of order, as batches of similar length arrive.
    for index in (2, 0, 1):
        writer.write(index, {(kind, layer): value(kind, layer, index) for kind, layer in writer.contents.columns})


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "e.h5"
    with create(path) as writer:
        fill(writer)
    return path


@pytest.mark.parametrize("kind", ["mean", "per-residue", "cls"])
@pytest.mark.parametrize("layer", [3, 6, 12])
def test_every_kind_and_layer_is_read_as_written(path, kind, layer):
    embeddings = open_embeddings(path, kind=kind, layer=layer)
    for index, record_id in enumerate(IDS):
        np.testing.assert_array_equal(embeddings[record_id], value(kind, layer, index))
    assert (embeddings.kind, embeddings.layer, embeddings.model_hash) == (kind, layer, "abc")


def test_the_default_is_the_richest_kind_and_the_last_layer(path, tmp_path):
    embeddings = open_embeddings(path)
    assert (embeddings.kind, embeddings.layer, embeddings.kinds, embeddings.layers) == (
        "per-residue",
        12,
        ("per-residue", "mean", "cls"),
        (3, 6, 12),
    )
    with create(tmp_path / "few.h5", kinds=("cls", "mean"), layers=(0,)) as writer:
        fill(writer)
    embeddings = open_embeddings(tmp_path / "few.h5")
    assert (embeddings.kind, embeddings.layer, embeddings.kinds) == ("mean", 0, ("mean", "cls"))


def test_it_is_a_mapping_in_record_order(path):
    embeddings = open_embeddings(path, kind="mean")
    assert list(embeddings) == IDS
    assert len(embeddings) == 3
    assert "a" in embeddings
    assert "z" not in embeddings
    assert embeddings.get("z") is None
    assert [array.shape for array in embeddings.values()] == [(4,)] * 3
    assert "mean of layer 12" in repr(embeddings)
    with pytest.raises(KeyError, match="'z'"):
        embeddings["z"]
    assert [bytes(digest) for digest in embeddings.sequence_hashes] == HASHES


def test_what_is_read_is_a_read_only_view(path):
    with pytest.raises(ValueError, match="read-only"):
        open_embeddings(path)["a"][0, 0] = 1


def test_the_layout_is_the_one_of_the_contract(path):
    with h5py.File(path) as file:
        assert dict(file.attrs) == {
            "format": "protlm-embeddings",
            "format_version": 1,
            "model_hash": "abc",
            "precision": "32",
            "dtype": "float32",
        }
        assert file["per-residue/layer_6"].shape == (9, 4)
        assert file["per-residue/offsets"][:].tolist() == [0, 3, 4, 9]
        assert file["mean/layer_12"].shape == (3, 4)
        assert file["sequence_hash"].shape == (3, 16)
        assert file["ids/bytes"][:].tobytes().decode() == "ab#2é/c"
        np.testing.assert_array_equal(file["mean/layer_3"][1], value("mean", 3, 1))
        for name in ("ids/offsets", "per-residue/offsets", "per-residue/layer_12", "mean/layer_3"):
            assert file[name].id.get_offset() % 64 == 0


def test_float16_is_stored_as_such(tmp_path):
    with create(tmp_path / "e.h5", kinds=("mean",), layers=(1,), dtype="float16") as writer:
        fill(writer)
    embeddings = open_embeddings(tmp_path / "e.h5")["a"]
    assert embeddings.dtype == np.float16
    np.testing.assert_array_equal(embeddings, value("mean", 1, 0).astype(np.float16))


def test_a_pickled_file_is_opened_anew(path):
    embeddings = open_embeddings(path, "mean", 6)
    pickled = pickle.dumps(embeddings)
    assert len(pickled) < 500
    again = pickle.loads(pickled)
    assert (again.kind, again.layer) == ("mean", 6)
    np.testing.assert_array_equal(again["a"], embeddings["a"])


def test_a_missing_record_is_found_at_the_end(tmp_path):
    writer = create(tmp_path / "e.h5", kinds=("mean",), layers=(1,))
    writer.write(0, {("mean", 1): value("mean", 1, 0)})
    writer.write(2, {("mean", 1): value("mean", 1, 2)})
    with pytest.raises(ValueError, match="expected every record, got none for 1"):
        writer.close()


def test_a_record_that_there_is_not_is_refused(tmp_path):
    with create(tmp_path / "e.h5", kinds=("mean",), layers=(1,)) as writer:
        fill(writer)
        for index in (-1, 3):
            with pytest.raises(ValueError, match=f"index: expected one of 3 records, got {index}"):
                writer.write(index, {("mean", 1): value("mean", 1, 0)})


def test_logits_are_opened_only_where_asked_for_or_alone(tmp_path):
    for kinds in (("logits",), ("logits", "cls")):
        path = tmp_path / "-".join(kinds)
        with create(path, kinds=kinds, layers=(3, 6)) as writer:
            for index, length in enumerate(LENGTHS):
                rows = {(kind, layer): value(kind, layer, index) for kind, layer in writer.contents.columns}
                writer.write(index, rows | {("logits", 12): np.full((length, 33), index, np.float32)})
        assert open_embeddings(path).kind == kinds[-1]
        embeddings = open_embeddings(path, "logits")
        assert (embeddings.layer, embeddings.layers) == (12, (12,))
        assert {record_id: rows.shape for record_id, rows in embeddings.items()} == dict(
            zip(IDS, [(3, 33), (1, 33), (5, 33)], strict=True)
        )
        assert [rows.min() for rows in embeddings.values()] == [0, 1, 2]


def test_records_are_found_by_id_whatever_their_hashes(path, monkeypatch):
    # As if all ids had the same one.
    monkeypatch.setattr("xxhash.xxh3_64_intdigest", lambda text: 7)
    embeddings = open_embeddings(path, "mean", 3)
    for index, record_id in enumerate(IDS):
        np.testing.assert_array_equal(embeddings[record_id], value("mean", 3, index))
    for absent in ("z", "\ud800", b"a", 0, None):
        assert absent not in embeddings


def test_a_kind_or_layer_that_is_not_there_is_an_error_that_names_those_there_are(path):
    with pytest.raises(ShardError, match="no layer 5 of kind 'per-residue'; it has 3, 6, 12"):
        open_embeddings(path, layer=5)
    with pytest.raises(ShardError, match="no embeddings of kind 'logits'; it has per-residue, mean, cls"):
        open_embeddings(path, kind="logits")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.attrs.__setitem__("format", "other"), "not a protlm-embeddings file"),
        (lambda file: file.attrs.__setitem__("format_version", 9), "format_version: expected 1, got 9"),
        (lambda file: file.attrs.__setitem__("dtype", "float64"), "dtype: expected one of float32, float16"),
        (
            lambda file: file.attrs.__setitem__("dtype", "float16"),
            "per-residue/layer_12: expected float16, got float32",
        ),
        (lambda file: [file.__delitem__(kind) for kind in ("mean", "cls", "per-residue")], "no embeddings in it"),
        (replace("ids/bytes", data=np.zeros(9, np.uint8)), "ids/offsets: expected offsets from 0 to 9, got 0 to 8"),
        (replace("sequence_hash", data=np.zeros((2, 16), np.uint8)), "sequence_hash: expected 3 rows, got 2"),
        (replace("per-residue/offsets", data=np.array([0, 3, 9])), "per-residue/offsets: expected 4 rows, got 3"),
        (replace("per-residue/offsets", data=np.array([0, 4, 3, 9])), "per-residue/offsets: expected .* never fall"),
        (replace("per-residue/layer_12", data=np.zeros((8, 4), np.float32)), "offsets: expected offsets from 0 to 8"),
        (replace("per-residue/layer_12", data=np.zeros(9, np.float32)), "layer_12: expected 2 axes"),
    ],
)
def test_a_file_that_breaks_the_contract_is_refused(path, change, message):
    edit(path, change)
    with pytest.raises(ShardError, match=message) as caught:
        open_embeddings(path)
    assert "\n" not in str(caught.value)


def test_repeated_ids_and_missing_rows_are_refused(path):
    edit(path, replace("mean/layer_3", data=np.zeros((2, 4), np.float32)))
    with pytest.raises(ShardError, match="mean/layer_3: expected 3 rows, got 2"):
        open_embeddings(path, "mean", 3)
    edit(path, replace("ids/bytes", data=np.frombuffer(b"aa", np.uint8)))
    edit(path, replace("ids/offsets", data=np.array([0, 1, 2, 2])))
    with pytest.raises(ShardError, match="ids: expected all different, got a repeated one"):
        open_embeddings(path)["a"]


def test_what_is_no_embeddings_file_is_a_clear_error(path):
    with pytest.raises(ShardError, match="no such file"):
        open_embeddings(path.with_name("absent.h5"))
    path.write_bytes(b"text")
    with pytest.raises(ShardError, match="not a readable HDF5 file"):
        open_embeddings(path)
