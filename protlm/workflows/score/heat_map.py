"""The picture of a deep mutational scan: positions × residues, folded into bands that fit a page."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from protlm.inference.blosum import STANDARD_RESIDUES
from protlm.workflows.pages.figures import heat_map, save
from protlm.workflows.pages.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_NOTHING = "#8a8f98"
"""Where there is no score: a grey far from both colours of the scale."""
MOST_POSITIONS = 5000
"""The longest protein that is drawn: fifty bands."""

_BAND = 100
"""Positions of a band."""

_GROUPS = ["AVILMFYW", "CGP", "STNQ", "HKR", "DE"]
"""The residues from the top, those alike side by side: hydrophobic, special, polar, basic, acidic."""

_ROWS = "".join(_GROUPS)
_CLIPPED_SHARE = 0.98
_CELL_INCHES = 0.125
_MOST_ID_LETTERS = 60


def draw_heat_map(path: Path, scores: np.ndarray, protein: str, *, title: str, offset: int) -> None:
    """Draws the scores of all single substitutions into a file.

    The wild type is marked by a dot, and its letters stand above each band. White is as likely as the wild type, blue
    likelier, orange less likely, grey what has no score. The few most extreme scores share the last colour.

    Args:
        path: The file, .png or .svg.
        scores: (num_residues, 20), in the order of `STANDARD_RESIDUES`; NaN where there is none.
        protein: The residues of the wild type.
        title: The title.
        offset: Added to a position from 1 it gives the number that is shown.
    """
    order = [STANDARD_RESIDUES.index(letter) for letter in _ROWS]
    values = scores[:, order].T.copy()
    for position, letter in enumerate(protein):
        if letter in _ROWS:
            values[_ROWS.index(letter), position] = 0.0
    strengths = np.abs(scores[~np.isnan(scores)])
    limit = float(np.quantile(strengths, _CLIPPED_SHARE)) if len(strengths) and strengths.any() else 1.0
    num_positions = values.shape[1]
    columns = min(_BAND, num_positions)
    num_bands = -(-num_positions // columns)
    height = 1.2 + num_bands * (len(_ROWS) * _CELL_INCHES + 0.65)

    def plot(figure: "Figure") -> None:
        bands = figure.subplots(num_bands, squeeze=False)[:, 0]
        starts = range(0, num_positions, columns)
        stretches = [slice(start, start + columns) for start in starts]
        images = [
            _draw_band(axes, values[:, stretch], protein[stretch], start + 1 + offset, columns, limit)
            for axes, start, stretch in zip(bands, starts, stretches, strict=True)
        ]
        # A dollar sign would begin a formula.
        figure.suptitle(title, fontsize=10, parse_math=False)
        bar = figure.colorbar(
            images[0], ax=list(bands), location="top", extend="both", shrink=min(1.0, 60 / columns), aspect=45,
            fraction=0.3 / height, pad=0.1 / height,
            label="score: below 0 less likely than the wild type (dot), above 0 likelier",
        )  # fmt: skip
        bar.outline.set_visible(False)

    save(plot, path, width=max(6.0, columns * _CELL_INCHES + 1.0), height=height)


def printable(record_id: str) -> str:
    """Returns an id as a title shows it: fitting the narrowest picture, of characters that every font has."""
    text = "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in record_id)
    return text if len(text) <= _MOST_ID_LETTERS else text[: _MOST_ID_LETTERS - 3] + "..."


def _draw_band(axes: "Axes", values: np.ndarray, protein: str, first: int, columns: int, limit: float) -> "AxesImage":
    """Draws consecutive positions, the first of which has the number `first`."""
    num_rows, num_positions = values.shape
    axes.grid(visible=False)
    colors = heat_map(diverging=True).with_extremes(bad=_NOTHING)
    image = axes.imshow(
        np.ma.masked_invalid(values), cmap=colors, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest",
        extent=(first - 0.5, first + num_positions - 0.5, num_rows - 0.5, -0.5),
    )  # fmt: skip
    axes.set_xlim(first - 0.5, first + columns - 0.5)
    numbers = np.arange(first, first + num_positions)
    rows = [_ROWS.find(letter) for letter in protein]
    known = [place for place, row in enumerate(rows) if row >= 0]
    axes.scatter(numbers[known], [rows[place] for place in known], s=5, color=LIGHT["ink"], linewidths=0)
    for number, letter in zip(numbers.tolist(), protein, strict=True):
        axes.text(number, -0.8, letter, fontsize=6.5, ha="center", va="bottom", color=LIGHT["ink"])
    axes.set_yticks(range(num_rows), list(_ROWS), fontsize=6.5)
    ticks: list[Any] = [number for number in numbers.tolist() if number % 10 == 0 or number == first]
    axes.set_xticks(ticks, [f"{number}" for number in ticks])
    axes.tick_params(length=0, pad=2)
    for spine in axes.spines.values():
        spine.set_visible(False)
    edge = -0.5
    for group in _GROUPS[:-1]:
        edge += len(group)
        axes.axhline(edge, color=LIGHT["page"], linewidth=1.2)
    return image
