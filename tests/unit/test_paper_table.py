"""The plan, the tables and the pictures of paper_table.md, from results that are made up."""

import re

import numpy as np
import pytest

from protlm.config_files import load_config
from protlm.errors import ProtlmError
from scripts import paper_table
from scripts.experiments.results import read_results
from scripts.paper import page, plan, proteins, runs
from scripts.paper.plan import KINDS, MAIN, TASKS, Run, planned_runs, settings_of, sweep


def scores(accuracy: float, step: int) -> dict:
    """Scores of a model that is as good on every set, whose proteins differ in how hard they are."""
    spread = np.random.default_rng(0).normal(scale=0.01, size=50)
    row = {"accuracy": accuracy, "accuracy_low": accuracy - 0.02, "accuracy_high": accuracy + 0.02,
           "perplexity": 10.0, "perplexity_low": 9.0, "perplexity_high": 11.0}  # fmt: skip
    split = {
        "num_records": 5, "num_targets": 100, "model": row, "empirical": {**row, "accuracy": 0.09, "perplexity": 17.5},
        "replicates": {"accuracy": (accuracy + spread).tolist()},
    }  # fmt: skip
    return {"step": step, "splits": dict.fromkeys(runs.SPLITS, split)}


def result(run: Run, accuracy: float = 0.1, perplexity: float = 15.0) -> dict:
    of_sweep = run.temperature is not None
    return {
        "format_version": 1, "task": run.task, "kind": run.kind, "direction": run.direction, "seed": run.seed,
        "temperature": run.temperature, "settings": [], "minutes": 20.0, "num_parameters": 2_000_000,
        "num_tokens": 4_000_000, "training_seconds": 1200.0, "tokens_per_second": 3333.0, "peak_bytes": 900 << 20,
        "scores": {} if of_sweep else {"steps": scores(accuracy, 400), "time": scores(accuracy + 0.01, 900)},
        "curve": [{"step": 100, "seconds": 100.0, "accuracy": accuracy, "perplexity": perplexity}],
        "environment": {"processor": "a CPU", "threads": 1, "torch": "2", "commit": "abc"},
    }  # fmt: skip


@pytest.fixture
def results():
    made = {run.name: result(run, perplexity=abs(run.temperature - 6) + 15.0) for run in sweep()}
    for kind, accuracy in (("exact", 0.1), ("cycle", 0.12), ("relu", 0.1)):
        for seed in (0, 1):
            run = Run("single", kind, seed=seed)
            made[run.name] = result(run, accuracy + 0.002 * seed)
    return made


def test_every_run_of_the_plan_is_there_once_and_its_settings_are_those_of_a_model(tmp_path):
    planned = list(planned_runs())
    assert len({run.name for run in planned}) == len(planned)
    assert [run for run in planned if run.temperature is not None] == planned[:3] == sweep()
    for run in planned:
        config = load_config(None, settings_of(run, 6))
        assert config.model.causal == (run.direction == "UNI")
        assert config.train.seed == run.seed
        assert config.train.schedule == "constant"
        assert (config.model.num_layers, config.model.model_dim) == (4, 192)
        if run.kind == "exact":
            assert config.model.exact_temperature == (run.temperature or 6)
    main = {(run.kind, run.seed) for run in planned if (run.task, run.direction) == ("single", "BID")}
    assert {(kind, seed) for kind in MAIN for seed in (0, 1)} <= main


def test_the_temperature_is_that_of_the_sweep(results):
    assert page.best_temperature(results) == 6
    del results[sweep()[0].name]
    assert page.best_temperature(results) is None
    assert "| best |" not in page.sweep_table(results)


def test_a_table_has_means_of_seeds_beside_the_baselines(results):
    text = page.scores_table(results, "single", "steps")
    row = next(line for line in text.splitlines() if KINDS["cycle"].title in line)
    assert re.search(r"\| BID \| .* \| 2 \| 0\.121 \(0\.\d+ to 0\.\d+\)<br>10\.00 \(9\.00 to 11\.00\) \|", row)
    assert row.endswith("| 400 |")
    assert "baseline: residue frequencies | – | 0.090 (0.080 to 0.120)<br>17.50 (9.00 to 11.00) |" in text
    assert "| 900 |" in page.scores_table(results, "single", "time")
    assert page.scores_table(results, "concatenated", "steps") == "No such run is there yet."


