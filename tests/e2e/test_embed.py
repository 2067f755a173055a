import json
import os
import shutil

import numpy as np
import pytest

import protlm
from protlm.cli.app import main
from tests.e2e.conftest import write_fasta


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


def test_a_protein_does_not_depend_on_its_company(run_dir, fasta, proteins, tmp_path):
    assert embed(run_dir, fasta, "--out", tmp_path / "together.h5", "--include", "per-residue") == 0
    backwards = write_fasta(tmp_path / "backwards.fasta", proteins[::-1])
    assert embed(run_dir, backwards, "--out", tmp_path / "alone.h5", "--include", "per-residue",
                 "--tokens-per-batch", 3) == 0  # fmt: skip
    together, alone = (protlm.open_embeddings(tmp_path / f"{name}.h5") for name in ("together", "alone"))
    for name, _ in proteins:
        difference = np.abs(together[name] - alone[name]).max()
        assert difference <= 1e-5 * np.abs(alone[name]).max()


def test_the_library_gives_what_the_command_writes(run_dir, fasta, proteins, tmp_path):
    assert embed(run_dir, fasta, "--out", tmp_path / "e.h5", "--layers", "0,-1") == 0
    model = protlm.load_model(run_dir)
    first, last = (protlm.open_embeddings(tmp_path / "e.h5", layer=layer) for layer in (0, 3))
    computed = model.embed((sequence for _, sequence in proteins), include=("mean", "per-residue"))
    for (name, sequence), found in zip(proteins, computed, strict=True):
        np.testing.assert_allclose(found["mean"], last[name], rtol=1e-5, atol=1e-6)
        assert found["per-residue"].shape == (len(sequence), 32)
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
    path = write_fasta(tmp_path / "twice.fasta", [("a", "MKT"), ("a", "MKTV"), ("a#2", "MK"), ("b/../c", "M")])
    assert embed(run_dir, path, "--out", tmp_path / "e.h5", "--include", "per-residue", "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_renamed"] == 2
    found = protlm.open_embeddings(tmp_path / "e.h5")
    assert {name: len(found[name]) for name in found} == {"a": 3, "a#2": 4, "a#2#2": 2, "b/../c": 1}


def test_a_very_long_protein_goes_in_one_pass(run_dir, tmp_path, proteins):
    titin_sized = "".join(sequence for _, sequence in proteins)[:20_000]
    path = write_fasta(tmp_path / "long.fasta", [("short", "MKT"), ("long", titin_sized), ("last", "MKTV")])
    assert embed(run_dir, path, "--out", tmp_path / "e.h5", "--include", "per-residue", "--dtype", "float16") == 0
    found = protlm.open_embeddings(tmp_path / "e.h5")
    assert found["long"].shape == (len(titin_sized), 32)
    assert found["long"].dtype == np.float16
    assert np.isfinite(found["long"]).all()


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
    assert "no embeddings file" in failure("embed", run_dir, bad, "--out", bad, "--force")
    assert bad.read_text() == text


def test_wrong_usage_exits_with_2(run_dir, fasta, tmp_path):
    assert embed(run_dir, fasta, "--out", tmp_path / "e.h5", "--layers", "last") == 2
    assert embed(run_dir, fasta, "--out", tmp_path / "e.h5", "--include", "sum") == 2
    assert embed(run_dir, fasta) == 2


def test_a_kept_vector_does_not_keep_its_row_in_memory(run_dir, proteins):
    model = protlm.load_model(run_dir)
    sequences = [sequence for _, sequence in proteins[:5]]
    for found in model.embed(sequences, include=("mean", "cls", "per-residue")):
        assert all(array.base is None for array in found.values())
    assert all(logits.base is None for logits in model.logits(sequences))


def test_force_replaces_embeddings_only(run_dir, fasta, tmp_path, failure):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    weights = copy / "model" / "model.safetensors"
    before = weights.read_bytes()
    assert "no embeddings file" in failure("embed", copy, fasta, "--out", weights, "--force")
    assert weights.read_bytes() == before


def test_a_pipe_is_refused_rather_than_read_once(run_dir, tmp_path, failure):
    os.mkfifo(tmp_path / "pipe")
    assert "read twice" in failure("embed", run_dir, tmp_path / "pipe", "--out", tmp_path / "e.h5")


def test_the_library_says_at_once_what_is_wrong(run_dir):
    model = protlm.load_model(run_dir)
    for call in (model.embed, model.logits):
        with pytest.raises(ValueError, match="single str"):
            call("MKT")
        with pytest.raises(ValueError, match="tokens_per_batch"):
            call(["MKT"], tokens_per_batch=0)
    with pytest.raises(ValueError, match="include"):
        model.embed(["MKT"], include="mean")
