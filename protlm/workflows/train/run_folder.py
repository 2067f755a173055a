"""The run directory: the files it may hold, the settings of its run, and when an old one may be replaced.

It appears with its settings in one step, in place of an old one if there is any, and is locked while its run goes on.
"""

import contextlib
import errno
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from protlm import files
from protlm.config import Config
from protlm.config_files import dump_config, load_config, parse_config
from protlm.errors import ConfigError, ProtlmError, RunError
from protlm.pretrained.model_description import EARLIER_MODEL_SETTINGS, ModelDescription
from protlm.pretrained.model_files import MODEL_FILES, remove_left_overs_of_model
from protlm.runtime import locks, work_folder
from protlm.workflows.train.resumed_settings import first_difference
from protlm.workflows.train.stage import STAGE_DEFAULTS, TEACHER_NAME

CONFIG_NAME, MODEL_NAME, CHECKPOINTS_NAME = "config.toml", "model", "checkpoints"
RUN_FILES = frozenset(
    {
        CONFIG_NAME, TEACHER_NAME, "run.json", "metrics.csv", "speed.csv", "health.csv", "curves.png",
        CHECKPOINTS_NAME, MODEL_NAME, "tensorboard", "wandb", locks.LOCK_NAME,
    }
)  # fmt: skip
"""The entries of a run directory; one with any other, such as the log of a job, is resumed but never replaced."""
_BEFORE = {"model": EARLIER_MODEL_SETTINGS}
"""What earlier runs did without saying so: their files have every setting of their time."""


def resolve_settings(
    run_dir: Path,
    config: str | Path | None,
    overrides: Sequence[str],
    *,
    resume: bool,
    init: ModelDescription | None = None,
) -> Config:
    """Returns the settings of a run: the saved ones if it is resumed, with max_steps and lower rates if given anew.

    Without a configuration, a run that starts from a model has that model's architecture and masking. In a stage of a
    converted model, the stage's settings stand before the defaults.

    Raises:
        ConfigError: Bad settings, or others than those of the run that is resumed.
    """
    saved_path = run_dir / CONFIG_NAME
    if not (resume and saved_path.exists()):
        of_init = None if init is None else _settings_of(init)
        settings = load_config(config, overrides, instead_of_file=of_init)
        if settings.train.stage is not None:
            own = {"train": STAGE_DEFAULTS[settings.train.stage]}
            settings = load_config(config, overrides, instead_of_file=of_init, missing=own)
        horizon = settings.train.schedule_steps or settings.train.max_steps
        return _with_train(settings, schedule_steps=horizon)
    saved = load_saved_settings(saved_path)
    missing: dict[str, dict[str, Any]] = _missing_in(saved_path)
    if saved.train.stage is not None:
        missing["train"] = STAGE_DEFAULTS[saved.train.stage] | {"stage": saved.train.stage}
    asked = load_config(saved_path if config is None else config, overrides, missing=missing)
    asked = _with_train(asked, schedule_steps=asked.train.schedule_steps or saved.train.schedule_steps)
    if any(override.partition("=")[0].strip() == "train.max_steps" for override in overrides):
        saved = _with_train(saved, max_steps=asked.train.max_steps)
    lower = {"lr": min(saved.train.lr, asked.train.lr), "muon_lr": min(saved.train.muon_lr, asked.train.muon_lr)}
    saved = _with_train(saved, **lower)
    difference = first_difference(saved.model_dump(), asked.model_dump())
    if difference is not None:
        key, ours, theirs = difference
        raise ConfigError(
            f"{saved_path}: {key} is {ours!r} in this run and cannot become {theirs!r} on --resume; "
            "only train.max_steps, the time and the devices may change, and train.lr and train.muon_lr become lower; "
            "without --config a run goes on with its own settings"
        )
    return saved


def load_saved_settings(path: Path) -> Config:
    """Returns the settings in the config.toml of a run, which an earlier protlm may have written.

    Raises:
        ConfigError: A file that cannot be read, an unknown key or a value out of range.
    """
    return load_config(path, missing=_BEFORE)


def _missing_in(saved_path: Path) -> dict[str, dict[str, Any]]:
    """Returns the settings that a run was started without, as they were then: nobody could ask for others."""
    written = tomllib.loads(saved_path.read_text(encoding="utf-8")).get("model", {})
    return {"model": {key: value for key, value in EARLIER_MODEL_SETTINGS.items() if key not in written}}


def _settings_of(init: ModelDescription) -> dict[str, dict[str, Any]]:
    masking = {"mask_rate": init.mask_rate, "mask_share": init.mask_share, "random_share": init.random_share}
    return {"model": init.model.model_dump(), "train": masking}


