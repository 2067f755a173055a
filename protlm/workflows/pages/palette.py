"""The colours of pages and figures: hides their values in light and dark, and keeps one meaning to a colour.

A split, a model or a baseline has a colour, and a line style, marker or hatching that distinguishes it without colour.
Neighbours differ for readers with any kind of colour blindness; a test computes by how much.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from protlm.choices import SplitName

NUM_LEVELS = 17
"""Levels of a colour scale; odd, so that a diverging scale has a middle."""


def _scale(name: str, low: str, middle: str, high: str) -> dict[str, str]:
    """Returns the levels of a colour scale by role, in even steps from `low` through `middle` to `high`."""

    def channels(color: str) -> list[int]:
        return [int(color[place : place + 2], 16) for place in (1, 3, 5)]

    half = NUM_LEVELS // 2
    roles = {}
    for level in range(NUM_LEVELS):
        first, second = (low, middle) if level < half else (middle, high)
        share = (level % half or half * (level == NUM_LEVELS - 1)) / half
        mixed = [round(a + share * (b - a)) for a, b in zip(channels(first), channels(second), strict=True)]
        roles[f"{name}-{level}"] = "#" + "".join(f"{channel:02x}" for channel in mixed)
    return roles


# No level of a scale is so strong that the ink of the page could not be read on it.
LIGHT = {
    "page": "#ffffff", "ink": "#1c2430", "soft": "#586372", "rule": "#d8dee6", "link": "#1f5fae", "warning": "#fff3d1",
    "all": "#46536a", "baseline": "#8691a0",
    "train": "#3746b5", "valid": "#c03722", "test": "#139e6e", "ood": "#a169e2",
    "model-1": "#b67d00", "model-2": "#4a788d", "model-3": "#703053", "model-4": "#174400",
    **_scale("heat", "#f4f7fb", "#aeccef", "#69a3e4"), **_scale("balance", "#e8965a", "#f5f5f4", "#6aa4e5"),
}  # fmt: skip
"""The colour of each role on a light page and on paper, by which matplotlib draws it."""

DARK = {
    "page": "#14181f", "ink": "#e4e9f0", "soft": "#a3aebc", "rule": "#363f4c", "link": "#8ab8f5", "warning": "#40361a",
    "all": "#b9c5d6", "baseline": "#78838f",
    "train": "#5585f2", "valid": "#ea6320", "test": "#3cbc9c", "ood": "#b69bf8",
    "model-1": "#faa93d", "model-2": "#67def9", "model-3": "#c4589d", "model-4": "#d3f498",
    **_scale("heat", "#1b212b", "#20416c", "#2a62ab"), **_scale("balance", "#8f4a17", "#1e232b", "#2a62ac"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mark:
    """How a split, model or baseline is drawn in every figure.

    Attributes:
        role: Its colour, a key of `LIGHT` and `DARK`.
        dash: The line style in the form of matplotlib.
        marker: The marker of its points.
        hatch: The hatching of its bars.
    """

    role: str
    dash: Any
    marker: str
    hatch: str

    @property
    def color(self) -> str:
        """The colour on a light page; on a page, a figure has it in the reader's mode."""
        return LIGHT[self.role]

    @property
    def line(self) -> dict[str, Any]:
        """The arguments of matplotlib for a line."""
        return {"color": self.color, "linestyle": self.dash}

    @property
    def points(self) -> dict[str, Any]:
        """The arguments of matplotlib for points or error bars, without a line between them."""
        return {"color": self.color, "linestyle": "none", "marker": self.marker}

    @property
    def bars(self) -> dict[str, Any]:
        """The arguments of matplotlib for bars."""
        return {"facecolor": self.color, "edgecolor": LIGHT["page"], "linewidth": 0.0, "hatch": self.hatch}


SPLIT_MARKS: Mapping[SplitName, Mark] = {
    "train": Mark("train", "solid", "o", ""),
    "valid": Mark("valid", (0, (6, 2)), "s", "///"),
    "test": Mark("test", (0, (2, 1.5)), "^", "..."),
    "ood": Mark("ood", (0, (7, 2, 1.5, 2)), "D", "\\\\\\"),
}

MODEL_MARKS = (
    Mark("model-1", "solid", "o", ""),
    Mark("model-2", (0, (6, 2)), "s", "///"),
    Mark("model-3", (0, (2, 1.5)), "^", "..."),
    Mark("model-4", (0, (7, 2, 1.5, 2)), "D", "\\\\\\"),
)
"""The models of a comparison, in order; a figure of more of them could not be read."""

BASELINE_MARKS = (
    Mark("baseline", (0, (1, 2)), "x", ""),
    Mark("baseline", (0, (4, 3)), "+", "---"),
    Mark("baseline", (0, (8, 2)), "1", "xxx"),
    Mark("baseline", (0, (5, 2, 1, 2)), "2", "|||"),
)
"""Baselines and references are grey; their dashes, hatching and labels distinguish them."""

ALL_MARK = Mark("all", "solid", "o", "")
"""Everything together, or the only series of a figure."""
