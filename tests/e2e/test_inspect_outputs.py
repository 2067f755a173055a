"""`protlm inspect` reads what every command makes: embeddings of all layouts, models and runs."""

import json
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

from protlm.cli.app import main
from protlm.data.embeddings.layouts import LAYOUTS
from protlm.pretrained.foreign import read_folder
from protlm.pretrained.model_directory import read_model
from protlm.runtime.locks import locked
from protlm.workflows.train.run_description import read_run_description
from tests.e2e.conftest import write_fasta
from tests.foreign_checkpoint import CONFIG, change, write_checkpoint, write_fairseq_checkpoint


@pytest.fixture
def inspected(capsys):
    """Runs inspect, which has to succeed and warn of nothing; returns the pairs it prints, or its JSON."""

    def run(*words):
        capsys.readouterr()
        assert main(["inspect", *map(str, words)]) == 0
        told = capsys.readouterr()
        assert told.err == ""
        if "--json" in words:
            return json.loads(told.out)
        return dict(line.split(maxsplit=1) for line in told.out.splitlines())

    return run


@pytest.fixture(scope="module")
def few(tmp_path_factory, proteins):
    return write_fasta(tmp_path_factory.mktemp("few") / "few.fasta", [*proteins[:8], ("again", proteins[0][1])])


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, run_dir, few):
    folder = tmp_path_factory.mktemp("outputs")
    for layout in LAYOUTS:
        (folder / layout).mkdir()
        words = ["--out", str(folder / layout / "out"), "--layout", layout, "--dtype", "float16"]
        assert main(["embed", str(run_dir), str(few), *words]) == 0
    return folder


def model_hash(run_dir):
    return read_model(run_dir)[1].weights_hash


@pytest.mark.parametrize("layout", LAYOUTS)
def test_embeddings_of_every_layout_are_read(layout, outputs, inspected, run_dir):
    out = outputs / layout / "out"
    told = inspected(out, "--json")
    summary = told["summary"]
    assert (told["what"], told["path"], told["layout"]) == ("embeddings", str(out), layout)
    assert summary["num_entries"] == (8 if layout == "biotrainer" else 9)
    assert (summary["dim"], summary["dtype"]) == (32, "float16")
    assert summary["kinds"] == ([] if layout == "npy" else ["mean"])
    assert summary["layers"] == ([] if layout == "npy" else [3])
    assert summary["model_hash"] == (None if layout in ("npy", "esm") else model_hash(run_dir))
    assert all(name.startswith(str(outputs)) for name in told["files"])
    pairs = inspected(out)
    assert pairs["layout"] == layout
    assert pairs["holds"] == ("8 different sequences" if layout == "biotrainer" else "9 proteins")
    assert pairs["stored"] == ("32 wide, float16" if layout == "npy" else "mean, layer 3, 32 wide, float16")


@pytest.mark.parametrize("layout", ["protlm", "esm", "npz"])
def test_several_kinds_and_layers_are_told(layout, run_dir, few, proteins, tmp_path, inspected):
    words = ["--layout", layout, "--include", "logits,per-residue,mean", "--layers", "0,-1"]
    assert main(["embed", str(run_dir), str(few), "--out", str(tmp_path / "out"), *words]) == 0
    summary = inspected(tmp_path / "out", "--json")["summary"]
    assert sorted(summary["kinds"]) == ["logits", "mean", "per-residue"]
    assert (summary["layers"], summary["dim"], summary["num_entries"]) == ([0, 3], 32, 9)
    num_residues = sum(len(sequence) for _, sequence in (*proteins[:8], proteins[0]))
    assert summary["num_residues"] == (num_residues if layout == "protlm" else None)


def test_an_output_of_an_earlier_version_is_read(outputs, tmp_path, inspected):
    """It had no description in the comment of the zip."""
    path = shutil.copy(outputs / "npz" / "out", tmp_path / "old.npz")
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"protlm embeddings"
    assert LAYOUTS["npz"].is_own(path)
    summary = inspected(path, "--json")["summary"]
    assert (summary["num_entries"], summary["dim"], summary["kinds"], summary["model_hash"]) == (9, 32, [], None)


def test_damaged_embeddings_are_one_line(outputs, tmp_path, failure):
    folder = tmp_path / "esm"
    shutil.copytree(outputs / "esm" / "out", folder)
    next(folder.glob("*.pt")).unlink()
    assert "lists 9 files, and there are 8" in failure("inspect", folder)
    for name in folder.glob("*.pt"):
        name.write_bytes(b"damaged")
    (folder / "index.tsv").write_text("protein\tfile\n" + "".join(f"x\t{path.name}\n" for path in folder.glob("*.pt")))
    assert f"{folder}: damaged, of layout esm" in failure("inspect", folder)
    path = tmp_path / "cut.npz"
    content = (outputs / "npz" / "out").read_bytes()
    path.write_bytes(content[:20] + bytes(40) + content[60:])
    assert f"{path}: damaged, of layout npz" in failure("inspect", path)


