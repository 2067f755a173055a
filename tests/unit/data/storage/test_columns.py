"""HDF5 files are opened without HDF5's own locks, also where somebody holds them open with locks."""

import contextlib
import subprocess
import sys

import h5py
import numpy as np
import pytest

from protlm.data.storage import columns

HOLDERS = {
    "as h5py opens by default": {},
    "without locks": {"locking": False},
    "with locks": {"locking": True},
    "with locks where there are some": {"locking": "best-effort"},
}


@pytest.fixture
def path(tmp_path):
    with columns.create_columns(tmp_path / "file.h5") as file:
        columns.write_column(file, "numbers", np.arange(5))
        file.attrs["layout"] = "mine"
    return tmp_path / "file.h5"


def is_readable(path):
    with columns.open_columns(path) as file:
        np.testing.assert_array_equal(file.column("numbers", np.int64), np.arange(5))
    return columns.file_attribute(path, "layout") == "mine"


@pytest.mark.parametrize("mode", ["r", "r+"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_file_that_this_process_holds_open_is_readable(path, holder, mode):
    with h5py.File(path, mode, **HOLDERS[holder]):
        assert is_readable(path)
    assert is_readable(path)


@contextlib.contextmanager
def held_by_another(path, mode):
    """Another process has the file open, as a notebook has."""
    script = f"import h5py, sys; file = h5py.File({str(path)!r}, {mode!r}); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        yield
        process.stdin.close()


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_file_that_another_process_holds_open_is_readable(path, mode):
    with held_by_another(path, mode):
        assert is_readable(path)


def test_a_file_that_another_process_reads_is_writable(path):
    with held_by_another(path, "r"), columns.change_columns(path) as file:
        file.attrs["more"] = "yes"
    assert columns.file_attribute(path, "more") == "yes"


def test_a_missing_or_damaged_file_is_tried_once(tmp_path, monkeypatch):
    tried = []
    original = h5py.File
    monkeypatch.setattr(h5py, "File", lambda path, mode, **_: tried.append(path) or original(path, mode))
    with pytest.raises(FileNotFoundError):
        columns.open_hdf5(tmp_path / "none.h5", "r")
    (tmp_path / "text.h5").write_text("text")
    with pytest.raises(OSError, match="signature"):
        columns.open_hdf5(tmp_path / "text.h5", "r")
    assert len(tried) == 2
