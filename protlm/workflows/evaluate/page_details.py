"""The sections of a report that say where a model is good: by residue, length, position and label."""

from typing import TYPE_CHECKING, Any

import numpy as np

from protlm.choices import SplitName
from protlm.workflows.evaluate.page_numbers import span, with_interval
from protlm.workflows.evaluate.report import EvalReport
from protlm.workflows.pages.figures import draw, matrix
from protlm.workflows.pages.page import Block, ColumnKind, Figure, Section, Table
from protlm.workflows.pages.palette import BASELINE_MARKS, LIGHT, SPLIT_MARKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

CHEMISTRY = "AVLIMFWYCGPSTNQHKRDE"
"""The standard residues: aliphatic, aromatic, special, polar, basic, acidic."""

_SHOWN_LABELS = 30
_FEWEST_SHOWN = 20
"""Residues in a bin below which its fraction is noise."""
_MOST_LEVEL_NAMES = 6
"""Names of bins that stand beside each other; more are turned."""
_KINDS: tuple[ColumnKind, ...] = ("text", "text", "number", "number", "number")


def calibration_section(report: EvalReport) -> Section:
    """Returns the calibration curve: how often the model is right, by how sure it is."""

    def plot(figure: "Drawing") -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], label="right as often as it says", **BASELINE_MARKS[1].line)
        for name, split in report.splits.items():
            points = [
                (row["confidence"], row["accuracy"]) for row in split.calibration if row["num_targets"] >= _FEWEST_SHOWN
            ]
            axes.plot(*np.array(points).reshape(-1, 2).T, label=name, marker=_mark(name).marker, clip_on=False,
                      **_mark(name).line)  # fmt: skip
        axes.set(xlabel="probability of the most probable residue", ylabel="fraction correct", xlim=(0, 1), ylim=(0, 1))
        figure.legend(loc="outside upper left", ncols=2)

    rows = [
        (name, f"{row['low']:.2f}", f"{row['num_targets']:,}", f"{row['confidence']:.3f}", f"{row['accuracy']:.3f}")
        for name, split in report.splits.items()
        for row in split.calibration
    ]
    first = next(iter(report.splits.values()))
    gap = sum(row["num_targets"] * (row["confidence"] - row["accuracy"]) for row in first.calibration)
    lean = gap / first.num_targets
    words = "about as sure as it should be" if abs(lean) < 0.01 else "too sure" if lean > 0 else "not sure enough"
    data = Table(("split", "bin from", "residues", "mean probability", "fraction correct"), rows)
    reading = f"On {report.split} the model is {words}: {lean:+.3f} on average."
    drawing = draw(plot, "Calibration: fraction correct by probability", height=3.4)
    return Section("calibration", "Is it as sure as it should be?", [Figure(drawing, reading, data)])


def residues_section(report: EvalReport) -> Section:
    """Returns the scores by residue, the confusion of residues, and what it has to do with BLOSUM62."""
    split = next(iter(report.splits.values()))
    confusion = split.breakdowns["confusion"]
    probabilities = by_chemistry(np.array(confusion["mean_probabilities"]), confusion["residues"])
    blocks: list[Block] = [_residue_figure(report), _confusion_figure(report.split, probabilities)]
    if split.breakdowns["substitutions"] is not None:
        blocks.append(_substitution_figure(report.split, split.breakdowns["substitutions"]))
    return Section("residues", "Which residues?", blocks)


def by_chemistry(values: "np.ndarray[Any, Any]", residues: str) -> "np.ndarray[Any, Any]":
    """Returns a matrix of residues by residues with those of `CHEMISTRY`, in that order."""
    order = [residues.index(letter) for letter in CHEMISTRY]
    ordered: np.ndarray[Any, Any] = values[np.ix_(order, order)]
    return ordered


