"""The parts of `scripts/learning.py`: tasks that are the same for all runs, the plan, the clock, figures and tables."""

import gzip
import json
import re
import shlex
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from protlm.errors import ProtlmError
from scripts import learning
from scripts.experiments import clock as clock_module
from scripts.experiments import curves, plan, results, runs, tables, tasks
from scripts.experiments.clock import StepClock
from scripts.experiments.plan import CYCLE, KINDS, TARGET, Run

ROOT = Path(__file__).parents[2]
NUM_FAMILIES = 6


def random_sequence(generator, length):
    return "".join(tasks.STANDARD[number] for number in generator.integers(20, size=length))


def write_members(path, generator, names, members, length):
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [
        f">{path.name[0]}{name}{number} family={name}\n{random_sequence(generator, length)}\n"
        for name in names
        for number in range(members)
    ]
    path.write_bytes(gzip.compress("".join(records).encode()))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Made-up proteins in the files that the tasks read."""
    folder, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    names = [f"F{number:02}" for number in range(NUM_FAMILIES)]
    for file, members in (("train", 60), ("iid", 5), ("held", 5)):
        write_members(folder / "families" / f"{file}.fasta.gz", generator, names, members, 90)
        write_members(folder / "families_long" / f"{file}.fasta.gz", generator, names, members // 2, 410)
    for file in ("train_100k", "valid_cluster_5k", "test_random_5k", "ood_pfam24"):
        write_members(folder / "swissprot" / f"{file}.fasta.gz", generator, ["F00"], 130, 320)
    return folder


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_task_has_the_same_splits_every_time_and_no_protein_in_two(name, data):
    splits = tasks.TASKS[name].make(data)
    assert splits == tasks.TASKS[name].make(data)
    assert set(splits) == {"train", "valid", "test", "ood"}
    sequences = [sequence for proteins in splits.values() for _, sequence in proteins]
    assert len(set(sequences)) == len(sequences)
    for proteins in splits.values():
        ids = [record_id for record_id, _ in proteins]
        assert len(set(ids)) == len(ids) > 0


def test_a_diverged_copy_differs_in_the_share_that_is_asked_for():
    sequence = random_sequence(np.random.default_rng(1), 20_000)
    copy = tasks.diverged(sequence, np.random.default_rng(2), 0.3)
    changed = [old != new for old, new in zip(sequence, copy, strict=True)]
    assert abs(np.mean(changed) - 0.3) < 4 * (0.3 * 0.7 / 20_000) ** 0.5
    # Every other residue is as likely as any.
    pairs = {(old, new) for old, new in zip(sequence, copy, strict=True) if old != new}
    assert len(pairs) == 20 * 19
    assert tasks.diverged(sequence, np.random.default_rng(2), 0.0) == sequence


def test_a_copy_stands_behind_its_protein_at_the_distance_of_the_task(data):
    for name, (shortest, longest) in (("copies", (200, 200)), ("copies-varied", tasks.VARIED_RESIDUES)):
        halves = {len(sequence) / 2 for _, sequence in tasks.TASKS[name].make(data)["test"]}
        assert min(halves) >= shortest
        assert max(halves) <= longest
        assert (len(halves) == 1) == (shortest == longest)
        for _, sequence in tasks.TASKS[name].make(data)["test"][:20]:
            half = len(sequence) // 2
            same = np.mean([sequence[place] == sequence[half + place] for place in range(half)])
            assert 0.5 < same < 0.9


def test_homologues_stand_side_by_side_and_held_families_are_in_no_other_split(data):
    splits = tasks.TASKS["concat-4096"].make(data)
    families = {name: {record_id.partition("-")[0] for record_id, _ in proteins} for name, proteins in splits.items()}
    assert families["train"] == families["test"] == families["valid"]
    assert len(families["ood"]) == tasks.UNSEEN_FAMILIES
    assert not families["ood"] & families["train"]
    members = {
        name: {sequence[start : start + 90] for _, sequence in proteins for start in range(0, len(sequence), 90)}
        for name, proteins in splits.items()
    }
    assert not members["train"] & (members["test"] | members["valid"])
    # Every order has every member once.
    assert len(members["train"]) * tasks.ORDERS == sum(len(sequence) // 90 for _, sequence in splits["train"])


def test_only_the_chosen_long_families_are_trained_on(data):
    splits = tasks.TASKS["families-long"].make(data)
    ids = [record_id for proteins in splits.values() for record_id, _ in proteins]
    assert {record_id[1:4] for record_id in ids} == set(tasks.LONG_FAMILIES)


def test_a_part_of_the_plan_is_balanced():
    planned = list(plan.planned_runs())
    assert len({run.name for run in planned}) == len(planned)
    fast = [kind for kind in KINDS if kind != plan.SLOW]
    for place, task in enumerate(plan.MAIN_TASKS):
        ran = [run for run in planned if run.task == task and run.budget == "steps" and run.kind in fast]
        assert [run.kind for run in ran[: len(fast)]] == fast, place
        assert {run.seed for run in ran[: len(fast)]} == {plan.SEEDS[0]}
    # The last seed of the main tasks begins when the first seed of all of them is done.
    seeds = [run.seed for run in planned if run.task in plan.MAIN_TASKS and run.kind in fast]
    assert seeds == sorted(seeds)


def result(run, *, accuracy=0.3, seconds=100.0, perplexity=8.0, replicates=(0.29, 0.31)):
    split = {"num_records": 20, "num_targets": 900, "accuracy": accuracy, "accuracy_low": accuracy - 0.02,
             "accuracy_high": accuracy + 0.02, "perplexity": perplexity, "perplexity_low": perplexity - 1,
             "perplexity_high": perplexity + 1, "empirical": 0.1, "replicates": list(replicates)}  # fmt: skip
    points = [(1, 0.1), (300, 0.2), (600, accuracy)]
    return {
        "format_version": 1, "task": run.task, "kind": run.kind, "seed": run.seed, "budget": run.budget,
        "settings": [], "steps": 600, "num_parameters": 9, "training_seconds": seconds,
        "curve": [{"step": step, "seconds": seconds * step / 600, "accuracy": value, "perplexity": perplexity}
                  for step, value in points],
        "splits": {"iid": split, "held": split},
        "environment": {"processor": "p", "threads": 1, "torch": "t", "commit": "c"},
    }  # fmt: skip


def needed_results(run):
    perplexities = {3: 9.0, 6: 7.0, 12: 8.0, 24: 8.5}
    sweep = [needed for needed in plan.needed_by(run) if needed.budget == "sweep"]
    return {needed.name: result(needed, perplexity=perplexities[needed.temperature]) for needed in sweep}


def test_exact_attention_starts_at_the_best_temperature_of_its_sweep():
    run = Run("copies", "exact-prior", 1)
    found = plan.settings_of(run, needed_results(run))
    assert "model.exact_temperature=6" in found
    assert {"model.attention=softmax", "model.local_bias=3", "train.seed=1", "train.max_steps=300"} <= set(found)


def test_at_equal_time_a_kind_makes_the_updates_that_fit_into_the_time_of_the_cycle():
    run = Run(TARGET, "exact", 0, "time")
    others = {Run(TARGET, CYCLE, 0).name: result(Run(TARGET, CYCLE, 0), seconds=90.0)}
    others[Run(TARGET, "exact", 0).name] = result(Run(TARGET, "exact", 0), seconds=180.0)
    assert set(others) <= {needed.name for needed in plan.needed_by(run)}
    assert plan.settings_of(run, others | needed_results(run))[-1] == "train.max_steps=300"


def test_seconds_are_of_training_alone(monkeypatch):
    clock = StepClock(every=4)
    # The first update loads libraries; 4 and 8 are measured, and their checkpoints are in 5 and 9; 10 is the last.
    seconds = [9.0, 1.0, 1.0, 50.0, 7.0, 1.0, 1.0, 60.0, 8.0, 70.0]
    times = iter([100.0, *(100.0 + np.cumsum(seconds))])
    monkeypatch.setattr(clock_module.time, "process_time", lambda: next(times))
    advance = clock.start("train", 10)
    for _ in seconds:
        advance(0)
        advance(1)
    assert clock.seconds() == [float(step) for step in range(1, 11)]


def test_another_file_or_other_settings_are_never_taken_for_the_run(tmp_path):
    path = tmp_path / "run.json"
    assert runs.earlier_result(path, ["a=1"]) is None
    runs.write_result(path, result(Run(TARGET, CYCLE, 0)) | {"settings": ["a=1"]})
    assert runs.earlier_result(path, ["a=1"])["kind"] == CYCLE
    with pytest.raises(ProtlmError, match=r"run.json: a run with other settings \(a=1, a=2\)"):
        runs.earlier_result(path, ["a=2"])
    for text, said in (("{", "something else"), ("[]", "something else"), ('{"format_version": 9}', "got 9")):
        path.write_text(text)
        with pytest.raises(ProtlmError, match=said):
            runs.earlier_result(path, ["a=1"])


def test_differences_are_paired_and_of_the_seeds_that_both_have():
    low = [result(Run(TARGET, "exact", 0), accuracy=0.3, replicates=(0.2, 0.3, 0.4))]
    high = [result(Run(TARGET, CYCLE, seed), accuracy=0.35 + seed, replicates=(0.26, 0.35, 0.46)) for seed in (0, 1)]
    difference = results.difference(high, low, "iid")
    assert difference.value == pytest.approx(0.05)
    # The spread of the proteins, 0.2, is in both and cancels.
    assert difference.low == pytest.approx(0.05, abs=1e-3)
    assert difference.high == pytest.approx(0.06, abs=1e-3)
    assert results.difference(high[1:], low, "iid") is None


def test_a_curve_is_read_between_its_points_and_ends_with_its_last_one():
    run = result(Run(TARGET, CYCLE, 0), accuracy=0.4, seconds=600.0)
    assert results.at_seconds(run, 450.0) == pytest.approx(0.3)
    assert results.at_seconds(run, 601.0) == 0.4
    assert results.at_seconds(run, 0.5) is None


def made_up():
    planned = [Run(TARGET, kind, seed) for kind in KINDS for seed in plan.SEEDS]
    planned += [Run(TARGET, kind, seed, "time") for kind in ("exact", "exact-prior") for seed in plan.SEEDS]
    planned += [Run(plan.VARIANT_TASK, kind, 0) for kind in (CYCLE, "cycle-64")]
    made = {run.name: result(run, accuracy=0.4 if run.kind == CYCLE else 0.3,
                             replicates=(0.39, 0.41) if run.kind == CYCLE else (0.29, 0.31))
            for run in planned}  # fmt: skip
    # At equal time, seeds differ in their numbers of updates, and so of points.
    made[Run(TARGET, "exact", 1, "time").name]["curve"].insert(0, made[Run(TARGET, CYCLE, 0).name]["curve"][0])
    return made | needed_results(Run(TARGET, "exact", 0)) | needed_results(Run(TARGET, "exact-prior", 0))


def test_tables_say_which_is_above_and_replace_the_old_ones_between_their_marks():
    page = "before\n<!-- table: target -->\nold\n<!-- end -->\nafter\n<!-- table: sweep -->\n<!-- end -->\n"
    text = tables.with_tables(page, made_up())
    assert "old" not in text
    assert text.startswith("before\n<!-- table: target -->\n\n| the cycle minus")
    assert text.count("+0.100 (+0.100 to +0.100)") + text.count("+0.100 |") == 8
    (chosen,) = (line for line in text.splitlines() if "exact |" in line and line.endswith("best |"))
    assert "| 6 |" in chosen
    assert tables.with_tables(text, made_up()) == text
    with pytest.raises(ProtlmError, match="table: nothing"):
        tables.with_tables("<!-- table: nothing -->\n\n<!-- end -->", {})


@pytest.mark.parametrize("name", [*tasks.TASKS, *tables.TABLES])
def test_every_table_can_be_made_of_any_part_of_the_runs(name):
    page = f"<!-- table: {name} -->\n\n<!-- end -->"
    made = made_up()
    for number in (0, 1, 5, len(made)):
        text = tables.with_tables(page, dict(islice(made.items(), number)))
        assert len(text) > len(page)


def test_the_verdict_of_an_interval_around_zero_is_open():
    first = [result(Run(TARGET, CYCLE, 0), accuracy=0.31, replicates=(0.25, 0.35))]
    second = [result(Run(TARGET, "exact", 0), accuracy=0.30, replicates=(0.27, 0.33))]
    difference = results.difference(first, second, "iid")
    assert tables._verdict(difference) == "not told apart"


def test_pictures_are_drawn_where_there_are_runs(tmp_path):
    paths = curves.draw_pictures(made_up(), tmp_path)
    assert [path.name for path in paths] == ["families-long.png", "copies.png", "variants.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert set(curves._MARKS) == {*KINDS, *plan.VARIANTS}


def test_the_page_is_that_of_its_runs_and_shows_every_picture():
    text = learning.PAGE.read_text(encoding="utf-8")
    made = results.read_results(learning.RUNS)
    assert tables.with_tables(text, made) == text
    shown = set(re.findall(r"\((what_trains/[\w-]+\.png)\)", text))
    assert shown == {path.relative_to(learning.PAGE.parent).as_posix() for path in learning.RUNS.parent.glob("*.png")}


def test_the_runs_of_the_page_are_those_of_the_plan():
    made = results.read_results(learning.RUNS)
    planned = {run.name: run for run in plan.planned_runs()}
    planned |= {needed.name: needed for run in list(planned.values()) for needed in plan.needed_by(run)}
    for name, content in made.items():
        assert json.loads(json.dumps(list(plan.settings_of(planned[name], made)))) == content["settings"], name


def test_the_commands_of_the_page_are_understood():
    commands = re.findall(r"python scripts/learning.py (.*)", learning.PAGE.read_text(encoding="utf-8"))
    assert {learning.parse(shlex.split(words.rstrip("`")))
            .command for words in commands} == {"run", "page"}  # fmt: skip
