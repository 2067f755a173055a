"""The checkpoints of a run: hides where they lie, how one replaces another, and what makes one fit to go on from."""

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
    """Returns where a run keeps the checkpoint that it is resumed from."""
    return run_dir / FOLDER_NAME / "last.ckpt"


def best_checkpoint(run_dir: Path) -> Path:
    """Returns where a run keeps the checkpoint of its lowest perplexity on valid."""
    return run_dir / FOLDER_NAME / "best.ckpt"


def kept_checkpoint(run_dir: Path, step: int) -> Path:
    """Returns where a run keeps the checkpoint of a step for good."""
    return run_dir / FOLDER_NAME / f"step-{step:08d}.ckpt"


def keep(checkpoint: Path, copy: Path) -> None:
    """Gives a checkpoint a second name, which stays when the first one moves on; the copy is whole or not there."""
    with files.written_whole(copy) as partial:
        try:
            os.link(checkpoint, partial)
        except OSError:
            # A file system without hard links.
            shutil.copyfile(checkpoint, partial)


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all: the one before stays until the new one is on the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes beside the old checkpoint, then takes its place."""
        with files.written_whole(Path(path)) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


def check_checkpoint(path: Path, dataset_hash: str, settings: Config) -> int:
    """Returns the step to resume from, 0 without a checkpoint.

    Raises:
        CheckpointError: A checkpoint that is damaged, or of other settings or another dataset.
    """
    if not path.exists():
        return 0
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("checksum differs")
        # Only tensors and plain values are ever loaded, never code.
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
    """Returns key and both values of the first setting that differs, max_steps apart."""
    for section in ours:
        for key, value in ours[section].items():
            if value != theirs.get(section, {}).get(key) and (section, key) != ("train", "max_steps"):
                return f"{section}.{key}", value, theirs.get(section, {}).get(key)
    return None
