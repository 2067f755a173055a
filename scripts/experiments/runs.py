"""One training run: hides how its processor time and its curve are measured, and what is kept of it."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from protlm import files
from protlm.choices import SplitName
from protlm.errors import ProtlmError
from protlm.workflows.evaluate.evaluate import evaluate
from protlm.workflows.evaluate.report import SplitReport
from protlm.workflows.evaluate.request import EvalRequest
from protlm.workflows.train.request import TrainRequest
from protlm.workflows.train.train import train
from scripts.environment import environment
from scripts.experiments.clock import StepClock, valid_curve
from scripts.experiments.plan import Result, Run
from scripts.experiments.results import FORMAT_VERSION, read_result
from scripts.measuring import using_threads

SCORED: Mapping[str, SplitName] = {"iid": "test", "held": "ood"}
"""The splits that are scored at the end, by their names on the page."""
NUM_POINTS = 16
"""Points of a curve, or one a step in shorter runs."""
NUM_MASKS = 3
"""How often a protein is scored at the end, each time with other residues hidden."""
NUM_REPLICATES = 200
"""Replicates of the bootstrap that are kept, the first of those of the evaluation."""
_NOT_MEASURED = "train.checkpoint_every_steps=1000000", "train.health_every_steps=0"


def earlier_result(path: Path, settings: Sequence[str]) -> Result | None:
    """Returns the result of an earlier run; None if there is none.

    Args:
        path: Its file.
        settings: Those that it has to have been made with.

    Raises:
        ProtlmError: A file that is no result, or one of a run with other settings.
    """
    if not path.exists():
        return None
    result = read_result(path)
    if result["settings"] != list(settings):
        other = ", ".join(sorted(set(result["settings"]) ^ set(settings)))
        raise ProtlmError(f"{path}: a run with other settings ({other}); move it away or choose another --out")
    return result


def perform(run: Run, settings: Sequence[str], dataset: Path, work: Path) -> dict[str, Any]:
    """Trains and scores a model, and returns its result; what a stopped run left in the folder is replaced.

    Args:
        run: The run.
        settings: Its settings, `section.key=value`, over those of the configuration tiny.
        dataset: The dataset of its task.
        work: Folder for the run and the report.

    Raises:
        ProtlmError: A run whose loss is no number any more, and whatever else ends training.
    """
    # The processor time of several threads also counts what they wait for each other.
    with using_threads(1):
        steps = int(dict(setting.split("=") for setting in settings)["train.max_steps"])
        clock = StepClock(max(1, steps // NUM_POINTS))
        measured = f"train.valid_every_steps={clock.every}"
        report = train(
            TrainRequest(
                dataset_paths=[dataset], run_dir=work / "run", config="tiny",
                overrides=[*settings, measured, *_NOT_MEASURED], force=True,
            ),
            start_progress=clock.start,
        )  # fmt: skip
        assert report is not None
        if report.interrupted:
            raise KeyboardInterrupt
        scored = evaluate(
            EvalRequest(
                model=work / "run", dataset=dataset, splits=tuple(SCORED.values()), out=work / "report",
                num_masks=NUM_MASKS, force=True,
            )
        )  # fmt: skip
        seconds = clock.seconds()
        return {
            "format_version": FORMAT_VERSION,
            "task": run.task, "kind": run.kind, "seed": run.seed, "budget": run.budget,
            "settings": list(settings),
            "steps": report.step,
            "num_parameters": report.num_parameters,
            "training_seconds": round(seconds[-1], 2),
            "curve": valid_curve(work / "run" / "metrics.csv", seconds),
            "splits": {name: _kept(scored.splits[split]) for name, split in SCORED.items()},
            "environment": environment(),
        }  # fmt: skip


def write_result(path: Path, result: Result) -> None:
    """Writes the file of a run, which appears complete or not at all."""
    with files.written_whole(path) as partial:
        partial.write_text(json.dumps(result) + "\n", encoding="utf-8")


def remove_work(work: Path) -> None:
    """Removes the folder of a run whose result is written."""
    shutil.rmtree(work, ignore_errors=True)


def _kept(report: SplitReport) -> dict[str, Any]:
    """Returns what is kept of the scores on a split: the model with its intervals and some replicates."""
    row = report.scores["model"]
    kept: dict[str, Any] = {"num_records": report.num_records, "num_targets": report.num_targets}
    for metric in ("accuracy", "perplexity"):
        kept |= {name: _rounded(row[name]) for name in (metric, f"{metric}_low", f"{metric}_high")}
    for name in ("empirical", "two_sided"):
        if name in report.scores:
            kept[name] = _rounded(report.scores[name]["accuracy"])
    kept["replicates"] = [round(value, 5) for value in report.replicates["accuracy"][:NUM_REPLICATES]]
    return kept


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)
