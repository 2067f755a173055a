"""The rules that every layout keeps."""

import errno
import os

import h5py
import numpy as np
import pytest

from protlm.data.embeddings.layouts import LAYOUTS
from protlm.errors import ProtlmError, ShardError
from tests.unit.data.embeddings.layouts.layout_cases import (
    SEQUENCES,
    SOME,
    bytes_of,
    contents_of,
    embeddings_of,
    value,
    write_all,
)

ALL = list(LAYOUTS)
RESUMABLE = [name for name, layout in LAYOUTS.items() if layout.can_resume]


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_there_are_the_layouts_of_the_contract():
    assert ALL == ["protlm", "uniprot", "bio-embeddings", "biotrainer", "esm", "npz", "parquet", "npy"]
    assert RESUMABLE == ["protlm", "uniprot", "bio-embeddings", "biotrainer", "esm", "npy"]
    assert [name for name, layout in LAYOUTS.items() if layout.default_dtype == "float16"] == ["uniprot"]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_equal_content_gives_equal_bytes_at_any_place(tmp_path, name, dtype):
    contents = contents_of(SEQUENCES, dtype=dtype)
    for place in ("one.npy", "two/other"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        layout = write_all(name, tmp_path / place, contents)
        assert {path.name for path in layout.paths(tmp_path / place)} <= set(names_in((tmp_path / place).parent))
    one, two = (list(bytes_of(layout, tmp_path / place).values()) for place in ("one.npy", "two/other"))
    assert one == two


@pytest.mark.parametrize("name", RESUMABLE)
@pytest.mark.parametrize("kind", ["mean", "per-residue"])
def test_a_resume_at_every_record_gives_the_bytes_of_an_uninterrupted_run(tmp_path, name, kind):
    if name == "npy" and kind == "per-residue":
        return
    contents = contents_of(kinds=[kind])
    layout = write_all(name, tmp_path / "whole.npy", contents)
    expected = list(bytes_of(layout, tmp_path / "whole.npy").values())
    for num_written in range(len(contents) + 1):
        for num_kept in {num_written, max(0, num_written - 2)}:
            path = tmp_path / f"{num_written}-{num_kept}" / "out.npy"
            path.parent.mkdir()
            writer = layout.open(path, contents, resume=False)
            for index in range(num_written):
                writer.write(index, embeddings_of(contents, index))
            writer.flush()
            writer.discard()
            with layout.open(path, contents, resume=True) as writer:
                for index in range(num_kept, len(contents)):
                    writer.write(index, embeddings_of(contents, index))
            assert list(bytes_of(layout, path).values()) == expected


@pytest.mark.parametrize("name", RESUMABLE)
def test_a_full_disk_leaves_what_a_resume_goes_on_with(tmp_path, monkeypatch, name):
    contents = contents_of()
    layout = write_all(name, tmp_path / "whole", contents)
    path = tmp_path / "folder" / "out"
    path.parent.mkdir()

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = layout.open(path, contents, resume=False)
    writer.write(0, embeddings_of(contents, 0))
    writer.flush()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        patch.setattr("torch.save", fail)
        with pytest.raises(OSError, match="No space left"):
            writer.write(1, embeddings_of(contents, 1))
    writer.discard()
    with layout.open(path, contents, resume=True) as writer:
        for index in range(1, len(contents)):
            writer.write(index, embeddings_of(contents, index))
    assert list(bytes_of(layout, path).values()) == list(bytes_of(layout, tmp_path / "whole").values())


@pytest.mark.parametrize("name", ["protlm", "uniprot", "bio-embeddings", "biotrainer"])
def test_an_output_takes_disk_for_what_is_written_only(tmp_path, name):
    """While embeddings move from their parts into it, the disk need not hold them twice."""
    contents = contents_of({"short": "M", "long": "M" * 100_000}, kinds=["per-residue"])
    with LAYOUTS[name].open(tmp_path / "out", contents, resume=False) as writer:
        writer.write(0, embeddings_of(contents, 0))
        writer.flush()
        status = (tmp_path / "out").stat()
        assert status.st_blocks * 512 < 100_000 < 100_000 * 5 * 4 < status.st_size
        writer.write(1, embeddings_of(contents, 1))


def test_one_write_of_the_system_may_be_short(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, place: pwrite(descriptor, data[:7], place))
    contents = contents_of()
    write_all("npy", tmp_path / "out.npy", contents)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy")[3], value(contents, ("mean", 6), 3))


@pytest.mark.parametrize("name", ALL)
def test_no_proteins_make_an_empty_output(tmp_path, name):
    layout = write_all(name, tmp_path / "out", contents_of({}))
    assert layout.is_own(tmp_path / "out")


@pytest.mark.parametrize("name", RESUMABLE)
def test_a_resume_needs_something_to_go_on_with(tmp_path, name):
    with pytest.raises(ShardError):
        LAYOUTS[name].open(tmp_path / "out", contents_of(), resume=True)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", ["npz", "parquet"])
def test_a_layout_that_cannot_resume_says_so(tmp_path, name):
    with pytest.raises(ValueError, match=f"layout {name} cannot go on"):
        LAYOUTS[name].open(tmp_path / "out", contents_of(), resume=True)


@pytest.mark.parametrize("name", ["protlm", "uniprot", "bio-embeddings", "biotrainer"])
def test_a_resume_refuses_what_another_model_or_other_proteins_began(tmp_path, name):
    write_all(name, tmp_path / "out", contents_of())
    with pytest.raises(ShardError, match="--resume"):
        LAYOUTS[name].open(tmp_path / "out", contents_of(model_hash="other"), resume=True)
    others = contents_of({f"{record_id}!": sequence * 2 for record_id, sequence in SOME.items()})
    with (
        pytest.raises(ShardError, match="begun for other proteins"),
        LAYOUTS[name].open(tmp_path / "out", others, resume=True) as writer,
    ):
        writer.write(2, embeddings_of(others, 2))


@pytest.mark.parametrize("name", ALL)
def test_what_is_replaced_is_replaced_whole(tmp_path, name):
    layout = write_all(name, tmp_path / "out", contents_of(SEQUENCES))
    write_all(name, tmp_path / "out", contents_of())
    write_all(name, tmp_path / "new", contents_of())
    assert list(bytes_of(layout, tmp_path / "out").values()) == list(bytes_of(layout, tmp_path / "new").values())


@pytest.mark.parametrize("name", ALL)
def test_each_layout_knows_only_its_own(tmp_path, name):
    for other in ALL:
        folder = tmp_path / other
        folder.mkdir()
        write_all(other, folder / "out.npy", contents_of())
        assert LAYOUTS[name].is_own(folder / "out.npy") is (name == other)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"text\n",
        b"PK\x03\x04 cut",
        b"\x89HDF\r\n\x1a\n cut",
        b"PAR1 cut",
        b"\x93NUMPY\x01\x00 cut",
        b"\x93NUMPY\x01\x00\x06\x00{'a':(",
    ],
)
def test_odd_files_and_folders_are_nobodys_own(tmp_path, name, content):
    path = tmp_path / "out"
    assert not LAYOUTS[name].is_own(path)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    assert not LAYOUTS[name].is_own(path)


