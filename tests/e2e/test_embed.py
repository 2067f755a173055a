import gzip
import json
import os
import shutil
import threading
import time
import types
from typing import get_args

import numpy as np
import pytest
import torch

import protlm
from protlm.cli.app import main
from protlm.data.embeddings.kinds import LayoutName
from protlm.data.embeddings.layouts import LAYOUTS
from protlm.data.storage.dataset import open_dataset
from protlm.inference.row_embeddings import RowEmbedder
from tests.e2e.conftest import SMALL, write_fasta
from tests.forked import Forked


def embed(run_dir, *arguments):
    return main(["embed", str(run_dir), *map(str, arguments)])


def test_every_protein_is_embedded_in_order(run_dir, fasta, proteins, tmp_path):
    out = tmp_path / "e.h5"
    assert embed(run_dir, fasta, "--out", out, "--include", "mean", "--include", "per-residue", "--include", "cls") == 0
    per_residue = protlm.open_embeddings(out)
    mean = protlm.open_embeddings(out, kind="mean")
    assert list(per_residue) == [name for name, _ in proteins]
    for name, sequence in proteins:
        assert per_residue[name].shape == (len(sequence), 32)
        np.testing.assert_allclose(mean[name], per_residue[name].mean(0), rtol=1e-4, atol=1e-5)
    assert protlm.open_embeddings(out, kind="cls")[proteins[0][0]].shape == (32,)


@pytest.fixture(scope="module")
def exact(dataset, tmp_path_factory):
    """A model with exact attention."""
    out = tmp_path_factory.mktemp("exact") / "run"
    words = ["train", str(dataset), "--out", str(out), "--config", "tiny", *SMALL, "--max-steps", "2"]
    assert main([*words, "--set", "model.attention=softmax"]) == 0
    return out


@pytest.mark.parametrize("model", ["run_dir", "exact"])
def test_a_protein_does_not_depend_on_its_company(model, request, proteins, tmp_path):
    run = request.getfixturevalue(model)
    some = proteins[:60]
    shuffled = [some[number] for number in np.random.default_rng(0).permutation(len(some))]
    kinds = ["--include", "per-residue", "--include", "mean", "--include", "cls", "--include", "logits"]
    for name, order, budget in (("together", some, 8192), ("shuffled", shuffled, 700), ("alone", some[::-1], 3)):
        path = write_fasta(tmp_path / f"{name}.fasta", order)
        assert embed(run, path, "--out", tmp_path / f"{name}.h5", "--tokens-per-batch", budget, *kinds) == 0
    for kind in kinds[1::2]:
        alone = protlm.open_embeddings(tmp_path / "alone.h5", kind)
        for company in ("together", "shuffled"):
            embeddings = protlm.open_embeddings(tmp_path / f"{company}.h5", kind)
            for name, _ in some:
                assert np.abs(embeddings[name] - alone[name]).max() <= 1e-5 * np.abs(alone[name]).max()


def test_the_library_gives_what_the_command_writes(run_dir, fasta, proteins, tmp_path):
    assert embed(run_dir, fasta, "--out", tmp_path / "e.h5", "--layers", "0,-1") == 0
    model = protlm.load_model(run_dir)
    first, last = (protlm.open_embeddings(tmp_path / "e.h5", layer=layer) for layer in (0, 3))
    computed = model.embed((sequence for _, sequence in proteins), include=("mean", "per-residue"))
    for (name, sequence), by_kind in zip(proteins, computed, strict=True):
        np.testing.assert_allclose(by_kind["mean"], last[name], rtol=1e-5, atol=1e-6)
        assert by_kind["per-residue"].shape == (len(sequence), 32)
    np.testing.assert_allclose(next(model.embed([proteins[0][1]], layer=0))["mean"], first[proteins[0][0]], rtol=1e-5)
    logits = next(model.logits([proteins[0][1]]))
    assert logits.shape == (len(proteins[0][1]), 33)


def test_the_library_refuses_what_it_cannot_embed(run_dir):
    model = protlm.load_model(run_dir)
    with pytest.raises(ValueError, match="include"):
        next(model.embed(["MKT"], include=("median",)))
    with pytest.raises(ValueError, match="layer"):
        next(model.embed(["MKT"], layer=7))
    with pytest.raises(ValueError, match="at least one residue"):
        next(model.embed(["*"]))
    with pytest.raises(ValueError, match="illegal character '1'"):
        next(model.embed(["MK1T"]))


