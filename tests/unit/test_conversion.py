"""The experiment of convert.md: its sequences, its tables and pictures, and that the page shows the runs beside it."""

import argparse
import csv
import gzip
import re
from pathlib import Path

import numpy as np
import pytest

from protlm.errors import ProtlmError
from protlm.workflows.convert import cost
from scripts import convert_experiment
from scripts.conversion import long_proteins, page, plan, runs
from scripts.conversion.plan import ARMS, SUBJECTS, Run, planned_runs
from scripts.conversion.sequences import vh_sequences

ROOT = Path(__file__).parents[2]


def result(subject, arm, seed, accuracies, exact=0.9):
    steps = range(0, 25 * len(accuracies), 25)
    curve = [
        {"step": step, "stage": "swap", "accuracy": a, "perplexity": 2.0}
        for step, a in zip(steps, accuracies, strict=True)
    ]
    return {
        "format_version": 1, "subject": subject, "arm": arm, "seed": seed, "seconds": 60.0, "swap": None,
        "exact": {"accuracy": exact, "perplexity": 1.5}, "curve": curve,
        "environment": {"processor": "a CPU", "commit": "abc"},
    }  # fmt: skip


@pytest.fixture
def results():
    near = {
        Run("sapiens", "near-stages", seed).name: result("sapiens", "near-stages", seed, [0.8 + 0.02 * seed] * 5)
        for seed in (0, 1)
    }
    scratch = result("sapiens", "scratch", 0, [0.1, 0.3, 0.5, 0.7, 0.82])
    return {**near, Run("sapiens", "scratch", 0).name: scratch}


def test_tables_are_means_of_seeds_and_shares_of_exact_attention(results):
    text = page.recovery_table(results, "sapiens")
    row = next(line for line in text.splitlines() if ARMS["near-stages"].title in line)
    assert re.findall(r"[\d.%–]+", row.partition("|")[2].partition("|")[2]) == [
        "2", "0.810", "0.810", "0.810", "0.810", "–", "–", "100", "0.810", "90.0%",
    ]  # fmt: skip
    assert "90.0%" in page.targets_table(results)
    assert page.scratch_sentence(results).endswith("the accuracy of 0.810 takes 100 updates, not 100.")
    assert "2 runs" not in page.conditions(results)
    assert page.conditions(results).startswith("3 runs, 3 minutes of processor time: a CPU, 1 thread, commits abc.")


def test_the_page_has_a_table_between_every_pair_of_marks(results, tmp_path):
    text = "a\n<!-- table: sapiens -->\nold\n<!-- end -->\nb\n<!-- table: rotary -->\n<!-- end -->\n"
    made = page.with_tables(text, results)
    assert "old" not in made
    assert made.startswith("a\n<!-- table: sapiens -->\n\n| attention, learning")
    assert "![sapiens VH" in made
    assert "No such run is there yet." in made
    assert page.with_tables(made, results) == made
    with pytest.raises(ProtlmError, match="<!-- table: other -->: expected one of"):
        page.with_tables("<!-- table: other -->\n<!-- end -->", results)
    (picture,) = page.draw_pictures(results, tmp_path / "pictures")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_files_of_something_else_are_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"format_version": 9}')
    with pytest.raises(ProtlmError, match=r"a\.json: expected the result of a run"):
        page.read_results(tmp_path)


def test_the_page_shows_the_runs_beside_it():
    results = page.read_results(ROOT / "docs" / "convert" / "runs")
    text = (ROOT / "docs" / "convert.md").read_text(encoding="utf-8")
    assert set(results) <= {run.name for run in planned_runs()}
    long = page.read_long(ROOT / "docs" / "convert" / "long.json")
    assert page.with_tables(text, results, long) == text
    shown = set(re.findall(r"\((convert/[\w-]+\.png)\)", text))
    assert shown == {f"convert/{path.name}" for path in (ROOT / "docs" / "convert").glob("*.png")}


def test_measurements_of_long_proteins_become_tables(tmp_path):
    long = {
        "format_version": 1,
        "blocks": [
            {"features": None, "block": None, "accuracy": 0.2, "perplexity": 12.0},
            {"features": 128, "block": 16, "accuracy": 0.15, "perplexity": 13.0},
        ],
        "positions": [{"start": 200, "num_targets": 1234, "exact": 12.0, "swapped": 12.5}],
        "exact_costs": [{"length": 512, "seconds": None, "peak_bytes": None}],
        "costs": [{"length": 512, "seconds": 0.5, "peak_bytes": 3 << 20}],
        "environment": {"processor": "a CPU", "cores": 2, "torch": "2"},
    }  # fmt: skip
    text = "".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in ("blocks", "positions", "cost"))
    made = page.with_tables(text, {}, long)
    assert "| 16 | 128 | 0.150 (75%) | 13.00 |" in made
    assert "| from 201 | 1,234 | 12.00 | 12.50 |" in made
    assert "| 512 | not over in 2 minutes | – | 0.5 s | 3 MiB |" in made
    assert "Not measured yet." in page.with_tables(text, {})
    assert page.read_long(tmp_path / "none.json") is None
    (tmp_path / "a.json").write_text('{"format_version": 9}')
    with pytest.raises(ProtlmError, match=r"a\.json: expected measurements of long proteins"):
        page.read_long(tmp_path / "a.json")


def airr(path, *changes):
    """Writes sequences that differ from a good one in some columns."""
    good = {
        "sequence_id": "s", "productive": "T", "v_germline_start": "1", "v_call": "IGHV1-2*01", "j_call": "IGHJ4*02",
        "junction_length": "45", "sequence_alignment": "CAG..GTGCAG---CTG" + "GAAGTT" * 60,
    }  # fmt: skip
    with gzip.open(path, "wt", newline="") as file:
        writer = csv.DictWriter(file, list(good), delimiter="\t")
        writer.writeheader()
        for number, change in enumerate(changes):
            writer.writerow({**good, "sequence_id": f"s{number}", **change})
    return path


