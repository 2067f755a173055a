import json
import os
import shutil

import pytest

from protlm import files
from protlm.errors import ProtlmError
from protlm.runtime import locks, work_folder
from protlm.runtime.work_folder import FINISHED_NAME, finish_moves, is_in_place, put_in_place


@pytest.fixture(params=["exchange", "two renames"])
def _way(request, monkeypatch):
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchanging_rename", lambda: None)


@pytest.fixture
def folder(tmp_path):
    """A work folder with an output of a folder and a file, which replace earlier ones."""
    path = tmp_path / "out.partial"
    (path / "output" / "out").mkdir(parents=True)
    (path / "output" / "out" / "new").write_text("2")
    (path / "output" / "out.ids").write_text("new")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    (tmp_path / "out.ids").write_text("old")
    return path


def moves(folder):
    return [(folder / "output" / name, folder.with_name(name)) for name in ("out.ids", "out")]


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


NEW = {"out/new": "2", "out.ids": "new"}


@pytest.mark.usefixtures("_way")
def test_a_set_of_files_appears_as_one_whatever_kills_it(folder, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    for name in ("publish", "remove"):
        for number in range(3):
            calls, original = iter(range(number)), getattr(files, name)
            with monkeypatch.context() as patch:
                patch.setattr(
                    files, name, lambda *a, o=original, c=calls: o(*a) if next(c, None) is not None else die()
                )
                try:
                    if work_folder.finished_note(folder) is None:
                        put_in_place(folder, moves(folder), {"more": 3})
                    finish_moves(folder)
                except Killed:
                    pass
    assert work_folder.finished_note(folder)["more"] == 3
    finish_moves(folder)
    assert is_in_place(folder)
    work_folder.remove_finished(folder)
    assert content(tmp_path) == NEW
    assert sorted(os.listdir(tmp_path)) == ["out", "out.ids"]


@pytest.mark.usefixtures("_way")
def test_what_has_come_to_the_place_since_is_not_replaced(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(work_folder, "finish_moves", lambda _: None)
        put_in_place(folder, moves(folder), {})
    (tmp_path / "out.ids").unlink()
    (tmp_path / "out.ids").write_text("precious")
    with pytest.raises(ProtlmError, match=r"out\.ids: in the way of the finished output in .*; move it away"):
        finish_moves(folder)
    assert (tmp_path / "out.ids").read_text() == "precious"
    assert (tmp_path / "out" / "old").exists()
    (tmp_path / "out.ids").unlink()
    finish_moves(folder)
    assert is_in_place(folder)


def test_a_finished_folder_that_was_copied_elsewhere_still_gives_its_output(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(work_folder, "finish_moves", lambda _: None)
        put_in_place(folder, moves(folder), {})
    copy = tmp_path / "elsewhere" / folder.name
    shutil.copytree(folder, copy)
    finish_moves(copy)
    assert is_in_place(copy)
    assert (copy.with_name("out") / "new").read_text() == "2"


def test_an_output_that_was_moved_away_is_not_in_place(folder, tmp_path):
    put_in_place(folder, moves(folder), {})
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert not is_in_place(folder)
    finish_moves(folder)
    assert not is_in_place(folder)


@pytest.mark.parametrize(
    "move",
    [
        {"source": "/etc/passwd", "target": "out", "inode": 1},
        {"source": "../out", "target": "out", "inode": 1},
        {"source": "output/out", "target": "../out", "inode": 1},
        {"source": "output/out", "target": "out"},
        ["output/out", "out", 1],
    ],
)
def test_a_note_that_leads_elsewhere_is_no_note(folder, move):
    (folder / FINISHED_NAME).write_text(json.dumps({"moves": [move]}))
    assert work_folder.finished_note(folder) is None
    finish_moves(folder)
    assert (folder / "output" / "out" / "new").exists()


def test_a_folder_that_is_being_made_is_no_left_over(tmp_path):
    path = tmp_path / "out.partial"
    with work_folder.new_folder(path) as temporary:
        work_folder.remove_left_overs(path)
        assert temporary.is_dir()
    assert list(tmp_path.iterdir()) == []
    temporary.mkdir()
    work_folder.remove_left_overs(path)
    assert list(tmp_path.iterdir()) == []


def test_a_beginning_that_another_process_removed_is_made_again(tmp_path, monkeypatch):
    path, locked, lost = tmp_path / "out.partial", locks.locked, []

    def lose_the_first(folder):
        if not lost:
            files.remove(folder)
            lost.append(folder)
        return locked(folder)

    monkeypatch.setattr(locks, "locked", lose_the_first)
    work_folder.make_folder(path, {"format": "test"}, ("pieces",))
    assert work_folder.read_own(path, "test", "a test")
    assert sorted(os.listdir(path)) == ["pieces", "work.json"]
    assert len(lost) == 1
