"""The checkpoints of a run: where they lie, how one replaces another, and which of them a run may be resumed from."""

import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from protlm import files
from protlm.config import Config
from protlm.errors import CheckpointError

FOLDER_NAME = "checkpoints"


def last_checkpoint(run_dir: Path) -> Path:
    """Returns the path of the checkpoint that a run is resumed from."""
    return run_dir / FOLDER_NAME / "last.ckpt"


def best_checkpoint(run_dir: Path) -> Path:
    """Returns the path of the checkpoint with the lowest perplexity on the valid split."""
    return run_dir / FOLDER_NAME / "best.ckpt"


def kept_checkpoint(run_dir: Path, step: int) -> Path:
    """Returns the path of the checkpoint of a step that is kept for good."""
    return run_dir / FOLDER_NAME / f"step-{step:08d}.ckpt"


def keep(checkpoint: Path, copy: Path) -> None:
    """Keeps the present content of a checkpoint under a second name, which appears whole or not at all."""
    with files.written_whole(copy) as partial:
        try:
            os.link(checkpoint, partial)
        except OSError:
            # A file system without hard links.
            shutil.copyfile(checkpoint, partial)


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoint files that appear whole or not at all: the previous one stays until the new one is on the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes a temporary file and renames it to the checkpoint's path."""
        with files.written_whole(Path(path)) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


def read_resume_step(path: Path, dataset_hash: str, settings: Config) -> int:
    """Returns the step of a checkpoint to resume from, 0 if there is none.

    Raises:
        CheckpointError: The checkpoint is damaged, or was made with other settings or another dataset.
    """
    if not path.exists():
        return 0
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("checksum differs")
        # weights_only: tensors and plain values, never code.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        saved, config = checkpoint["protlm"]["dataset_hash"], dict(checkpoint["protlm"]["config"])
        step = int(checkpoint["global_step"])
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, LookupError, TypeError, ValueError,
            AttributeError):  # fmt: skip
        raise CheckpointError(
            f"{path}: damaged, or not a checkpoint of protlm train; delete it to start the run afresh"
        ) from None
    difference = first_difference(config, settings.model_dump(mode="json"))
    if difference is not None:
        key, ours, theirs = difference
        raise CheckpointError(
            f"{path}: made with {key} = {ours!r}, but the run's config.toml now says {theirs!r}; put it back"
        )
    if saved != dataset_hash:
        raise CheckpointError(
            f"{path}: the run was trained on another dataset (hash {saved}, now {dataset_hash}); "
            "resume with the dataset it began with"
        )
    return step


def first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, object, object] | None:
    """Returns key and both values of the first setting that differs; train.max_steps may differ."""
    for section in ours:
        for key, value in ours[section].items():
            if value != theirs.get(section, {}).get(key) and (section, key) != ("train", "max_steps"):
                return f"{section}.{key}", value, theirs.get(section, {}).get(key)
    return None