def test_repeated_ids_are_all_kept(run_dir, tmp_path, capsys):
    # A user's own id goes before one that we would make.
    path = write_fasta(tmp_path / "twice.fasta", [("a", "MKT"), ("a", "MKTV"), ("a#2", "MK"), ("b/../c", "M")])
    assert embed(run_dir, path, "--out", tmp_path / "e.h5", "--include", "per-residue", "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_renamed"] == 1
    embeddings = protlm.open_embeddings(tmp_path / "e.h5")
    assert {name: len(embeddings[name]) for name in embeddings} == {"a": 3, "a#3": 4, "a#2": 2, "b/../c": 1}


def test_a_very_long_protein_goes_in_one_pass(run_dir, tmp_path, proteins):
    titin_sized = "".join(sequence for _, sequence in proteins)[:20_000]
    path = write_fasta(tmp_path / "long.fasta", [("short", "MKT"), ("long", titin_sized), ("last", "MKTV")])
    assert embed(run_dir, path, "--out", tmp_path / "e.h5", "--include", "per-residue", "--dtype", "float16") == 0
    embeddings = protlm.open_embeddings(tmp_path / "e.h5")
    assert embeddings["long"].shape == (len(titin_sized), 32)
    assert embeddings["long"].dtype == np.float16
    assert np.isfinite(embeddings["long"]).all()


def test_bad_input_gives_one_line_and_no_file(run_dir, fasta, tmp_path, failure):
    out = tmp_path / "e.h5"
    bad = write_fasta(tmp_path / "bad.fasta", [("a", "MKT"), ("b", "MK1T")])
    assert f"{bad}:4:" in failure("embed", run_dir, bad, "--out", out)
    assert "no.fasta" in failure("embed", run_dir, tmp_path / "no.fasta", "--out", out)
    assert "layer" in failure("embed", run_dir, fasta, "--out", out, "--layers", "9")
    assert "no such directory" in failure("embed", tmp_path / "no", fasta, "--out", out)
    pickled = tmp_path / "pickled"
    shutil.copytree(run_dir / "model", pickled)
    (pickled / "model.safetensors").write_bytes(b"\x80\x04K\x01.")
    assert "hash" in failure("embed", pickled, fasta, "--out", out)
    assert not list(tmp_path.glob("*.h5*")) + list(tmp_path.glob(".*h5*"))
    assert embed(run_dir, bad, "--out", out, "--on-bad-record", "skip") == 0
    assert list(protlm.open_embeddings(out)) == ["a"]
    before = out.read_bytes()
    assert "--force" in failure("embed", run_dir, fasta, "--out", out)
    assert out.read_bytes() == before
    assert embed(run_dir, fasta, "--out", out, "--force") == 0
    text = bad.read_text()
    assert "no embeddings" in failure("embed", run_dir, bad, "--out", bad, "--force")
    assert bad.read_text() == text


def test_wrong_usage_exits_with_2(run_dir, fasta, tmp_path):
    assert embed(run_dir, fasta, "--out", tmp_path / "e.h5", "--layers", "last") == 2
    assert embed(run_dir, fasta, "--out", tmp_path / "e.h5", "--include", "sum") == 2
    assert embed(run_dir, fasta) == 2


def test_a_kept_vector_does_not_keep_its_row_in_memory(run_dir, proteins):
    model = protlm.load_model(run_dir)
    sequences = [sequence for _, sequence in proteins[:5]]
    for by_kind in model.embed(sequences, include=("mean", "cls", "per-residue")):
        assert all(array.base is None for array in by_kind.values())
    assert all(logits.base is None for logits in model.logits(sequences))


def test_force_replaces_embeddings_only(run_dir, fasta, tmp_path, failure):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    weights = copy / "model" / "model.safetensors"
    before = weights.read_bytes()
    assert "no embeddings" in failure("embed", copy, fasta, "--out", weights, "--force")
    assert weights.read_bytes() == before


def test_a_pipe_and_the_standard_input_are_read_like_files(run_dir, fasta, proteins, tmp_path):
    os.mkfifo(tmp_path / "pipe")

    def write(content):
        writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
        writer.start()
        return writer

    writer = write(fasta.read_bytes())
    assert embed(run_dir, tmp_path / "pipe", "--out", tmp_path / "pipe.h5") == 0
    writer.join()
    process = Forked("embed", run_dir, "-", "--out", tmp_path / "stdin.h5", stdin=tmp_path / "pipe")
    writer = write(gzip.compress(fasta.read_bytes()))
    _, errors = process.communicate()
    writer.join()
    assert process.returncode == 0, errors
    assert embed(run_dir, fasta, "--out", tmp_path / "file.h5") == 0
    expected = protlm.open_embeddings(tmp_path / "file.h5")
    for name in ("pipe", "stdin"):
        embeddings = protlm.open_embeddings(tmp_path / f"{name}.h5")
        assert list(embeddings) == [record_id for record_id, _ in proteins]
        for record_id in embeddings:
            np.testing.assert_allclose(embeddings[record_id], expected[record_id], rtol=1e-5, atol=1e-6)


