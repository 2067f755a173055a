import inspect
import pickle

import h5py
import numpy as np
import pytest

from protlm import open_embeddings
from protlm.data import embeddings
from protlm.data.duplicates import sequence_digest
from protlm.data.embeddings import EmbeddingsWriter
from protlm.errors import ProtlmError, ShardError

IDS = ["a", "b#2", "é/c"]
LENGTHS = [3, 1, 5]
HASHES = [sequence_digest(record_id.encode()) for record_id in IDS]


def create(path, kinds=("mean", "per-residue", "cls"), layers=(3, 6, 12), dims=(4, 4, 2), **changes):
    arguments = {
        "ids": IDS,
        "lengths": LENGTHS,
        "sequence_hashes": HASHES,
        "kinds": kinds,
        "layers": layers,
        "dims": dims,
        "dtype": "float32",
        "model_hash": "abc",
        **changes,
    }
    return EmbeddingsWriter.create(path, **arguments)


def value(kind, layer, index, dim):
    seed = [("per-residue", "mean", "cls").index(kind), layer, index]
    shape = (LENGTHS[index], dim) if kind == "per-residue" else (dim,)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def fill(writer, kinds=("mean", "per-residue", "cls"), layers=(3, 6, 12), dims=(4, 4, 2)):
    # Out of order, as batches of similar length arrive.
    for index in (2, 0, 1):
        for kind in kinds:
            for layer, dim in zip(layers, dims, strict=True):
                writer.write(kind, layer, index, value(kind, layer, index, dim))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "e.h5"
    with create(path) as writer:
        fill(writer)
    return path


def edit(path, change):
    with h5py.File(path, "r+") as file:
        change(file)


def replace(name, **options):
    def change(file):
        del file[name]
        file.create_dataset(name, **options)

    return change


@pytest.mark.parametrize("kind", ["mean", "per-residue", "cls"])
@pytest.mark.parametrize(("layer", "dim"), [(3, 4), (6, 4), (12, 2)])
def test_every_kind_and_layer_is_read_as_written(path, kind, layer, dim):
    found = open_embeddings(path, kind=kind, layer=layer)
    for index, record_id in enumerate(IDS):
        np.testing.assert_array_equal(found[record_id], value(kind, layer, index, dim))
    assert (found.kind, found.layer, found.model_hash) == (kind, layer, "abc")


def test_the_default_is_the_richest_kind_and_the_last_layer(path, tmp_path):
    found = open_embeddings(path)
    assert (found.kind, found.layer, found.kinds, found.layers) == (
        "per-residue",
        12,
        ("per-residue", "mean", "cls"),
        (3, 6, 12),
    )
    with create(tmp_path / "few.h5", kinds=["cls", "mean"], layers=[0], dims=[4]) as writer:
        fill(writer, ["cls", "mean"], [0], [4])
    found = open_embeddings(tmp_path / "few.h5")
    assert (found.kind, found.layer, found.kinds) == ("mean", 0, ("mean", "cls"))


def test_it_is_a_mapping_in_record_order(path):
    found = open_embeddings(path, kind="mean")
    assert list(found) == IDS
    assert len(found) == 3
    assert "a" in found
    assert "z" not in found
    assert found.get("z") is None
    assert [array.shape for array in found.values()] == [(2,)] * 3
    assert "mean of layer 12" in repr(found)
    with pytest.raises(KeyError, match="'z'"):
        found["z"]
    assert [bytes(digest) for digest in found.sequence_hashes] == HASHES


def test_what_is_read_is_a_read_only_view(path):
    with pytest.raises(ValueError, match="read-only"):
        open_embeddings(path)["a"][0, 0] = 1


def test_the_layout_is_the_one_of_the_contract(path):
    with h5py.File(path) as file:
        assert dict(file.attrs) == {
            "format": "protlm-embeddings",
            "format_version": 1,
            "model_hash": "abc",
            "dtype": "float32",
        }
        assert file["per-residue/layer_6"].shape == (9, 4)
        assert file["per-residue/offsets"][:].tolist() == [0, 3, 4, 9]
        assert file["mean/layer_12"].shape == (3, 2)
        assert file["sequence_hash"].shape == (3, 16)
        assert file["ids/bytes"][:].tobytes().decode() == "ab#2é/c"
        np.testing.assert_array_equal(file["mean/layer_3"][1], value("mean", 3, 1, 4))
        for name in ("ids/offsets", "per-residue/offsets", "per-residue/layer_12", "mean/layer_3"):
            assert file[name].id.get_offset() % 64 == 0


