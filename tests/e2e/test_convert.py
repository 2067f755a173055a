"""protlm convert, and commands on models that other programs saved."""

import json

import numpy as np
import pytest
import torch

import protlm
from protlm.cli.app import main
from protlm.pretrained.model_directory import read_model
from tests.foreign_checkpoint import write_checkpoint

PROTEINS = ">a first\nMKTAYIAKQR\n>b\nMKVLAAGIVGLCAKAYEDXB\n"


@pytest.fixture
def source(tmp_path):
    """A directory of transformers, and proteins beside it."""
    (tmp_path / "proteins.fasta").write_text(PROTEINS)
    return write_checkpoint(tmp_path / "source")


def run(capsys, *words):
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_converted_model_gives_the_numbers_of_its_source_and_says_where_it_is_from(source, tmp_path, capsys):
    status, out, _ = run(capsys, "convert", source, "--out", tmp_path / "model", "--json")
    assert status == 0
    report = json.loads(out)
    assert report["origin"]["source"] == "source"
    assert (report["to"], report["max_residues"], report["trained_residues"]) == ("protlm", None, 98)
    _, description = read_model(tmp_path / "model")
    assert description.weights_hash == report["weights_hash"]
    assert description.origin.files.keys() == {"config.json", "model.safetensors"}
    for model in (source, tmp_path / "model"):
        words = ("--layers", "0,1,2", "--include", "mean", "--include", "per-residue", "--include", "logits")
        assert run(capsys, "embed", model, tmp_path / "proteins.fasta", "--out", f"{model}.h5", *words)[0] == 0
    for kind, layer in (("mean", 0), ("mean", 2), ("per-residue", 1), ("logits", 2)):
        first, second = (
            protlm.open_embeddings(f"{m}.h5", kind=kind, layer=layer) for m in (source, tmp_path / "model")
        )
        assert all(np.array_equal(first[name], second[name]) for name in ("a", "b"))
    means, rows = (protlm.open_embeddings(f"{source}.h5", kind=kind, layer=1) for kind in ("mean", "per-residue"))
    assert np.allclose(means["a"], rows["a"].mean(0), rtol=1e-5, atol=1e-6)


def test_there_and_back_again_gives_equal_tensors(source, tmp_path, capsys):
    for model, out, form in (
        (source, "first", "protlm"), ("first", "hf", "hf"), ("hf", "second", "protlm"),
    ):  # fmt: skip
        assert run(capsys, "convert", tmp_path / model, "--out", tmp_path / out, "--to", form)[0] == 0
    (first, described), (second, again) = (read_model(tmp_path / name) for name in ("first", "second"))
    assert first.config.model_copy(update={"max_positions": 100}) == second.config
    assert described.trained_residues == again.trained_residues == 98
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_the_summary_names_limit_source_and_licence(source, tmp_path, capsys):
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    status, out, _ = run(capsys, "convert", source, "--out", tmp_path / "model")
    assert status == 0
    for words in ("any; it was trained on proteins of up to 98 residues", "source, family esm", "mit"):
        assert words in out


def test_nothing_but_a_model_is_replaced_and_that_only_with_force(source, tmp_path, capsys):
    out = tmp_path / "model"
    assert run(capsys, "convert", source, "--out", out)[0] == 0
    status, _, err = run(capsys, "convert", source, "--out", out)
    assert (status, "--force" in err) == (1, True)
    assert run(capsys, "convert", source, "--out", out, "--to", "hf", "--force")[0] == 0
    assert json.loads((out / "config.json").read_text())["model_type"] == "esm"
    (out / "thesis.txt").write_text("precious")
    status, _, err = run(capsys, "convert", source, "--out", out, "--force")
    assert (status, "thesis.txt" in err) == (1, True)
    status, _, err = run(capsys, "convert", source, "--out", source, "--force")
    assert (status, "the model itself" in err) == (1, True)
    assert (source / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_model_that_transformers_lacks_leaves_nothing_behind(tmp_path, capsys, run_dir):
    status, _, err = run(capsys, "convert", run_dir, "--out", tmp_path / "hf", "--to", "hf")
    assert status == 1
    assert "transformers has no architecture with" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "hf").exists()
    assert list(tmp_path.glob(".*")) == []