def test_a_split_of_a_dataset_is_embedded_with_its_ids(run_dir, dataset, fasta, proteins, tmp_path, failure):
    out = tmp_path / "e.h5"
    assert "--split: train, valid, test" in failure("embed", run_dir, dataset, "--out", out)
    assert "no records in split" in failure("embed", run_dir, dataset, "--out", out, "--split", "ood")
    assert "by itself" in failure("embed", run_dir, dataset, fasta, "--out", out, "--split", "test")
    assert "--split" in failure("embed", run_dir, fasta, "--out", out, "--split", "test")
    assert embed(run_dir, dataset, "--split", "test", "--out", out, "--include", "per-residue") == 0
    embeddings = protlm.open_embeddings(out)
    split = open_dataset(dataset).split("test")
    assert list(embeddings) == [split.id(number) for number in range(len(split))]
    sequences = dict(proteins)
    model = protlm.load_model(run_dir)
    computed = model.embed([sequences[name] for name in embeddings], ("per-residue",))
    for name, expected in zip(embeddings, computed, strict=True):
        np.testing.assert_allclose(embeddings[name], expected["per-residue"], rtol=1e-4, atol=1e-5)


def test_equal_sequences_are_computed_once(run_dir, proteins, tmp_path, capsys, monkeypatch):
    names = [f"{number}-{turn}" for turn in range(3) for number in range(10)]
    path = write_fasta(tmp_path / "equal.fasta", [(name, proteins[int(name[0])][1]) for name in names])
    computed = []
    original = RowEmbedder.__call__
    monkeypatch.setattr(
        RowEmbedder, "__call__", lambda self, row, cores=None: computed.extend(row) or original(self, row, cores)
    )
    assert embed(run_dir, path, "--out", tmp_path / "e.h5", "--json", "--tokens-per-batch", 300) == 0
    assert len(computed) == 10
    report = json.loads(capsys.readouterr().out)
    assert (report["num_records"], report["num_equal"]) == (30, 20)
    embeddings = protlm.open_embeddings(tmp_path / "e.h5")
    assert list(embeddings) == names
    for name in names:
        np.testing.assert_array_equal(embeddings[name], embeddings[f"{name[0]}-0"])


def test_logits_are_what_the_model_expects_at_each_residue(run_dir, fasta, proteins, tmp_path):
    assert embed(run_dir, fasta, "--out", tmp_path / "e.h5", "--include", "logits", "--include", "mean") == 0
    embeddings = protlm.open_embeddings(tmp_path / "e.h5", kind="logits")
    assert protlm.open_embeddings(tmp_path / "e.h5").kind == "mean"
    expected = protlm.load_model(run_dir).logits(sequence for _, sequence in proteins)
    for (name, sequence), logits in zip(proteins, expected, strict=True):
        assert embeddings[name].shape == (len(sequence), 33)
        np.testing.assert_allclose(embeddings[name], logits, rtol=1e-4, atol=1e-4)


