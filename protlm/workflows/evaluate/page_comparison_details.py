"""The sections of a comparison that say where the models differ: by length, by residue, and in how sure they are."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from protlm.choices import SplitName
from protlm.vocabulary import RESIDUES
from protlm.workflows.evaluate.breakdowns import LENGTH_BIN_NAMES
from protlm.workflows.evaluate.comparison import Comparison, different_names
from protlm.workflows.evaluate.page_details import CHEMISTRY
from protlm.workflows.evaluate.saved_report import BreakdownRow, SavedSplit
from protlm.workflows.pages.figures import draw
from protlm.workflows.pages.log_axis import set_log_scale
from protlm.workflows.pages.page import Block, Figure, Section, Table, Text
from protlm.workflows.pages.palette import BASELINE_MARKS, MODEL_MARKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

_FEWEST_SHOWN = 20
"""Residues in a bin below which its score is noise."""
_MOST_LABEL_LETTERS = 24
_FEWEST_TIMES = 1.5
"""From the lower to the upper end of an axis of perplexity, so that a small difference looks small."""
_RARE = "".join(letter for letter in RESIDUES if letter not in CHEMISTRY)


def short_names(names: Sequence[str]) -> list[str]:
    """Returns the names as a figure has room for them, all different."""
    half = _MOST_LABEL_LETTERS // 2
    return different_names([name if len(name) <= 2 * half else f"{name[: half - 1]}…{name[-half:]}" for name in names])


def lengths_section(comparison: Comparison) -> Section:
    """Returns the perplexity by length of the protein, a figure for each split."""
    figures = [_breakdown_figure(comparison, split, "lengths", LENGTH_BIN_NAMES) for split in comparison.splits]
    return Section("lengths", "By length of the protein", [*_notes(comparison), *figures])


def residues_section(comparison: Comparison) -> Section:
    """Returns the perplexity by true residue, a figure for each split."""
    figures = [_breakdown_figure(comparison, split, "residues", CHEMISTRY + _RARE) for split in comparison.splits]
    return Section("residues", "By residue", [*_notes(comparison), *figures])


def calibration_section(comparison: Comparison) -> Section:
    """Returns the calibration curves, a figure for each split."""
    figures = [_calibration_figure(comparison, split) for split in comparison.splits]
    return Section("calibration", "Which is as sure as it should be?", [*_drawn_note(comparison), *figures])


def _notes(comparison: Comparison) -> list[Block]:
    text = "These scores have no intervals: where few residues were scored, differences are mostly chance."
    return [Text(text, soft=True), *_drawn_note(comparison)]


def _drawn_note(comparison: Comparison) -> list[Block]:
    if len(comparison.names) <= len(MODEL_MARKS):
        return []
    return [Text(f"The figures show the first {len(MODEL_MARKS)} models, the tables below them all.", soft=True)]


def _models_on(comparison: Comparison, split: SplitName) -> dict[str, SavedSplit]:
    return {name: report.splits[split] for name, report in zip(comparison.names, comparison.reports, strict=True)}


def _breakdown_figure(
    comparison: Comparison, split: SplitName, key: Literal["lengths", "residues"], order: Sequence[str]
) -> Block:
    groups = {
        name: {row.name: row for row in getattr(measured.breakdowns, key)}
        for name, measured in _models_on(comparison, split).items()
    }
    shown = [name for name in order if any(name in rows for rows in groups.values())]
    what = "length of the protein, residues" if key == "lengths" else "true residue, ordered by chemistry"

    def plot(figure: "Drawing") -> None:
        axes = figure.subplots()
        drawn = list(zip(short_names(comparison.names), groups.values(), MODEL_MARKS, strict=False))
        for number, (name, rows, mark) in enumerate(drawn):
            points = [
                (place, rows[group].perplexity)
                for place, group in enumerate(shown)
                if group in rows and rows[group].perplexity is not None
            ]
            # Residues have no order that a line could follow; their points stand side by side.
            shift = 0.0 if key == "lengths" else (number - (len(drawn) - 1) / 2) * 0.6 / len(drawn)
            style = {**mark.points, **(mark.line if key == "lengths" else {})}
            axes.plot([place + shift for place, _ in points], [value for _, value in points], label=name, **style)
        axes.set_xticks(range(len(shown)), shown, rotation=30 if key == "lengths" else 0)
        axes.set(xlabel=what, ylabel=f"perplexity on {split} (log scale)")
        values = [value for line in axes.lines for value in np.ravel(line.get_ydata())]
        if values:
            middle = (math.log(min(values)) + math.log(max(values))) / 2
            reach = max(0.55 * (math.log(max(values)) - math.log(min(values))), math.log(_FEWEST_TIMES) / 2)
            axes.set_ylim(math.exp(middle - reach), math.exp(middle + reach))
            set_log_scale(axes, "y")
        if key == "residues":
            for place in range(1, len(shown)):
                axes.axvline(place - 0.5, linewidth=0.4, color=BASELINE_MARKS[0].color, alpha=0.5)
        figure.legend(loc="outside upper left", ncols=2)

    names = comparison.names
    scores = [f"{name}, {metric}" for metric in ("perplexity", "accuracy") for name in names]
    header = [what.partition(",")[0], "scored", *scores]
    rows = [[group, *_cells([groups[name].get(group) for name in names])] for group in shown]
    label = f"Perplexity by {'length' if key == 'lengths' else 'residue'} on {split}"
    return Figure(draw(plot, label, height=3.2), _gap_sentence(split, shown, groups), Table(header, rows))


def _cells(rows: Sequence[BreakdownRow | None]) -> list[str]:
    """Returns the scored residues of a group, then the perplexity and the accuracy of each model."""
    num_targets = max(row.num_targets for row in rows if row is not None)
    perplexities = ["–" if row is None or row.perplexity is None else f"{row.perplexity:.2f}" for row in rows]
    return [f"{num_targets:,}", *perplexities, *("–" if row is None else f"{row.accuracy:.3f}" for row in rows)]


def _gap_sentence(split: str, shown: Sequence[str], groups: Mapping[str, Mapping[str, BreakdownRow]]) -> str:
    """Returns where the best and the worst of the models are furthest from each other, in bits."""
    gaps = []
    for place, group in enumerate(shown):
        rows = [(rows[group], name) for name, rows in groups.items() if group in rows]
        values = [(row.perplexity, name) for row, name in rows if row.perplexity and row.num_targets >= _FEWEST_SHOWN]
        if len(values) > 1:
            (best, best_name), (worst, worst_name) = min(values), max(values)
            words = f"{best:.2f} of {best_name} against {worst:.2f} of {worst_name}"
            gaps.append((math.log2(worst) - math.log2(best), -place, words))
    if not gaps:
        return f"On {split} no group has the {_FEWEST_SHOWN} scored residues that would tell the models apart."
    bits, place, words = max(gaps)
    if bits == 0:
        return f"On {split} the models have the same perplexity in every group."
    return f"On {split} the models differ most at {shown[-place]}: perplexity {words}, {bits:.2f} bits per residue."


def _calibration_figure(comparison: Comparison, split: SplitName) -> Block:
    models = _models_on(comparison, split)

    def plot(figure: "Drawing") -> None:
        axes = figure.subplots()
        ends = [0.25]
        for name, measured, mark in zip(short_names(list(models)), models.values(), MODEL_MARKS, strict=False):
            points = [
                (bin_.confidence, bin_.accuracy)
                for bin_ in measured.calibration
                if bin_.num_targets >= _FEWEST_SHOWN and bin_.confidence is not None
            ]
            axes.plot([x for x, _ in points], [y for _, y in points], label=name, marker=mark.marker, **mark.line)
            ends += [max(point) for point in points]
        axes.plot([0, 1], [0, 1], label="right as often as it says", **BASELINE_MARKS[1].line)
        # Models that are never sure would fill a corner of the whole range.
        reach = min(1.0, 0.05 + max(ends))
        axes.set(xlabel="probability of the most probable residue", ylabel=f"fraction correct on {split}")
        axes.set(xlim=(0, reach), ylim=(0, reach))
        figure.legend(loc="outside upper left", ncols=2)

    rows = [
        (name, f"{bin_.low:.2f}", f"{bin_.num_targets:,}", "–" if bin_.confidence is None else f"{bin_.confidence:.3f}",
         f"{bin_.accuracy:.3f}")
        for name, measured in models.items()
        for bin_ in measured.calibration
    ]  # fmt: skip
    data = Table(("model", "bin from", "residues", "mean probability", "fraction correct"), rows)
    drawn = list(models.items())[: len(MODEL_MARKS)]
    reading = f"On {split} " + ", ".join(f"{name} is {_lean_words(measured)}" for name, measured in drawn) + "."
    return Figure(draw(plot, f"Calibration on {split}: fraction correct by probability", height=3.4), reading, data)


def _lean_words(measured: SavedSplit) -> str:
    lean = sum(bin_.num_targets * ((bin_.confidence or 0.0) - bin_.accuracy) for bin_ in measured.calibration)
    lean /= measured.num_targets
    if abs(lean) < 0.01:
        return f"about as sure as it should be ({lean:+.3f} on average)"
    return f"{'too sure' if lean > 0 else 'not sure enough'} ({lean:+.3f} on average)"
