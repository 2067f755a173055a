"""The tables of what_trains.md, and how they are put into its text: hides the marks that a table stands between."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from protlm.errors import ProtlmError
from protlm.inference.metrics import Estimate
from scripts.experiments import results as figures
from scripts.experiments.curves import planned_pictures
from scripts.experiments.plan import (
    CYCLE,
    KINDS,
    SEEDS,
    TARGET,
    VARIANT_TASK,
    VARIANTS,
    Kind,
    Result,
    Results,
    Run,
    best_temperature,
    needed_by,
    planned_runs,
)
from scripts.experiments.runs import SCORED
from scripts.experiments.tasks import TASKS
from scripts.report.page import table

_BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def with_tables(text: str, results: Results, folder: str = "what_trains") -> str:
    """Returns the text of the page with each table between its marks made anew, and its picture below it.

    Args:
        text: The page.
        results: The runs.
        folder: The path of the pictures from the page.

    Raises:
        ProtlmError: A mark of a table that there is not.
    """
    pictures = planned_pictures(results)

    def replaced(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TASKS and name not in TABLES:
            raise ProtlmError(f"<!-- table: {name} -->: expected one of {', '.join([*TASKS, *TABLES])}")
        made = task_table(results, name) if name in TASKS else TABLES[name](results)
        picture = f"\n\n![Curves: {pictures[name].title}]({folder}/{name}.png)" if name in pictures else ""
        return f"{match[1]}\n{made}{picture}\n\n"

    return _BLOCK.sub(replaced, text)


def task_table(results: Results, task: str, kinds: Mapping[str, Kind] = KINDS) -> str:
    """Returns the table of a task: each of these kinds with the same number of updates."""
    named = {kind.title: figures.of_kind(results, task, name) for name, kind in kinds.items()}
    return _scores({title: runs for title, runs in named.items() if runs})


def variants_table(results: Results) -> str:
    """Returns the cycle beside its variants."""
    return task_table(results, VARIANT_TASK, {CYCLE: KINDS[CYCLE], **VARIANTS})


def equal_time_table(results: Results) -> str:
    """Returns the cycle beside exact attention that was trained as long, on long proteins."""
    named = {KINDS[CYCLE].title: figures.of_kind(results, TARGET, CYCLE)}
    named |= {kind.title: figures.of_kind(results, TARGET, name, "time") for name, kind in _opponents().items()}
    return _scores({title: runs for title, runs in named.items() if runs})


def target_table(results: Results) -> str:
    """Returns the cycle minus exact attention, at equal time and at equal updates, on long proteins."""
    rows = []
    cycle = figures.of_kind(results, TARGET, CYCLE)
    for budget, words in (("time", "equal time"), ("steps", "equal updates")):
        for name, kind in _opponents().items():
            others = figures.of_kind(results, TARGET, name, budget)
            rows += _difference_rows(f"{kind.title}, {words}", cycle, others)
    return table(["the cycle minus", "proteins", "seeds", "accuracy", "verdict"], rows)


def differences_table(results: Results) -> str:
    """Returns the cycle minus each other kind at equal updates, on every task."""
    rows = []
    for task in TASKS:
        for name, kind in KINDS.items():
            if name != CYCLE:
                cycle, others = (figures.of_kind(results, task, of) for of in (CYCLE, name))
                rows += [[TASKS[task].title, *row] for row in _difference_rows(kind.title, cycle, others)]
    return table(["task", "the cycle minus", "proteins", "seeds", "accuracy", "verdict"], rows)


def sweep_table(results: Results) -> str:
    """Returns the sweep over the temperature at which exact attention starts."""
    rows = []
    for name, kind in _opponents().items():
        best = None
        for run in needed_by(Run(TARGET, name, SEEDS[0])):
            if run.name in results:
                best = best or _best(name, results)
                end = results[run.name]["curve"][-1]
                mark = "best" if run.temperature == best else ""
                rows.append([kind.title, run.temperature, f"{end['accuracy']:.3f}", f"{end['perplexity']:.2f}", mark])
    return table(["attention", "start", "accuracy on valid", "perplexity", ""], rows)


def curves_table(results: Results) -> str:
    """Returns the accuracy on valid at the processor time that the cycle took for all its updates, read off curves."""
    rows = []
    for task in TASKS:
        cycle = figures.of_kind(results, task, CYCLE)
        for name, kind in KINDS.items():
            cells = []
            for run, base in _pairs(figures.of_kind(results, task, name), cycle):
                value = figures.at_seconds(run, base["training_seconds"])
                cells.append("–" if value is None else f"{value:.3f}")
            if cells:
                rows.append([TASKS[task].title, kind.title, " / ".join(cells)])
    return table(["task", "attention", "accuracy on valid"], rows)


def conditions(results: Results) -> str:
    """Returns a paragraph about the runs: how many there are, how long they took, where and with which code."""
    planned = [run.name for run in planned_runs()]
    planned += [needed.name for run in planned_runs() for needed in needed_by(run)]
    missing = [name for name in dict.fromkeys(planned) if name not in results]
    minutes = sum(result["training_seconds"] for result in results.values()) / 60
    machines: dict[str, set[str]] = {}
    for result in results.values():
        facts = result["environment"]
        machine = f"{facts['processor']}, {facts['threads']} thread, torch {facts['torch']}"
        machines.setdefault(machine, set()).add(facts["commit"])
    where = "; ".join(f"{machine}, commits {', '.join(sorted(commits))}" for machine, commits in machines.items())
    text = f"{len(results)} runs, {minutes:.0f} minutes of processor time in training: {where}."
    if missing:
        counts = Counter(name.partition(".")[0] for name in missing)
        text += (
            f" Not there are {len(missing)} runs of the plan: {', '.join(f'{n} of {t}' for t, n in counts.items())}."
        )
    return text


TABLES: Mapping[str, Callable[[Results], str]] = {
    "conditions": conditions, "target": target_table, "equal-time": equal_time_table, "sweep": sweep_table,
    "variants": variants_table,
    "differences": differences_table, "curves": curves_table,
}  # fmt: skip
"""What stands between marks by their names, beside the tables of the tasks."""


def _opponents() -> dict[str, Kind]:
    return {name: kind for name, kind in KINDS.items() if kind.is_exact}


def _best(kind: str, results: Results) -> float | None:
    """Returns the best temperature of the sweep; None before all of it is there."""
    sweep = (run for run in needed_by(Run(TARGET, kind, SEEDS[0])))
    return best_temperature(kind, results) if all(run.name in results for run in sweep) else None


def _scores(rows: Mapping[str, Sequence[Result]]) -> str:
    if not rows:
        return "No such run is there yet."
    cells = []
    for title, runs in rows.items():
        row = [title, str(len(runs))]
        for split in SCORED:
            row += [_interval(figures.accuracy(runs, split)), f"{figures.mean_of(runs, split, 'perplexity'):.2f}"]
        steps = sum(run["steps"] for run in runs) / len(runs)
        seconds = sum(run["training_seconds"] for run in runs) / len(runs)
        cells.append([*row, f"{steps:.0f}", f"{seconds:.0f}", f"{1000 * seconds / steps:.0f}"])
    cells += _baseline_rows(next(iter(rows.values()))[0])
    columns = [word for split in SCORED for word in (f"{split} accuracy", "perplexity")]
    return table(["attention", "seeds", *columns, "updates", "CPU s", "ms an update"], cells)


_BASELINES = {"empirical": "baseline: composition", "two_sided": "baseline: Markov, both sides"}


def _baseline_rows(result: Result) -> list[list[str]]:
    """Returns rows for the baselines that need no training: the same for every run of a task."""
    return [
        [title, "–", *(cell for split in SCORED for cell in (f"{result['splits'][split][name]:.3f}", "–")), *("–",) * 3]
        for name, title in _BASELINES.items()
        if all(result["splits"][split].get(name) is not None for split in SCORED)
    ]


def _difference_rows(title: str, first: Sequence[Result], second: Sequence[Result]) -> list[list[str]]:
    rows = []
    for split in SCORED:
        difference = figures.difference(first, second, split)
        if difference is not None:
            seeds = {run["seed"] for run in first} & {run["seed"] for run in second}
            rows.append([title, split, str(len(seeds)), _interval(difference, signed=True), _verdict(difference)])
    return rows


def _interval(value: Estimate, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    text = f"{value.value:{sign}.3f}"
    return text if value.low is None else f"{text} ({value.low:{sign}.3f} to {value.high:{sign}.3f})"


def _verdict(value: Estimate) -> str:
    if value.low is None or value.high is None:
        return "too few proteins"
    return "above" if value.low > 0 else "below" if value.high < 0 else "not told apart"


def _pairs(runs: Sequence[Result], others: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Returns the runs that have the same seed."""
    return [(run, other) for run in runs for other in others if run["seed"] == other["seed"]]
