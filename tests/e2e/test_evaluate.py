import json
import math
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from protlm.cli.app import main
from protlm.data.batching.masking import MaskRates, evaluation_generator, mask_residues
from protlm.data.storage.dataset import open_dataset
from protlm.vocabulary import MASK, RESIDUES
from tests.unit.workflows.evaluate.eval_cases import save_new_model


@pytest.fixture
def evaluate(run_dir, dataset, tmp_path, capsys):
    """A function that runs `protlm eval` on the run and returns the content of its report.json."""

    def run(*options, model=run_dir, out=tmp_path / "report"):
        assert main(["eval", str(model), str(dataset), "--out", str(out), "--force", *map(str, options)]) == 0
        return json.loads((out / "report.json").read_text())

    return run


@pytest.fixture
def usage_error(capsys):
    """Runs a command that must end with status 2 and one line `Error: …` below the usage; returns that line."""

    def run(*arguments):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = captured.err.strip().splitlines()
        assert lines[0].startswith("Usage: ")
        assert [line.startswith("Error: ") for line in lines].count(True) == 1
        assert lines[-1].startswith("Error: ")
        return lines[-1]

    return run


def test_eval_reports_the_model_beside_the_baselines(run_dir, dataset, tmp_path, capsys):
    assert main(["eval", str(run_dir), str(dataset), "--split", "test", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    names = ["model", "empirical baseline", "Markov, residues before", "Markov, both sides", "uniform"]
    assert [line.split("  ")[0] for line in told.splitlines()[1:6]] == names
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["split"] == "test"
    assert report["seed"] == 0
    assert report["targets"] == "hidden"
    for row in report["splits"]["test"]["scores"].values():
        assert 0 <= row["accuracy"] <= row["top5_accuracy"] <= 1
        assert 1 < row["perplexity"] < 40
        assert f"{row['perplexity']:.3f}" in told
        assert row["perplexity"] == pytest.approx(2 ** row["bits_per_residue"])
        if row["perplexity_stderr"] is not None:
            assert row["perplexity_low"] < row["perplexity"] < row["perplexity_high"]
            assert f"{row['perplexity_low']:.3f} to {row['perplexity_high']:.3f}" in told
    assert report["verdict"] in told
    # Three epochs of a tiny model are nothing against a count table.
    assert "does not beat" in report["verdict"]
    # About 15 % of the residues of the split are scored.
    manifest = json.loads((dataset / "manifest.json").read_text())
    assert report["num_targets"] / manifest["splits"]["test"]["num_residues"] == pytest.approx(0.15, abs=0.03)
    assert report["markov"]["num_residues"] == manifest["splits"]["train"]["num_residues"]
    assert report["markov"]["chosen_on"] == "valid"


def test_eval_of_the_valid_split_equals_what_training_measured(run_dir, dataset, tmp_path, capsys):
    arguments = ["eval", str(run_dir / "model"), str(dataset), "--split", "valid", "--out", str(tmp_path), "--json"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "report.json").read_text())
    saved = json.loads((run_dir / "model" / "config.json").read_text())["valid"]
    assert report["model"]["perplexity"] == pytest.approx(saved["perplexity"], rel=1e-6)
    assert report["model"]["accuracy"] == saved["accuracy"]
    assert report["empirical"]["perplexity"] == pytest.approx(saved["empirical_perplexity"], rel=1e-12)
    assert report["empirical"]["accuracy"] == saved["empirical_accuracy"]
    assert report["num_targets"] == saved["num_targets"]


def test_the_seed_moves_the_masks_and_the_same_command_gives_the_same_bytes(run_dir, dataset, tmp_path):
    reports = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        assert main(["eval", str(run_dir), str(dataset), "--out", str(out), "--seed", str(seed)]) == 0
        reports.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert reports[0] == reports[1]
    assert reports[0]["report.json"] != reports[2]["report.json"]


def test_proteins_that_were_cut_are_told(tmp_path, dataset, capsys):
    model = save_new_model(tmp_path / "model", positions="learned", max_positions=32)
    assert main(["eval", str(model), str(dataset), "--out", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["num_cut"] > 0
    assert f"cut         {report['num_cut']} proteins (test): longer than" in capsys.readouterr().out


def test_a_model_of_another_dataset_is_told(run_dir, tmp_path, dataset, capsys):
    warning = "trained on  another dataset, or several"
    for model, is_told in ((run_dir, False), (save_new_model(tmp_path / "model"), True)):
        out = tmp_path / str(is_told)
        assert main(["eval", str(model), str(dataset), "--out", str(out)]) == 0
        report = json.loads((out / "report.json").read_text())
        assert (report["training_dataset_hash"] != report["dataset_hash"]) is is_told
        assert (warning in capsys.readouterr().out) is is_told
        assert ("proteins scored here may be among them" in (out / "report.html").read_text()) is is_told


def test_splits_are_scored_side_by_side(evaluate, capsys):
    two = evaluate("--split", "valid", "--split", "test")
    assert list(two["splits"]) == ["valid", "test"]
    assert {(row["first"], row["second"]) for row in two["differences"]} == {("valid", "test")}
    told = capsys.readouterr().out
    assert told.index("valid split") < told.index("test split")
    every = evaluate("--split", "all")
    assert list(every["splits"]) == ["test", "valid", "train"]
    assert every["splits"]["test"] == two["splits"]["test"]
    # On the training split the table meets its own counts.
    markov = {name: split["scores"]["markov"]["perplexity"] for name, split in every["splits"].items()}
    assert markov["train"] < markov["test"]


def test_what_is_copied_from_the_mixture_is_named_beside_it(evaluate, run_dir, dataset):
    report = evaluate("--as-trained", "--random-weights", "--masks", 2, "--mask-rate", 0.3, "--pseudo-perplexity", 1)
    assert (report["num_masks"], report["mask_rate"]) == (2, 0.3)
    scores = report["splits"]["test"]["scores"]
    requested = ["random_weights", "model_as_trained", "copies"]
    assert list(scores) == ["model", "empirical", "markov", "two_sided", "uniform", *requested]
    assert report["splits"]["test"]["pseudo_perplexity"]["num_proteins"] == 1
    # Without a context: a visible target, of which half were left as they are, and else the training frequencies.
    counts = json.loads((run_dir / "model" / "config.json").read_text())["residue_counts"]
    frequencies = {letter: (counts[letter] + 1) / (sum(counts.values()) + 25) for letter in RESIDUES}
    split, num_targets, nll = open_dataset(dataset).split("test"), 0, 0.0
    for seed in (0, second_seed(report)):
        for tokens in map(split.tokens, range(split.num_records)):
            seen, target_mask = mask_residues(tokens, MaskRates(0.3, 0.8, 0.1), evaluation_generator(seed, tokens))
            for true, visible in zip(tokens[target_mask].tolist(), seen[target_mask].tolist(), strict=True):
                probability = frequencies[RESIDUES[true - 4]]
                if visible != MASK:
                    probability = probability / 2 + (visible == true) / 2
                nll -= math.log(probability)
                num_targets += 1
    assert report["num_targets"] == num_targets
    assert scores["copies"]["perplexity"] == pytest.approx(math.exp(nll / num_targets), rel=1e-9)
    assert scores["copies"]["accuracy"] > scores["empirical"]["accuracy"]


def second_seed(report):
    from protlm.data.batching.masking import Objective
    from protlm.workflows.evaluate.measure import Masks

    objective = Objective(False, MaskRates(report["mask_rate"]))
    shape = {"tokens_per_batch": 1, "window_tokens": None, "max_residues": None}
    return Masks(objective=objective, seed=report["seed"], num_masks=2, **shape).seed_of(1)


def test_the_residues_of_a_report_add_up_to_it(evaluate, dataset, tmp_path):
    report = evaluate("--split", "test", "--split", "valid", "--masks", 2, "--residues")
    table = pq.read_table(tmp_path / "report" / "residues.parquet").to_pydict()
    assert sorted(set(table["mask"])) == [0, 1]
    names = np.array(table["split"])
    for name, measured in report["splits"].items():
        (rows,) = np.nonzero(names == name)
        assert len(rows) == measured["num_targets"]
        model = measured["scores"]["model"]
        nll = -np.array(table["log_probability"], dtype=np.float64)[rows].mean()
        assert math.exp(nll) == pytest.approx(model["perplexity"], rel=1e-6)
        ranks = np.array(table["rank"])[rows]
        assert (ranks == 1).mean() == model["accuracy"]
        assert (ranks <= 5).mean() == model["top5_accuracy"]
        split = open_dataset(dataset).split(name)
        numbers = {split.id(record): record for record in range(split.num_records)}
        for row in rows[:: max(1, len(rows) // 50)].tolist():
            tokens = split.tokens(numbers[table["id"][row]])
            assert RESIDUES[tokens[table["position"][row] - 1] - 4] == table["residue"][row]
            probability = table["probabilities"][row][RESIDUES.index(table["residue"][row])]
            assert math.log(probability) == pytest.approx(table["log_probability"][row], abs=1e-5)


def test_a_causal_model_predicts_what_follows_and_refuses_masks(evaluate, dataset, tmp_path, usage_error):
    model = save_new_model(tmp_path / "causal", causal=True)
    report = evaluate("--split", "all", model=model)
    manifest = json.loads((dataset / "manifest.json").read_text())
    assert (report["objective"], report["targets"]) == ("next-token", "next-token")
    for name, measured in report["splits"].items():
        assert measured["num_targets"] == manifest["splits"][name]["num_residues"]
        assert measured["scores"]["markov"]["perplexity"] < measured["scores"]["empirical"]["perplexity"]
    for options in (("--as-trained",), ("--mask-rate", 0.3), ("--masks", 2), ("--pseudo-perplexity", 2)):
        assert "hides nothing" in usage_error("eval", model, dataset, "--out", tmp_path / "r", *options)
    assert not (tmp_path / "r").exists()


def test_wrong_usage(run_dir, dataset, tmp_path, usage_error):
    command = ("eval", run_dir, dataset, "--out", tmp_path)
    assert "'val' is not one of" in usage_error(*command, "--split", "val")
    assert "nothing would be scored" in usage_error(*command, "--mask-rate", 0)
    assert "--mask-rate" in usage_error(*command, "--mask-rate", 1.5)
    assert "--masks" in usage_error(*command, "--masks", 0)
    assert "--pseudo-perplexity" in usage_error(*command, "--pseudo-perplexity", -1)


def test_bad_input_gives_one_line(run_dir, dataset, tmp_path, failure):
    assert "train, valid, test" in failure("eval", run_dir, dataset, "--split", "ood", "--out", tmp_path / "r")
    assert "config.json" in failure("eval", dataset, dataset, "--out", tmp_path / "r")
    assert "no such directory" in failure("eval", tmp_path / "no", dataset, "--out", tmp_path / "r")
    assert "expected a dataset folder" in failure("eval", run_dir, tmp_path / "no", "--out", tmp_path / "r")
    assert main(["eval", str(run_dir), str(dataset), "--out", str(tmp_path / "r")]) == 0
    assert "--force" in failure("eval", run_dir, dataset, "--out", tmp_path / "r")
    assert main(["eval", str(run_dir), str(dataset), "--out", str(tmp_path / "r"), "--force"]) == 0
    (tmp_path / "file").write_text("")
    assert "expected a folder" in failure("eval", run_dir, dataset, "--out", tmp_path / "file")
    assert str(tmp_path / "file") in failure("eval", run_dir, dataset, "--out", tmp_path / "file" / "report")
    altered = tmp_path / "altered"
    shutil.copytree(run_dir / "model", altered)
    with (altered / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert "hash" in failure("eval", altered, dataset, "--out", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def changed(folder, out, name, change):
    """Copies a folder and changes one JSON file in it."""
    shutil.copytree(folder, out)
    content = json.loads((out / name).read_text())
    change(content)
    (out / name).write_text(json.dumps(content))
    return out


def test_another_vocabulary_is_refused(run_dir, dataset, tmp_path, failure):
    swap = lambda content: content["vocabulary"].reverse()  # noqa: E731
    of_data = changed(dataset, tmp_path / "dataset", "manifest.json", swap)
    assert "vocabulary" in failure("eval", run_dir, of_data, "--out", tmp_path / "r")
    of_model = changed(run_dir / "model", tmp_path / "model", "config.json", swap)
    assert "vocabulary" in failure("eval", of_model, dataset, "--out", tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("split", ["test", "train"])
def test_a_shard_that_cannot_be_read_is_named(run_dir, dataset, tmp_path, failure, split):
    copy = tmp_path / "dataset"
    shutil.copytree(dataset, copy)
    (shard,) = copy.glob(f"{split}*.h5")
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    # The training split is read for the Markov baseline.
    assert shard.name in failure("eval", run_dir, copy, "--out", tmp_path / "r")
    shard.unlink()
    assert shard.name in failure("eval", run_dir, copy, "--out", tmp_path / "r")
    assert not (tmp_path / "r").exists()
