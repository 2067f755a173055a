"""`protlm eval --compare`: several reports side by side, with paired differences and their intervals.

Reports can be compared if the same residues of the same proteins were hidden in all of them. The bootstrap weights of a
protein are a function of the seed and the protein, so the replicates of two reports belong together one by one, and the
interval of a difference is that of their differences.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from protlm import files
from protlm.data.storage.dataset import is_dataset
from protlm.errors import ProtlmError, UsageError, validation_fault
from protlm.inference.metrics import METRICS, NUM_REPLICATES
from protlm.workflows.evaluate.report import BASELINE_NAMES, FORMAT_VERSION, REPLICATED, difference
from protlm.workflows.evaluate.request import REPORT_NAME

COMPARISON_NAME = "comparison.json"
_SAME = ("dataset_hash", "seed", "num_masks", "mask_rate", "objective", "targets")
_MOST_REPORT_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The content of comparison.json.

    Attributes:
        format_version: Of this file.
        names: The models, in the order given; all different.
        splits: The splits that every report has.
        scores: For each split and model its score row.
        baselines: For each split the score rows of the baselines, by their keys in a report.
        differences: The first model against each other one: `split`, `first`, `second`, `metric`, `difference`
            (first − second), `stderr`, `low`, `high`.
        reports: The reports themselves.
    """

    format_version: int = 1
    names: list[str]
    splits: list[str]
    scores: dict[str, dict[str, dict[str, float | None]]]
    baselines: dict[str, dict[str, dict[str, float | None]]]
    differences: list[dict[str, Any]]
    reports: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Returns the comparison as plain values, without the reports."""
        return {
            "format_version": self.format_version,
            "models": [
                {"name": name, "weights_hash": report["weights_hash"], "num_parameters": report["num_parameters"]}
                for name, report in zip(self.names, self.reports, strict=True)
            ],
            "splits": self.splits,
            "scores": self.scores,
            "baselines": self.baselines,
            "differences": self.differences,
        }


Evaluate = Callable[[Path, Path, Path], object]
"""Evaluates a model on a dataset and writes its report into a folder: called with the three paths."""


def compare(items: Sequence[Path], out: Path, evaluate: Evaluate, *, force: bool = False) -> Comparison:
    """Compares reports, or models that are evaluated first, and writes out/comparison.json.

    Args:
        items: `report.json` files, folders with one, and models; with models also the dataset to evaluate them on.
        out: Folder of the comparison, and of the reports of models.
        evaluate: Evaluates a model.
        force: Replace an existing comparison.

    Raises:
        UsageError: Fewer than two reports or models; models without a dataset, or with several.
        ProtlmError: A report or model that cannot be read, reports that do not belong together, an existing comparison.
    """
    path = out / COMPARISON_NAME
    if path.exists() and not force:
        raise ProtlmError(f"{path}: exists already; replace it with --force or choose another --out")
    datasets = [item for item in items if is_dataset(item)]
    others = [item for item in items if item not in datasets]
    models = [item for item in others if _report_path(item) is None]
    if len(others) < 2:
        raise UsageError("--compare takes at least two reports or models")
    if models and len(datasets) != 1:
        raise UsageError(f"--compare: {models[0]} is no report, so one DATASET is needed to evaluate it on")
    reports = []
    for number, item in enumerate(others, start=1):
        report_path = _report_path(item)
        if report_path is None:
            folder = out / f"model-{number}"
            evaluate(item, datasets[0], folder)
            report_path = folder / REPORT_NAME
        reports.append((report_path, read_report(report_path)))
    comparison = _comparison(reports)
    out.mkdir(parents=True, exist_ok=True)
    with files.written_whole(path) as partial:
        partial.write_text(json.dumps(comparison.to_json(), indent=1) + "\n", encoding="utf-8")
    return comparison


def read_report(path: Path) -> dict[str, Any]:
    """Returns the content of a report.json.

    Raises:
        ProtlmError: It cannot be read, or is of another kind or version.
    """
    try:
        if path.stat().st_size > _MOST_REPORT_BYTES:
            raise ProtlmError(f"{path}: larger than any report of protlm eval")
        report = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ProtlmError(f"{path}: cannot be read: {error}") from None
    if not isinstance(report, dict) or not isinstance(report.get("splits"), dict) or not report["splits"]:
        raise ProtlmError(f"{path}: not a report of protlm eval that can be compared; evaluate the model again")
    if report.get("format_version") != FORMAT_VERSION:
        raise ProtlmError(
            f"{path}: format_version: expected {FORMAT_VERSION}, got {report.get('format_version')!r}; evaluate again"
        )
    try:
        _Report.model_validate(report)
    except ValidationError as error:
        raise ProtlmError(f"{path}: damaged: {validation_fault(error)}; evaluate again") from None
    for name, split in report["splits"].items():
        if any(split["scores"]["model"].get(metric) is None for metric in REPLICATED):
            raise ProtlmError(f"{path}: the scores on {name} are no numbers, as of a model that has diverged")
    return report


_Row = dict[str, float | None]


class _Split(BaseModel):
    """The part of a split's report that a comparison reads."""

    num_targets: Annotated[int, Field(gt=0)]
    scores: dict[str, _Row]
    replicates: dict[str, Annotated[list[float | None], Field(min_length=NUM_REPLICATES, max_length=NUM_REPLICATES)]]

    @model_validator(mode="after")
    def _validate_metrics(self) -> Self:
        keys = {f"{metric}{suffix}" for metric in METRICS for suffix in ("", "_stderr", "_low", "_high")}
        if "model" not in self.scores or any(not keys <= row.keys() for row in self.scores.values()):
            raise ValueError("scores: expected a row for the model, and every metric in each row")
        if not set(REPLICATED) <= self.replicates.keys():
            raise ValueError(f"replicates: expected those of {', '.join(REPLICATED)}")
        return self