def agreement_words(agreement: dict[str, Any]) -> str:
    """Returns the agreement of a similarity of residues with BLOSUM62 as a sentence."""
    pearson, spearman = (
        "unknown" if agreement[key] is None else f"{agreement[key]:+.2f}".replace("-", "−")
        for key in ("pearson", "spearman")
    )
    return (
        f"Over the {agreement['num_pairs']} pairs of different residues it agrees with BLOSUM62 by Pearson {pearson} "
        f"and Spearman {spearman} (1 is full agreement, 0 none)."
    )


def _residue_figure(report: EvalReport) -> Block:
    def plot(figure: "Drawing") -> None:
        axes = figure.subplots()
        width = 0.8 / len(report.splits)
        for number, (name, split) in enumerate(report.splits.items()):
            of_letter = {row["name"]: row for row in split.breakdowns["residues"] if row["name"] in CHEMISTRY}
            places = [CHEMISTRY.index(letter) + (number - (len(report.splits) - 1) / 2) * width for letter in of_letter]
            heights = [row["accuracy"] for row in of_letter.values()]
            spans = np.array([span(row, "accuracy") for row in of_letter.values()])
            axes.bar(places, heights, width, label=name, **_mark(name).bars)
            axes.errorbar(
                places, heights, yerr=spans.T, linestyle="none", color=LIGHT["ink"], elinewidth=0.8, capsize=0
            )
        axes.set_xticks(range(len(CHEMISTRY)), list(CHEMISTRY))
        axes.set(xlabel="true residue, ordered by chemistry", ylabel="accuracy, 95 % interval")
        figure.legend(loc="outside upper left", ncols=4)

    rows = [
        (name, row["name"], f"{row['num_targets']:,}", with_interval(row, "accuracy"), with_interval(row, "perplexity"))
        for name, split in report.splits.items()
        for row in split.breakdowns["residues"]
    ]
    best = max(next(iter(report.splits.values())).breakdowns["residues"], key=lambda row: row["accuracy"])
    reading = f"On {report.split} the model is right most often about {best['name']} ({best['accuracy']:.2f})."
    data = Table(("split", "residue", "scored", "accuracy", "perplexity"), rows, _KINDS)
    return Figure(draw(plot, "Accuracy by residue"), reading, data)


def _confusion_figure(name: str, probabilities: "np.ndarray[Any, Any]") -> Block:
    def plot(figure: "Drawing") -> None:
        axes: Axes = figure.subplots()
        matrix(axes, probabilities, list(CHEMISTRY), list(CHEMISTRY), label="mean probability")
        axes.set(xlabel="predicted residue", ylabel="true residue")

    others = probabilities.copy()
    np.fill_diagonal(others, 0)
    true, predicted = np.unravel_index(int(others.argmax()), others.shape)
    reading = (
        f"The mean prediction for each true residue on {name}. The strongest mistake is {CHEMISTRY[predicted]} where "
        f"{CHEMISTRY[true]} stands, with a mean probability of {others.max():.2f}."
    )
    rows = [
        (letter, *(f"{value:.3f}" for value in line)) for letter, line in zip(CHEMISTRY, probabilities, strict=True)
    ]
    data = Table(("true", *CHEMISTRY), rows)
    return Figure(draw(plot, "Mean predicted probability by true residue", height=4.6), reading, data)


def _substitution_figure(name: str, substitutions: dict[str, Any]) -> Block:
    shown = by_chemistry(np.array(substitutions["log_odds"]), substitutions["residues"])
    np.fill_diagonal(shown, np.nan)

    def plot(figure: "Drawing") -> None:
        axes: Axes = figure.subplots()
        matrix(axes, shown, list(CHEMISTRY), list(CHEMISTRY), label="log-odds, bits", diverging=True)
        axes.set(xlabel="residue", ylabel="residue")

    reading = (
        f"Which residues the model takes for each other on {name}: blue more often than by chance, orange less. "
        f"{agreement_words(substitutions['blosum62'])}"
    )
    rows = [
        (letter, *("" if np.isnan(value) else f"{value:+.2f}" for value in line))
        for letter, line in zip(CHEMISTRY, shown, strict=True)
    ]
    return Figure(draw(plot, "Substitution log-odds", height=4.6), reading, Table(("", *CHEMISTRY), rows))


