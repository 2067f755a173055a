"""The order in which tasks are handed out and their results come."""

import multiprocessing
import os
import threading
import time

import pytest

from protlm.runtime import local_workers, run_marks
from protlm.runtime.local_workers import LocalWorkers
from tests.numbered_tasks import Numbered


class Desk:
    """What tasks share: which were begun, and whether the first may end."""

    def __init__(self):
        self.begun = []
        self.first_may_end = threading.Event()


def hand_in(desk, task):
    desk.begun.append(task.number)
    if task.number == 0:
        desk.first_may_end.wait(60)
    return task.number


def test_a_worker_ends_whose_parent_was_dead_before_it_asked():
    parent = multiprocessing.get_context("fork").Process(target=os._exit, args=(0,))
    parent.start()
    parent.join()
    worker = multiprocessing.get_context("fork").Process(target=begin_and_wait, args=(parent.pid,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 1


def begin_and_wait(parent):
    local_workers._begin(None, parent)
    time.sleep(120)


@pytest.mark.parametrize(("ahead", "begun"), [(0, 2), (5, 5), (100, 20)])
def test_workers_go_on_behind_a_slow_task_as_far_as_they_may(ahead, begun):
    desk = Desk()
    reached = threading.Event()

    def look():
        # Once nothing new begins, this is how far they come.
        if len(desk.begun) >= begun:
            reached.set()
            desk.first_may_end.set()

    with LocalWorkers(1, desk) as workers:
        results = list(workers.in_order(hand_in, map(Numbered, range(20)), ahead=ahead, meanwhile=look))
    assert reached.is_set()
    assert results == list(range(20))


def test_no_more_tasks_are_in_memory_than_may_be():
    desk, handed_out = Desk(), []

    def tasks():
        for number in range(20):
            handed_out.append(number)
            yield Numbered(number)

    counts = []

    def look():
        if not desk.first_may_end.is_set():
            counts.append(len(handed_out))
        if counts[-2:] == [counts[-1]] * 2:
            desk.first_may_end.set()

    with LocalWorkers(1, desk) as workers:
        assert list(workers.in_order(hand_in, tasks(), ahead=6, meanwhile=look)) == list(range(20))
    # One more was asked for and waits.
    assert max(counts) == 7


def test_a_mark_ends_by_its_run_by_the_next_one_and_with_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_marks, "_LOOK_SECONDS", 0)
    folder = tmp_path / "work"
    folder.mkdir()
    first, second = run_marks.new_mark(folder), run_marks.new_mark(folder)
    assert run_marks.fault_of_mark(first) == ""
    watch, other = run_marks.MarkWatch(first), run_marks.MarkWatch(second)
    assert watch.is_there()
    run_marks.end_run(first)
    assert not watch.is_there()
    assert other.is_there()
    assert run_marks.fault_of_mark(first) == "the run of this task has ended"
    run_marks.end_run(first)
    run_marks.end_runs(folder)
    assert not other.is_there()
    monkeypatch.setattr(run_marks, "_NEW_FILE_SECONDS", 0)
    assert "sees another folder as" in run_marks.fault_of_mark(folder / "run-x")
    assert "sees another folder as" in run_marks.fault_of_mark(tmp_path / "gone" / "run-x")
