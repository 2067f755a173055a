"""The figures of what_trains.md: curves of every kind on a task, against updates and against processor time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from protlm import files
from protlm.workflows.pages.figures import quiet_matplotlib
from scripts.experiments import results as figures
from scripts.experiments.plan import CYCLE, KINDS, VARIANT_TASK, VARIANTS, Result, Results
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


@dataclass(frozen=True)
class Picture:
    """A picture that is due.

    Attributes:
        title: Above it.
        lines: The runs of each kind, by its name.
        shorter: Runs of the same kinds at equal time.
    """

    title: str
    lines: Mapping[str, Sequence[Result]]
    shorter: Mapping[str, Sequence[Result]]


def planned_pictures(results: Results) -> dict[str, Picture]:
    """Returns a picture for each task that has results, and one of the variants if there are any, by their names."""
    pictures = {}
    for name, task, kinds in (*((task, task, KINDS) for task in TASKS), ("variants", VARIANT_TASK, VARIANTS)):
        lines = {kind: figures.of_kind(results, task, kind) for kind in kinds}
        if any(lines.values()):
            title = TASKS[task].title
            if kinds is VARIANTS:
                lines = {CYCLE: figures.of_kind(results, task, CYCLE), **lines}
                title += ": variants of the cycle"
            shorter = {kind: figures.of_kind(results, task, kind, "time") for kind in kinds}
            pictures[name] = Picture(title, *({k: runs for k, runs in of.items() if runs} for of in (lines, shorter)))
    return pictures


def draw_pictures(results: Results, folder: Path) -> list[Path]:
    """Draws the pictures of these results as PNG files in a folder, and returns their paths."""
    paths = []
    for name, picture in planned_pictures(results).items():
        paths.append(folder / f"{name}.png")
        _draw(paths[-1], picture)
    return paths


@quiet_matplotlib()
def _draw(path: Path, picture: Picture) -> None:
    """Draws the curves of a task twice: equal updates stand above each other on the left, equal times on the right."""
    # The Figure class directly: pyplot would look for a display and keep global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.9), dpi=90, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for kind, runs in picture.lines.items():
        for axes, key in ((left, "step"), (right, "seconds")):
            _draw_kind(axes, kind, runs, key)
    for kind, runs in picture.shorter.items():
        _draw_kind(right, kind, runs, "seconds", dashed=True)
    left.set(xlabel="updates", ylabel="accuracy on valid, hidden residues", title="by updates")
    right.set(xlabel="CPU seconds of training, one thread", title="by time")
    if picture.shorter:
        handles, _ = right.get_legend_handles_labels()
        right.legend(handles=handles[len(picture.lines) :], fontsize=8, framealpha=0.9)
    for axes in (left, right):
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.title.set_fontsize(9)
    left.legend(fontsize=8, framealpha=0.9)
    figure.suptitle(picture.title, fontsize=10.5)
    with files.written_whole(path) as partial:
        figure.savefig(partial, format="png")


def _draw_kind(axes: "Axes", kind: str, runs: Sequence[Result], key: str, *, dashed: bool = False) -> None:
    """Draws the mean of the seeds, and each seed thinly; dashed where the runs end at the time of the cycle."""
    color, marker = _MARKS[kind]
    style = "dashed" if dashed else "solid"
    label = (KINDS | VARIANTS)[kind].title + (", in the time of the cycle" if dashed else "")
    curves = [
        {name: np.array([point[name] for point in run["curve"]]) for name in (key, "step", "accuracy")} for run in runs
    ]
    if len(curves) > 1:
        for curve in curves:
            axes.plot(curve[key], curve["accuracy"], color=color, linewidth=0.7, alpha=0.35, linestyle=style)
    # At the same shares of a run: at equal time, seeds differ in their numbers of updates.
    shares = curves[0]["step"] / curves[0]["step"][-1]
    mean = [
        np.mean([np.interp(shares, curve["step"] / curve["step"][-1], curve[name]) for curve in curves], axis=0)
        for name in (key, "accuracy")
    ]
    axes.plot(*mean, color=color, marker=marker, markersize=4, linewidth=1.6, linestyle=style, label=label)
