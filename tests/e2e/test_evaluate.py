import json
import shutil

import pytest

from protlm.cli.app import main


def test_eval_reports_the_model_beside_the_baseline(run_dir, dataset, tmp_path, capsys):
    assert main(["eval", str(run_dir), str(dataset), "--split", "test", "--out", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert [line.split("  ")[0] for line in table.splitlines()[1:3]] == ["model", "empirical baseline"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["split"] == "test"
    assert report["seed"] == 0
    for name in ("model", "empirical"):
        assert 0 <= report[name]["accuracy"] <= 1
        assert 1 < report[name]["perplexity"] < 40
        assert f"{report[name]['perplexity']:.3f}" in table
    # About 15 % of the residues of the split are scored.
    manifest = json.loads((dataset / "manifest.json").read_text())
    assert report["num_targets"] / manifest["splits"]["test"]["num_residues"] == pytest.approx(0.15, abs=0.03)


def test_eval_of_the_valid_split_equals_what_training_measured(run_dir, dataset, tmp_path, capsys):
    arguments = ["eval", str(run_dir / "model"), str(dataset), "--split", "valid", "--out", str(tmp_path), "--json"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    saved = json.loads((run_dir / "model" / "config.json").read_text())["valid"]
    assert report["model"]["perplexity"] == pytest.approx(saved["perplexity"], rel=1e-6)
    assert report["empirical"]["perplexity"] == saved["empirical_perplexity"]
    assert report["num_targets"] == saved["num_targets"]


def test_the_seed_moves_the_masks(run_dir, dataset, tmp_path):
    reports = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        assert main(["eval", str(run_dir), str(dataset), "--out", str(out), "--seed", str(seed)]) == 0
        reports.append((out / "report.json").read_text())
    assert reports[0] == reports[1]
    assert reports[0] != reports[2]


def test_bad_input_gives_one_line(run_dir, dataset, tmp_path, failure):
    assert "train, valid, test" in failure("eval", run_dir, dataset, "--split", "ood", "--out", tmp_path / "r")
    assert "config.json" in failure("eval", dataset, dataset, "--out", tmp_path / "r")
    assert "no such directory" in failure("eval", tmp_path / "no", dataset, "--out", tmp_path / "r")
    assert main(["eval", str(run_dir), str(dataset), "--out", str(tmp_path / "r")]) == 0
    assert "--force" in failure("eval", run_dir, dataset, "--out", tmp_path / "r")
    assert main(["eval", str(run_dir), str(dataset), "--out", str(tmp_path / "r"), "--force"]) == 0
    altered = tmp_path / "altered"
    shutil.copytree(run_dir / "model", altered)
    with (altered / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert "hash" in failure("eval", altered, dataset, "--out", tmp_path / "s")


def test_an_unknown_split_is_wrong_usage(run_dir, dataset, tmp_path):
    assert main(["eval", str(run_dir), str(dataset), "--split", "val", "--out", str(tmp_path)]) == 2
