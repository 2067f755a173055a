import json
from pathlib import Path

import pytest

from protlm.cli.app import main
from protlm.config import ModelConfig
from protlm.data.storage.dataset import open_dataset
from protlm.model.performer import Performer
from protlm.pretrained.model_description import ModelDescription
from protlm.pretrained.model_directory import save_model
from protlm.vocabulary import RESIDUES
from protlm.workflows.evaluate.evaluate import evaluate

SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ" * times for times in (1, 2, 3)] + ["ACDEFGHIKL"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    fasta = folder / "proteins.fasta"
    fasta.write_text("".join(f">{number}\n{sequence}\n" for number, sequence in enumerate(SEQUENCES)))
    split = folder / "split.tsv"
    split.write_text("".join(f"{number}\ttest\n" for number in range(len(SEQUENCES))))
    arguments = ["prep", str(fasta), "--out", str(folder / "dataset"), "--split", "file", "--split-file", str(split)]
    assert main(arguments) == 0
    return folder / "dataset"


@pytest.fixture
def report(dataset, tmp_path):
    """A function that evaluates a new model of a given shape; it returns the report and the content of report.json."""

    def run(description=None, **shape):
        model = Performer(ModelConfig(num_layers=1, model_dim=16, num_heads=2, ffn_dim=16, num_features=8, **shape))
        model.reset(0)
        known = {"redraw_every_steps": 0, "seed": 0, "step": 1, "dataset_hash": "", "mask_rate": 0.15}
        counts = dict.fromkeys(RESIDUES, 1)
        saved = ModelDescription(model=model.config, residue_counts=counts, **{**known, **(description or {})})
        save_model(tmp_path / "model", model, saved)
        scored = evaluate(tmp_path / "model", dataset, "test", tmp_path / "report", force=True)
        return scored, json.loads((tmp_path / "report" / "report.json").read_text())

    return run


def test_a_masked_model_is_scored_at_some_residues(report, dataset):
    scored, written = report()
    num_residues = open_dataset(dataset).split("test").lengths.sum()
    assert (scored.objective, scored.num_cut) == (written["objective"], written["num_cut"]) == ("masked", 0)
    assert 0 < scored.num_targets < num_residues
    assert report({"mask_rate": 1.0})[0].num_targets == num_residues


def test_a_causal_model_is_scored_at_every_residue(report, dataset):
    scored, written = report(causal=True)
    assert scored.objective == written["objective"] == "next-token"
    assert scored.num_targets == open_dataset(dataset).split("test").lengths.sum()


def test_proteins_beyond_learned_positions_are_cut_and_counted(report):
    scored, written = report({"mask_rate": 1.0}, positions="learned", max_positions=32)
    assert scored.num_cut == written["num_cut"] == 2
    assert scored.num_targets == 22 + 30 + 30 + 10


def test_a_model_of_joined_proteins_is_scored_on_windows(report, dataset):
    joined = {"mask_rate": 1.0, "data_mode": "concatenated", "window_tokens": 20}
    scored, _ = report(joined, positions="learned", max_positions=20)
    assert scored.num_cut == 0
    assert scored.num_targets == open_dataset(dataset).split("test").lengths.sum()
    assert scored.model != report({"mask_rate": 1.0}, positions="learned", max_positions=200)[0].model
