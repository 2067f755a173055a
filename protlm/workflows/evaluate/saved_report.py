"""Reports of `protlm eval` that are read again, perhaps from another machine: hides what is checked in a report.json.

A file that somebody else has made may hold anything. What passes the models of this module can be compared, drawn and
shown: numbers are finite and of a size that can be drawn, names are short and can be printed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from protlm import files
from protlm.choices import SplitName, UsedPrecision
from protlm.errors import ProtlmError, validation_fault
from protlm.inference.metrics import METRICS, NUM_CONFIDENCE_BINS, NUM_REPLICATES
from protlm.vocabulary import RESIDUES
from protlm.workflows.evaluate.breakdowns import LENGTH_BIN_NAMES
from protlm.workflows.evaluate.report import FORMAT_VERSION, REPLICATED

_MOST_REPORT_BYTES = 64 << 20
_MOST_FAULT_LETTERS = 500


def _printable(text: str) -> str:
    """Returns text with a sign in place of each character that a terminal or a page may not show."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


_Word = Annotated[str, Field(max_length=255), AfterValidator(_printable)]
_Count = Annotated[int, Field(ge=0, le=10**18)]
# The square of such a number is finite too, and so are the ends of an axis around it.
_Number = Annotated[float, Field(ge=-1, le=1e100, allow_inf_nan=False)]
_Perplexity = Annotated[_Number, Field(ge=0.5)]
_Replicates = Annotated[list[_Number | None], Field(min_length=NUM_REPLICATES, max_length=NUM_REPLICATES)]

SavedRow = dict[str, _Number | None]
"""A score row: every metric with its standard error and interval."""


class CalibrationBin(BaseModel):
    """A point of the calibration curve; the confidence is None where a model that has diverged gives no number."""

    low: _Number
    num_targets: Annotated[_Count, Field(gt=0)]
    confidence: _Number | None
    accuracy: _Number


class BreakdownRow(BaseModel):
    """The scores of one group of residues; the perplexity is None where it is infinite."""

    name: str
    num_targets: Annotated[_Count, Field(gt=0)]
    accuracy: _Number
    perplexity: _Perplexity | None


class SavedBreakdowns(BaseModel):
    """The breakdowns that a comparison shows, each group once."""

    residues: list[BreakdownRow]
    lengths: list[BreakdownRow]

    @model_validator(mode="after")
    def _validate_names(self) -> Self:
        for key, rows, known in (("residues", self.residues, RESIDUES), ("lengths", self.lengths, LENGTH_BIN_NAMES)):
            names = [row.name for row in rows]
            if len(set(names)) < len(names) or not set(names) <= set(known):
                raise ValueError(f"breakdowns.{key}: expected names of {', '.join(known)}, each at most once")
        return self


class SavedSplit(BaseModel):
    """The part of a split's report that a comparison reads."""

    num_records: _Count
    num_cut: _Count = 0
    num_lacked: _Count = 0
    num_targets: Annotated[_Count, Field(gt=0)]
    resampled: Literal["proteins", "clusters"]
    scores: dict[str, SavedRow]
    calibration: Annotated[list[CalibrationBin], Field(max_length=NUM_CONFIDENCE_BINS)]
    breakdowns: SavedBreakdowns
    replicates: dict[str, _Replicates]

    @model_validator(mode="after")
    def _validate_metrics(self) -> Self:
        keys = {f"{metric}{suffix}" for metric in METRICS for suffix in ("", "_stderr", "_low", "_high")}
        if "model" not in self.scores or any(not keys <= row.keys() for row in self.scores.values()):
            raise ValueError("scores: expected a row for the model, and every metric in each row")
        if any(not _is_drawable(row) for row in self.scores.values()):
            raise ValueError("scores: expected perplexities above 0.5, and no interval that ends before it begins")
        if not set(REPLICATED) <= self.replicates.keys():
            raise ValueError(f"replicates: expected those of {', '.join(REPLICATED)}")
        return self

    @property
    def model(self) -> SavedRow:
        """The scores of the model."""
        return self.scores["model"]

    def value(self, metric: str) -> float:
        """Returns a metric of `REPLICATED` of the model, which is always a number."""
        value = self.model[metric]
        assert value is not None
        return value


def _is_drawable(row: Mapping[str, float | None]) -> bool:
    perplexities = [row[f"perplexity{suffix}"] for suffix in ("", "_low", "_high")]
    if any(value is not None and value < 0.5 for value in perplexities):
        return False
    intervals = [(row[f"{metric}_low"], row[f"{metric}_high"]) for metric in METRICS]
    return all(low is None or high is None or low <= high for low, high in intervals)


class SavedReport(BaseModel):
    """The part of a report that a comparison reads."""

    dataset_hash: _Word
    training_dataset_hash: _Word | None
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    num_masks: _Count
    mask_rate: _Number
    objective: Literal["masked", "next-token"]
    targets: Literal["hidden", "next-token"]
    weights_hash: _Word
    model_name: _Word
    num_parameters: _Count
    attention: _Word
    projection: _Word
    precision: UsedPrecision = "32"
    splits: Annotated[dict[SplitName, SavedSplit], Field(min_length=1)]

    @property
    def is_of_training_dataset(self) -> bool:
        """Whether the model was trained on this very dataset, whose splits hold it apart from what is scored."""
        return self.dataset_hash == self.training_dataset_hash


def read_report(path: Path) -> SavedReport:
    """Returns what a comparison needs of a report.json.

    Raises:
        ProtlmError: It cannot be read, is of another kind or version, or of a model that has diverged.
    """
    try:
        content = json.loads(files.read_regular(path, max_bytes=_MOST_REPORT_BYTES))
    except OSError as error:
        raise ProtlmError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ProtlmError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("splits"), dict) or not content["splits"]:
        raise ProtlmError(f"{path}: not a report of protlm eval that can be compared; evaluate the model again")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ProtlmError(f"{path}: format_version: expected {FORMAT_VERSION}, got {version!r:.99}; evaluate again")
    try:
        report = SavedReport.model_validate(content)
    except ValidationError as error:
        fault = _printable(validation_fault(error))
        raise ProtlmError(f"{path}: damaged: {fault[:_MOST_FAULT_LETTERS]}; evaluate again") from None
    for name, split in report.splits.items():
        if any(split.model[metric] is None for metric in REPLICATED):
            raise ProtlmError(f"{path}: the scores on {name} are no numbers, as of a model that has diverged")
    return report
