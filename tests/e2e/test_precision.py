"""`--precision` of embed, eval and score: what changes, what is written down, and what is refused."""

import json

import h5py
import numpy as np
import pytest
import safetensors.torch

from protlm import open_embeddings
from protlm.cli.app import main
from protlm.inference import precision as precision_module
from protlm.pretrained.checkpoint_files import file_hash
from scripts import half_precision
from tests.e2e.conftest import write_fasta


@pytest.fixture
def has_units(monkeypatch):
    """The machine has units for every half precision; what they would compute, others compute here."""
    monkeypatch.setattr(precision_module, "has_half_precision_units", lambda _: True)


@pytest.fixture
def few(tmp_path, proteins):
    return write_fasta(tmp_path / "few.fasta", proteins[:12])


def embed(run, path, out, *words):
    assert main(["embed", str(run), str(path), "--out", str(out), *words]) == 0
    return open_embeddings(out)


def test_embeddings_of_half_precision_are_near_and_say_what_they_are(run_dir, few, tmp_path, has_units, capsys):
    full = embed(run_dir, few, tmp_path / "32.h5")
    for precision, least in (("bf16", 0.999), ("fp16", 0.99999)):
        half = embed(run_dir, few, tmp_path / f"{precision}.h5", "--precision", precision)
        for record_id in full:
            first, second = full[record_id], half[record_id]
            assert not np.array_equal(first, second)
            assert first @ second > least * np.linalg.norm(first) * np.linalg.norm(second)
        with h5py.File(tmp_path / f"{precision}.h5") as file:
            assert file.attrs["precision"] == precision
        capsys.readouterr()
        assert main(["inspect", str(tmp_path / f"{precision}.h5")]) == 0
        assert f"precision   {precision}\n" in capsys.readouterr().out
    with h5py.File(tmp_path / "32.h5") as file:
        assert file.attrs["precision"] == "32"


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_other_layouts_say_it_too(run_dir, few, tmp_path, has_units, suffix, capsys):
    out = tmp_path / f"out.{suffix}"
    assert main(["embed", str(run_dir), str(few), "--out", str(out), "--precision", "bf16"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["precision"] == "bf16"


def test_a_run_in_another_precision_is_not_resumed(run_dir, few, tmp_path, has_units, failure, monkeypatch):
    from protlm.workflows.embed import embed as embed_module

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(embed_module, "assemble", stop)
        assert main(["embed", str(run_dir), str(few), "--out", str(tmp_path / "x.h5"), "--precision", "bf16"]) == 130
    line = failure("embed", run_dir, few, "--out", tmp_path / "x.h5", "--resume")
    assert "made with other options" in line
    assert (
        main(["embed", str(run_dir), str(few), "--out", str(tmp_path / "x.h5"), "--resume", "--precision", "bf16"]) == 0
    )


def test_a_folder_of_the_version_before_is_resumed_in_float32(run_dir, few, tmp_path, monkeypatch, capsys):
    from protlm.workflows.embed import embed as embed_module

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(embed_module, "assemble", stop)
        assert main(["embed", str(run_dir), str(few), "--out", str(tmp_path / "x.h5")]) == 130
    assert "precision" not in (tmp_path / "x.h5.partial" / "work.json").read_text()
    assert main(["embed", str(run_dir), str(few), "--out", str(tmp_path / "x.h5"), "--resume"]) == 0


def test_eval_in_half_precision_is_near_and_says_so(run_dir, dataset, tmp_path, has_units, capsys):
    reports = {}
    for precision in ("auto", "bf16", "fp16"):
        out = tmp_path / precision
        words = ["--random-weights", "--precision", precision] if precision != "auto" else ["--random-weights"]
        assert main(["eval", str(run_dir), str(dataset), "--out", str(out), *words]) == 0
        reports[precision] = json.loads((out / "report.json").read_text())
        shown = {"auto": "32"}.get(precision, precision)
        assert f'>precision</td><td class="code">{shown}</td>' in (out / "report.html").read_text()
    assert [report["precision"] for report in reports.values()] == ["32", "bf16", "fp16"]
    for row in ("model", "random_weights"):
        of_row = [report["splits"]["test"]["scores"][row]["perplexity"] for report in reports.values()]
        assert len(set(of_row)) == 3
        assert max(of_row) / min(of_row) < 1.02


def test_scores_in_half_precision_are_near_and_say_so(run_dir, few, tmp_path, has_units, capsys):
    columns = {}
    protein = write_fasta(tmp_path / "one.fasta", [("p", "MKVLAGWERTYHNDC")])
    for precision in ("auto", "bf16"):
        out = tmp_path / f"{precision}.csv"
        capsys.readouterr()
        words = ["score", str(run_dir), str(protein), "--all-singles", "--out", str(out), "--precision", precision]
        assert main([*words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["precision"] == {"auto": "32", "bf16": "bf16"}[precision]
        rows = [line.split(",") for line in out.read_text().splitlines()[1:]]
        columns[precision] = np.array([float(row[2]) for row in rows])
    assert not np.array_equal(columns["auto"], columns["bf16"])
    assert np.corrcoef(columns["auto"], columns["bf16"])[0, 1] > 0.99


def test_without_units_half_precision_is_refused_in_one_line(run_dir, dataset, few, tmp_path, failure, monkeypatch):
    monkeypatch.setattr(precision_module, "has_half_precision_units", lambda _: False)
    for words in (
        ("embed", run_dir, few, "--out", tmp_path / "x.h5"),
        ("eval", run_dir, dataset, "--out", tmp_path / "report"),
        ("score", run_dir, few, "--all-singles", "--out", tmp_path / "x.csv"),
        ("embed", run_dir, few, "--out", tmp_path / "x.h5", "--dry-run"),
    ):
        assert "no units for bfloat16" in failure(*words, "--precision", "bf16")
    assert [path.name for path in tmp_path.iterdir()] == ["few.fasta"]


def test_beyond_the_range_of_float16_the_protein_is_named(
    run_dir, dataset, few, tmp_path, has_units, failure, proteins
):
    model = tmp_path / "model"
    model.mkdir()
    tensors = safetensors.torch.load_file(run_dir / "model" / "model.safetensors")
    tensors["layers.0.ffn_in.weight"] *= 1e5
    safetensors.torch.save_file(tensors, model / "model.safetensors")
    config = json.loads((run_dir / "model" / "config.json").read_text())
    config["weights_hash"] = file_hash(model / "model.safetensors")
    (model / "config.json").write_text(json.dumps(config))
    names = {name for name, _ in proteins}
    for words in (
        ("embed", model, few, "--out", tmp_path / "x.h5"),
        ("eval", model, dataset, "--out", tmp_path / "report"),
        ("score", model, few, "--all-singles", "--out", tmp_path / "x.csv"),
    ):
        line = failure(*words, "--precision", "fp16")
        assert "float16 ends at 65,504: take precision 32, or bf16" in line
        assert any(name in line for name in names)
    assert not (tmp_path / "x.h5").exists()
    assert not (tmp_path / "report").exists()
    for words in (["--as-trained"], ["--random-weights"], ["--pseudo-perplexity", "2"]):
        # In every pass.
        assert (
            main(["eval", str(run_dir), str(dataset), "--out", str(tmp_path / words[0]), "--precision", "fp16", *words])
            == 0
        )
    # In float32 the same model computes.
    assert main(["embed", str(model), str(few), "--out", str(tmp_path / "y.h5")]) == 0


def test_the_script_tells_how_far_embeddings_move(run_dir, few, capsys):
    half_precision.main([str(run_dir), str(few), "--num-proteins", "5"])
    out = capsys.readouterr().out
    rows = {cells[0].strip("| "): cells[1:] for cells in (line.split(" | ") for line in out.splitlines())}
    assert out.startswith("5 proteins, against float32")
    assert 1e-3 > float(rows["bfloat16"][0]) > float(rows["float16"][0]) > 0
    with pytest.raises(SystemExit, match="error: nosuch"):
        half_precision.main(["nosuch", str(few)])
