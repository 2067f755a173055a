import fcntl
import multiprocessing
import os
import time

import pytest

from protlm.errors import ProtlmError
from protlm.runtime import locks
from protlm.runtime.locks import LOCK_NAME, is_locked, locked


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0.1)


def test_a_locked_folder_keeps_others_out_and_names_its_holder(tmp_path):
    with locked(tmp_path):
        assert is_locked(tmp_path)
        with pytest.raises(ProtlmError, match=rf"another run is at work here \(process {os.getpid()} on .*, since 20"):
            locked(tmp_path).__enter__()
    assert not is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        pass


def test_sharers_keep_only_those_out_that_do_not_share(tmp_path):
    with (
        locked(tmp_path, shared=True),
        locked(tmp_path, shared=True),
        pytest.raises(ProtlmError, match="another run is at work"),
    ):
        locked(tmp_path).__enter__()
    with locked(tmp_path), pytest.raises(ProtlmError, match="another run is at work"):
        locked(tmp_path, shared=True).__enter__()


def test_a_lock_goes_with_its_folder_when_that_is_renamed(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    with locked(before):
        before.rename(after)
        assert is_locked(after)
    assert list(after.iterdir()) == []


def test_the_file_of_a_process_that_was_killed_is_no_lock(tmp_path):
    (tmp_path / LOCK_NAME).write_text("process 1 on elsewhere")
    assert not is_locked(tmp_path)
    with locked(tmp_path):
        assert (tmp_path / LOCK_NAME).read_text().startswith(f"process {os.getpid()} ")


def test_a_lock_is_waited_for_a_little(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 30)
    holder = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path,))
    holder.start()
    while not is_locked(tmp_path):
        time.sleep(0.01)
    with locked(tmp_path):
        pass
    holder.join()
    assert holder.exitcode == 0


def _hold(folder):
    with locked(folder):
        time.sleep(0.5)


def test_a_lock_on_a_file_that_its_holder_has_removed_counts_for_nothing(tmp_path, monkeypatch):
    """Between the opening of the file and its lock, the holder may end and a third process begin."""
    flock, seen = fcntl.flock, []

    def lose_the_first(lock, mode):
        if not seen:
            os.unlink(tmp_path / LOCK_NAME)
        seen.append(lock)
        flock(lock, mode)

    monkeypatch.setattr(fcntl, "flock", lose_the_first)
    with locked(tmp_path):
        assert len(seen) == 2
        assert (tmp_path / LOCK_NAME).exists()


@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_folder_that_lost_its_name_while_it_was_waited_for_is_not_locked(tmp_path, monkeypatch, is_replaced):
    folder, flock = tmp_path / "run", fcntl.flock
    folder.mkdir()

    def lose_the_folder(lock, mode):
        if folder.exists() and not (tmp_path / "old").exists():
            folder.rename(tmp_path / "old")
            if is_replaced:
                folder.mkdir()
        flock(lock, mode)

    monkeypatch.setattr(fcntl, "flock", lose_the_folder)
    with pytest.raises(locks.FolderGoneError, match="and has just replaced or removed it"):
        locked(folder).__enter__()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available")))
    with pytest.warns(UserWarning, match=r"has no locks \(No locks available\)"), locked(tmp_path):
        pass


def test_a_folder_that_is_not_there_cannot_be_locked(tmp_path):
    with pytest.raises(FileNotFoundError):
        locked(tmp_path / "missing").__enter__()
    assert not is_locked(tmp_path / "missing")