def test_float16_is_stored_as_such(tmp_path):
    with create(tmp_path / "e.h5", ["mean"], [1], [4], dtype="float16") as writer:
        fill(writer, ["mean"], [1], [4])
    found = open_embeddings(tmp_path / "e.h5")["a"]
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, value("mean", 1, 0, 4).astype(np.float16))


def test_the_folder_is_made_if_it_is_not_there(tmp_path):
    with create(tmp_path / "new" / "folder" / "e.h5", ["mean"], [1], [4]) as writer:
        fill(writer, ["mean"], [1], [4])
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["e.h5"]


def test_no_records_make_an_empty_mapping(tmp_path):
    with create(tmp_path / "e.h5", ids=[], lengths=[], sequence_hashes=[]):
        pass
    assert dict(open_embeddings(tmp_path / "e.h5")) == {}


def test_a_pickled_file_is_opened_anew(path):
    found = open_embeddings(path, "mean", 6)
    pickled = pickle.dumps(found)
    assert len(pickled) < 500
    again = pickle.loads(pickled)
    assert (again.kind, again.layer) == ("mean", 6)
    np.testing.assert_array_equal(again["a"], found["a"])


def test_nothing_is_left_when_writing_fails(tmp_path):
    def interrupted():
        with create(tmp_path / "e.h5") as writer:
            fill(writer)
            assert not (tmp_path / "e.h5").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_record_is_found_at_the_end(tmp_path):
    writer = create(tmp_path / "e.h5", ["mean"], [1], [4])
    writer.write("mean", 1, 0, value("mean", 1, 0, 4))
    with pytest.raises(ValueError, match="mean of layer 1: expected every record, got none for 1"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_there_is_no_room(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", fail)
    with pytest.raises(OSError, match="No space left"):
        create(tmp_path / "e.h5")
    assert list(tmp_path.iterdir()) == []


def test_the_space_is_claimed_at_creation(tmp_path):
    writer = create(tmp_path / "e.h5", ["mean"], [1], [300_000])
    (temporary,) = tmp_path.iterdir()
    assert temporary.stat().st_blocks * 512 >= 3 * 300_000 * 4
    writer.discard()


def test_an_existing_file_is_replaced_only_by_force(path):
    with pytest.raises(ProtlmError, match="exists already"):
        create(path)
    with create(path, ["mean"], [1], [4], force=True) as writer:
        fill(writer, ["mean"], [1], [4])
    assert open_embeddings(path).kinds == ("mean",)
    with pytest.raises(ProtlmError, match="exists already"):
        create(path.parent, force=True)


@pytest.mark.parametrize("shape", [(3, 5), (2, 4), (4,), (1, 4)])
def test_an_embedding_of_another_shape_is_refused(tmp_path, shape):
    writer = create(tmp_path / "e.h5", ["per-residue"], [1], [4])
    with pytest.raises(ValueError, match=r"embedding: expected shape \(3, 4\)"):
        writer.write("per-residue", 1, 0, np.zeros(shape, np.float32))
    writer.discard()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [1, 2]}, "expected equal numbers"),
        ({"ids": ["a", "b", "a"]}, "ids: expected all different"),
        ({"kinds": []}, "kinds: expected"),
        ({"kinds": ["mean", "mean"]}, "kinds: expected"),
        ({"layers": [1]}, "layers, dims: expected"),
        ({"layers": [1, 1, 2]}, "layers, dims: expected"),
        ({"layers": [-1, 1, 2]}, "layers, dims: expected"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        create(tmp_path / "e.h5", **changes)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_dtype_is_refused():
    # Past the type check that only tests have.
    with pytest.raises(ValueError, match="dtype: expected one of"):
        inspect.unwrap(embeddings._check_arguments)([], [], [], ["mean"], [1], [4], "float64")


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
        (replace("per-residue/layer_12", data=np.zeros((8, 2), np.float32)), "offsets: expected offsets from 0 to 8"),
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
    with pytest.raises(ShardError, match="ids: expected all different"):
        open_embeddings(path)


def test_what_is_no_embeddings_file_is_a_clear_error(path):
    with pytest.raises(ShardError, match="no such file"):
        open_embeddings(path.with_name("absent.h5"))
    path.write_bytes(b"text")
    with pytest.raises(ShardError, match="not a readable HDF5 file"):
        open_embeddings(path)