def test_windows_and_truncation_are_for_longer_proteins_only(run_dir, fasta, proteins, tmp_path, capsys):
    model = protlm.load_model(run_dir)
    whole = dict(zip(dict(proteins), model.embed(dict(proteins).values(), ("per-residue", "mean")), strict=True))
    kinds = ["--include", "per-residue", "--include", "mean", "--include", "cls", "--json"]
    assert embed(run_dir, fasta, "--out", tmp_path / "w.h5", "--window", 120, *kinds) == 0
    assert json.loads(capsys.readouterr().out)["num_windowed"] == sum(len(s) > 120 for _, s in proteins)
    assert embed(run_dir, fasta, "--out", tmp_path / "t.h5", "--truncate", 120, *kinds) == 0
    assert json.loads(capsys.readouterr().out)["num_truncated"] == sum(len(s) > 120 for _, s in proteins)
    windowed, truncated = (protlm.open_embeddings(tmp_path / f"{name}.h5") for name in "wt")
    means = protlm.open_embeddings(tmp_path / "w.h5", kind="mean")
    for name, sequence in proteins:
        assert windowed[name].shape == (len(sequence), 32)
        assert truncated[name].shape == (min(len(sequence), 120), 32)
        np.testing.assert_allclose(means[name], windowed[name].mean(0), rtol=1e-4, atol=1e-5)
        if len(sequence) <= 120:
            np.testing.assert_allclose(windowed[name], whole[name]["per-residue"], rtol=1e-4, atol=1e-5)
        else:
            # What stands in the windows is what the stretches give by themselves.
            (first,) = model.embed([sequence[:120]], ("per-residue",))
            np.testing.assert_allclose(windowed[name][:60], first["per-residue"][:60], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(truncated[name], first["per-residue"], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def learned(dataset, tmp_path_factory):
    """A model whose positions reach 98 residues."""
    out = tmp_path_factory.mktemp("learned") / "run"
    settings = ["--set", "model.positions=learned", "--set", "model.max_positions=100", "--set", "data.max_length=98"]
    words = ["train", str(dataset), "--out", str(out), "--config", "tiny", *SMALL, *settings, "--max-steps", "2"]
    assert main(words) == 0
    return out


def test_learned_positions_refuse_what_they_do_not_reach_unless_asked(learned, fasta, proteins, tmp_path, failure):
    out = tmp_path / "e.h5"
    message = failure("embed", learned, fasta, "--out", out)
    assert "--window 98" in message
    assert "--truncate 98" in message
    assert next(name for name, sequence in proteins if len(sequence) > 98) in message
    assert "reach 98" in failure("embed", learned, fasta, "--out", out, "--window", 99)
    assert "reach 98" in failure("embed", learned, fasta, "--out", out, "--truncate", 99)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="at most 98 residues"):
        list(protlm.load_model(learned).embed(sequence for _, sequence in proteins))
    assert embed(learned, fasta, "--out", out, "--window", 98, "--include", "per-residue") == 0
    assert [len(rows) for rows in protlm.open_embeddings(out).values()] == [len(sequence) for _, sequence in proteins]
    assert embed(learned, fasta, "--out", out, "--truncate", 98, "--force") == 0


def test_a_protein_that_does_not_fit_is_listed_and_the_others_are_there(
    run_dir, fasta, proteins, tmp_path, monkeypatch, capsys
):
    longest = max(len(sequence) for _, sequence in proteins)
    too_long = [name for name, sequence in proteins if len(sequence) == longest]
    original = RowEmbedder.__call__

    def scarce(self, row, cores=None):
        if sum(map(len, row)) >= longest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, row, cores)

    monkeypatch.setattr(RowEmbedder, "__call__", scarce)
    assert embed(run_dir, fasta, "--out", tmp_path / "e.h5", "--json") == 1
    captured = capsys.readouterr()
    assert [skipped["id"] for skipped in json.loads(captured.out)["skipped"]] == too_long
    assert captured.err.count("\n") == 1
    assert too_long[0] in captured.err
    assert "--window" in captured.err
    monkeypatch.undo()
    assert embed(run_dir, fasta, "--out", tmp_path / "all.h5") == 0
    embeddings, expected = (protlm.open_embeddings(tmp_path / f"{name}.h5") for name in ("e", "all"))
    assert list(embeddings) == [name for name, _ in proteins if name not in too_long]
    for name in embeddings:
        np.testing.assert_allclose(embeddings[name], expected[name], rtol=1e-4, atol=1e-5)


def test_a_dry_run_tells_and_makes_nothing(run_dir, fasta, proteins, tmp_path, capsys, failure, monkeypatch):
    out = tmp_path / "e.h5"
    options = ["--include", "per-residue", "--dtype", "float16"]
    assert embed(run_dir, fasta, "--out", out, "--dry-run", "--json", *options) == 0
    estimate = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    assert (estimate["num_records"], estimate["num_residues"]) == (120, sum(len(sequence) for _, sequence in proteins))
    assert estimate["longest"] == max(len(sequence) for _, sequence in proteins)
    assert 0 < estimate["seconds"] < 60
    start = time.perf_counter()
    assert embed(run_dir, fasta, "--out", out, *options) == 0
    assert estimate["seconds"] < 20 * (time.perf_counter() - start)
    assert estimate["out_bytes"] == pytest.approx(out.stat().st_size, rel=0.05)
    for layout in ("uniprot", "biotrainer", "esm", "npz", "parquet", "npy"):
        other = tmp_path / layout
        capsys.readouterr()
        assert embed(run_dir, fasta, "--out", other, "--layout", layout, "--dry-run", "--json") == 0
        told = json.loads(capsys.readouterr().out)["out_bytes"]
        assert embed(run_dir, fasta, "--out", other, "--layout", layout) == 0
        size = sum(path.stat().st_blocks * 512 for path in [other, *other.glob("*")])
        assert 0.5 * size < told < 2 * size, layout
    assert estimate["peak_bytes"] > estimate["out_bytes"]
    out.unlink()
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=1000))
    capsys.readouterr()
    assert embed(run_dir, fasta, "--out", out, "--dry-run", *options) == 1
    assert "not enough disk" in capsys.readouterr().err


