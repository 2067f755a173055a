"""The report of a run: how the scores of each assay agree with its measurements, beside the baselines."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from protlm.inference.assay_metrics import METRICS, AssayValue, benchmark_mean, fit_by_median, measure
from protlm.inference.correlation import spearman
from protlm.inference.metrics import Estimate
from protlm.workflows.score.assembly import AssayScores
from protlm.workflows.score.csv_rows import csv_row
from protlm.workflows.score.request import ASSAYS_NAME, SUMMARY_NAME

MODEL = "model"
NAMES = {MODEL: "model", "blosum62": "BLOSUM62", "site_frequencies": "site frequencies"}
"""The predictions as a table or a sentence names them."""

Interval = dict[str, float | None]
"""A value with the 95 % interval of its bootstrap: `value`, `low`, `high`; null where there is none."""


@dataclass(frozen=True, kw_only=True)
class AssayReport:
    """The scores of one assay.

    Attributes:
        name: Name of its file; empty for the only one of a run.
        protein: Id of its protein; the first one of several.
        num_residues: Residues of that protein.
        num_variants: Rows that were scored.
        num_multiple: Of them, rows with several substitutions.
        num_indels: Rows with insertions or deletions.
        num_not_standard: Rows that replace, or put in, another residue than the 20 standard ones, of which models know
            little: to replace one seems a gain, to put one in a loss.
        num_measured: Rows with a measurement.
        fit_by: How fit variants were known; None without measurements.
        metrics: Of the model and of each baseline that scores all measured rows: `spearman`, `auc`, `mcc`, `ndcg`.
        gains: Spearman of the model minus that of each baseline, on the same rows.
        agreement: Spearman of the model's scores with those of each baseline, on the rows that it scores; of rows
            without a measurement on the first million.
        function: Type of function in the reference file of the benchmark.
        uniprot: Protein in that file.
        verdict: Whether the model beats the baselines, as a sentence; None without measurements.
    """

    name: str
    protein: str
    num_residues: int
    num_variants: int
    num_multiple: int
    num_indels: int
    num_not_standard: int
    num_measured: int
    fit_by: str | None
    metrics: dict[str, dict[str, Interval]]
    gains: dict[str, Interval]
    agreement: dict[str, float | None]
    function: str | None
    uniprot: str | None
    verdict: str | None


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The aggregate of several assays.

    Attributes:
        rule: `types` if it is the mean over types of function, `assays` if it is the mean over assays.
        num_assays: Assays with measurements.
        metrics: Of the model and each baseline that scores all of them.
        by_function: The same for each type of function, without intervals; null where none of its assays has one.
        lacking: Of each baseline that scores only some, the assays that it has no score for.
    """

    rule: str
    num_assays: int
    metrics: dict[str, dict[str, Interval]]
    by_function: dict[str, dict[str, dict[str, float | None]]]
    lacking: dict[str, list[str]]


@dataclass(frozen=True, kw_only=True)
class ScoreReport:
    """The outcome of a run.

    Attributes:
        out: The output.
        heat_map: The picture, if one was made; none is without a single substitution to draw.
        strategy: How mutants were scored.
        precision: Number type in which the model computed.
        num_proteins: Proteins whose mutants were scored.
        num_variants: Rows that were scored.
        num_passes: Forward passes of a protein or window that this took, rows of several counted by their members.
        num_beyond_training: Proteins longer than any that the model was trained on.
        trained_residues: Length of the longest protein that it was trained on; None if that is unknown.
        rejects: Number of records and rows that were skipped, by reason.
        repairs: Number of repaired letters, by rule.
        left_out: Files of an input folder that are no assays.
        num_not_standard: Positions that a scan left out: their residue is none of the 20 standard ones.
        num_aligned: Sequences of the alignment; None without one.
        num_covered: Positions of the protein that the alignment covers; None without one.
        assays: Each table of scores.
        benchmark: The aggregate of a folder of assays.
    """

    out: str
    heat_map: str | None
    strategy: str
    num_proteins: int
    num_variants: int
    num_passes: int
    num_beyond_training: int
    trained_residues: int | None
    rejects: dict[str, int]
    repairs: dict[str, int]
    left_out: list[str]
    num_not_standard: int
    num_aligned: int | None
    num_covered: int | None
    assays: list[AssayReport]
    benchmark: Benchmark | None
    precision: str = "32"

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "ScoreReport":
        """Returns the report that `asdict` turned into `content`."""
        benchmark = content["benchmark"]
        return cls(
            **{
                **content,
                "assays": [AssayReport(**assay) for assay in content["assays"]],
                "benchmark": None if benchmark is None else Benchmark(**benchmark),
            }
        )