def test_sequences_are_translated_distinct_and_split_by_clone(tmp_path):
    alignment = "GAAGTT" * 60
    path = airr(
        tmp_path / "a.tsv.gz", {}, {}, {"productive": "F"}, {"v_germline_start": "2"},
        {"sequence_alignment": "TAA" + alignment}, {"sequence_alignment": "GAA"},
        {"sequence_alignment": "NNN" + alignment}, {"sequence_alignment": "NNN" * 3 + alignment},
        {"sequence_alignment": "ATG" + alignment, "v_call": "IGHV1-2*02,IGHV1-3*01"},
    )  # fmt: skip
    found = list(vh_sequences(path))
    assert [name for name, _, _ in found] == ["s0", "s6", "s8"]
    assert found[0][1] == "QVQL" + "EV" * 60
    assert found[1][1] == "X" + "EV" * 60
    # Of one clone, whatever the allele.
    assert found[0][2] == found[2][2]
    clones = [airr(tmp_path / f"{n}.tsv.gz", {"junction_length": str(n)}) for n in range(200)]
    shares = [held for path in clones for _, _, held in vh_sequences(path)]
    assert 8 <= sum(shares) <= 35


def test_a_run_goes_from_the_swap_through_its_stages(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    families = tmp_path / "data" / "families"
    families.mkdir(parents=True)
    for name, size in (("train", 40), ("iid", 12)):
        with gzip.open(families / f"{name}.fasta.gz", "wt") as file:
            for number in range(size):
                residues = "".join(generator.choice(list("ACDEFGHIKLMNPQRSTVWY"), 40))
                file.write(f">{name}{number}\n{residues}\n")
    small = ("model.num_layers=2", "model.attention=softmax", "model.qk_norm=false", "model.conv_width=0",
             "model.model_dim=32", "model.num_heads=2", "train.max_steps=2", "data.max_length=100")  # fmt: skip
    monkeypatch.setattr(runs, "_TEACHING", small)
    monkeypatch.setitem(plan.SUBJECTS, "rotary", plan.Subject("small", 16, 4, 100, 3))
    stages = (("transfer", 3), ("distill", 2))
    for arm in ("near-stages", "scratch"):
        monkeypatch.setitem(plan.ARMS, arm, plan.Arm("small", ARMS[arm].balance, arm != "scratch", stages))
    monkeypatch.setattr(runs, "_POINTS", 1)
    arguments = argparse.Namespace(data=tmp_path / "data", airr=None, antiberty=None)
    prepared = runs.prepare("rotary", arguments, tmp_path / "work")
    made = runs.perform(Run("rotary", "near-stages", 0), prepared, tmp_path / "run")
    assert [(point["step"], point["stage"]) for point in made["curve"]] == [
        (0, "swap"), (1, "transfer"), (2, "transfer"), (3, "transfer"), (4, "distill"), (5, "distill"),
    ]  # fmt: skip
    assert made["swap"] == {"calibrated_on": 40}
    scratch = runs.perform(Run("rotary", "scratch", 0), prepared, tmp_path / "scratch")
    assert [point["step"] for point in scratch["curve"]] == [1, 2, 3]
    with pytest.raises(ProtlmError, match="--airr: name the file"):
        runs.prepare("sapiens", arguments, tmp_path / "other")
    (tmp_path / "data" / "families_long").mkdir()
    for name in ("iid", "held"):
        with gzip.open(tmp_path / "data" / "families_long" / f"{name}.fasta.gz", "wt") as file:
            file.write(f">{name}\n" + "".join(generator.choice(list("ACDEFGHIKLMNPQRSTVWY"), 450)) + "\n")
    monkeypatch.setattr(cost, "LENGTHS", (30,))
    monkeypatch.setattr(long_proteins, "SHAPE", {**long_proteins.SHAPE, "num_layers": 1})
    long = long_proteins.measure_long(prepared, tmp_path / "data", tmp_path / "work")
    assert [row["start"] for row in long["positions"]] == [0, 200, 400]
    assert [each["block"] for each in long["blocks"]] == [None, 16, 16, 32, 32, 64, 64]
    assert len(long["costs"]) == len(long["exact_costs"]) == 1


def test_the_command_line_chooses_runs_and_makes_none_twice(tmp_path, monkeypatch, capsys):
    made = []

    def perform(run, prepared, work):
        made.append(run.name)
        return result(run.subject, run.arm, run.seed, [0.5, 0.6])

    monkeypatch.setattr(runs, "prepare", lambda *_: None)
    monkeypatch.setattr(runs, "perform", perform)
    words = ["run", "--subject", "sapiens", "--arm", "near-ce", "--out", str(tmp_path)]
    for _ in range(2):
        convert_experiment.main(words)
    assert made == ["sapiens.near-ce.0", "sapiens.near-ce.1"]
    target = tmp_path / "page.md"
    target.write_text("<!-- table: sapiens -->\n<!-- end -->\n")
    files = ["--runs", str(tmp_path), "--long", str(tmp_path / "no.json")]
    convert_experiment.main(["page", *files, "--page", str(target)])
    assert "| exact attention |" in target.read_text()
    assert (tmp_path / "page" / "sapiens.png").exists()
    with pytest.raises(SystemExit, match="holds no runs"):
        convert_experiment.main(["page", "--runs", str(tmp_path / "none"), "--page", str(target)])
    assert set(SUBJECTS) == {"sapiens", "rotary", "antiberty"}
