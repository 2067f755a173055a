"""The figures of what_trains.md: curves of every kind on a task, against updates and against processor time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from protlm import files
from protlm.workflows.pages.figures import quiet_matplotlib
from scripts.experiments import results as figures
from scripts.experiments.plan import KINDS, VARIANT_TASK, VARIANTS, Kind, Result, Results
from scripts.experiments.tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKS = {
    "exact": ("#5b2a86", "D"), "exact-prior": ("#cc79a7", "s"), "favor": ("#0072b2", "o"), "local": ("#e69f00", "^"),
    "cycle": ("#009e73", "v"), "near-far": ("#d55e00", "P"),
    "cycle-exact": ("#5b2a86", "D"), "cycle-64": ("#66c2a5", "1"), "cycle-256": ("#00533d", "2"),
    "cycle-t4": ("#e69f00", "^"), "cycle-t8": ("#b8860b", "<"), "cycle-two": ("#0072b2", "o"),
    "cycle-last": ("#56b4e9", "X"), "near-far-t4": ("#d55e00", "P"),
}  # fmt: skip
"""Colour and marker of a kind, the same in every figure; variants have one of their own, where no kind has one."""
VARIANTS_PICTURE = "variants"


def draw_pictures(results: Results, folder: Path) -> list[Path]:
    """Draws a PNG for each task that has results, and one for the variants; returns their paths."""
    pictures = {task: (KINDS, task, TASKS[task].title) for task in TASKS}
    cycle = {"cycle": KINDS["cycle"]}
    pictures[VARIANTS_PICTURE] = (cycle | VARIANTS, VARIANT_TASK, f"{TASKS[VARIANT_TASK].title}: variants")
    paths = []
    for name, (kinds, task, title) in pictures.items():
        runs = {kind: figures.of_kind(results, task, kind) for kind in kinds}
        if any(runs[kind] for kind in runs if kind != "cycle" or name != VARIANTS_PICTURE):
            lines = {kinds[kind]: (kind, of_kind) for kind, of_kind in runs.items() if of_kind}
            shorter = {kind: figures.of_kind(results, task, kind, "time") for kind in kinds}
            paths.append(folder / f"{name}.png")
            _draw(paths[-1], lines, title, shorter)
    return paths


@quiet_matplotlib()
def _draw(
    path: Path, lines: Mapping[Kind, tuple[str, Sequence[Result]]], title: str, shorter: Mapping[str, Sequence[Result]]
) -> None:
    """Draws the curves of a task twice: equal updates stand above each other on the left, equal times on the right."""
    # The Figure class directly: pyplot would look for a display and keep global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.9), dpi=90, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for kind, (name, runs) in lines.items():
        for axes, key in ((left, "step"), (right, "seconds")):
            _draw_kind(axes, name, kind.title, runs, key)
    for name, runs in shorter.items():
        if runs:
            _draw_kind(right, name, f"{KINDS[name].title}, in the time of the cycle", runs, "seconds", dashed=True)
    left.set(xlabel="updates", ylabel="accuracy on valid, hidden residues")
    right.set(xlabel="CPU seconds of training, one thread")
    if any(shorter.values()):
        handles, _ = right.get_legend_handles_labels()
        right.legend(handles=handles[len(lines) :], fontsize=8, framealpha=0.9)
    for axes in (left, right):
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    left.legend(fontsize=8, framealpha=0.9)
    figure.suptitle(title, fontsize=10.5)
    with files.written_whole(path) as partial:
        figure.savefig(partial, format="png")


def _draw_kind(axes: "Axes", name: str, label: str, runs: Sequence[Result], key: str, *, dashed: bool = False) -> None:
    """Draws the mean of the seeds, and each seed thinly."""
    color, marker = _MARKS[name]
    style = "dashed" if dashed else "solid"
    seeds = [np.array([[point[key], point["accuracy"]] for point in run["curve"]]) for run in runs]
    if len(seeds) > 1:
        for seed in seeds:
            axes.plot(*seed.T, color=color, linewidth=0.7, alpha=0.35, linestyle=style)
    mean = np.mean(seeds, axis=0)
    axes.plot(*mean.T, color=color, marker=marker, markersize=4, linewidth=1.6, linestyle=style, label=label)