@pytest.mark.parametrize("name", [name for name in ALL if name != "protlm"])
def test_records_out_of_order_are_refused(tmp_path, name):
    contents = contents_of()
    writer = LAYOUTS[name].open(tmp_path / "out", contents, resume=False)
    with pytest.raises(ValueError, match="index: expected record 0, got 1"):
        writer.write(1, embeddings_of(contents, 1))
    writer.write(0, embeddings_of(contents, 0))
    with pytest.raises(ValueError, match="index: expected record 1, got 0"):
        writer.write(0, embeddings_of(contents, 0))
    with pytest.raises(ValueError, match="expected every record, got none for 1"):
        writer.close()


@pytest.mark.parametrize("name", ALL)
def test_embeddings_that_do_not_fit_are_refused(tmp_path, name):
    contents = contents_of()
    with LAYOUTS[name].open(tmp_path / "out", contents, resume=False) as writer:
        with pytest.raises(ValueError, match="embeddings: expected"):
            writer.write(0, {("cls", 6): value(contents, ("mean", 6), 0)})
        with pytest.raises(ValueError, match=r"expected shape \(5,\) for mean of record 0, got \(4,\)"):
            writer.write(0, {("mean", 6): np.zeros(4, np.float32)})
        for index in range(len(contents)):
            writer.write(index, embeddings_of(contents, index))