@pytest.mark.parametrize("place", [".", "model"])
def test_a_model_and_a_run_are_read(place, run_dir, inspected):
    told = inspected(run_dir / place, "--json")
    model = told if place == "model" else told["model"]
    network, description = read_model(run_dir)
    assert model["what"] == "model"
    assert model["num_parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert model["description"]["weights_hash"] == description.weights_hash
    assert model["verified"] is False
    pairs = inspected(run_dir / place, "--verify")
    assert pairs["weights"] == f"{description.weights_hash} (verified)"
    assert pairs["shape"] == "3 layers, 32 wide, 2 heads, masked residues"
    assert pairs["parameters"] == f"{model['num_parameters']:,}"
    assert pairs["valid"].startswith(f"accuracy {description.valid.accuracy:.4f}, perplexity ")
    if place == ".":
        assert (told["what"], told["is_at_work"], told["max_steps"]) == ("run", False, 9)
        assert told["description"]["sessions"][0]["end"]["outcome"] == "finished"
        assert pairs["steps"] == "9 of 9"
        assert pairs["sessions"].endswith(": finished")
        assert pairs["dataset"].startswith("dataset, ")


def test_a_run_at_work_and_one_that_was_killed_are_told(run_dir, tmp_path, inspected):
    run = shutil.copytree(run_dir, tmp_path / "run")
    description = read_run_description(run / "run.json")
    session = description.sessions[0].model_copy(update={"end": None})
    (run / "run.json").write_text(description.model_copy(update={"sessions": [session]}).model_dump_json())
    shutil.rmtree(run / "model")
    with locked(run):
        assert inspected(run)["sessions"].endswith(": at work")
    pairs = inspected(run)
    assert pairs["sessions"].endswith(": killed")
    assert (pairs["steps"], pairs["model"]) == ("from 0 of 9", "none yet")


def test_a_model_with_other_weights_is_found_by_verify(run_dir, tmp_path, failure, inspected):
    model = shutil.copytree(run_dir / "model", tmp_path / "model")
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    inspected(model)
    assert "not the weights that config.json names" in failure("inspect", model, "--verify")
    weights.unlink()
    assert "cannot be read" in failure("inspect", model)
    (model / "config.json").write_text("{}")
    assert "expected a protlm model" in failure("inspect", model)


def test_what_is_none_of_these_is_told(tmp_path, failure, outputs, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    expected = "not a protlm dataset, nor an output of protlm embed, a model or a run"
    assert expected in failure("inspect", tmp_path / "notes.txt")
    assert expected in failure("inspect", tmp_path)
    unfinished = tmp_path / "out.partial"
    unfinished.mkdir()
    (unfinished / "work.json").write_text("{}")
    assert "go on with the same command and --resume" in failure("inspect", unfinished)
    (tmp_path / "manifest.json").write_text("{")
    assert "manifest.json" in failure("inspect", tmp_path)
    assert main(["inspect", str(outputs / "npy" / "out"), "--verify"]) == 2
    assert "embeddings have no checksums" in capsys.readouterr().err


def test_embeddings_are_inspected_without_torch(outputs):
    script = (
        "import sys; from protlm.cli.app import main; "
        f"assert main(['inspect', {str(outputs / 'uniprot' / 'out')!r}]) == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_a_model_of_another_program_is_told_by_what_it_is(tmp_path, inspected, failure):
    source = write_checkpoint(tmp_path / "esm2-small")
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    pairs = inspected(source)
    assert pairs["origin"] == "esm2-small, esm, licence: mit"
    assert pairs["shape"] == "2 layers, 16 wide, 2 heads, masked residues"
    assert (pairs["vocabulary"], pairs["weights"]) == ("33 tokens", "not read; --verify reads them")
    told = inspected(source, "--verify", "--json")
    network, description = read_folder(source, "esm2-small")
    assert told["num_parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert (told["verified"], told["description"]["weights_hash"]) == (True, description.weights_hash)
    change(source, lm_head__bias=torch.full((33,), torch.nan))
    inspected(source)
    assert "not finite" in failure("inspect", source, "--verify")
    (source / "config.json").write_text(json.dumps({**CONFIG, "model_type": "t5"}))
    assert "its encoder has relative positions" in failure("inspect", source)


def test_a_checkpoint_of_fairseq_is_told_by_what_it_is(tmp_path, inspected, failure):
    write_fairseq_checkpoint(tmp_path / "esm2_t2_random.pt")
    pairs = inspected(tmp_path / "esm2_t2_random.pt")
    assert pairs["origin"] == "esm2_t2_random, fairseq, licence: not named"
    assert pairs["shape"] == "2 layers, 16 wide, 2 heads, masked residues"
    (tmp_path / "other.pt").write_bytes(b"junk")
    assert "not a checkpoint of torch" in failure("inspect", tmp_path / "other.pt")
