"""Each layout is read as those read it who use it."""

import csv
import hashlib
import subprocess
import sys
import zipfile

import h5py
import numpy as np
import pytest
import torch

from protlm import open_embeddings, vocabulary
from protlm.data.embeddings.layouts import LAYOUTS, biotrainer, esm, npz, uniprot
from protlm.data.strings import Strings
from protlm.errors import ProtlmError, ShardError
from tests.unit.data.embeddings.layouts.layout_cases import (
    MODEL_DIM,
    SEQUENCES,
    SOME,
    contents_of,
    embeddings_of,
    value,
    write_all,
)

KINDS = ("logits", "per-residue", "mean", "cls")


def same(stored, contents, column, index):
    expected = value(contents, column, index).astype(contents.dtype)
    assert stored.dtype == expected.dtype
    np.testing.assert_array_equal(stored, expected)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_protlm_gives_every_kind_and_layer_by_id(tmp_path, dtype):
    contents = contents_of(SEQUENCES, KINDS, (0, 6), dtype)
    write_all("protlm", tmp_path / "e.h5", contents)
    for kind, layer in contents.columns:
        embeddings = open_embeddings(tmp_path / "e.h5", kind, layer)
        assert list(embeddings) == list(SEQUENCES)
        for index, record_id in enumerate(SEQUENCES):
            same(embeddings[record_id], contents, (kind, layer), index)
    logits = open_embeddings(tmp_path / "e.h5", "logits")
    assert (logits.layer, logits["again"].shape) == (6, (4, len(vocabulary.TOKENS)))
    assert open_embeddings(tmp_path / "e.h5").kind == "per-residue"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_uniprot_is_read_by_accession(tmp_path, kind, dtype):
    contents = contents_of(SEQUENCES, [kind], dtype=dtype)
    write_all("uniprot", tmp_path / "per.h5", contents)
    with h5py.File(tmp_path / "per.h5") as file:
        keys = {dataset.attrs["original_id"]: key for key, dataset in file.items()}
        assert sorted(keys) == sorted(SEQUENCES)
        for index, record_id in enumerate(SEQUENCES):
            same(file[keys[record_id]][()], contents, contents.columns[0], index)
        np.testing.assert_array_equal(np.array(file["P69905"]), value(contents, contents.columns[0], 0))
    assert keys["sp|P69905|HBA_HUMAN"] == "P69905"
    assert keys["P69905"] == "P69905#2"
    assert keys["tr|A0A0/24|X"] == "A0A0_24"
    assert keys["UniRef100_A0A7"] == "UniRef100_A0A7"
    assert keys["."] == "_"
    assert keys["../../escape"] == ".._.._escape"


@pytest.mark.parametrize(
    ("record_id", "key"),
    [
        ("sp|P69905-2|HBA_HUMAN", "P69905-2"),
        ("tr|A0A0|", "A0A0"),
        ("sp|P69905", "sp|P69905"),
        ("sp||X", "sp||X"),
        ("gb|P69905|X", "gb|P69905|X"),
        ("", "_"),
        ("sp|.|X", "_"),
        ("a\0b/c", "a_b_c"),
    ],
)
def test_the_key_of_uniprot_is_the_accession_or_the_id(record_id, key):
    assert uniprot.key_of(record_id) == key


