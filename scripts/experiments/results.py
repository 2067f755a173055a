"""The files of runs, and figures of several of them: hides the bootstrap over proteins, paired between runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from protlm.errors import ProtlmError
from protlm.inference.metrics import Estimate, estimate
from scripts.experiments.plan import Budget, Result, Results, planned_runs

FORMAT_VERSION = 1


def read_result(path: Path) -> dict[str, Any]:
    """Returns the content of the file of a run.

    Raises:
        ProtlmError: A file that is no result of this version.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = result["format_version"]
    except (ValueError, KeyError, TypeError):  # no JSON, or that of another program
        raise ProtlmError(f"{path}: expected the result of a run, got something else; move it away") from None
    if version != FORMAT_VERSION:
        raise ProtlmError(f"{path}: expected format version {FORMAT_VERSION}, got {version!r}; move it away")
    return result


def read_results(folder: Path) -> dict[str, Result]:
    """Returns the results in a folder by the names of their runs; raises as `read_result`."""
    return {path.stem: read_result(path) for path in sorted(folder.glob("*.json"))}


def of_kind(results: Results, task: str, kind: str, budget: Budget = "steps") -> list[Result]:
    """Returns the results of a kind on a task, ordered by seed; those there are."""
    of_seeds = [
        results[run.name]
        for run in planned_runs()
        if (run.task, run.kind, run.budget) == (task, kind, budget) and run.name in results
    ]
    return sorted(of_seeds, key=lambda result: int(result["seed"]))


def mean_of(runs: Sequence[Result], split: str, metric: str = "accuracy") -> float:
    """Returns the mean of a metric over runs."""
    return float(np.mean([run["splits"][split][metric] for run in runs]))


def accuracy(runs: Sequence[Result], split: str) -> Estimate:
    """Returns the mean accuracy of runs that differ by their seed, with the interval over proteins."""
    return estimate(mean_of(runs, split), _replicates(runs, split))


def difference(first: Sequence[Result], second: Sequence[Result], split: str) -> Estimate | None:
    """Returns the mean accuracy of some runs minus that of others; None where no seed is among both.

    Only seeds that both have count; the replicates of the bootstrap are paired, since all runs score the same residues.
    """
    seeds = {run["seed"] for run in first} & {run["seed"] for run in second}
    if not seeds:
        return None
    one, other = ([run for run in runs if run["seed"] in seeds] for runs in (first, second))
    value = mean_of(one, split) - mean_of(other, split)
    return estimate(value, _replicates(one, split) - _replicates(other, split))


def at_seconds(run: Result, seconds: float) -> float | None:
    """Returns the accuracy on the valid split at a processor time: between the points of the curve, or at its end.

    None before the first point.
    """
    times = [point["seconds"] for point in run["curve"]]
    if seconds < times[0]:
        return None
    return float(np.interp(seconds, times, [point["accuracy"] for point in run["curve"]]))


def _replicates(runs: Sequence[Result], split: str) -> np.ndarray:
    """Returns the replicates of the mean accuracy of runs."""
    return np.mean([run["splits"][split]["replicates"] for run in runs], axis=0)