def assay_report(scores: AssayScores, protein: str, num_residues: int, seed: int) -> AssayReport:
    """Returns the report of one assay.

    Args:
        scores: Its scores.
        protein: Id of its protein.
        num_residues: Residues of that.
        seed: Of the bootstrap.
    """
    model = np.array(scores.scores)
    baselines = {name: np.array(values) for name, values in scores.baselines.items()}
    measured = np.array(scores.measured)
    rows = np.flatnonzero(~np.isnan(measured))
    metrics: dict[str, dict[str, Interval]] = {}
    gains: dict[str, Interval] = {}
    if len(rows):
        is_fit = np.array(scores.is_fit)[rows]
        # As read, all rows of an assay say whether they are fit, or none.
        is_fit = fit_by_median(measured[rows]) if (is_fit < 0).any() else is_fit == 1
        complete = {name: values[rows] for name, values in baselines.items() if not np.isnan(values[rows]).any()}
        measurement = measure(measured[rows], is_fit, {MODEL: model[rows], **complete}, seed)
        metrics = {
            name: {metric: _interval(each) for metric, each in values.items()}
            for name, values in measurement.metrics.items()
        }
        gains = {name: _interval(each) for name, each in measurement.gains.items()}
    return AssayReport(
        name=scores.assay.name,
        protein=protein,
        num_residues=num_residues,
        num_variants=scores.num_variants,
        num_multiple=scores.num_multiple,
        num_indels=scores.num_indels,
        num_not_standard=scores.num_not_standard,
        num_measured=len(rows),
        fit_by=scores.assay.fit_by if len(rows) else None,
        metrics=metrics,
        gains=gains,
        agreement={name: _agreement(model, values) for name, values in baselines.items()},
        function=scores.assay.function,
        uniprot=scores.assay.protein,
        verdict=_verdict(metrics, gains) if len(rows) else None,
    )


def benchmark_of(reports: Sequence[AssayReport], seed: int) -> Benchmark | None:
    """Returns the aggregate of some assays; None if none of them has measurements.

    Where every assay has a type of function, the mean is the benchmark's own; otherwise each assay counts once.
    """
    with_metrics = [report for report in reports if report.metrics]
    if not with_metrics:
        return None
    is_typed = all(report.function is not None for report in with_metrics)
    names = [name for name in NAMES if all(name in report.metrics for report in with_metrics)]
    metrics: dict[str, dict[str, Interval]] = {name: {} for name in names}
    by_function: dict[str, dict[str, dict[str, float | None]]] = {}
    for name in names:
        for metric in METRICS:
            values = [_assay_value(report, report.metrics[name][metric]["value"], is_typed) for report in with_metrics]
            means, mean = benchmark_mean(values, seed)
            metrics[name][metric] = _interval(mean)
            for function in sorted({each.function for each in values}) if is_typed else ():
                by_function.setdefault(function, {}).setdefault(name, {})[metric] = means.get(function)
    return Benchmark(
        rule="types" if is_typed else "assays",
        num_assays=len(with_metrics),
        metrics=metrics,
        by_function=by_function,
        lacking={
            name: [report.name for report in with_metrics if name not in report.metrics]
            for name in NAMES
            if name not in names and any(name in report.metrics for report in with_metrics)
        },
    )


def _assay_value(report: AssayReport, value: float | None, is_typed: bool) -> AssayValue:
    return AssayValue(
        protein=(report.uniprot if is_typed else None) or report.name,
        function=(report.function if is_typed else None) or "",
        value=np.nan if value is None else value,
    )


def write_benchmark(folder: Path, report: ScoreReport) -> None:
    """Writes the table of the assays, one row each, and the whole report, into the output for a folder of assays."""
    names = [name for name in NAMES if any(name in assay.metrics for assay in report.assays)]
    with (folder / ASSAYS_NAME).open("w", newline="", encoding="utf-8") as file:
        columns = [f"{name}/{metric}{end}" for name in names for metric in METRICS for end in ("", "/low", "/high")]
        file.write(csv_row(["assay", "uniprot", "function", "protein", "variants", "measured", "fit_by", *columns]))
        for assay in report.assays:
            cells = [
                _cell(assay.metrics.get(name, {}).get(metric, {}).get(end))
                for name in names
                for metric in METRICS
                for end in ("value", "low", "high")
            ]
            about = [assay.name, assay.uniprot, assay.function, assay.protein, assay.num_variants, assay.num_measured]
            file.write(csv_row([*about, assay.fit_by, *cells]))
    text = json.dumps(asdict(report), indent=2, ensure_ascii=False)
    (folder / SUMMARY_NAME).write_text(text + "\n", encoding="utf-8")


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _interval(estimate: Estimate) -> Interval:
    return {"value": None if np.isnan(estimate.value) else estimate.value, "low": estimate.low, "high": estimate.high}


def _agreement(model: np.ndarray, baseline: np.ndarray) -> float | None:
    both = ~np.isnan(baseline)
    return spearman(model[both], baseline[both])


def _verdict(metrics: Mapping[str, Mapping[str, Interval]], gains: Mapping[str, Interval]) -> str:
    """Returns a sentence that says whether the model predicts the measurements better than every baseline."""
    value = metrics[MODEL]["spearman"]["value"]
    if value is None:
        return "There is no Spearman correlation: fewer than three measurements, or all scores or measurements equal."
    if not gains:
        return f"The model has a Spearman of {value:.3f}; no baseline scores all of these variants."
    known = {name: gain for name, gain in gains.items() if gain["value"] is not None}
    if not known:
        return f"The model has a Spearman of {value:.3f}; the baselines score all of these variants alike."
    best = min(known, key=lambda name: known[name]["value"] or 0.0)
    gain, low, high = (known[best][key] for key in ("value", "low", "high"))
    assert gain is not None
    beside = f"a Spearman of {value:.3f}, {NAMES[best]} {value - gain:.3f}"
    if low is None or high is None:
        return f"The model has {beside}; there are too few variants to tell which is better."
    interval = f"difference {gain:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"
    if low > 0:
        return f"The model predicts the measurements better than the best baseline: {beside} ({interval})."
    if high < 0:
        return f"The model predicts the measurements worse than {NAMES[best]} does: {beside} ({interval})."
    return f"The model is not shown to be better than the best baseline: {beside} ({interval})."