@pytest.mark.parametrize("kind", ["per-residue", "mean"])
def test_bio_embeddings_is_read_by_original_id(tmp_path, kind):
    contents = contents_of(SEQUENCES, [kind])
    write_all("bio-embeddings", tmp_path / "e.h5", contents)
    with h5py.File(tmp_path / "e.h5", "r") as file:
        embeddings = {dataset.attrs["original_id"]: dataset[()] for _, dataset in file.items()}
        keys = {dataset.attrs["original_id"]: key for key, dataset in file.items()}
    assert sorted(embeddings) == sorted(SEQUENCES)
    for index, (record_id, sequence) in enumerate(SEQUENCES.items()):
        same(embeddings[record_id], contents, (kind, 6), index)
        assert keys[record_id].split("#")[0] == hashlib.md5(sequence.encode()).hexdigest()
    assert "#" not in keys["sp|P69905|HBA_HUMAN"]
    assert keys["again"] == keys["sp|P69905|HBA_HUMAN"] + "#2"
    with (tmp_path / "mapping_file.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["", "original_id", "sequence_length"]
    assert rows == [[keys[record_id], record_id, str(len(sequence))] for record_id, sequence in SEQUENCES.items()]


@pytest.mark.parametrize("name", ["uniprot", "bio-embeddings", "biotrainer"])
def test_datasets_come_in_the_order_of_the_proteins(tmp_path, name):
    sequences = {record_id: sequence for record_id, sequence in SEQUENCES.items() if record_id != "again"}
    many = sequences | {f"id{number * 37 % 400}": "M" * (number + 5) for number in range(400)}
    write_all(name, tmp_path / "e.h5", contents_of(many))
    with h5py.File(tmp_path / "e.h5") as file:
        assert [dataset.attrs["original_id"] for dataset in file.values()] == list(many)
        assert list(file) != sorted(file)


def biotrainer_key(sequence):
    """As `calculate_sequence_hash` of biotrainer 1.4.0 and biotrainer-core 2.0.0 computes it."""
    return hashlib.sha256(f"{sequence}_{len(sequence)}".encode()).hexdigest()


def test_the_key_of_biotrainer_is_a_known_sum():
    assert biotrainer_key("MVLS") == "63f4a977d4e17b04e06b3bf4d4339332e33b4537de68ebe33182f765db047b20"
    assert biotrainer.key_of(b"MVLS") == biotrainer_key("MVLS")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["per-residue", "mean"])
def test_biotrainer_finds_each_protein_by_its_sequence(tmp_path, kind, dtype):
    contents = contents_of(SEQUENCES, [kind], dtype=dtype)
    write_all("biotrainer", tmp_path / "e.h5", contents)
    assert [path.name for path in tmp_path.iterdir()] == ["e.h5"]
    first = {}
    for index, sequence in enumerate(SEQUENCES.values()):
        first.setdefault(sequence, index)
    with h5py.File(tmp_path / "e.h5", "r") as file:
        # biotrainer counts what is in the file, and refuses what it has no protein for.
        assert list(file) == [biotrainer_key(sequence) for sequence in first]
        for record_id, sequence in SEQUENCES.items():
            dataset = file[biotrainer_key(sequence)]
            index = first[sequence]
            same(dataset[:], contents, (kind, 6), index)
            assert dataset.attrs["original_id"] == (record_id if record_id != "again" else "sp|P69905|HBA_HUMAN")


def test_biotrainers_own_reader_reads_it(tmp_path):
    h5_files = pytest.importorskip("biotrainer_core.h5_files")
    from biotrainer_core.data_classes import SequenceData

    contents = contents_of(SEQUENCES, ["per-residue"])
    write_all("biotrainer", tmp_path / "e.h5", contents)
    proteins = [SequenceData(seq_id=record_id, seq=sequence) for record_id, sequence in SEQUENCES.items()]
    found = h5_files.read_id2emb(tmp_path / "e.h5", {protein.get_hash() for protein in proteins})
    assert found.keys() == h5_files.read_id2emb(tmp_path / "e.h5").keys()
    for index, protein in enumerate(proteins):
        if protein.seq_id != "again":
            same(found[protein.get_hash()], contents, ("per-residue", 6), index)


