"""The model that is part of protlm: every command takes it by its name, and its card says what was measured."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from protlm import load_model
from protlm.cli.app import main
from protlm.pretrained.model_directory import read_model
from protlm.pretrained.model_files import model_path
from scripts import starter

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*words):
    assert main([str(word) for word in words]) == 0


def test_every_command_takes_it_by_its_name(fasta, dataset, proteins, tmp_path, capsys):
    run("inspect", "starter", "--verify")
    run("embed", "starter", fasta, "--out", "e.h5")
    run("eval", "starter", dataset, "--split", "test", "--out", "report")
    run("train", dataset, "--out", "run", "--init", "starter", "--max-steps", "1")
    run("score", "starter", ROOT / "data" / "tem1.fasta", "--mutations", ROOT / "data" / "tem1_mutations.csv",
        "--offset", "2", "--out", "s.csv")  # fmt: skip
    rows = [f"p{n},{sequence},{'short' if n % 2 else 'long'}\n" for n, (_, sequence) in enumerate(proteins[:24])]
    (tmp_path / "labels.csv").write_text("id,sequence,label\n" + "".join(rows))
    run("probe", "starter", "labels.csv", "--layers", "0", "--seeds", "1")
    run("convert", "starter", "--out", "converted")
    assert json.loads((tmp_path / "report" / "report.json").read_text())["model_name"] == "starter"
    of_name, of_folder = load_model("starter"), load_model("converted")
    (ours,), (theirs,) = of_name.embed(["MKVLAAGIVGLC"]), of_folder.embed(["MKVLAAGIVGLC"])
    torch.testing.assert_close(torch.as_tensor(ours["mean"]), torch.as_tensor(theirs["mean"]))


def test_a_folder_of_that_name_goes_first(run_dir, fasta, capsys):
    shutil.copytree(run_dir / "model", "starter")
    run("inspect", "starter", "--json")
    of_folder = json.loads(capsys.readouterr().out)
    run("inspect", run_dir / "model", "--json")
    assert of_folder["description"] == json.loads(capsys.readouterr().out)["description"]


def test_its_weights_are_half_precision_and_small():
    folder = model_path("starter")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= starter.MOST_MEGABYTES * 1_000_000
    model, _ = read_model(folder)
    for tensor in model.state_dict().values():
        assert not tensor.is_floating_point() or torch.equal(tensor, tensor.half().float())


def test_its_card_and_page_say_what_was_measured_of_these_weights():
    results = json.loads(starter.RESULTS.read_text(encoding="utf-8"))
    _, description = read_model(model_path("starter"))
    assert results["weights_hash"] == description.weights_hash
    card, page = (model_path("starter") / "README.md").read_text(), starter.PAGE.read_text()
    for table in (starter.scores_table(results), starter.probe_table(results), starter.training_line(results)):
        assert table in card
        assert table in page
    assert all(starter.demands(results).values())


def test_what_it_has_to_fulfil_is_seen_if_it_does_not():
    results = json.loads(starter.RESULTS.read_text(encoding="utf-8"))
    demands = starter.demands(results)
    rows = results["splits"]["ood"]["scores"]
    rows["model"]["accuracy_low"] = rows["markov"]["accuracy_low"]
    results["probe"]["gains"]["composition"]["low"] = -0.001
    changed = starter.demands(results)
    assert [name for name in demands if demands[name] != changed[name]] == [
        "held-out families: accuracy above Markov, residues before",
        "held-out families: accuracy above Markov, both sides",
        "probe of held-out families: above composition",
    ]
