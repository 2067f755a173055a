"""The tables and pictures of convert.md: hides the marks that a table stands between."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from protlm import files
from protlm.errors import ProtlmError
from protlm.workflows.pages.figures import quiet_matplotlib
from scripts.conversion.plan import ARMS, FORMAT_VERSION, SUBJECTS, planned_runs
from scripts.report.page import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = Mapping[str, dict[str, Any]]
"""The content of the files of the runs, by their names."""

_BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
_STEPS = (0, 25, 50, 100, 200, 300)
_MARKS = {
    "plain-ce": ("#0072b2", "o"), "plain-stages": ("#56b4e9", "s"), "balanced-ce": ("#e69f00", "^"),
    "balanced-stages": ("#d55e00", "v"), "near-ce": ("#009e73", "D"), "near-stages": ("#00533d", "P"),
    "scratch": ("#cc79a7", "X"),
}  # fmt: skip
"""Colour and marker of an arm, the same in every picture."""


def read_results(folder: Path) -> Results:
    """Returns the results in a folder by the names of their runs.

    Raises:
        ProtlmError: A file that is no result of this version.
    """
    results = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format_version") != FORMAT_VERSION:
            raise ProtlmError(f"{path}: expected the result of a run, format version {FORMAT_VERSION}; move it away")
        results[path.stem] = content
    return results


def read_long(path: Path) -> dict[str, Any] | None:
    """Returns the measurements of long proteins; None if there are none.

    Raises:
        ProtlmError: A file of something else.
    """
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format_version") != FORMAT_VERSION:
        raise ProtlmError(f"{path}: expected measurements of long proteins, format version {FORMAT_VERSION}")
    return content


def blocks_table(long: dict[str, Any]) -> str:
    """Returns what our own model keeps, by the block of the near field and the number of random rows."""
    exact, *swaps = long["blocks"]
    rows = [
        (each["block"], each["features"], f"{each['accuracy']:.3f} ({each['accuracy'] / exact['accuracy']:.0%})",
         f"{each['perplexity']:.2f}")
        for each in swaps
    ]  # fmt: skip
    rows.append(("exact", "–", f"{exact['accuracy']:.3f}", f"{exact['perplexity']:.2f}"))
    return table(("block", "features", "accuracy, untrained", "perplexity"), rows)


def positions_table(long: dict[str, Any]) -> str:
    """Returns the perplexities with exact and with swapped attention by position."""
    rows = [
        (f"from {row['start'] + 1}", f"{row['num_targets']:,}", f"{row['exact']:.2f}", f"{row['swapped']:.2f}")
        for row in long["positions"]
    ]
    return table(("residues", "hidden", "perplexity, exact", "swapped"), rows)


def cost_table(long: dict[str, Any]) -> str:
    """Returns the time and memory of a pass with exact and with swapped attention."""
    rows = []
    for exact, own in zip(long["exact_costs"], long["costs"], strict=True):
        cells = [
            "not over in 2 minutes" if each["seconds"] is None else f"{each['seconds']:.3g} s" for each in (exact, own)
        ]
        memory = ["–" if e["peak_bytes"] is None else f"{e['peak_bytes'] / 2**20:,.0f} MiB" for e in (exact, own)]
        rows.append((f"{exact['length']:,}", cells[0], memory[0], cells[1], memory[1]))
    about = long["environment"]
    machine = f"{about['processor']}, {about['cores']} cores, torch {about['torch']}."
    return f"{table(('residues', 'exact', 'memory', 'swapped', 'memory'), rows)}\n\n{machine}"


def of_arm(results: Results, subject: str, arm: str) -> list[dict[str, Any]]:
    """Returns the results of an arm on a subject, ordered by seed; those there are."""
    names = [run.name for run in planned_runs() if (run.subject, run.arm) == (subject, arm)]
    return [results[name] for name in names if name in results]


def exact_accuracy(results: Results, subject: str) -> float | None:
    """Returns the accuracy of the model with exact attention on the held-out proteins; None if nothing was run."""
    runs = [result for result in results.values() if result["subject"] == subject]
    return runs[0]["exact"]["accuracy"] if runs else None


def accuracy_at(runs: Sequence[dict[str, Any]], step: int) -> float | None:
    """Returns the mean accuracy of some runs after so many updates; None where they were not measured then."""
    values = [point["accuracy"] for run in runs for point in run["curve"] if point["step"] == step]
    return float(np.mean(values)) if len(values) == len(runs) and values else None


def steps_to(runs: Sequence[dict[str, Any]], accuracy: float) -> int | None:
    """Returns the first measured update after which the mean accuracy of some runs reaches a value; None if none."""
    steps = sorted({point["step"] for run in runs for point in run["curve"]})
    return next((step for step in steps if (accuracy_at(runs, step) or 0.0) >= accuracy), None)


def recovery_table(results: Results, subject: str) -> str:
    """Returns the accuracy of every arm after some updates, and the share of that with exact attention."""
    exact = exact_accuracy(results, subject)
    assert exact is not None
    rows = []
    for arm, definition in ARMS.items():
        runs = of_arm(results, subject, arm)
        if not runs:
            continue
        cells = [accuracy_at(runs, step) for step in _STEPS]
        last = max(point["step"] for run in runs for point in run["curve"])
        final = accuracy_at(runs, last)
        rows.append((
            definition.title, len(runs), *("–" if cell is None else f"{cell:.3f}" for cell in cells),
            f"{last:,}: {final:.3f} ({final / exact:.1%})" if final is not None else "–",
        ))  # fmt: skip
    rows.append(("exact attention", "–", *[f"{exact:.3f}"] * len(_STEPS), "–"))
    header = ("attention, learning", "seeds", *(f"{step} updates" for step in _STEPS), "at the end")
    return table(header, rows)


def targets_table(results: Results) -> str:
    """Returns, of each model, what is kept without training and after few updates, and what scratch takes for that."""
    rows = []
    for subject, definition in SUBJECTS.items():
        exact = exact_accuracy(results, subject)
        if exact is None:
            continue

        def kept(arm: str, step: int, subject: str = subject, exact: float = exact) -> str:
            value = accuracy_at(of_arm(results, subject, arm), step)
            return "–" if value is None else f"{value / exact:.1%}"

        rows.append((
            definition.title, f"{exact:.3f}", kept("plain-ce", 0), kept("balanced-stages", 0), kept("near-stages", 0),
            kept("near-stages", 100), kept("balanced-stages", 200), kept("plain-stages", 200), kept("plain-ce", 200),
        ))  # fmt: skip
    header = (
        "model", "exact", "as it is, untrained", "balanced, untrained", "balanced + near, untrained",
        "balanced + near, 100 of transfer", "balanced, 100 + 100", "as it is, 100 + 100", "as it is, 200 of CE",
    )  # fmt: skip
    return table(header, rows)


def scratch_sentence(results: Results) -> str:
    """Returns how many updates a model with random weights takes for the accuracy that a swap has after few."""
    runs = of_arm(results, "sapiens", "scratch")
    swapped = of_arm(results, "sapiens", "near-stages")
    if not runs or not swapped:
        return "No such run is there yet."
    reached = accuracy_at(swapped, 100)
    assert reached is not None
    last = max(point["step"] for run in runs for point in run["curve"])
    best = max(accuracy_at(runs, step) or 0.0 for step in {point["step"] for run in runs for point in run["curve"]})
    steps = steps_to(runs, reached)
    if steps is not None:
        return f"Beginning with random weights, the accuracy of {reached:.3f} takes {steps:,} updates, not 100."
    plain = accuracy_at(of_arm(results, "sapiens", "plain-ce"), 100)
    text = f"Beginning with random weights, {last:,} updates reach {best:.3f}, not {reached:.3f}."
    if plain is not None and (own := steps_to(runs, plain)) is not None:
        text += f" For the {plain:.3f} that the plain swap has after 100 updates of cross-entropy they take {own:,}."
    return text


def conditions(results: Results) -> str:
    """Returns the sentence on what was run, and on which machine."""
    environments = [result["environment"] for result in results.values()]
    commits = ", ".join(sorted({each["commit"] for each in environments}))
    machines = ", ".join(sorted({each["processor"] for each in environments}))
    planned = {run.name for run in planned_runs()}
    missing = len(planned - set(results))
    seconds = sum(result["seconds"] for result in results.values())
    text = (
        f"{len(results)} runs, {seconds / 60:.0f} minutes of processor time: {machines}, 1 thread, commits {commits}."
    )
    return text if not missing else f"{text} Not there are {missing} runs of the plan."


def with_tables(text: str, results: Results, long: dict[str, Any] | None = None) -> str:
    """Returns the text of the page with each table between its marks made anew.

    Args:
        text: The page.
        results: The runs.
        long: Measurements of long proteins, if there are any.

    Raises:
        ProtlmError: A mark of a table that there is not.
    """
    made: dict[str, Callable[[], str]] = {
        "conditions": lambda: conditions(results),
        "targets": lambda: targets_table(results),
        "scratch": lambda: scratch_sentence(results),
        "blocks": lambda: "Not measured yet." if long is None else blocks_table(long),
        "positions": lambda: "Not measured yet." if long is None else positions_table(long),
        "cost": lambda: "Not measured yet." if long is None else cost_table(long),
    }
    for subject in SUBJECTS:
        made[subject] = lambda subject=subject: (  # type: ignore[misc]
            "No such run is there yet."
            if exact_accuracy(results, subject) is None
            else f"{recovery_table(results, subject)}\n\n![{SUBJECTS[subject].title}](convert/{subject}.png)"
        )

    def replaced(match: re.Match[str]) -> str:
        if match[2] not in made:
            raise ProtlmError(f"<!-- table: {match[2]} -->: expected one of {', '.join(made)}")
        return f"{match[1]}\n{made[match[2]]()}\n\n"

    return _BLOCK.sub(replaced, text)


def draw_pictures(results: Results, folder: Path) -> list[Path]:
    """Draws a picture for each model that has results, and returns their paths."""
    paths = []
    for subject in SUBJECTS:
        if exact_accuracy(results, subject) is not None:
            folder.mkdir(parents=True, exist_ok=True)
            paths.append(folder / f"{subject}.png")
            _draw(paths[-1], results, subject)
    return paths


@quiet_matplotlib()
def _draw(path: Path, results: Results, subject: str) -> None:
    """Draws accuracy against updates: after the swap, and on the right from random weights, where that was run."""
    # The Figure class directly: pyplot would look for a display and keep global state.
    from matplotlib.figure import Figure

    has_scratch = bool(of_arm(results, subject, "scratch"))
    figure = Figure(figsize=(10.4 if has_scratch else 7.4, 4.2), dpi=90, layout="constrained")
    axes = figure.subplots(1, 2 if has_scratch else 1, sharey=True, squeeze=False)[0]
    exact = exact_accuracy(results, subject)
    assert exact is not None
    for place, each in enumerate(axes):
        each.axhline(exact, color="#333333", linewidth=1.2, linestyle="dashed", label="exact attention")
        for arm in ARMS:
            if (place == 0) == (arm == "scratch"):
                continue
            _draw_arm(each, arm, of_arm(results, subject, arm))
        each.grid(True, color="#dddddd", linewidth=0.6)
        each.set_axisbelow(True)
        each.set(xlabel="updates")
    axes[0].set(ylabel="accuracy on hidden residues, held out", title="after the swap")
    if has_scratch:
        axes[1].set(title="from random weights")
        axes[1].xaxis.set_major_formatter("{x:,.0f}")
    for each in axes:
        each.title.set_fontsize(9)
        each.legend(fontsize=7.5, framealpha=0.9, loc="lower right")
    figure.suptitle(SUBJECTS[subject].title, fontsize=10.5)
    with files.written_whole(path) as partial:
        figure.savefig(partial, format="png")


def _draw_arm(axes: "Axes", arm: str, runs: Sequence[dict[str, Any]]) -> None:
    """Draws the mean of the seeds, and each seed thinly."""
    if not runs:
        return
    color, marker = _MARKS[arm]
    steps = [point["step"] for point in runs[0]["curve"]]
    curves = np.array([[point["accuracy"] for point in run["curve"]] for run in runs])
    if len(runs) > 1:
        for curve in curves:
            axes.plot(steps, curve, color=color, linewidth=0.7, alpha=0.35)
    axes.plot(steps, curves.mean(0), color=color, marker=marker, markersize=4, linewidth=1.6, label=ARMS[arm].title)