def test_a_foreign_mapping_file_is_not_ours_to_replace(tmp_path):
    layout = write_all("bio-embeddings", tmp_path / "e.h5", contents_of())
    assert layout.is_own(tmp_path / "e.h5")
    (tmp_path / "mapping_file.csv").unlink()
    assert layout.is_own(tmp_path / "e.h5")
    (tmp_path / "mapping_file.csv").write_text("my,own,notes\n")
    assert not layout.is_own(tmp_path / "e.h5")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_esm_files_are_those_of_esm_extract(tmp_path, dtype):
    contents = contents_of(SEQUENCES, KINDS, (0, 6), str(dtype).removeprefix("torch."))
    write_all("esm", tmp_path / "out", contents)
    header, *lines = (tmp_path / "out" / "index.tsv").read_text().splitlines()
    assert header == "protein\tfile"
    assert [line.split("\t")[0] for line in lines] == list(SEQUENCES)
    for index, line in enumerate(lines):
        record_id, name = line.split("\t")
        content = torch.load(tmp_path / "out" / name, weights_only=True)
        assert content.pop("label") == record_id
        assert sorted(content) == ["bos_representations", "logits", "mean_representations", "representations"]
        same(content["logits"].numpy(), contents, ("logits", 6), index)
        titles = {"per-residue": "representations", "mean": "mean_representations", "cls": "bos_representations"}
        for kind, title in titles.items():
            assert list(content[title]) == [0, 6]
            for layer, tensor in content[title].items():
                same(tensor.numpy(), contents, (kind, layer), index)
    assert (tmp_path / "out" / "sp|P69905|HBA_HUMAN.pt").is_file()


def test_esm_files_hold_only_what_was_asked_for(tmp_path):
    write_all("esm", tmp_path / "out", contents_of(kinds=["mean"]))
    content = torch.load(tmp_path / "out" / "again.pt", weights_only=True)
    assert sorted(content) == ["label", "mean_representations"]
    assert (tmp_path / "out" / "again.pt").stat().st_size < 3_000


def test_every_esm_file_lies_in_the_folder_under_a_name_of_its_own_whatever_the_id(tmp_path):
    (tmp_path / "folder").mkdir()
    write_all("esm", tmp_path / "folder" / "out", contents_of(SEQUENCES))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["out"]
    names = [path.name for path in (tmp_path / "folder" / "out").iterdir()]
    assert len({name.casefold() for name in names}) == len(SEQUENCES) + 1
    assert all(len(name.encode()) <= 255 and not name.startswith((".", "-")) for name in names)
    plain = {"again", "again#2", "日本", "a.npy", "a", "P69905", "sp|P69905|HBA_HUMAN", "UniRef100_A0A7"}
    assert {name.removesuffix(".pt") for name in names} >= plain
    assert not {"CON.pt", "Again.pt", "dot..pt"} & set(names)


def test_an_id_made_to_collide_with_the_name_of_another_does_not(tmp_path):
    made = esm._with_hash("Twin", "Twin")
    write_all("esm", tmp_path / "out", contents_of({"twin": "M", "Twin": "MM", made: "MMM", "../x": "L"}))
    assert len(list((tmp_path / "out").glob("*.pt"))) == 4
    for line in (tmp_path / "out" / "index.tsv").read_text().splitlines()[1:]:
        record_id, name = line.split("\t")
        assert torch.load(tmp_path / "out" / name, weights_only=True)["label"] == record_id


def test_a_folder_with_more_than_ours_in_it_is_not_ours_to_replace(tmp_path):
    layout = write_all("esm", tmp_path / "out", contents_of())
    assert layout.is_own(tmp_path / "out")
    (tmp_path / "out" / "thesis.docx").write_text("")
    assert not layout.is_own(tmp_path / "out")


@pytest.mark.parametrize(
    "record_id", ["sp|P69905|HBA_HUMAN", "a#2", "日本", "a.b", "a..b", "x-y", "console", "é" * 100, "a b"]
)
def test_an_id_that_any_file_system_can_hold_is_the_name_of_its_file(record_id):
    assert esm.file_names(Strings.of([record_id])).to_list() == [record_id]


