"""The checkpoints of a run: where they lie, how one replaces another, and which of them a run goes on from."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from protlm import files
from protlm.config import Config
from protlm.errors import CheckpointError
from protlm.workflows.train.checkpoint_content import SECTIONS, DamagedCheckpointError, read_step
from protlm.workflows.train.run_folder import CHECKPOINTS_NAME


def last_checkpoint(run_dir: Path) -> Path:
    """Returns the path of the checkpoint that a run is resumed from."""
    return run_dir / CHECKPOINTS_NAME / "last.ckpt"


def previous_checkpoint(run_dir: Path) -> Path:
    """Returns the path of the checkpoint before the last one, for the case that the last one is damaged."""
    return run_dir / CHECKPOINTS_NAME / "previous.ckpt"


def best_checkpoint(run_dir: Path) -> Path:
    """Returns the path of the checkpoint with the lowest perplexity on the valid split."""
    return run_dir / CHECKPOINTS_NAME / "best.ckpt"


def kept_checkpoint(run_dir: Path, step: int) -> Path:
    """Returns the path of the checkpoint of a step that is kept for good."""
    return run_dir / CHECKPOINTS_NAME / f"step-{step:08d}.ckpt"


def keep(checkpoint: Path, copy: Path) -> None:
    """Keeps the present content of a checkpoint under a second name, which appears whole or not at all."""
    with files.written_whole(copy) as partial:
        try:
            os.link(checkpoint, partial)
        except OSError:
            # A file system without hard links.
            shutil.copyfile(checkpoint, partial)


def new_checkpoint(run_dir: Path) -> Path:
    """Returns the path at which a checkpoint is written, before `replace_last` gives it its name."""
    return run_dir / CHECKPOINTS_NAME / f".new.ckpt{files.PARTIAL_SUFFIX}"


def replace_last(run_dir: Path, copies: Sequence[Path]) -> None:
    """Lets the new checkpoint take the place of the last one, which becomes the previous one.

    At every moment there is a whole one under the name of the last. The copies come before: a run that is killed in
    between goes on from the last one, and so makes them again.

    Args:
        run_dir: The run directory, with a new checkpoint.
        copies: Further paths under which the new one is kept.
    """
    new, last = new_checkpoint(run_dir), last_checkpoint(run_dir)
    for copy in copies:
        keep(new, copy)
    if last.exists():
        keep(last, previous_checkpoint(run_dir))
    os.replace(new, last)


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoint files that appear whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes a temporary file and renames it to the checkpoint's path.

        Raises:
            CheckpointError: It cannot be written, as on a full disk.
        """
        path = Path(path)
        try:
            with files.written_whole(path) as partial:
                _save({name: checkpoint[name] for name in SECTIONS}, partial)
        except OSError as error:
            raise CheckpointError(
                f"{path.parent}: no checkpoint can be written: {error.strerror}; the last one is kept: go on with "
                "--resume once it can"
            ) from None


def _save(content: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        writer = _Writer(file)
        try:
            torch.save(content, writer)  # type: ignore[arg-type]
        except RuntimeError:
            # torch reports another error, in its own bookkeeping, where a write failed.
            if writer.error is None:
                raise
            raise writer.error from None
        file.flush()
        os.fsync(file.fileno())


class _Writer:
    """A file to write to that remembers the error of a write that failed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run goes on from.

    Attributes:
        path: The file.
        step: Updates made before it.
        note: A warning if it is not the last one that was written; None if it is.
    """

    path: Path
    step: int
    note: str | None = None


def find_resume_point(run_dir: Path, dataset_hash: str, settings: Config) -> ResumePoint | None:
    """Returns the newest checkpoint that is whole; None if there is no checkpoint at all. It changes no file.

    Raises:
        CheckpointError: None of those that are there is whole, or the run had other settings or another dataset.
    """
    faults: list[DamagedCheckpointError] = []

    def first_whole(paths: Sequence[Path]) -> ResumePoint | None:
        for path in paths:
            try:
                if path.exists():
                    return ResumePoint(path, read_step(path, dataset_hash, settings))
            except DamagedCheckpointError as error:
                faults.append(error)
        return None

    last = last_checkpoint(run_dir)
    if (point := first_whole([last])) is not None:
        return point
    kept = sorted((run_dir / CHECKPOINTS_NAME).glob("step-*.ckpt"), reverse=True)
    older = [first_whole([previous_checkpoint(run_dir)]), first_whole([best_checkpoint(run_dir)]), first_whole(kept)]
    newest = max((point for point in older if point is not None), key=lambda point: point.step, default=None)
    if newest is not None:
        reason = str(faults[0]) if last.exists() else f"{last}: is gone"
        note = f"{reason}; the run goes on from {newest.path.name}, and so from step {newest.step}"
        return ResumePoint(newest.path, newest.step, note)
    if faults:
        raise CheckpointError(
            f"{faults[0]}, and no other checkpoint of this run is whole; put a copy of one in its place, or begin "
            "another run, with --init from this one if it has a model"
        )
    return None


def make_last(run_dir: Path, point: ResumePoint) -> None:
    """Lets the checkpoint that a run goes on from take the place of the last one, which was damaged or gone."""
    if point.path != last_checkpoint(run_dir):
        keep(point.path, last_checkpoint(run_dir))