class _Report(BaseModel):
    """The part of a report that a comparison reads."""

    dataset_hash: str
    seed: int
    num_masks: int
    mask_rate: float
    objective: str
    targets: str
    weights_hash: str
    model_name: str
    num_parameters: int
    splits: dict[str, _Split]


def _report_path(item: Path) -> Path | None:
    if item.is_file():
        return item
    return item / REPORT_NAME if (item / REPORT_NAME).is_file() else None


def _comparison(reports: Sequence[tuple[Path, Mapping[str, Any]]]) -> Comparison:
    (first_path, first), *others = reports
    for path, other in others:
        for key in _SAME:
            if first[key] != other[key]:
                raise ProtlmError(
                    f"{path}: {key} is {other[key]!r}, and {first[key]!r} in {first_path}: other residues were scored; "
                    "evaluate the models on the same dataset with the same options"
                )
    splits = [name for name in first["splits"] if all(name in report["splits"] for _, report in reports)]
    if not splits:
        raise ProtlmError(f"{others[0][0]}: no split in common with {first_path}")
    names = _different_names([str(report["model_name"]) for _, report in reports])
    rows = []
    for split in splits:
        own = first["splits"][split]
        for name, (path, report) in zip(names[1:], others, strict=True):
            other = report["splits"][split]
            if other["num_targets"] != own["num_targets"]:
                raise ProtlmError(f"{path}: other residues of {split} were scored than in {first_path}")
            for metric in REPLICATED:
                value = own["scores"]["model"][metric] - other["scores"]["model"][metric]
                spread = difference(own["replicates"], other["replicates"], metric, value)
                rows.append({"split": split, "first": names[0], "second": name, **spread})
    scores = {
        split: {
            name: report["splits"][split]["scores"]["model"] for name, (_, report) in zip(names, reports, strict=True)
        }
        for split in splits
    }
    baselines = {
        split: {
            key: row for key, row in first["splits"][split]["scores"].items() if key in (*BASELINE_NAMES, "uniform")
        }
        for split in splits
    }
    return Comparison(
        names=names,
        splits=splits,
        scores=scores,
        baselines=baselines,
        differences=rows,
        reports=[dict(report) for _, report in reports],
    )


def _different_names(names: Sequence[str]) -> list[str]:
    """Returns the names with a number behind each that stood before."""
    different: list[str] = []
    for name in names:
        number, candidate = 2, name
        while candidate in different:
            candidate, number = f"{name} ({number})", number + 1
        different.append(candidate)
    return different
