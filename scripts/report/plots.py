"""The figures of measurements of the attention: one meaning to each colour and line style, in every figure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from protlm.ops import compiled
from protlm.runtime.devices import processor_name
from protlm.workflows.pages.log_axis import set_log_scale

SUBJECTS = {
    "positive": ("#0072b2", "o"),
    "hyperbolic": ("#cc79a7", "P"),
    "oprf": ("#009e73", "^"),
    "trig": ("#d55e00", "s"),
    "relu": ("#56b4e9", "X"),
    "near-far": ("#882255", "d"),
    "exact": ("#5b2a86", "D"),
    "formed": ("#b8860b", "v"),
    "peer": ("#e69f00", "*"),
    "relu peer": ("#8c510a", "h"),
    "reference": ("#808080", ""),
}
"""Colour and marker of a feature map; of FAVOR with exact near weights; of exact attention, by a fused kernel and with
its matrix formed; of another library; of a line that is no measurement of ours."""

DASHES: Mapping[str, Any] = {
    "orthogonal": "solid", "iid": (0, (5, 2)), "simplex": (0, (1, 1)),
    "bidirectional": "solid", "causal": (0, (6, 2, 1, 2)),
    "torch": (0, (3, 1, 1, 1, 1, 1)), "formula": (0, (3, 1.5)), "compiled formula": (0, (4, 1.5, 1, 1.5)),
    "reference": (0, (1, 3)),
}  # fmt: skip
"""Line style of a kind of projection; of attention to all tokens or to earlier ones; of other ways than our fastest to
the same output; of a line that is no measurement of ours."""


@dataclass(frozen=True)
class Line:
    """One curve of a plot.

    Attributes:
        label: In the legend.
        x: Along the axis.
        y: Values.
        subject: What is measured, a key of `SUBJECTS`.
        kind: Which kind of it, a key of `DASHES`.
        spread: Half the height of a bar at each point.
        width: Of the line, in points.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    subject: str
    kind: str
    spread: Sequence[float] | None = None
    width: float = 1.6


def backend_of(dtype: torch.dtype) -> str:
    """Returns the backend that `favor_attention` chooses on this CPU, and the instructions of a compiled one."""
    if dtype == torch.float32 and compiled.why_not() is None:
        return f"cpp ({compiled.best_kernel()})"
    return "torch"


def conditions(dtype: torch.dtype) -> str:
    """Returns a line for the foot of a figure: machine, threads, precision, backend and version of torch."""
    threads = torch.get_num_threads()
    return (
        f"{processor_name()}, {threads} thread{'s' * (threads > 1)}; {str(dtype).removeprefix('torch.')}, "
        f"FAVOR by backend {backend_of(dtype)}; torch {torch.__version__}"
    )


def plot(
    path: Path, lines: Sequence[Line], *, x_label: str, y_label: str, title: str, foot: str, x_log: bool = True,
    y_log: bool = True, x_ticks: Mapping[float, str] | None = None, legend_above: bool = False,
) -> None:  # fmt: skip
    """Writes a PNG of curves, with a line on how it was made at its foot."""
    # The figure class is used directly: pyplot would look for a display and keep global state.
    figure = Figure(figsize=(7.5, 5), dpi=100, layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.035, 1, 0.965))
    axes = figure.add_subplot()
    for line in lines:
        color, marker = SUBJECTS[line.subject]
        options = {
            "color": color, "marker": marker, "linestyle": DASHES[line.kind], "label": line.label,
            "markersize": 3.5 + line.width, "linewidth": line.width,
            "markerfacecolor": color if DASHES[line.kind] == "solid" else "white",
        }  # fmt: skip
        if line.spread is None:
            axes.plot(line.x, line.y, **options)
        else:
            axes.errorbar(line.x, line.y, yerr=line.spread, capsize=3, **options)
    if x_log:
        axes.set_xscale("log", base=2)
    if y_log:
        set_log_scale(axes, "y")
    if x_ticks is not None:
        axes.set_xticks(list(x_ticks), list(x_ticks.values()))
        axes.minorticks_off()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=10.5)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    if legend_above:
        figure.legend(fontsize=8.5, handlelength=3.2, ncols=2, loc="outside upper center")
    else:
        axes.legend(fontsize=8.5, framealpha=0.9, handlelength=3.2)
    figure.text(0.99, 0.008, foot, ha="right", va="bottom", fontsize=7, color="#555555")
    figure.savefig(path)