@pytest.mark.parametrize(
    ("record_id", "beginning"),
    [
        ("../../x", "_._.._x-"),
        ("/x", "_x-"),
        ("a\\b", "a_b-"),
        ("a\0b\x1f\x7f", "a_b__-"),
        (".hidden", "_hidden-"),
        ("-rf", "_rf-"),
        ("..", "__-"),
        ("", "_-"),
        ("end.", "end_-"),
        ("nul", "_nul-"),
        ("COM1.x", "_COM1.x-"),
        ("lpt² .x", "_lpt² .x-"),
        ("CONOUT$", "_CONOUT$-"),
        ("WP_1:a*b?", "WP_1_a_b_-"),
        ("a<b>", "a_b_-"),
        ('the "best"', "the _best_-"),
        ("é" * 101, "é" * 100 + "-"),
    ],
)
def test_an_id_that_no_file_should_have_becomes_a_safe_name_with_its_hash(record_id, beginning):
    (name,) = esm.file_names(Strings.of([record_id])).to_list()
    assert name.startswith(beginning)
    assert len(name) == len(beginning) + 16
    assert len(f"{name}.pt".encode()) <= 255


def test_a_folder_begun_under_other_names_is_not_gone_on_with(tmp_path):
    """An earlier version left a colon in the names of files."""
    contents = contents_of({"a:b": "M", "c": "MM"})
    layout = LAYOUTS["esm"]
    with layout.open(tmp_path / "out", contents, resume=False) as writer:
        for index in range(2):
            writer.write(index, embeddings_of(contents, index))
    layout.open(tmp_path / "out", contents, resume=True).discard()
    index = tmp_path / "out" / "index.tsv"
    for text in ("protein\tfile\na:b\ta:b.pt\nc\tc.pt\n", "protein\tfile\n", index.read_text() + "d\td.pt\n"):
        index.write_text(text)
        with pytest.raises(ShardError, match="no unfinished output of these proteins"):
            layout.open(tmp_path / "out", contents, resume=True)


def test_files_differ_where_case_and_accents_do_not_count():
    names = esm.file_names(Strings.of(["é", "E\u0301", "e\u0301", "É", "Straße", "STRASSE"])).to_list()
    assert [name.partition("-")[0] for name in names] == ["é", "E\u0301", "e\u0301", "É", "Straße", "STRASSE"]
    assert ["-" in name for name in names] == [False, True, True, True, False, True]


def test_npz_of_one_kind_and_layer_has_the_ids_as_keys(tmp_path):
    contents = contents_of(SEQUENCES, ["per-residue"], dtype="float16")
    write_all("npz", tmp_path / "out.npz", contents)
    with zipfile.ZipFile(tmp_path / "out.npz") as archive:
        members = archive.infolist()
        assert archive.testzip() is None
        # No file system can hold the others.
        short = [member for member in members if len(member.filename) < 200]
        archive.extractall(tmp_path / "unpacked", short)
    assert sum(path.is_file() for path in (tmp_path / "unpacked").rglob("*")) == len(short) == len(SEQUENCES) - 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npz", "unpacked"]
    changed = {}
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        assert len(arrays) == len(SEQUENCES)
        for index, (record_id, member) in enumerate(zip(SEQUENCES, members, strict=True)):
            key = member.filename.removesuffix(".npy")
            if key != record_id:
                changed[record_id] = key
                assert member.comment.decode() == record_id
            same(arrays[key], contents, ("per-residue", 6), index)
    assert changed == {
        "../../escape": ".._.._escape",
        "/absolute/x": "_absolute_x",
        "..": "_",
        ".": "_#2",
        "back\\slash": "back_slash",
        "a.npy": "a_npy",
    }


@pytest.mark.parametrize(
    ("kinds", "layers", "keys"),
    [
        (("mean", "cls"), (6,), ["again/avg", "again/pooled"]),
        (("per-residue", "logits"), (6,), ["again/seq", "again/logits"]),
        (("mean",), (0, 6), ["again/avg/layer_0", "again/avg/layer_6"]),
        (("logits", "mean"), (0, 6), ["again/logits", "again/avg/layer_0", "again/avg/layer_6"]),
        (("logits",), (0, 6), ["again"]),
    ],
)
def test_npz_of_several_kinds_or_layers_has_the_names_of_tape_behind_the_id(tmp_path, kinds, layers, keys):
    contents = contents_of(SOME, kinds, layers)
    write_all("npz", tmp_path / "out.npz", contents)
    with np.load(tmp_path / "out.npz") as arrays:
        assert [key for key in arrays if key.partition("/")[0] == "again"] == keys
        for key, column in zip(keys, contents.columns, strict=True):
            same(arrays[key], contents, column, list(SOME).index("again"))