def _with_train(settings: Config, **changes: float | None) -> Config:
    content = settings.model_dump()
    content["train"] |= changes
    return parse_config(content, "settings")


def lock_existing(run_dir: Path, locked: contextlib.ExitStack) -> bool:
    """Removes what killed processes left beside a run directory and, if it holds a run, locks it.

    Args:
        run_dir: The run directory, which need not exist.
        locked: Holds the lock.

    Returns:
        Whether it holds a run, and so is locked.

    Raises:
        ProtlmError: Another process is at work there.
    """
    work_folder.remove_left_overs(run_dir)
    is_run = (run_dir / CONFIG_NAME).is_file()
    if is_run:
        locked.enter_context(locks.locked(run_dir))
    return is_run


def check_replaceable(run_dir: Path, *, resume: bool, force: bool) -> None:
    """Refuses to write a run to anything but a new or empty folder, or an old run that is resumed or replaced.

    Raises:
        ProtlmError: The folder holds something else, or a run that was to be neither resumed nor replaced.
    """
    if not run_dir.exists() or (run_dir.is_dir() and not _entries(run_dir)):
        return
    if not (resume or force):
        raise ProtlmError(f"{run_dir}: exists already; continue it with --resume or replace it with --force")
    foreign = _foreign(run_dir, force=force) if run_dir.is_dir() else [run_dir.name]
    if not (run_dir / CONFIG_NAME).is_file() or (foreign and force):
        holds = f"holds {foreign[0]!r}" if foreign else f"has no {CONFIG_NAME}"
        raise RunError(f"{run_dir}: is no run of protlm train ({holds}); choose another --out")
    load_saved_settings(run_dir / CONFIG_NAME)


def _foreign(run_dir: Path, *, force: bool) -> list[str]:
    """Returns what a folder holds besides the files of a run; where it is to be replaced, also inside its folders."""
    foreign = _entries(run_dir) - RUN_FILES
    if force:
        others = _entries(run_dir / MODEL_NAME) - set(MODEL_FILES)
        others |= {name for name in _entries(run_dir / CHECKPOINTS_NAME) if not name.endswith(".ckpt")}
        foreign |= others
    return sorted(foreign)


def _entries(folder: Path) -> set[str]:
    """Returns the names of what a folder holds, without incomplete files of a kill."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return {name for name in names if not (name.startswith(".") and name.endswith(files.PARTIAL_SUFFIX))}


def prepare_run_dir(
    run_dir: Path, settings: Config, *, resume: bool, is_run: bool, locked: contextlib.ExitStack
) -> None:
    """Makes the folder with its settings, or in a run that is resumed writes these.

    Args:
        run_dir: The run directory.
        settings: The settings of the run.
        resume: Keep what the folder holds.
        is_run: Whether it held a run when it was locked; only then it may be resumed or replaced.
        locked: Holds the lock of the folder from here on.

    Raises:
        ProtlmError: Another process began a run there at the same time.
        OSError: The disk is full or failed.
    """
    if not (resume and is_run):
        _make(run_dir, settings, locked, is_replaced=is_run)
        return
    _write_settings(run_dir, settings)
    (run_dir / CHECKPOINTS_NAME).mkdir(exist_ok=True)


def remove_left_overs_in(run_dir: Path) -> None:
    """Removes what a kill left in a run, which is locked."""
    _remove_incomplete_files(run_dir)
    for left_over in (run_dir / CHECKPOINTS_NAME).glob(f".*{files.PARTIAL_SUFFIX}"):
        files.remove(left_over)
    remove_left_overs_of_model(run_dir / MODEL_NAME)


def _remove_incomplete_files(run_dir: Path) -> None:
    """Removes incomplete files of a run from its folder, and nothing that another command is writing there."""
    for name in RUN_FILES:
        for left_over in files.left_overs(run_dir / name):
            if left_over.is_file():
                files.remove(left_over)


def _make(run_dir: Path, settings: Config, locked: contextlib.ExitStack, *, is_replaced: bool) -> None:
    """Makes a run directory with nothing but its settings, in place of an old one."""
    folder = locked.enter_context(work_folder.new_folder(run_dir))
    _write_settings(folder, settings)
    (folder / CHECKPOINTS_NAME).mkdir()
    if is_replaced:
        files.publish(folder, run_dir)
        return
    _remove_incomplete_files(run_dir)
    try:
        # Takes the place of an empty folder, but of no other.
        folder.rename(run_dir)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise RunError(f"{run_dir}: another run began here at the same time; choose another --out") from None


def _write_settings(folder: Path, settings: Config) -> None:
    with files.written_whole(folder / CONFIG_NAME) as partial:
        partial.write_text(dump_config(settings), encoding="utf-8")
