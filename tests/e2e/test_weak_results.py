"""Weak results are told in a line each, by whichever command has them."""

import json

import pytest

from protlm.cli.app import main
from tests.e2e.conftest import write_fasta
from tests.e2e.train_tools import train


def warnings(capsys):
    return [line.removeprefix("warning: ") for line in capsys.readouterr().err.splitlines() if "warning: " in line]


def prepare(folder, proteins, *options):
    fasta = write_fasta(folder / "few.fasta", proteins)
    out = folder / "few"
    assert main(["prep", str(fasta), "--out", str(out), *options]) == 0
    return out


@pytest.fixture
def one_valid(tmp_path, proteins, capsys):
    """A dataset of four training proteins and one valid protein."""
    valid = write_fasta(tmp_path / "valid.fasta", proteins[4:5])
    return prepare(tmp_path, proteins[:4], "--valid-input", str(valid))


def test_a_dataset_too_small_for_its_fractions_is_told(tmp_path, proteins, capsys):
    prepare(tmp_path, proteins[:3], "--valid-fraction", "0.001", "--test-fraction", "0")
    (line,) = warnings(capsys)
    assert "split 'valid' is empty: the dataset is too small for its fraction, 0.001; raise --valid-fraction" in line


def test_a_split_of_one_protein_is_told_by_every_command_that_relies_on_it(one_valid, tmp_path, capsys):
    assert [line for line in warnings(capsys) if "split 'valid' is a single protein" in line]
    out = tmp_path / "run"
    assert train(one_valid, out, "--max-steps", 2) == 0
    assert [line for line in warnings(capsys) if "the valid split is a single protein" in line]
    assert main(["eval", str(out), str(one_valid), "--split", "valid", "--out", str(tmp_path / "report")]) == 0
    assert [line for line in warnings(capsys) if "split 'valid' is a single protein" in line]


def test_a_run_of_hundreds_of_epochs_is_told(one_valid, tmp_path, capsys):
    words = [
        "--set",
        "model.num_layers=1",
        "--set",
        "train.valid_every_steps=1000",
        "--set",
        "train.health_every_steps=0",
    ]
    words += ["--set", "train.checkpoint_every_steps=1000"]
    assert train(one_valid, tmp_path / "run", *words, "--max-steps", 20) == 0
    assert not [line for line in warnings(capsys) if "by heart" in line]
    assert train(one_valid, tmp_path / "run", *words, "--max-steps", 120, "--force") == 0
    (line,) = [line for line in warnings(capsys) if "by heart" in line]
    assert "the 4 proteins of its training split" in line
    assert int(line.split()[5]) >= 100


def test_a_model_below_a_baseline_is_told_at_the_end_of_train_and_by_eval(dataset, run_dir, tmp_path, capsys):
    assert train(dataset, tmp_path / "run", "--max-steps", 1, "--json") == 0
    told = capsys.readouterr()
    valid = json.loads(told.out)["valid"]
    assert valid["perplexity"] > valid["empirical_perplexity"]
    (line,) = [line for line in told.err.splitlines() if "no better than" in line]
    assert f"perplexity {valid['perplexity']:.2f} against " in line
    words = ["eval", str(run_dir), str(dataset), "--split", "test", "--out", str(tmp_path / "report"), "--force"]
    assert main(words) == 0
    told = capsys.readouterr()
    verdict = json.loads((tmp_path / "report" / "report.json").read_text())["verdict"]
    assert "warning" not in told.err
    assert told.out.count(verdict) == 1
    assert main([*words, "--json"]) == 0
    assert f"warning: {verdict}\n" in capsys.readouterr().err