def test_npz_stays_sound_with_an_id_longer_than_a_zip_can_name(tmp_path):
    contents = contents_of({"x" * 70_000: "M", "x" * 70_001: "MM"})
    write_all("npz", tmp_path / "out.npz", contents)
    with np.load(tmp_path / "out.npz") as arrays:
        for index, key in enumerate(["x" * 60_000, "x" * 60_000 + "#2"]):
            same(arrays[key], contents, ("mean", 6), index)


@pytest.mark.parametrize("record_id", ["a", "a/b", "a..b", "..a", "a.npz", "sp|P|X", "x" * 10_000])
def test_a_key_of_npz_is_the_id_where_that_harms_nobody(record_id):
    assert npz.key_of(record_id) == record_id


@pytest.mark.parametrize(
    ("record_id", "key"),
    [
        ("../a", ".._a"),
        ("a/../b", "a_.._b"),
        ("a/..", "a_.."),
        ("a/./b", "a_._b"),
        ("a//b", "a__b"),
        ("/a", "_a"),
        ("C:a", "C_a"),
        ("a\\..\\b", "a_.._b"),
        ("a\0", "a_"),
        ("a.npy", "a_npy"),
        ("", "_"),
    ],
)
def test_a_key_of_npz_never_leads_out_of_a_folder(record_id, key):
    assert npz.key_of(record_id) == key


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parquet_is_a_table_of_ids_lengths_and_embeddings(tmp_path, monkeypatch, dtype):
    pyarrow = pytest.importorskip("pyarrow")
    monkeypatch.setattr("protlm.data.embeddings.layouts.parquet._GROUP_BYTES", 100)
    contents = contents_of(SEQUENCES, ["cls"], dtype=dtype)
    write_all("parquet", tmp_path / "e.parquet", contents)
    from pyarrow import parquet

    file = parquet.ParquetFile(tmp_path / "e.parquet")
    assert file.num_row_groups > 2
    table = file.read()
    file.close()
    assert table.column_names == ["id", "length", "embedding"]
    assert table["id"].to_pylist() == list(SEQUENCES)
    assert table["length"].to_pylist() == [len(sequence) for sequence in SEQUENCES.values()]
    rows = table["embedding"].combine_chunks()
    assert rows.type == pyarrow.list_(pyarrow.from_numpy_dtype(dtype))
    rows = rows.flatten().to_numpy().reshape(-1, MODEL_DIM)
    for index, row in enumerate(rows):
        same(row, contents, ("cls", 6), index)


def test_parquet_without_pyarrow_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ProtlmError, match=r"pip install 'protlm\[parquet\]'"):
        LAYOUTS["parquet"].check(("mean",), (6,), "float32")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_npy_is_a_matrix_with_its_ids_beside_it(tmp_path, dtype):
    contents = contents_of(SEQUENCES, dtype=dtype)
    write_all("npy", tmp_path / "means.npy", contents)
    rows = np.load(tmp_path / "means.npy", mmap_mode="r")
    assert (tmp_path / "means.ids.txt").read_text().splitlines() == list(SEQUENCES)
    assert len(rows) == len(SEQUENCES)
    for index, row in enumerate(rows):
        same(row, contents, ("mean", 6), index)


def test_an_array_without_its_ids_is_not_ours_to_replace(tmp_path):
    layout = write_all("npy", tmp_path / "means.npy", contents_of())
    (tmp_path / "means.ids.txt").write_text("one\n")
    assert not layout.is_own(tmp_path / "means.npy")
    (tmp_path / "means.ids.txt").unlink()
    assert not layout.is_own(tmp_path / "means.npy")


def test_the_names_of_layouts_need_neither_torch_nor_pyarrow():
    program = "import sys, protlm.data.embeddings.layouts; sys.exit(bool({'torch', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