def lengths_section(report: EvalReport) -> Section:
    """Returns the scores by length of the protein and by distance from either end."""
    blocks = [
        _binned_figure(report, "lengths", "length of the protein, residues", "in proteins of {} residues"),
        _binned_figure(
            report, "from_n_terminus", "residues from the N-terminus", "at a distance of {} from the N-terminus"
        ),
        _binned_figure(
            report, "from_c_terminus", "residues from the C-terminus", "at a distance of {} from the C-terminus"
        ),
    ]
    return Section("lengths", "Which proteins, and where in them?", blocks)


def _binned_figure(report: EvalReport, key: str, axis: str, place: str) -> Block:
    names = list(dict.fromkeys(row["name"] for split in report.splits.values() for row in split.breakdowns[key]))
    names.sort(key=lambda name: int(name.rstrip("+").partition("-")[0]))

    def plot(figure: "Drawing") -> None:
        axes = figure.subplots()
        for number, (name, split) in enumerate(report.splits.items()):
            rows = [row for row in split.breakdowns[key] if np.isfinite(row["perplexity"])]
            # Beside each other, so that no interval hides another.
            places = [names.index(row["name"]) + 0.12 * (number - (len(report.splits) - 1) / 2) for row in rows]
            spans = np.array([span(row, "perplexity") for row in rows]).reshape(-1, 2)
            axes.errorbar(places, [row["perplexity"] for row in rows], yerr=spans.T, label=name, elinewidth=1,
                          marker=_mark(name).marker, **_mark(name).line)  # fmt: skip
        axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > _MOST_LEVEL_NAMES else 0)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set(xlabel=axis, ylabel="perplexity, 95 % interval")
        figure.legend(loc="outside upper left", ncols=4)

    rows = [
        (name, row["name"], f"{row['num_targets']:,}", with_interval(row, "accuracy"), with_interval(row, "perplexity"))
        for name, split in report.splits.items()
        for row in split.breakdowns[key]
    ]
    own = next(iter(report.splits.values())).breakdowns[key]
    best = min(own, key=lambda row: row["perplexity"])
    where = place.format(best["name"].replace("-", " to ").replace("+", " or more"))
    reading = f"On {report.split} perplexity is lowest {where}: {with_interval(best, 'perplexity')}."
    data = Table(("split", axis, "scored", "accuracy", "perplexity"), rows, _KINDS)
    return Figure(draw(plot, f"Perplexity by {axis}"), reading, data)


def labels_section(report: EvalReport) -> Section | None:
    """Returns the scores of the largest families, clusters and taxa; None if the dataset knows none."""
    blocks: list[Block] = []
    for kind, plural in (("family", "families"), ("cluster", "clusters"), ("taxon", "taxa")):
        for name, split in report.splits.items():
            if kind not in split.breakdowns:
                continue
            labels = split.breakdowns[kind]
            rows = [
                (row["name"], f"{row['num_proteins']:,}", f"{row['num_targets']:,}", f"{row['accuracy']:.3f}",
                 f"{row['perplexity']:.2f}")
                for row in labels["rows"][:_SHOWN_LABELS]
            ]  # fmt: skip
            which = "The" if labels["num_labels"] == len(rows) else "The largest of"
            caption = f"{which} {labels['num_labels']:,} {plural} of {name}."
            blocks.append(Table((kind, "proteins", "scored", "accuracy", "perplexity"), rows, caption=caption))
    return Section("labels", "Which families?", blocks) if blocks else None


def _mark(name: str) -> Any:
    split: SplitName = name  # type: ignore[assignment]  # a report's splits are those of a dataset
    return SPLIT_MARKS[split]
