"""The progress of every command where stderr is no terminal: nothing in the first minute, then a line a minute."""

import re

import pytest

from protlm.cli import progress
from protlm.cli.app import main
from tests.e2e.conftest import SMALL
from tests.e2e.train_tools import train

LINE = re.compile(
    r"(\w+): (?:([\d,]+) of ([\d,]+) (\w+) \((\d+)%\), [\d,.e+]+ \w+/s, \d+:\d\d:\d\d left|at work for .*)(, loss .*)?"
)


def command_lines(run_dir, dataset, fasta):
    few = ["--config", "tiny", *SMALL, "--max-steps", "2"]
    return {
        "prep": (["prep", fasta, "--out", "out"], {"read": "B", "write": "residues"}),
        "train": (["train", dataset, "--out", "out", *few], {"train": "steps"}),
        "eval": (["eval", run_dir, dataset, "--out", "out"], {"eval": "residues"}),
        "embed": (["embed", run_dir, fasta, "--out", "out"], {"read": "B", "embed": "residues", "write": "proteins"}),
        "convert": (["convert", run_dir, "--out", "out"], {"convert": "steps"}),
        "inspect": (["inspect", dataset, "--verify"], {"verify": "residues"}),
    }


@pytest.fixture(params=["prep", "train", "eval", "embed", "convert", "inspect"])
def case(request, run_dir, dataset, fasta, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, units = command_lines(run_dir, dataset, fasta)[request.param]
    return list(map(str, words)), units


def test_work_of_less_than_a_minute_prints_no_progress(case, capsys):
    words, units = case
    assert main(words) == 0
    told = capsys.readouterr().err
    assert not [line for line in told.splitlines() if line.partition(":")[0] in units], told


def test_longer_work_prints_what_is_done_of_how_much_in_every_stage(case, capsys, monkeypatch):
    words, units = case
    # Each call comes a minute after the last one.
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    assert main(words) == 0
    told = capsys.readouterr().err
    lines = [line for line in told.splitlines() if not line.startswith("warning: ")]
    matches = [LINE.fullmatch(line) for line in lines]
    assert all(matches), told
    for stage, unit in units.items():
        counted = [match for match in matches if match[1] == stage and match[2] is not None]
        assert {match[4] for match in counted} == {unit}, told
        # All is done at the end.
        assert (counted[-1][2], counted[-1][5]) == (counted[-1][3], "100"), told


def test_the_lines_of_train_have_the_loss_and_go_on_where_a_run_is_resumed(dataset, tmp_path, capsys, monkeypatch):
    assert train(dataset, tmp_path / "run", "--max-steps", 2) == 0
    capsys.readouterr()
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    assert train(dataset, tmp_path / "run", "--max-steps", 4, "--resume", "--set", "train.schedule_steps=2") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train: ")]
    assert lines[0].startswith("train: 2 of 4 steps") or lines[0].startswith("train: 3 of 4 steps")
    assert re.search(r"4 of 4 steps .*, loss \d\.\d+, perplexity \d+\.\d+, accuracy 0\.\d+, valid \d+\.\d+", lines[-1])
