"""The probe.html of a probe: its first screen answers whether the model knows anything about these labels."""

import math
from typing import TYPE_CHECKING

from protlm.inference.metrics import Estimate
from protlm.workflows.pages.figures import draw
from protlm.workflows.pages.page import Block, Figure, Page, Section, Table, Text, Warnings, render
from protlm.workflows.pages.palette import ALL_MARK, BASELINE_MARKS, MODEL_MARKS
from protlm.workflows.probe.fits import layer_name
from protlm.workflows.probe.report import BASELINE_NAMES, METRIC_NAMES, ProbeReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


def render_page(report: ProbeReport) -> str:
    """Returns the HTML page of a probe; equal reports have equal pages."""
    summary: list[Block] = [
        Text(f"**{report.verdict}**"), Warnings(report.warnings), _score_table(report), _figure(report)
    ]  # fmt: skip
    sections = [_gains_section(report)]
    if report.classes:
        sections.append(_classes_section(report))
    sections.append(_method_section(report))
    what = "residues" if report.task == "per-residue" else "proteins"
    page = Page(
        f"What does {report.model_name} know about {report.label}?",
        f"Made by `protlm probe`: {report.num_tested:,} {what} of {report.labels} predicted by a linear model.",
        summary,
        sections,
    )
    return render(page)


def row_names(report: ProbeReport) -> dict[str, str]:
    """Returns the names of the rows of a table of scores in words, in their order."""
    layers = {layer_name(layer): f"layer {layer}" for layer in report.layers}
    return {"model": "model", **layers, **{name: BASELINE_NAMES[name] for name in report.baselines}}


def score_rows(report: ProbeReport) -> list[tuple[str, ...]]:
    """Returns the table of scores with its header: every row of `row_names`, each metric with its standard error."""
    header = ("", *(METRIC_NAMES[metric] for metric in report.metrics))
    rows = [
        (shown, *(_with_error(report.scores[name][metric], metric) for metric in report.metrics))
        for name, shown in row_names(report).items()
    ]
    return [header, *rows]


def _with_error(estimate: Estimate, metric: str) -> str:
    if math.isnan(estimate.value):
        return "–"
    # An error has the unit of the labels, and so any size.
    form = ".3g" if metric == "mae" else ".3f"
    error = "" if estimate.stderr is None else f" ± {estimate.stderr:{'.1g' if metric == 'mae' else '.3f'}}"
    return f"{estimate.value:{form}}{error}".replace("-", "−")


def _score_table(report: ProbeReport) -> Table:
    header, *rows = score_rows(report)
    return Table(header, rows, caption="Scores on tested labels ± their standard error.", strong_rows=(0,))


def _figure(report: ProbeReport) -> Block:
    names, metric = row_names(report), report.metrics[0]

    def plot(figure: "Drawing") -> None:
        axes = figure.subplots()
        for place, name in enumerate(names):
            estimate = report.scores[name][metric]
            mark = ALL_MARK if name == "model" else BASELINE_MARKS[0] if name in BASELINE_NAMES else MODEL_MARKS[0]
            low, high = estimate.low, estimate.high
            reach = [[0.0], [0.0]]
            if low is not None and high is not None:
                reach = [[max(0.0, estimate.value - low)], [max(0.0, high - estimate.value)]]
            axes.errorbar([estimate.value], [place], xerr=reach, **mark.points)
        axes.set_yticks(range(len(names)), list(names.values()))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"{METRIC_NAMES[metric]}, 95 % interval; further right is better")

    reading = (
        f"Only what lies to the right of **{BASELINE_NAMES[report.best_baseline]}** is knowledge of the model: all "
        "else can be had without it."
    )
    label = f"{METRIC_NAMES[metric]} of the model, its layers and the baselines"
    rows = [(shown, f"{report.scores[name][metric].value:.3f}", _interval(report.scores[name][metric]))
            for name, shown in names.items()]  # fmt: skip
    data = Table(("", METRIC_NAMES[metric], "95 % interval"), rows)
    return Figure(draw(plot, label, height=0.7 + 0.24 * len(names)), reading, data)


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return "–"
    return f"{estimate.low:.3f} to {estimate.high:.3f}".replace("-", "−")


def _gains_section(report: ProbeReport) -> Section:
    rows = [
        (BASELINE_NAMES[name], f"{gain.value:+.3f}".replace("-", "−"), _interval(gain))
        for name, gain in report.gains.items()
    ]
    text = Text(
        f"The {METRIC_NAMES[report.metrics[0]]} of the model minus that of each baseline, on the same labels. An "
        "interval that holds 0 decides nothing."
    )
    return Section("gains", "What the model adds", [text, Table(("over", "difference", "95 % interval"), rows)])


def _classes_section(report: ProbeReport) -> Section:
    rows = [
        (row["class"], f"{row['num_tested']:,}", f"{row['model']:.3f}", f"{row['best_baseline']:.3f}")
        for row in report.classes
    ]
    header = ("class", "tested", "found by the model", "by the best baseline")
    return Section("classes", "Classes", [Table(header, rows, caption="The share of each class that is found.")])


def _method_section(report: ProbeReport) -> Section:
    fit = (
        "ridge regression; its penalty, and the layer, are those with the best R²"
        if report.task == "regression"
        else "logistic regression; its penalty, and the layer, are those with the highest accuracy"
    )
    divided = (
        "the split that the labels name"
        if report.split == "given"
        else f"{report.num_folds} folds in turn, drawn anew by each seed"
    )
    chosen = ", ".join(f"layer {layer}: {count}" for layer, count in report.chosen.items())
    text = Text(
        f"The probe is a {fit} on labels that are neither fitted nor tested; it is then fitted again on both. Tested "
        f"is {divided}. Scores are means over the seeds, and ranks are those within a fold. "
        f"Standard errors and intervals are of a bootstrap over the tested {report.resampled}; they do not hold what "
        "another training set, other folds or other random weights would change. The row **model** takes the layer "
        "that was chosen without the tested labels; the best of the other rows was chosen by the tested labels, and is "
        "flattered by that. Random weights: the same architecture untrained, which mixes residues and knows nothing; "
        "what it reaches is the merit of the architecture. Constant: always the most frequent class, or the mean; with "
        "several folds that of all labels, the tested ones included."
    )
    rows = [
        ("task", report.task),
        ("labels that were tested, fitted at most", f"{report.num_tested:,}, {report.num_fitted:,}"),
        (f"tested {report.resampled}", f"{report.num_units:,}"),
        ("seeds", ", ".join(map(str, report.seeds))),
        ("folds that chose each layer", chosen),
        ("parameters", f"{report.num_parameters:,}"),
        ("weights", report.weights_hash),
    ]
    return Section("method", "How this was measured", [text, Table(("", ""), rows, ("text", "code"))])
