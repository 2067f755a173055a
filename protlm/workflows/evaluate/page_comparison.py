"""The comparison.html of several models: its first screen answers which is better, the sections say where."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from protlm.choices import SplitName
from protlm.workflows.evaluate.comparison import Comparison
from protlm.workflows.evaluate.page import METRIC_NAMES
from protlm.workflows.evaluate.page_comparison_details import (
    calibration_section,
    lengths_section,
    residues_section,
    short_names,
)
from protlm.workflows.evaluate.page_numbers import with_interval
from protlm.workflows.evaluate.report import ROW_NAMES
from protlm.workflows.evaluate.saved_report import SavedRow
from protlm.workflows.pages.figures import draw
from protlm.workflows.pages.log_axis import set_log_scale
from protlm.workflows.pages.page import Block, ColumnKind, Figure, Page, Section, Table, Text, Warnings, render
from protlm.workflows.pages.palette import BASELINE_MARKS, LIGHT, SPLIT_MARKS, Mark

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

_BASELINES = ("empirical", "markov", "two_sided")
"""The baselines with an interval; that of a blind guess is a line."""
_FIRST_METRICS = ("accuracy", "perplexity", "bits_per_residue")


def render_comparison(comparison: Comparison) -> str:
    """Returns the HTML page of a comparison; equal comparisons have equal pages."""
    sections = [
        _differences_section(comparison),
        lengths_section(comparison),
        residues_section(comparison),
        calibration_section(comparison),
        _models_section(comparison),
    ]
    subtitle = f"Made by `protlm eval --compare`: {_what_was_scored(comparison)}."
    return render(Page("Which model is better?", subtitle, _summary(comparison), sections))


def _what_was_scored(comparison: Comparison) -> str:
    first = comparison.reports[0]
    splits = ", ".join(
        f"{first.splits[name].num_targets:,} residues of {first.splits[name].num_records:,} proteins ({name})"
        for name in comparison.splits
    )
    hidden = "all hidden from the models" if first.targets == "hidden" else "each predicted from those before it"
    return f"{len(comparison.names)} models on the same {splits}; {hidden}"


def _summary(comparison: Comparison) -> Sequence[Block]:
    # A name with an asterisk would end the bold text.
    verdicts = [text if "*" in text else f"**{text}**" for text in comparison.verdicts.values()]
    return [
        *map(Text, verdicts),
        Warnings(_warnings(comparison)),
        _score_table(comparison, _FIRST_METRICS),
        _perplexity_figure(comparison),
    ]


def _warnings(comparison: Comparison) -> list[str]:
    """Returns what a reader must know before he believes the verdict."""
    lines = [
        f"{name} was trained on another dataset, or several: proteins scored here, or relatives of them, may be in it."
        for name, report in zip(comparison.names, comparison.reports, strict=True)
        if not report.is_of_training_dataset
    ]
    for split in comparison.splits:
        best = _best_baseline(comparison, split)
        own = [row["perplexity"] for row in comparison.scores[split].values()]
        if best is not None and all(value is None or value >= best[1] for value in own):
            lines.append(f"On {split} no model has a lower perplexity than the baseline “{best[0]}”, {best[1]:.2f}.")
    of_weights: dict[str, list[str]] = {}
    for name, report in zip(comparison.names, comparison.reports, strict=True):
        of_weights.setdefault(report.weights_hash, []).append(name)
    repeated = [same for same in of_weights.values() if len(same) > 1]
    lines += [f"{' and '.join(same)} have the same weights: they are one model." for same in repeated]
    lines += comparison.limits()
    if "train" in comparison.splits:
        lines.append("On train the models are scored on what they have seen, which says little of other proteins.")
    return lines


def _best_baseline(comparison: Comparison, split: SplitName) -> tuple[str, float] | None:
    """Returns the name and perplexity of the best baseline; tables have seen what they predict on train."""
    rows = comparison.baselines[split]
    keys = [key for key in _BASELINES if key in rows and (split != "train" or key == "empirical")]
    values = [(value, ROW_NAMES[key]) for key in keys if (value := rows[key]["perplexity"]) is not None]
    return min(values)[::-1] if values else None


def _score_table(comparison: Comparison, metrics: Sequence[str]) -> Table:
    rows: list[tuple[str, ...]] = []
    strong: list[int] = []
    for split in comparison.splits:
        for name, row in comparison.scores[split].items():
            strong.append(len(rows))
            rows.append((split, name, *(with_interval(row, metric) for metric in metrics)))
        for key in (*_BASELINES, "uniform"):
            if key in comparison.baselines[split]:
                row = comparison.baselines[split][key]
                rows.append((split, ROW_NAMES[key], *(with_interval(row, metric) for metric in metrics)))
    header = ("split", "", *(METRIC_NAMES[metric] for metric in metrics))
    kinds: tuple[ColumnKind, ...] = ("text", "text", *(["number"] * len(metrics)))  # type: ignore[arg-type]
    return Table(header, rows, kinds, "95 % intervals in parentheses.", strong)


def _perplexity_figure(comparison: Comparison) -> Block:
    keys = [key for key in _BASELINES if any(key in rows for rows in comparison.baselines.values())]
    names = [*short_names(comparison.names), *(ROW_NAMES[key] for key in keys)]
    num_models = len(comparison.names)

    def plot(figure: "Drawing") -> None:
        axes = figure.subplots()
        for number, split in enumerate(comparison.splits):
            rows = [*comparison.scores[split].values(), *(comparison.baselines[split].get(key) for key in keys)]
            shift = _shift(number, len(comparison.splits))
            places = [(place + shift, row) for place, row in enumerate(rows) if row is not None]
            _draw_intervals(axes, places, "perplexity", SPLIT_MARKS[split], split)
        guess = comparison.baselines[comparison.splits[0]].get("uniform", {}).get("perplexity")
        if guess is not None:
            axes.axvline(guess, label=f"blind guess among {guess:.0f} letters", **BASELINE_MARKS[0].line)
        axes.axhline(num_models - 0.5, color=LIGHT["rule"], linewidth=0.8)
        _set_rows(axes, names, num_models)
        axes.set_xlabel("perplexity (log scale), 95 % interval")
        _say_sides(axes, "← better", "")
        set_log_scale(axes, "x")
        figure.legend(loc="outside upper left", ncols=3)

    split = comparison.splits[0]
    own = [row["perplexity"] for row in comparison.scores[split].values() if row["perplexity"] is not None]
    best = _best_baseline(comparison, split)
    reading = f"On {split} " + (
        f"the perplexities of the models are {min(own):.2f} to {max(own):.2f}"
        if own
        else "no model has a perplexity that is a number"
    )
    reading += "" if best is None else f", that of the best baseline is {best[1]:.2f}"
    reading += ": perplexity is the effective number of residues that a prediction is spread over."
    label = "Perplexity of the models and the baselines by split"
    drawing = draw(plot, label, height=1.0 + _row_inches(len(comparison.splits)) * len(names))
    return Figure(drawing, reading, _score_table(comparison, ("perplexity",)))


def _shift(number: int, count: int) -> float:
    """Returns how far from the middle of its row the n-th of several series is drawn."""
    return (number - (count - 1) / 2) * 0.7 / count


def _row_inches(num_series: int) -> float:
    return 0.2 + 0.14 * num_series


def _draw_intervals(
    axes: "Axes", places: Sequence[tuple[float, SavedRow]], metric: str, mark: Mark, label: str
) -> None:
    """Draws values as points with their intervals; a value need not be inside its interval."""
    points = [(value, place) for place, row in places if (value := row[metric]) is not None]
    axes.plot([value for value, _ in points], [place for _, place in points], label=label, **mark.points)
    for place, row in places:
        low, high = row[f"{metric}_low"], row[f"{metric}_high"]
        if low is not None and high is not None:
            axes.plot([low, high], [place, place], color=mark.color, marker="|", markersize=5.0, linewidth=1.2)


def _set_rows(axes: "Axes", names: Sequence[str], num_strong: int) -> None:
    """Names the rows of a figure from the top; the first ones are those that it is about."""
    axes.set_yticks(range(len(names)), names)
    for label in axes.get_yticklabels()[:num_strong]:
        label.set_color(LIGHT["ink"])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")


def _say_sides(axes: "Axes", left: str, right: str) -> None:
    """Writes above a figure what its left and its right side mean."""
    style: dict[str, Any] = {"transform": axes.transAxes, "va": "bottom", "color": LIGHT["soft"], "size": 8.5}
    axes.text(0, 1.02, left, ha="left", **style)
    axes.text(1, 1.02, right, ha="right", **style)


def _differences_section(comparison: Comparison) -> Section:
    first, *others = comparison.names
    text = (
        f"Each difference is {first} minus another model, on the same residues of the same proteins. Its interval is "
        f"95 % of a paired bootstrap over {_units(comparison)}: both models meet the same draw, so what is hard for "
        "both cancels out. It says how the difference would vary with other proteins of the same kind, not with "
        "another training run."
    )
    if len(others) > 1:
        text += " An interval is for one pair: of many pairs, some exclude 0 by chance."
    rows = [
        (
            row["split"], row["second"], METRIC_NAMES[row["metric"]], f"{row['difference']:+.4f}", _interval(row),
            _better(row),
        )
        for row in comparison.differences
    ]  # fmt: skip
    table = Table(
        ("split", f"{first} minus", "metric", "difference", "95 % interval", "better"), rows,
        ("text", "text", "text", "number", "number", "text"),
        "Fewer bits per residue, a lower calibration error and a higher accuracy are better.",
    )  # fmt: skip
    return Section("differences", "Paired differences", [Text(text), _forest_figure(comparison), table])


def _units(comparison: Comparison) -> str:
    units = {comparison.reports[0].splits[name].resampled for name in comparison.splits}
    return " or ".join(sorted(units))


def _interval(row: dict[str, Any]) -> str:
    return "–" if row["low"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}"


def _better(row: dict[str, Any]) -> str:
    """Returns the model that is better by a difference, or that the interval decides nothing."""
    if row["low"] is None:
        return "–"
    if row["low"] <= 0 <= row["high"]:
        return "undecided"
    is_first = (row["high"] < 0) == (row["metric"] in ("bits_per_residue", "calibration_error"))
    name: str = row["first"] if is_first else row["second"]
    return name


def _forest_figure(comparison: Comparison) -> Block:
    first, *others = comparison.names
    short_first, *shorts = short_names(comparison.names)
    rows = [row for row in comparison.differences if row["metric"] == "bits_per_residue"]

    def plot(figure: "Drawing") -> None:
        axes = figure.subplots()
        for number, split in enumerate(comparison.splits):
            shift = _shift(number, len(comparison.splits))
            places = [
                (
                    others.index(row["second"]) + shift,
                    {"bits": row["difference"], "bits_low": row["low"], "bits_high": row["high"]},
                )
                for row in rows
                if row["split"] == split
            ]
            _draw_intervals(axes, places, "bits", SPLIT_MARKS[split], split)
        axes.axvline(0, color=LIGHT["soft"], linewidth=1.2)
        _set_rows(axes, [f"{short_first}\n− {name}" for name in shorts], len(shorts))
        # Zero is in the middle: which side an interval is on is what the figure is for.
        reach = 1.08 * max((abs(end) for end in axes.get_xlim()), default=1.0)
        axes.set_xlim(-reach, reach)
        axes.set_xlabel("difference in bits per residue, 95 % interval")
        _say_sides(axes, "← first is better", "other is better →")
        figure.legend(loc="outside upper left", ncols=4)

    decided = [row for row in rows if row["low"] is not None and not row["low"] <= 0 <= row["high"]]
    reading = (
        f"The interval excludes 0 in {len(decided)} of {len(rows)}; left of the line {first} needs fewer bits per "
        "residue and is better, right of it the other model."
    )
    cells = [(row["split"], row["second"], f"{row['difference']:+.4f}", _interval(row)) for row in rows]
    header = ("split", f"{first} minus", "bits per residue", "95 % interval")
    data = Table(header, cells, ("text", "text", "number", "number"))
    label = "Paired differences in bits per residue by model and split"
    drawing = draw(plot, label, height=1.2 + (0.1 + _row_inches(len(comparison.splits))) * len(others))
    return Figure(drawing, reading, data)


def _models_section(comparison: Comparison) -> Section:
    first = comparison.reports[0]
    models = [
        (
            name, f"{report.num_parameters:,}", report.attention, report.projection,
            "this dataset" if report.is_of_training_dataset else "another dataset, or several", report.weights_hash,
        )
        for name, report in zip(comparison.names, comparison.reports, strict=True)
    ]  # fmt: skip
    header = ("model", "parameters", "attention", "projections", "trained on", "weights")
    measured = [
        ("objective", first.objective),
        ("what a model saw at a target", "<mask>" if first.targets == "hidden" else "the residues before it"),
        ("probability that a residue is scored", f"{first.mask_rate:.3g}" if first.targets == "hidden" else "1"),
        ("masks per protein", f"{first.num_masks:,}"),
        ("seed", f"{first.seed}"),
        ("dataset", first.dataset_hash),
    ]
    text = (
        "The empirical baseline always answers with the residue frequencies of a model's training set, here that of "
        f"{comparison.names[0]}. The Markov baselines are tables of the residues beside each short stretch in the "
        "dataset's training split. What every row means, and what published values can be compared with, is in each "
        "model's own report."
    )
    return Section(
        "models",
        "What each model is",
        [
            Table(header, models, ("text", "number", "text", "text", "text", "code")),
            Text(text),
            Table(("", ""), measured, ("text", "code"), "How all of them were measured"),
        ],
    )
