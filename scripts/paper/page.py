"""The tables and curves of paper_table.md: hides the marks that a table stands between."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from protlm import files
from protlm.errors import ProtlmError
from protlm.inference.metrics import Estimate, estimate
from protlm.workflows.pages.figures import quiet_matplotlib
from scripts.paper.plan import KINDS, TASKS, Direction, planned_runs, sweep
from scripts.paper.runs import SPLITS
from scripts.report.page import filled, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = Mapping[str, Any]
Results = Mapping[str, Result]
"""The content of the files of the runs, by the names of the runs."""

_BASELINE_TITLES = {
    "empirical": "baseline: residue frequencies", "markov": "baseline: Markov, residues before",
    "two_sided": "baseline: Markov, both sides",
}  # fmt: skip
DIRECTIONS: Sequence[Direction] = ("BID", "UNI")
_MARKS = {
    "exact-plain": ("#b79fd1", "<"), "relu-plain": ("#e6b3a1", ">"), "exact": ("#5b2a86", "D"),
    "relu": ("#d55e00", "P"), "positive": ("#0072b2", "o"), "hyperbolic": ("#56b4e9", "X"), "trig": ("#cc79a7", "s"),
    "near-far": ("#e69f00", "^"), "cycle": ("#009e73", "v"),
}  # fmt: skip
"""Colour and marker of a kind, the same in every picture."""


def best_temperature(results: Results) -> int | None:
    """Returns the temperature of the sweep with the lowest perplexity on valid; None before all of it is there."""
    runs = [(run, results[run.name]) for run in sweep() if run.name in results]
    if len(runs) < len(sweep()):
        return None
    best, _ = min(runs, key=lambda pair: pair[1]["curve"][-1]["perplexity"])
    return best.temperature


def of_kind(results: Results, task: str, kind: str, direction: Direction) -> list[Result]:
    """Returns the results of a kind, ordered by seed; those there are."""
    runs = [run for run in planned_runs() if (run.task, run.kind, run.direction) == (task, kind, direction)]
    made = [results[run.name] for run in runs if run.temperature is None and run.name in results]
    return sorted(made, key=lambda result: int(result["seed"]))


def accuracy(runs: Sequence[Result], when: str, split: str) -> Estimate:
    """Returns the mean accuracy of runs that differ by their seed, with the interval over proteins."""
    rows = [run["scores"][when]["splits"][split] for run in runs]
    replicates = np.mean([row["replicates"]["accuracy"] for row in rows], axis=0)
    return estimate(float(np.mean([row["model"]["accuracy"] for row in rows])), replicates)


def perplexity(runs: Sequence[Result], when: str, split: str) -> Estimate:
    """Returns the mean perplexity of runs that differ by their seed, with the mean of their intervals over proteins.

    The same proteins are drawn for all seeds, so that their intervals move together.
    """
    rows = [run["scores"][when]["splits"][split]["model"] for run in runs]
    value, low, high = (float(np.mean([row[f"perplexity{end}"] for row in rows])) for end in ("", "_low", "_high"))
    return Estimate(value=value, stderr=None, low=low, high=high)


def _scores_cell(of_accuracy: Estimate, of_perplexity: Estimate) -> str:
    return f"{_cell(of_accuracy)}<br>{_cell(of_perplexity, digits=2)}"


def difference(first: Sequence[Result], second: Sequence[Result], when: str, split: str) -> Estimate | None:
    """Returns the mean accuracy of some runs minus that of others, paired; None where no seed is among both."""
    seeds = {run["seed"] for run in first} & {run["seed"] for run in second}
    if not seeds:
        return None
    values, replicates = [], []
    for runs in (first, second):
        rows = [run["scores"][when]["splits"][split] for run in runs if run["seed"] in seeds]
        values.append(float(np.mean([row["model"]["accuracy"] for row in rows])))
        replicates.append(np.mean([row["replicates"]["accuracy"] for row in rows], axis=0))
    return estimate(values[0] - values[1], replicates[0] - replicates[1])


def differences_of_seeds(first: Sequence[Result], second: Sequence[Result], when: str, split: str) -> list[float]:
    """Returns the accuracy of some runs minus that of others for each seed that both have, by seed."""
    values = [
        {run["seed"]: float(run["scores"][when]["splits"][split]["model"]["accuracy"]) for run in runs}
        for runs in (first, second)
    ]
    return [values[0][seed] - values[1][seed] for seed in sorted(values[0].keys() & values[1].keys())]


def _difference_cell(first: Sequence[Result], second: Sequence[Result], when: str, split: str) -> str:
    """Returns a difference with its interval, and those of the seeds; bold where all seeds and the interval agree."""
    mean = difference(first, second, when, split)
    assert mean is not None
    of_seeds = differences_of_seeds(first, second, when, split)
    bounds = [*of_seeds, *(bound for bound in (mean.low, mean.high) if bound is not None)]
    is_sure = len(of_seeds) > 1 and (min(bounds) > 0 or max(bounds) < 0)
    text = f"**{_cell(mean, '+')}**" if is_sure else _cell(mean, "+")
    return f"{text}<br>{', '.join(f'{value:+.3f}' for value in of_seeds).replace('-', '−')}"


def scores_table(results: Results, task: str, when: str) -> str:
    """Returns the scores of every kind on a task, at equal updates (`steps`) or at the end of the time (`time`)."""
    rows: list[list[object]] = []
    for direction in DIRECTIONS:
        named = {kind: of_kind(results, task, kind, direction) for kind in KINDS}
        named = {kind: runs for kind, runs in named.items() if runs}
        if not named:
            continue
        rows += [_baseline_row(next(iter(named.values()))[0], when, name, direction) for name in _BASELINE_TITLES
                 if name in next(iter(named.values()))[0]["scores"][when]["splits"]["cluster"]]  # fmt: skip
        for kind, runs in named.items():
            cells = [_scores_cell(accuracy(runs, when, split), perplexity(runs, when, split)) for split in SPLITS]
            steps = np.mean([run["scores"][when]["step"] for run in runs])
            rows.append([direction, KINDS[kind].title, len(runs), *cells, f"{steps:,.0f}"])
    if not rows:
        return "No such run is there yet."
    header = ("", "model", "seeds", "held-out clusters", "held-out families (OOD)", "random", "updates")
    return table(header, rows)


def cost_table(results: Results, task: str) -> str:
    """Returns the speed and the memory of training of every kind on a task."""
    rows = []
    for direction in DIRECTIONS:
        for kind, definition in KINDS.items():
            runs = of_kind(results, task, kind, direction)
            if runs:
                peaks = [run["peak_bytes"] / 2**20 for run in runs if run["peak_bytes"] is not None]
                rows.append((
                    direction, definition.title, _range([run["tokens_per_second"] for run in runs]),
                    _range(peaks) if peaks else "–",
                    _range([run["training_seconds"] / 60 for run in runs], digits=1),
                    f"{np.mean([run['num_tokens'] for run in runs]) / 1e6:.2f}",
                ))  # fmt: skip
    if not rows:
        return "No such run is there yet."
    return table(("", "model", "tokens/s", "peak MiB", "minutes", "million tokens"), rows)


def differences_table(results: Results, reference: str) -> str:
    """Returns every kind minus the reference, a kind too, paired; there is a row for each task and direction of it."""
    rows = []
    for task in TASKS:
        for direction, when in product(DIRECTIONS, ("steps", "time")):
            others = of_kind(results, task, reference, direction)
            for kind, definition in KINDS.items():
                runs = of_kind(results, task, kind, direction)
                if kind == reference or not _share_a_seed(runs, others):
                    continue
                cells = [_difference_cell(runs, others, when, split) for split in SPLITS]
                words = "equal updates" if when == "steps" else "equal time"
                rows.append((f"{task}, {direction}", words, definition.title, *cells))
    if not rows:
        return "No two such runs are there yet."
    minus = f"minus {KINDS[reference].title}"
    return table(("task", "", minus, "held-out clusters", "held-out families (OOD)", "random"), rows)


def _share_a_seed(first: Sequence[Result], second: Sequence[Result]) -> bool:
    """Returns whether some runs share a seed with others."""
    return bool({run["seed"] for run in first} & {run["seed"] for run in second})


def sweep_table(results: Results) -> str:
    """Returns the runs that chose the temperature of exact attention."""
    best = best_temperature(results)
    rows = []
    for run in sweep():
        if run.name in results:
            end = results[run.name]["curve"][-1]
            mark = "best" if run.temperature == best else ""
            rows.append((run.temperature, f"{end['accuracy']:.3f}", f"{end['perplexity']:.2f}", mark))
    return table(("starts at", "accuracy on valid", "perplexity", ""), rows) if rows else "No such run is there yet."


def conditions(results: Results) -> str:
    """Returns a paragraph about the runs: how many, how long, where, with which code, and which are missing."""
    planned = [run.name for run in planned_runs()]
    missing = [name for name in planned if name not in results]
    minutes = sum(result["training_seconds"] for result in results.values()) / 60
    machines: dict[str, set[str]] = {}
    for result in results.values():
        facts = result["environment"]
        machine = f"{facts['processor']}, {facts['threads']} thread, torch {facts['torch']}"
        machines.setdefault(machine, set()).add(facts["commit"])
    where = "; ".join(f"{machine}, commits {', '.join(sorted(commits))}" for machine, commits in machines.items())
    given = sorted({result["minutes"] for result in results.values() if result["temperature"] is None})
    each = f", {' or '.join(f'{value:g}' for value in given)} minutes a run" if given else ""
    text = f"{len(results)} runs, {minutes:.0f} minutes of processor time in training{each}: {where}."
    if missing:
        text += f" Not there are {len(missing)} of {len(planned)} runs: {', '.join(f'`{name}`' for name in missing)}."
    return text


TABLES: Mapping[str, Callable[[Results], str]] = {
    "single-steps": lambda results: scores_table(results, "single", "steps"),
    "single-time": lambda results: scores_table(results, "single", "time"),
    "concatenated-steps": lambda results: scores_table(results, "concatenated", "steps"),
    "concatenated-time": lambda results: scores_table(results, "concatenated", "time"),
    "single-cost": lambda results: cost_table(results, "single"),
    "concatenated-cost": lambda results: cost_table(results, "concatenated"),
    "differences": lambda results: differences_table(results, "exact"),
    "differences-cycle": lambda results: differences_table(results, "cycle"),
    "sweep": sweep_table,
    "conditions": conditions,
}
"""What stands between marks, by their names."""


def with_tables(text: str, results: Results) -> str:
    """Returns the text of the page with each table between its marks made anew, the picture of a task below the last.

    Raises:
        ProtlmError: A mark of a table that there is not.
    """

    def content(name: str) -> str:
        if name not in TABLES:
            raise ProtlmError(f"<!-- table: {name} -->: expected one of {', '.join(TABLES)}")
        task = name.removesuffix("-time")
        if task not in tasks_with_runs(results):
            return TABLES[name](results)
        return f"{TABLES[name](results)}\n\n![Curves: {TASKS[task].title}](paper_table/{task}.png)"

    return filled(text, content)


def tasks_with_runs(results: Results) -> list[str]:
    """Returns the tasks that have a picture: those of which a bidirectional run is there."""
    return [task for task in TASKS if any(of_kind(results, task, kind, "BID") for kind in KINDS)]


@quiet_matplotlib()
def draw_pictures(results: Results, folder: Path) -> list[Path]:
    """Draws the curves of every task that has runs, and returns the paths of the pictures."""
    # The Figure class directly: pyplot would look for a display and keep global state.
    from matplotlib.figure import Figure

    paths = []
    for task in tasks_with_runs(results):
        named = {kind: of_kind(results, task, kind, "BID") for kind in KINDS}
        named = {kind: runs for kind, runs in named.items() if runs}
        figure = Figure(figsize=(9.6, 4.2), dpi=90, layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for kind, runs in named.items():
            _draw_kind(left, kind, runs, "step", 1)
            _draw_kind(right, kind, runs, "seconds", 60)
        left.set(xlabel="updates", ylabel="perplexity of hidden residues on valid", title="by updates")
        right.set(xlabel="CPU minutes of training, one thread", title="by time")
        for axes in (left, right):
            axes.grid(True, color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.title.set_fontsize(9)
        left.legend(fontsize=8, framealpha=0.9)
        figure.suptitle(TASKS[task].title, fontsize=10.5)
        folder.mkdir(parents=True, exist_ok=True)
        paths.append(folder / f"{task}.png")
        with files.written_whole(paths[-1]) as partial:
            figure.savefig(partial, format="png")
    return paths


def _draw_kind(axes: "Axes", kind: str, runs: Sequence[Result], key: str, unit: float) -> None:
    color, marker = _MARKS[kind]
    for number, run in enumerate(runs):
        curve = [(point[key] / unit, point["perplexity"]) for point in run["curve"]]
        label = KINDS[kind].title if not number else None
        axes.plot(*zip(*curve, strict=True), color=color, marker=marker, markersize=3, linewidth=1.2, label=label)


def _baseline_row(result: Result, when: str, name: str, direction: str) -> list[object]:
    cells = []
    for split in SPLITS:
        row = result["scores"][when]["splits"][split].get(name)
        cells.append("–" if row is None else _scores_cell(_stored(row, "accuracy"), _stored(row, "perplexity")))
    return [direction, _BASELINE_TITLES[name], "–", *cells, "–"]


def _stored(row: Mapping[str, float | None], metric: str) -> Estimate:
    value = row[metric]
    assert value is not None
    return Estimate(value=value, stderr=None, low=row[f"{metric}_low"], high=row[f"{metric}_high"])


def _range(values: Sequence[float], digits: int = 0) -> str:
    """Returns the mean of some values, and the smallest and the largest of them where they differ."""
    low, mean, high = (f"{value:,.{digits}f}" for value in (min(values), float(np.mean(values)), max(values)))
    return mean if low == high else f"{mean} ({low}–{high})"


def _cell(value: Estimate, sign: str = "", digits: int = 3) -> str:
    text = f"{value.value:{sign}.{digits}f}"
    if value.low is not None:
        text = f"{text} ({value.low:{sign}.{digits}f} to {value.high:{sign}.{digits}f})"
    return text.replace("-", "−")
