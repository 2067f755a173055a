"""The run directory: the files it may hold, the settings of its run, and when an old one may be replaced."""

from collections.abc import Sequence
from pathlib import Path

from protlm import files
from protlm.config import Config, dump_config, load_config, parse_config
from protlm.errors import ConfigError, ProtlmError, RunError
from protlm.workflows.train import run_checkpoints

CONFIG_NAME = "config.toml"
RUN_FILES = frozenset(
    {
        CONFIG_NAME, "run.json", "metrics.csv", "speed.csv", "health.csv", "curves.png",
        run_checkpoints.FOLDER_NAME, "model", "tensorboard", "wandb",
    }
)  # fmt: skip
"""The entries that a run directory may have; a folder with any other is never replaced."""


def resolve_settings(run_dir: Path, config: str | Path | None, overrides: Sequence[str], *, resume: bool) -> Config:
    """Returns the settings of a run: the saved ones if it is resumed, with max_steps if that is given anew.

    Raises:
        ConfigError: Bad settings, or others than those of the run that is resumed.
    """
    saved_path = run_dir / CONFIG_NAME
    if not (resume and saved_path.exists()):
        settings = load_config(config, overrides)
        horizon = settings.train.schedule_steps or settings.train.max_steps
        return _with_train(settings, schedule_steps=horizon)
    saved = load_config(saved_path)
    asked = load_config(saved_path if config is None else config, overrides)
    asked = _with_train(asked, schedule_steps=asked.train.schedule_steps or saved.train.schedule_steps)
    if any(override.partition("=")[0].strip() == "train.max_steps" for override in overrides):
        saved = _with_train(saved, max_steps=asked.train.max_steps)
    difference = run_checkpoints.first_difference(saved.model_dump(), asked.model_dump())
    if difference is not None:
        key, ours, theirs = difference
        raise ConfigError(
            f"{saved_path}: {key} is {ours!r} in this run and cannot become {theirs!r} on --resume; "
            "only train.max_steps, the time and the devices may change"
        )
    return saved


def _with_train(settings: Config, **changes: int | None) -> Config:
    content = settings.model_dump()
    content["train"] |= changes
    return parse_config(content, "settings")


def check_replaceable(run_dir: Path, *, resume: bool, force: bool) -> None:
    """Refuses to write a run to anything but a new or empty folder, or an old run that is resumed or replaced.

    Raises:
        ProtlmError: The folder holds something else, or a run that was to be neither resumed nor replaced.
    """
    if not run_dir.exists() or (run_dir.is_dir() and not any(run_dir.iterdir())):
        return
    if not (resume or force):
        raise ProtlmError(f"{run_dir}: exists already; continue it with --resume or replace it with --force")
    foreign = [] if run_dir.is_dir() else [run_dir.name]
    if not foreign:
        names = sorted(path.name for path in run_dir.iterdir() if path.suffix != files.PARTIAL_SUFFIX)
        foreign = [name for name in names if name not in RUN_FILES]
    if foreign or not (run_dir / CONFIG_NAME).is_file():
        holds = f"holds {foreign[0]!r}" if foreign else f"has no {CONFIG_NAME}"
        raise RunError(f"{run_dir}: is no run of protlm train ({holds}); choose another --out")
    load_config(run_dir / CONFIG_NAME)


def prepare_run_dir(run_dir: Path, settings: Config, *, resume: bool) -> None:
    """Makes the folder, empty unless the run is resumed, writes the settings, and removes partial files of a kill."""
    if run_dir.exists() and not resume:
        # A kill in the middle leaves a folder that nobody takes for a run.
        files.remove_at_once(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    # First, since it is what makes a folder a run.
    with files.written_whole(run_dir / CONFIG_NAME) as partial:
        partial.write_text(dump_config(settings), encoding="utf-8")
    for folder in (run_dir, run_dir / run_checkpoints.FOLDER_NAME, run_dir / "model"):
        for leftover in folder.glob(f".*{files.PARTIAL_SUFFIX}"):
            leftover.unlink()
    (run_dir / run_checkpoints.FOLDER_NAME).mkdir(exist_ok=True)
