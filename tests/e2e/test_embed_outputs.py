"""What an output is named, holds and warns of."""

import h5py
import pytest

from protlm.cli.app import main
from protlm.data.embeddings.layouts import LAYOUTS
from tests.e2e.conftest import write_fasta


def embed(run_dir, *arguments):
    return main(["embed", str(run_dir), *map(str, arguments)])


def test_the_suffix_of_the_output_chooses_the_layout(run_dir, fasta, tmp_path):
    pytest.importorskip("pyarrow")
    for name, layout in (("a.npz", "npz"), ("a.npy", "npy"), ("a.parquet", "parquet"), ("a.h5", "protlm")):
        assert embed(run_dir, fasta, "--out", tmp_path / name) == 0
        assert LAYOUTS[layout].is_own(tmp_path / name)


def test_kinds_by_comma_are_those_one_by_one(run_dir, fasta, tmp_path):
    assert embed(run_dir, fasta, "--out", tmp_path / "a.h5", "--include", "mean,per-residue,mean") == 0
    assert embed(run_dir, fasta, "--out", tmp_path / "b.h5", "--include", "mean", "--include", "per-residue") == 0
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_biotrainer_needs_the_letters_that_were_embedded(run_dir, tmp_path, capsys):
    repaired = write_fasta(tmp_path / "a.fasta", [("a", "MKtay"), ("b", "MKTAY*"), ("c", "MK")])
    assert embed(run_dir, repaired, "--out", tmp_path / "a.h5", "--layout", "biotrainer") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: 4 letters were repaired: biotrainer finds a protein by its sequence, and these only if the file that "
        "it reads has the repaired letters too"
    ]
    with h5py.File(tmp_path / "a.h5") as file:
        assert [dataset.attrs["original_id"] for dataset in file.values()] == ["a", "c"]
    clean = write_fasta(tmp_path / "b.fasta", [("a", "MKTAY")])
    assert embed(run_dir, clean, "--out", tmp_path / "b.h5", "--layout", "biotrainer") == 0
    assert "warning" not in capsys.readouterr().err