def test_a_number_too_large_for_float16_is_an_error_that_says_what_to_do(tmp_path):
    contents = contents_of(dtype="float16")
    with (
        pytest.raises(ProtlmError, match=r"'sp\|P69905\|HBA_HUMAN': mean: expected numbers up to 65504.* got 1e\+06"),
        LAYOUTS["npy"].open(tmp_path / "out.npy", contents, resume=False) as writer,
    ):
        writer.write(0, {("mean", 6): np.array([1, 2, 1e6, 3, 4], np.float32)})


@pytest.mark.parametrize("name", ["uniprot", "bio-embeddings", "biotrainer", "npy", "parquet"])
def test_one_kind_and_one_layer_where_there_is_room_for_no_more(name):
    check = LAYOUTS[name].check
    check(("mean",), (6,), "float32")
    with pytest.raises(ValueError, match=rf"layout {name} holds one kind of embedding, not 2 \(mean, cls\)"):
        check(("mean", "cls"), (6,), "float32")
    with pytest.raises(ValueError, match=f"layout {name} holds one layer, not 3"):
        check(("mean",), (1, 2, 3), "float32")


@pytest.mark.parametrize("name", ["npy", "parquet"])
@pytest.mark.parametrize("kind", ["per-residue", "logits"])
def test_no_rows_of_residues_where_a_protein_has_one_row(name, kind):
    with pytest.raises(ValueError, match=f"one row for each protein, mean or cls, not {kind}"):
        LAYOUTS[name].check((kind,), (6,), "float32")


@pytest.mark.parametrize("name", ["protlm", "esm", "npz"])
def test_any_kinds_and_layers_elsewhere(name):
    LAYOUTS[name].check(("logits", "mean", "cls", "per-residue"), (0, 6), "float16")


@pytest.mark.parametrize("name", ["esm", "npy"])
def test_an_id_that_would_break_the_list_of_ids_is_refused(tmp_path, name):
    with pytest.raises(ProtlmError, match=r"id 'a\\tb': expected no tab or line end"):
        LAYOUTS[name].open(tmp_path / "out", contents_of({"ok": "M", "a\tb": "M"}), resume=False)
    assert names_in(tmp_path) == []


def test_hdf5_layouts_tell_the_model_and_what_they_hold(tmp_path):
    for name in ("uniprot", "bio-embeddings", "biotrainer"):
        write_all(name, tmp_path / name, contents_of(kinds=["cls"], layers=[4]))
        with h5py.File(tmp_path / name) as file:
            assert dict(file.attrs) == {
                "layout": name, "model_hash": "abc", "precision": "32", "kind": "cls", "layer": 4,
            }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": []}, "kinds: expected"),
        ({"kinds": ["mean", "mean"]}, "kinds: expected"),
        ({"layers": []}, "layers: expected at least one for mean"),
        ({"layers": [1, 1]}, "layers: expected different"),
        ({"layers": [-1]}, "layers: expected different ones from 0"),
        ({"dtype": "float64"}, "dtype: expected one of"),
    ],
)
def test_contents_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        contents_of(**changes)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_pipe_in_the_place_of_an_output_is_not_its_own_and_nobody_waits_for_it(name, tmp_path):
    layout = LAYOUTS[name]
    for path in layout.paths(tmp_path / "out"):
        os.mkfifo(path)
    assert not layout.is_own(tmp_path / "out")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "index.tsv")
    assert not layout.is_own(tmp_path / "folder")
