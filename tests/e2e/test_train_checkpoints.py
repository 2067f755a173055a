"""What `train --resume` goes on from when checkpoints are damaged, gone or replaced by something else."""

import errno
import os
import resource
import shutil
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from protlm.cli.app import main
from protlm.workflows.train import run_checkpoints
from protlm.workflows.train.task import loops_at
from tests.e2e.conftest import SMALL
from tests.e2e.train_tools import losses, rows, run_on_two, train

EVERY = ["--set", "train.checkpoint_every_steps=1", "--set", "train.valid_every_steps=3"]


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """A run of six updates with all kinds of checkpoints: best of step 3 or 6, kept ones of steps 2, 4 and 6."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(dataset, out, *EVERY, "--max-steps", 6, "--set", "train.keep_every_steps=2") == 0
    return out


@pytest.fixture
def out(whole, tmp_path):
    """A copy of that run after five updates, without hard links between its checkpoints."""
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    for name in ("last.ckpt", "step-00000006.ckpt", "best.ckpt"):
        (copy / "checkpoints" / name).unlink()
    (copy / "checkpoints" / "previous.ckpt").rename(copy / "checkpoints" / "last.ckpt")
    shutil.copy(copy / "checkpoints" / "step-00000004.ckpt", copy / "checkpoints" / "previous.ckpt")
    return copy


def resume(dataset, out, *arguments):
    return main(["train", str(dataset), "--out", str(out), "--resume", *map(str, arguments)])


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


def test_two_checkpoints_are_kept_that_replace_each_other(whole):
    checkpoints = whole / "checkpoints"
    assert step_of(checkpoints / "last.ckpt") == 6
    assert step_of(checkpoints / "previous.ckpt") == 5
    assert not list(checkpoints.glob(".*"))


def damage_nothing(path):
    pass


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-100])


def fill_with_zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def take_away(path):
    path.unlink()


def make_pipe(path):
    path.unlink()
    os.mkfifo(path)


def link_to_zeros(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def poison(path):
    content = torch.load(path, weights_only=True)
    next(iter(content["state_dict"].values()))[0] = torch.nan
    torch.save(content, path)


DAMAGES = [cut_off, fill_with_zeros, take_away, make_pipe, link_to_zeros, poison]


@pytest.mark.parametrize("damage", [damage_nothing, *DAMAGES])
def test_a_run_goes_on_from_the_newest_good_checkpoint_and_says_so(damage, dataset, whole, out, capsys):
    damage(out / "checkpoints" / "last.ckpt")
    capsys.readouterr()
    assert resume(dataset, out, "--dry-run") == 0
    dry = capsys.readouterr()
    assert resume(dataset, out) == 0
    errors = capsys.readouterr().err
    if damage is damage_nothing:
        assert "5 of the steps" in dry.out
        assert "goes on from" not in dry.err + errors
    else:
        assert "4 of the steps" in dry.out
        for shown in (dry.err, errors):
            assert "last.ckpt" in shown
            assert "the run goes on from previous.ckpt, and so from step 4" in shown
        assert str(out) in errors
    # As if nothing had been.
    assert rows(out) == rows(whole)
    weights, expected = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (out, whole))
    assert all(torch.equal(tensor, weights["state_dict"][name]) for name, tensor in expected["state_dict"].items())
    assert step_of(out / "checkpoints" / "previous.ckpt") == 5
    for name in ("config.json", "model.safetensors"):
        assert (out / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()


def test_kept_checkpoints_are_the_next_that_are_tried(dataset, whole, out, capsys):
    for name in ("last.ckpt", "previous.ckpt", "step-00000004.ckpt"):
        cut_off(out / "checkpoints" / name)
    shutil.copy(whole / "checkpoints" / "step-00000002.ckpt", out / "checkpoints" / "best.ckpt")
    assert resume(dataset, out) == 0
    assert "and so from step 2" in capsys.readouterr().err
    assert losses(out) == losses(whole)


def test_of_several_good_checkpoints_the_newest_is_taken(dataset, whole, out, capsys):
    cut_off(out / "checkpoints" / "last.ckpt")
    for name, step in (("previous.ckpt", 2), ("best.ckpt", 5), ("step-00000004.ckpt", 4)):
        (out / "checkpoints" / name).unlink(missing_ok=True)
        source = "previous.ckpt" if step == 5 else f"step-{step:08d}.ckpt"
        shutil.copy(whole / "checkpoints" / source, out / "checkpoints" / name)
    assert resume(dataset, out) == 0
    assert "from best.ckpt, and so from step 5" in capsys.readouterr().err
    assert losses(out) == losses(whole)


def test_without_any_good_checkpoint_nothing_is_touched(dataset, out, failure):
    for path in (out / "checkpoints").iterdir():
        cut_off(path)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    message = failure("train", dataset, "--out", out, "--resume")
    assert "last.ckpt: damaged" in message
    assert "no other checkpoint of this run is whole" in message
    assert "delete" not in message
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_checkpoint_that_may_not_be_read_is_not_passed_over(dataset, out, failure, monkeypatch):
    def refuse(path, **_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("protlm.workflows.train.checkpoint_content.open_regular", refuse)
    assert "make it readable" in failure("train", dataset, "--out", out, "--resume")


@pytest.mark.parametrize("moment", ["before the new one has its name", "while the old one gets its second name"])
def test_a_kill_between_the_two_names_leaves_a_whole_last_one(moment, dataset, out, whole, monkeypatch):
    """Every rename of the saving of a checkpoint is such a moment."""

    class Killed(BaseException):
        pass

    number = {"while the old one gets its second name": 1, "before the new one has its name": 2}[moment]
    replace, calls = os.replace, []

    def dying(source, target):
        if str(target).endswith(".ckpt"):
            calls.append(target)
            if len(calls) == number:
                raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(Killed):
            resume(dataset, out)
    assert step_of(out / "checkpoints" / "last.ckpt") == 5
    assert resume(dataset, out) == 0
    assert losses(out) == losses(whole)


@pytest.mark.parametrize("devices", [1, 2])
def test_two_processes_fall_back_to_the_same_checkpoint(devices, dataset, tmp_path):
    """And a run that stopped after an odd number of rows per device goes on with whole updates on any number."""
    shared = ["--set", "train.accumulate=2", "--set", "train.checkpoint_every_steps=1", "--set",
              "train.schedule_steps=6"]  # fmt: skip
    one, out = tmp_path / "one", tmp_path / "two"
    assert train(dataset, one, *shared, "--max-steps", 6) == 0
    start = ["torchrun", "train", dataset, "--out", out]
    status, _, errors = run_on_two(*start, "--config", "tiny", *SMALL, *shared, "--max-steps", 4)
    assert status == 0, errors
    cut_off(out / "checkpoints" / "last.ckpt")
    if devices == 2:
        status, _, errors = run_on_two(*start, "--resume", "--max-steps", 6)
        assert status == 0, errors
        assert errors.count("the run goes on from previous.ckpt, and so from step 3") == 1
    else:
        assert resume(dataset, out, "--max-steps", 6) == 0
    assert losses(out) == pytest.approx(losses(one), rel=2e-5)
    assert [row["tokens"] for row in rows(out)] == [row["tokens"] for row in rows(one)]


def test_a_full_disk_is_one_line_wherever_the_file_ends(dataset, out, failure):
    """torch reports a failed write in its own way, which depends on the place."""
    size = (out / "checkpoints" / "last.ckpt").stat().st_size
    before = {path: path.read_bytes() for path in (out / "checkpoints").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Model and tables are smaller than half of it.
    for limit in (size // 2, size * 3 // 4, size - 4096, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            message = failure("train", dataset, "--out", out, "--resume")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "checkpoints: no checkpoint can be written" in message
        assert os.strerror(errno.EFBIG) in message
        assert {path: path.read_bytes() for path in (out / "checkpoints").iterdir()} == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("size", [0, 10**6])
def test_a_full_disk_is_told_as_such(size):
    """And not as the error in torch's bookkeeping that follows."""
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        run_checkpoints._save({"numbers": torch.zeros(size)}, Path("/dev/full"))


@pytest.mark.parametrize("name", ["metrics.csv", "speed.csv", "health.csv", "run.json"])
def test_tables_that_are_no_regular_files_are_one_line(name, dataset, out, failure):
    began = time.monotonic()
    for replace in (make_pipe, link_to_zeros):
        replace(out / name)
        message = failure("train", dataset, "--out", out, "--resume")
        assert name in message
        assert "expected a regular file" in message
    (out / name).unlink()
    with (out / name).open("wb") as file:
        file.truncate(10 * 2**40)
    message = failure("train", dataset, "--out", out, "--resume")
    assert name in message
    assert "bytes" in message
    assert time.monotonic() - began < 60


def test_a_table_without_lines_is_one_line(dataset, out, failure):
    """Its first line would be read whole."""
    with (out / "metrics.csv").open("wb") as file:
        file.truncate(8 * 2**30)
    assert "metrics.csv: line 1" in failure("train", dataset, "--out", out, "--resume")


def test_what_lightning_keeps_of_its_loops_follows_from_the_step(whole):
    """A run goes on from the step alone; this notices a Lightning that keeps more."""
    saved = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    assert loops_at(trainer, 6) == saved["loops"]["fit_loop"]
