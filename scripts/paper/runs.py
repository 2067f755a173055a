"""One run of the table: trained by the product's own workflow, scored at equal updates and at the end of its time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from protlm.choices import SplitName
from protlm.workflows.evaluate.evaluate import evaluate
from protlm.workflows.evaluate.report import EvalReport, ScoreRow
from protlm.workflows.evaluate.request import EvalRequest
from protlm.workflows.train.request import TrainRequest
from protlm.workflows.train.train import train
from scripts.environment import environment
from scripts.experiments.clock import StepClock, valid_curve
from scripts.experiments.results import FORMAT_VERSION
from scripts.measuring import using_threads
from scripts.paper.plan import SWEEP_STEPS, TASKS, Run
from scripts.paper.proteins import Sets

SPLITS = ("cluster", "ood", "iid")
"""The sets that are scored: held-out clusters, held-out families, random proteins."""
_NUM_POINTS = 8
"""Measurements on the valid split up to the updates of equal comparison."""
_KEPT = ("accuracy", "perplexity")
_BASELINES = ("empirical", "markov", "two_sided")
_NUM_REPLICATES = 200
"""Replicates of the bootstrap that are kept, the first of those of the evaluation: all runs draw the same proteins."""


def perform(run: Run, settings: Sequence[str], sets: Sets, work: Path, minutes: float, steps: int) -> dict[str, Any]:
    """Trains and scores a model, and returns its result.

    Args:
        run: The run.
        settings: Its settings, over the defaults.
        sets: The datasets.
        work: Folder for the run and the reports; what a stopped run left there is replaced.
        minutes: Processor time of training; the updates of the equal comparison are made in any case.
        steps: These updates; a run of the sweep makes as many as the plan says, and no more.
    """
    steps = min(steps, SWEEP_STEPS) if run.temperature is not None else steps
    # The processor time of several threads also counts what they wait for each other.
    with using_threads(1):
        clock = StepClock(max(1, steps // _NUM_POINTS))
        measured = (f"train.valid_every_steps={clock.every}", "train.health_every_steps=0")
        scores: dict[str, Any] = {}
        report = train(
            TrainRequest(
                dataset_paths=[sets.trained], run_dir=work / "run", force=True,
                overrides=[*settings, *measured, f"train.max_steps={steps}", "train.checkpoint_every_steps=1000000"],
            ),
            start_progress=clock.start,
        )  # fmt: skip
        assert report is not None
        if report.interrupted:
            raise KeyboardInterrupt
        peak = _peak_bytes()
        if run.temperature is None:
            scores["steps"] = _scored(work, sets, "steps", report.step)
            seconds = clock.seconds()
            total = max(steps, int(steps * 60 * minutes / seconds[-1]))
            if total > steps:
                report = train(
                    TrainRequest(
                        dataset_paths=[sets.trained], run_dir=work / "run", resume=True,
                        overrides=[f"train.max_steps={total}"],
                    ),
                    start_progress=clock.start,
                )  # fmt: skip
                assert report is not None
                if report.interrupted:
                    raise KeyboardInterrupt
            scores["time"] = _scored(work, sets, "time", report.step)
        seconds = clock.seconds()
        tokens = TASKS[run.task].tokens * report.step
        return {
            "format_version": FORMAT_VERSION,
            "task": run.task, "kind": run.kind, "direction": run.direction, "seed": run.seed,
            "temperature": run.temperature,
            "settings": list(settings),
            "minutes": minutes,
            "num_parameters": report.num_parameters,
            "num_tokens": tokens,
            "training_seconds": round(seconds[-1], 1),
            "tokens_per_second": round(tokens / seconds[-1], 1),
            "peak_bytes": peak,
            "scores": scores,
            "curve": valid_curve(work / "run" / "metrics.csv", seconds),
            "environment": environment(),
        }  # fmt: skip


def _scored(work: Path, sets: Sets, name: str, step: int) -> dict[str, Any]:
    """Returns the scores of the newest model of a run on every set."""
    scored: list[tuple[Path, tuple[SplitName, ...]]] = [(sets.trained, ("test", "ood")), (sets.iid, ("test",))]
    of_trained, of_iid = (
        evaluate(
            EvalRequest(
                model=work / "run" / "model",
                dataset=dataset,
                splits=splits,
                out=work / f"report-{name}-{dataset.name}",
                force=True,
            )
        )
        for dataset, splits in scored
    )
    rows = {"cluster": _kept(of_trained, "test"), "ood": _kept(of_trained, "ood"), "iid": _kept(of_iid, "test")}
    return {"step": step, "splits": rows}


def _kept(report: EvalReport, split: str) -> dict[str, Any]:
    of_split = report.splits[split]
    rows = {name: _row(of_split.scores[name]) for name in ("model", *_BASELINES) if name in of_split.scores}
    replicates = {"accuracy": [round(value, 5) for value in of_split.replicates["accuracy"][:_NUM_REPLICATES]]}
    return {
        "num_records": of_split.num_records, "num_targets": of_split.num_targets, "replicates": replicates, **rows
    }  # fmt: skip


def _row(row: ScoreRow) -> dict[str, float | None]:
    names = [f"{metric}{suffix}" for metric in _KEPT for suffix in ("", "_low", "_high")]
    return {name: None if row[name] is None else round(float(row[name] or 0.0), 5) for name in names}


def _peak_bytes() -> int | None:
    """Returns the peak memory of this process so far; None where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