def test_differences_are_paired(results):
    text = page.differences_table(results, "exact")
    row = next(line for line in text.splitlines() if KINDS["cycle"].title in line and "equal updates" in line)
    # The same proteins are drawn for both: nothing but rounding is left.
    assert "**+0.020**<br>+0.020, +0.020 |" in row
    # Not bold: a seed says the opposite, or there is only one.
    results["single.BID.cycle.1"] = result(Run("single", "cycle", seed=1), 0.09)
    row = next(line for line in page.differences_table(results, "exact").splitlines() if KINDS["cycle"].title in line)
    assert "| +0.004<br>+0.020, −0.012 |" in row
    del results["single.BID.cycle.1"]
    row = next(line for line in page.differences_table(results, "exact").splitlines() if KINDS["cycle"].title in line)
    assert "| +0.020<br>+0.020 |" in row
    assert KINDS["exact"].title in page.differences_table(results, "cycle")
    assert page.differences_table(results, "trig") == "No two such runs are there yet."
    relu = page.difference(
        *(page.of_kind(results, "single", kind, "BID") for kind in ("relu", "exact")), "steps", "ood"
    )
    assert (relu.value, relu.low) == (0, None)
    assert (
        page.difference([result(Run("single", "relu", seed=2))], [result(Run("single", "exact"))], "time", "iid")
        is None
    )


def test_the_page_says_what_is_missing(results):
    text = page.conditions(results)
    assert text.startswith("9 runs, 180 minutes of processor time in training, 20 minutes a run: a CPU, 1 thread")
    assert f"Not there are {len(list(planned_runs())) - 9} of {len(list(planned_runs()))} runs: " in text
    assert "`single.BID.near-far.0`" in text
    assert "`single.BID.cycle.0`" not in text


def test_the_page_has_a_table_between_every_pair_of_marks(results):
    marks = "".join(f"<!-- table: {name} -->\nold\n<!-- end -->\n" for name in page.TABLES)
    made = page.with_tables(f"a\n{marks}b\n", results)
    assert "old" not in made
    assert page.with_tables(made, results) == made
    assert made.count("](paper_table/single.png)") == 1
    assert "concatenated.png" not in made
    assert "3,333" in made
    results["single.BID.relu.1"] |= {"training_seconds": 1260.0}
    assert "| 3,333 | 900 | 20.5 (20.0–21.0) |" in page.cost_table(results, "single")
    assert "900" in made
    with pytest.raises(ProtlmError, match="<!-- table: nosuch -->: expected one of single-steps"):
        page.with_tables("<!-- table: nosuch -->\n<!-- end -->\n", results)


def test_every_task_with_runs_has_a_picture(results, tmp_path):
    assert [path.name for path in page.draw_pictures(results, tmp_path)] == ["single.png"]
    assert (tmp_path / "single.png").read_bytes().startswith(b"\x89PNG")


def test_every_kind_has_a_mark_and_a_task_for_its_updates():
    assert set(page._MARKS) == set(KINDS)
    assert all(task.tokens % 1024 == 0 and task.steps > plan.SWEEP_STEPS / 2 for task in TASKS.values())


def test_a_sample_of_families_has_all_of_them():
    records = [proteins.Record(f"p{number}", f"pfam=PF{number % 3}|x", "MK" + "A" * number) for number in range(60)]
    sample = proteins.of_each_family(records, 12)
    assert sorted(record.description for record in sample) == [f"pfam=PF{n}|x" for n in (0, 1, 2) for _ in range(4)]
    assert proteins.of_each_family(list(reversed(records)), 12) == sample


def test_what_is_wrong_is_one_line(tmp_path):
    with pytest.raises(
        SystemExit, match=r"error: --only: expected the name of a run, such as single\.BID\.exact\.3\.0"
    ):
        paper_table.main(["run", "--only", "nosuch", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds no runs; make some with `run`"):
        paper_table.main(["page", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"error: .*train_100k\.fasta\.gz: no such file; name the folder"):
        paper_table.main(["one", "--only", "single.BID.relu.0", "--out", str(tmp_path), "--data", str(tmp_path)])
    with pytest.raises(
        SystemExit, match=r"its temperature follows from other runs; make these first: single\.BID\.exact"
    ):
        paper_table.main(["one", "--only", "single.BID.exact.0", "--out", str(tmp_path), "--data", str(tmp_path)])
    (tmp_path / "single.BID.relu.0.json").write_text('{"format_version": 99}')
    with pytest.raises(SystemExit, match="expected format version 1, got 99; move it away"):
        paper_table.main(["page", "--out", str(tmp_path)])


def test_the_page_shows_the_runs_beside_it():
    """After new runs: python scripts/paper_table.py page."""
    text = paper_table.PAGE.read_text(encoding="utf-8")
    assert page.with_tables(text, read_results(paper_table.RUNS)) == text
