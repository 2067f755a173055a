import sys
from itertools import count

import pytest

from protlm.cli import progress
from protlm.cli.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """The time, which a test sets."""
    seconds = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])

    def wait(duration):
        seconds[0] += duration

    return wait


def test_without_a_terminal_there_is_a_line_a_minute_with_what_is_done_the_rate_and_the_time_left(clock, capsys):
    with Progress({"eval": "residue"}) as shown:
        advance = shown.start("eval", 100_000)
        for _ in range(18):
            clock(10)
            advance(500)
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "eval: 3,000 of 100,000 residues (3%), 50 residues/s, 0:32:20 left",
        "eval: 6,000 of 100,000 residues (6%), 50 residues/s, 0:31:20 left",
        "eval: 9,000 of 100,000 residues (9%), 50 residues/s, 0:30:20 left",
    ]


def test_work_of_less_than_a_minute_prints_nothing_however_many_stages_it_has(clock, capsys):
    with Progress({"read": "B", "write": "protein"}) as shown:
        for stage in ("read", "write"):
            advance = shown.start(stage, 10)
            for _ in range(10):
                clock(2.9)
                advance(1)
    assert capsys.readouterr().err == ""


def test_the_minute_goes_on_over_the_stages_and_the_rate_is_that_of_the_stage(clock, capsys):
    with Progress({"read": "B", "write": "protein"}) as shown:
        advance = shown.start("read", 10**10)
        clock(50)
        advance(10**10)
        advance = shown.start("write", 4000)
        clock(20)
        advance(30)
    assert capsys.readouterr().err == "write: 30 of 4,000 proteins (1%), 1.5 proteins/s, 0:44:07 left\n"


def test_what_was_done_before_counts_for_no_rate_and_details_are_asked_for_when_a_line_is_printed(clock, capsys):
    numbers = count(1)
    with Progress({"train": "step"}) as shown:
        advance = shown.start("train", 5000, done=1000, details=lambda: {"loss": f"2.{next(numbers)}", "valid": "-"})
        for _ in range(2):
            clock(30)
            advance(300)
        clock(60)
        # At work, as in a measurement, without a step.
        advance(0)
    assert capsys.readouterr().err.splitlines() == [
        "train: 1,600 of 5,000 steps (32%), 10 steps/s, 0:05:40 left, loss 2.1, valid -",
        "train: 1,600 of 5,000 steps (32%), 5 steps/s, 0:11:20 left, loss 2.2, valid -",
    ]


def test_a_stage_of_unknown_size_has_no_time_left_and_one_that_counts_nothing_tells_how_long_it_has_been(clock, capsys):
    with Progress({"read": "B", "cluster": "sequence", "eval": "residue"}) as shown:
        advance = shown.start("read", 0)
        clock(100)
        advance(1_234_500)
        advance = shown.start("cluster", 0)
        clock(3725)
        advance(0)
        advance = shown.start("eval", 10)
        clock(61)
        advance(0)
    assert capsys.readouterr().err.splitlines() == [
        "read: 1,234,500 B, 12,345 B/s",
        "cluster: at work for 1:02:05",
        "eval: at work for 0:01:01",
    ]


def test_without_a_stderr_nothing_goes_to_stdout(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with Progress({"train": "step"}) as shown:
        advance = shown.start("train", 50)
        clock(100)
        advance(5)
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar_at_once_and_no_lines(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress({"train": "step"}) as shown:
        advance = shown.start("train", 50, done=20, details=lambda: {"loss": "2.5"})
        clock(100)
        advance(5)
    told = capsys.readouterr().err
    assert "train:" in told
    assert "25/50" in told
    assert "loss=2.5" in told
    assert "left" not in told
