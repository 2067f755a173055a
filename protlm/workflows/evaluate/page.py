"""The report.html of an evaluation: its first screen answers whether the model is any good, the sections say where."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from protlm.choices import SplitName
from protlm.workflows.evaluate.page_attention import approximation_section, attention_section
from protlm.workflows.evaluate.page_details import (
    calibration_section,
    labels_section,
    lengths_section,
    residues_section,
)
from protlm.workflows.evaluate.page_numbers import span, with_interval
from protlm.workflows.evaluate.report import ROW_NAMES, EvalReport
from protlm.workflows.pages.figures import draw
from protlm.workflows.pages.page import Block, ColumnKind, Figure, KeyValues, Page, Section, Table, Text, render
from protlm.workflows.pages.palette import BASELINE_MARKS, SPLIT_MARKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

_DRAWN_ROWS = ("model", "empirical", "markov", "two_sided", "random_weights")
METRIC_NAMES = {
    "accuracy": "accuracy",
    "top5_accuracy": "top-5 accuracy",
    "perplexity": "perplexity",
    "bits_per_residue": "bits per residue",
    "calibration_error": "calibration error",
}


def render_page(report: EvalReport) -> str:
    """Returns the HTML page of an evaluation; equal reports have equal pages."""
    sections = [
        _scores_section(report),
        calibration_section(report),
        residues_section(report),
        lengths_section(report),
        labels_section(report),
        attention_section(report),
        approximation_section(report),
        _method_section(report),
    ]
    page = Page(
        f"How good is {report.model_name}?",
        f"Made by `protlm eval`: {_what_was_scored(report)}.",
        _summary(report),
        [section for section in sections if section is not None],
    )
    return render(page)


def _what_was_scored(report: EvalReport) -> str:
    splits = ", ".join(
        f"{split.num_targets:,} residues of {split.num_records:,} proteins ({name})"
        for name, split in report.splits.items()
    )
    return f"{splits}; " + (
        "all hidden from the model" if report.targets == "hidden" else "each predicted from those before it"
    )


def _summary(report: EvalReport) -> Sequence[Block]:
    blocks: list[Block] = [Text(f"**{split.verdict}**") for split in report.splits.values()]
    blocks.append(_score_table(report, ("accuracy", "perplexity"), (*_DRAWN_ROWS, "uniform")))
    blocks.append(_perplexity_figure(report))
    return blocks


def _score_table(report: EvalReport, metrics: Sequence[str], keys: Sequence[str]) -> Table:
    """Returns a row for each split and each of the keys that it has; the split is named only if there are several."""
    rows = [
        (name, ROW_NAMES[key], *(with_interval(split.scores[key], metric) for metric in metrics))
        for name, split in report.splits.items()
        for key in keys
        if key in split.scores
    ]
    strong = [number for number, row in enumerate(rows) if row[1] == ROW_NAMES["model"]]
    header = ("split", "", *(METRIC_NAMES[metric] for metric in metrics))
    skipped = 0 if len(report.splits) > 1 else 1
    kinds = _kinds(len(metrics))
    return Table(
        header[skipped:], [row[skipped:] for row in rows], kinds[skipped:], "95 % intervals in parentheses.", strong
    )


def _perplexity_figure(report: EvalReport) -> Block:
    names = [key for key in _DRAWN_ROWS if any(key in split.scores for split in report.splits.values())]

    def plot(figure: "Drawing") -> None:
        axes = figure.subplots()
        step = 0.8 / len(report.splits)
        for number, (name, split) in enumerate(report.splits.items()):
            shown = [(place, split.scores[key]) for place, key in enumerate(names) if key in split.scores]
            heights = [place + (number - (len(report.splits) - 1) / 2) * step for place, _ in shown]
            values = [row["perplexity"] or 0.0 for _, row in shown]
            spans = [span(row, "perplexity") for _, row in shown]
            axes.errorbar(
                values, heights, xerr=list(zip(*spans, strict=True)), label=name, **SPLIT_MARKS[_split(name)].points
            )
        axes.axvline(25, label="blind guess among 25 letters", **BASELINE_MARKS[0].line)
        axes.set_yticks(range(len(names)), [ROW_NAMES[key] for key in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("perplexity, 95 % interval; further left is better")
        figure.legend(loc="outside upper left", ncols=2)

    model = next(iter(report.splits.values())).scores["model"]
    reading = (
        f"On {report.split} the model is choosing between {model['perplexity'] or 0.0:.1f} residues: "
        "perplexity is the effective number of residues that its probability is spread over."
    )
    drawing = draw(plot, "Perplexity of the model and the baselines by split", height=0.6 + 0.55 * len(names))
    return Figure(drawing, reading, _score_table(report, ("perplexity",), _DRAWN_ROWS))


def _split(name: str) -> SplitName:
    return name  # type: ignore[return-value]  # a report's splits are those of a dataset


def _resampled_sentence(report: EvalReport) -> str:
    units = {split.resampled for split in report.splits.values()}
    if units == {"clusters"}:
        return "Intervals are 95 % of a bootstrap over the clusters of the dataset: relatives are drawn together."
    if units == {"proteins"}:
        return (
            "Intervals are 95 % of a bootstrap over proteins, since the dataset names no clusters: if many of them are "
            "relatives, the intervals are too narrow."
        )
    of_split = "; ".join(f"{name}: {split.resampled}" for name, split in report.splits.items())
    return f"Intervals are 95 % of a bootstrap over proteins, or over clusters where a split has them ({of_split})."


def _scores_section(report: EvalReport) -> Section:
    blocks: list[Block] = [
        Text(
            "Accuracy is the fraction of scored residues to which the model gives the highest probability, top-5 "
            "accuracy the fraction among its first five. Perplexity is 2 to the power of bits per residue. The "
            "calibration error (ECE) is the mean difference between the highest probability and how often it is "
            "right. " + _resampled_sentence(report)
        ),
        _score_table(report, ("accuracy", "top5_accuracy", "perplexity"), tuple(ROW_NAMES)),
        _score_table(report, ("bits_per_residue", "calibration_error"), tuple(ROW_NAMES)),
    ]
    if report.differences:
        rows = [
            (
                f"{row['first']} − {row['second']}",
                METRIC_NAMES[row["metric"]],
                _signed(row["difference"]),
                _interval(row),
            )
            for row in report.differences
        ]
        caption = "The model on one split minus the same model on another."
        blocks.append(Table(("splits", "metric", "difference", "95 % interval"), rows, caption=caption,
                            kinds=("text", "text", "number", "number")))  # fmt: skip
    for name, split in report.splits.items():
        if split.pseudo_perplexity is not None:
            pairs = [
                (f"pseudo-perplexity on {name}", with_interval(split.pseudo_perplexity, "perplexity")),
                ("proteins, one residue hidden at a time", f"{split.pseudo_perplexity['num_proteins']:,}"),
            ]
            blocks.append(KeyValues(pairs))
    return Section("scores", "Scores", blocks)


def _interval(row: dict[str, Any]) -> str:
    return "–" if row["low"] is None else f"{_signed(row['low'])} to {_signed(row['high'])}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _method_section(report: EvalReport) -> Section:
    markov = report.markov
    rows = [
        ("objective", report.objective),
        ("what the model saw at a target", "<mask>" if report.targets == "hidden" else "the residues before it"),
        ("probability that a residue is scored", f"{report.mask_rate:.3g}" if report.targets == "hidden" else "1"),
        ("masks per protein", f"{report.num_masks:,}"),
        ("seed", f"{report.seed}"),
        ("Markov baselines", "none: the dataset has no training split" if markov is None else _markov_words(report)),
        ("proteins cut to the reach of the model", f"{sum(split.num_cut for split in report.splits.values()):,}"),
        ("residues that the model lacks", f"{sum(split.num_lacked for split in report.splits.values()):,}"),
        ("parameters", f"{report.num_parameters:,}"),
        ("attention", report.attention),
        ("random projections", report.projection),
        ("precision", report.precision),
        ("weights", report.weights_hash),
        ("dataset", report.dataset_hash),
        ("trained on", "this dataset" if report.is_of_training_dataset else _OTHER_DATASET),
    ]
    counted = "the model's training set"
    if report.training_dataset_hash is None:
        counted = "the dataset's training split, since those of the model's training set are not known"
    text = Text(
        f"The empirical baseline always answers with the residue frequencies of {counted}. The Markov "
        "baselines are tables of the residues that followed each short stretch in the dataset's training split, "
        "smoothed by the rule of Witten and Bell, read from one side or from both; they show how much local statistics "
        "reach without any model. "
        "Published perplexities depend on their split and masks: compare values only on the same residues of the same "
        "proteins."
    )
    return Section("method", "How this was measured", [text, Table(("", ""), rows, ("text", "code"))])


_OTHER_DATASET = "another dataset, or several: proteins scored here may be among them, or relatives of them"


def _markov_words(report: EvalReport) -> str:
    assert report.markov is not None
    chosen = f"chosen on {report.markov.chosen_on}" if report.markov.chosen_on else "not chosen: no valid split"
    two_sided = report.markov.two_sided_order
    orders = f"{report.markov.order}" if two_sided is None else f"{report.markov.order}, both sides {two_sided}"
    return f"order {orders} ({chosen}), {report.markov.num_residues:,} residues counted"


def _kinds(num_numbers: int) -> tuple[ColumnKind, ...]:
    return ("text", "text", *(["number"] * num_numbers))  # type: ignore[arg-type]  # a list of one literal