def test_the_command_knows_every_layout():
    assert tuple(LAYOUTS) == get_args(LayoutName)


def test_float16_that_cannot_hold_a_number_is_an_error(run_dir, fasta, tmp_path, failure, monkeypatch):
    original = RowEmbedder.__call__

    def huge(self, row, cores=None):
        results = original(self, row, cores)
        results[3]["mean", 3] = np.full_like(results[3]["mean", 3], 1e8)
        return results

    monkeypatch.setattr(RowEmbedder, "__call__", huge)
    message = failure("embed", run_dir, fasta, "--out", tmp_path / "e.h5", "--dtype", "float16")
    assert "--dtype float32" in message
    assert embed(run_dir, fasta, "--out", tmp_path / "e.h5") == 0


def test_layouts_refuse_what_they_cannot_hold(run_dir, fasta, tmp_path, capsys):
    for options in (
        ["--layout", "uniprot", "--include", "mean", "--include", "cls"],
        ["--layout", "npy", "--include", "per-residue"],
        ["--layout", "parquet", "--layers", "0,1"],
        ["--window", "50", "--truncate", "50"],
        ["--include", "mean,kind"],
    ):
        assert embed(run_dir, fasta, "--out", tmp_path / "x", *options) == 2
        assert "Traceback" not in capsys.readouterr().err
    assert embed(run_dir, fasta, "--out", tmp_path / "x.npz", "--layout", "npy") == 2
    assert "holds the layout npz" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["esm", "npy"])
def test_an_id_that_a_layout_cannot_list_is_found_before_anything_is_computed(
    layout, run_dir, tmp_path, failure, monkeypatch
):
    path = write_fasta(tmp_path / "odd.fasta", [("ok", "MKT"), ("a\u2028b", "MKV")])
    monkeypatch.setattr(RowEmbedder, "__call__", None)
    assert "tab or line end" in failure("embed", run_dir, path, "--out", tmp_path / "out", "--layout", layout)
    assert [path.name for path in tmp_path.iterdir()] == ["odd.fasta"]


def test_force_leaves_the_arrays_of_others_alone(run_dir, fasta, tmp_path, failure):
    np.savez(tmp_path / "mine.npz", a=np.zeros(3))
    assert "holds no embeddings" in failure(
        "embed", run_dir, fasta, "--out", tmp_path / "mine.npz", "--layout", "npz", "--force"
    )
    assert np.load(tmp_path / "mine.npz")["a"].shape == (3,)


def test_force_replaces_only_the_same_layout(run_dir, fasta, tmp_path, failure):
    out = tmp_path / "out"
    assert embed(run_dir, fasta, "--out", out, "--layout", "esm") == 0
    assert "--force" in failure("embed", run_dir, fasta, "--out", out, "--layout", "esm")
    assert "layout protlm" in failure("embed", run_dir, fasta, "--out", out, "--force")
    assert embed(run_dir, fasta, "--out", out, "--layout", "esm", "--force") == 0
    # What belongs to an output is in the way like the output itself.
    (tmp_path / "mapping_file.csv").write_text("mine")
    message = failure("embed", run_dir, fasta, "--out", tmp_path / "b.h5", "--layout", "bio-embeddings", "--force")
    assert "mapping_file.csv" in message
    assert (tmp_path / "mapping_file.csv").read_text() == "mine"


def test_the_library_says_at_once_what_is_wrong(run_dir):
    model = protlm.load_model(run_dir)
    for call in (model.embed, model.logits):
        with pytest.raises(ValueError, match="single str"):
            call("MKT")
        with pytest.raises(ValueError, match="tokens_per_batch"):
            call(["MKT"], tokens_per_batch=0)
    with pytest.raises(ValueError, match="include"):
        model.embed(["MKT"], include="mean")
    with pytest.raises(ValueError, match="include"):
        model.embed(["MKT"], include=())
