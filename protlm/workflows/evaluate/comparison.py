"""The content of comparison.json: several reports in pairs, and in words which model is better.

Reports can be compared if the same residues of the same proteins were hidden in all of them. The bootstrap weights of a
protein are a function of the seed and the protein, so the replicates of two reports belong together one by one, and the
interval of a difference is that of their differences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from protlm.choices import SplitName
from protlm.errors import ProtlmError
from protlm.workflows.evaluate.report import BASELINE_NAMES, REPLICATED, difference
from protlm.workflows.evaluate.saved_report import SavedReport, SavedRow, SavedSplit

_SAME = ("dataset_hash", "seed", "num_masks", "mask_rate", "objective", "targets")


_PRECISION_NAMES = {"32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The content of comparison.json.

    Attributes:
        format_version: Of this file.
        names: The models, in the order given; all different.
        splits: The splits that every report has.
        verdicts: For each split one sentence: which model is better.
        scores: For each split and model its score row.
        baselines: For each split the score rows of the baselines, by their keys in a report.
        differences: The first model against each other one: `split`, `first`, `second`, `metric`, `difference`
            (first − second), `stderr`, `low`, `high`.
        reports: What was read of the reports themselves.
    """

    format_version: int = 1
    names: list[str]
    splits: list[SplitName]
    verdicts: dict[SplitName, str]
    scores: dict[SplitName, dict[str, SavedRow]]
    baselines: dict[SplitName, dict[str, SavedRow]]
    differences: list[dict[str, Any]]
    reports: list[SavedReport]

    def limits(self) -> list[str]:
        """Returns a sentence for each model and split of which not all was read as it is, or in other numbers."""
        sentences = []
        precisions = {report.precision for report in self.reports}
        for name, report in zip(self.names, self.reports, strict=True):
            if len(precisions) > 1:
                sentences.append(f"{name} computed in {_PRECISION_NAMES[report.precision]}.")
            for split in self.splits:
                measured = report.splits[split]
                if measured.num_cut:
                    sentences.append(
                        f"{name} reaches only the beginning of {measured.num_cut:,} of the {measured.num_records:,} "
                        f"proteins on {split}; the rest of each was left out."
                    )
                if measured.num_lacked:
                    sentences.append(
                        f"{name} has no token for {measured.num_lacked:,} residues on {split}, and reads them as X or "
                        "unknown."
                    )
        return sentences

    def to_json(self) -> dict[str, Any]:
        """Returns the comparison as plain values, without the reports."""
        return {
            "format_version": self.format_version,
            "models": [
                {
                    "name": name,
                    "weights_hash": report.weights_hash,
                    "num_parameters": report.num_parameters,
                    "precision": report.precision,
                    "num_cut": {split: report.splits[split].num_cut for split in self.splits},
                    "num_lacked": {split: report.splits[split].num_lacked for split in self.splits},
                }
                for name, report in zip(self.names, self.reports, strict=True)
            ],
            "splits": self.splits,
            "verdicts": self.verdicts,
            "scores": self.scores,
            "baselines": self.baselines,
            "differences": self.differences,
        }


def check_related(reports: Sequence[tuple[Path, SavedReport]]) -> None:
    """Raises ProtlmError if other residues were scored in one report than in another."""
    for (first_path, first), (path, other) in pairwise(reports):
        for key in _SAME:
            own, others_own = getattr(first, key), getattr(other, key)
            if own != others_own:
                raise ProtlmError(
                    f"{path}: {key} is {others_own!r}, and {own!r} in {first_path}: other residues were scored; "
                    "evaluate the models on the same dataset with the same options"
                )
        for name in first.splits.keys() & other.splits.keys():
            if first.splits[name].num_targets != other.splits[name].num_targets:
                raise ProtlmError(f"{path}: other residues of {name} were scored than in {first_path}")


def comparison_of(reports: Sequence[tuple[Path, SavedReport]]) -> Comparison:
    """Returns the comparison of reports.

    Args:
        reports: At least two, with their paths.

    Raises:
        ProtlmError: Other residues were scored in one than in another, or they have no split in common.
    """
    check_related(reports)
    (first_path, first), *others = reports
    splits = [name for name in first.splits if all(name in report.splits for _, report in reports)]
    if not splits:
        raise ProtlmError(f"{others[0][0]}: no split in common with {first_path}")
    names = different_names([report.model_name for _, report in reports])
    models = {
        split: {name: report.splits[split] for name, (_, report) in zip(names, reports, strict=True)}
        for split in splits
    }
    return Comparison(
        names=names,
        splits=splits,
        verdicts={split: comparison_verdict(split, models[split]) for split in splits},
        scores={split: {name: measured.model for name, measured in models[split].items()} for split in splits},
        baselines={
            split: {key: row for key, row in first.splits[split].scores.items() if key in (*BASELINE_NAMES, "uniform")}
            for split in splits
        },
        differences=[row for split in splits for row in _differences(split, models[split])],
        reports=[report for _, report in reports],
    )


def _differences(split: str, models: Mapping[str, SavedSplit]) -> list[dict[str, Any]]:
    """Returns the first model minus each other one, in every replicated metric."""
    (first, own), *others = models.items()
    return [
        {"split": split, "first": first, "second": name, **_difference(own, other, metric)}
        for name, other in others
        for metric in REPLICATED
    ]


def _difference(first: SavedSplit, second: SavedSplit, metric: str) -> dict[str, Any]:
    value = first.value(metric) - second.value(metric)
    return difference(first.replicates, second.replicates, metric, value)


def comparison_verdict(split: str, models: Mapping[str, SavedSplit]) -> str:
    """Returns one plain sentence: which model has the fewest bits per residue, and whether that is beyond chance.

    Args:
        split: The name of the split.
        models: What was measured of each model on it, by name.
    """
    best, second = sorted(models, key=lambda name: models[name].value("bits_per_residue"))[:2]
    row = _difference(models[best], models[second], "bits_per_residue")
    figures = " against ".join(_perplexity(models[name]) for name in (best, second))
    both = f"{best} and {second}" + (f", the best of {len(models)} models," if len(models) > 2 else "")
    is_better = f"{best} is better than {second}" + (f", the next of {len(models)} models," if len(models) > 2 else "")
    lead = -row["difference"]
    if any(set(models[name].replicates["bits_per_residue"]) == {None} for name in (best, second)):
        return (
            f"On {split} too few {models[best].resampled} were scored for an interval, so this decides nothing: "
            f"{lead:.3f} bits per residue in favour of {best} over {second}; perplexity {figures}."
        )
    if row["low"] is None and lead == 0:
        return f"On {split} {both} have the same score: perplexity {figures}."
    # Where no resampling changes the difference, it is its own interval.
    low, high = (lead, lead) if row["low"] is None else (-row["high"], -row["low"])
    digits = 3 if max(abs(low), abs(high)) >= 0.01 else 5
    bits, interval = f"{lead:.{digits}f} bits per residue", f"95 % interval {low:.{digits}f} to {high:.{digits}f}"
    if low <= 0 <= high:
        return (
            f"On {split} {both} cannot be told apart: {bits} in favour of {best}, {interval}, which includes 0; "
            f"perplexity {figures}."
        )
    return f"On {split} {is_better} by {bits}, {interval}, which excludes 0; perplexity {figures}."


def _perplexity(measured: SavedSplit) -> str:
    perplexity = measured.model["perplexity"]
    return "infinite" if perplexity is None else f"{perplexity:.2f}"


def different_names(names: Sequence[str]) -> list[str]:
    """Returns the names with a number behind each that stood before."""
    different: list[str] = []
    for name in names:
        number, candidate = 2, name
        while candidate in different:
            candidate, number = f"{name} ({number})", number + 1
        different.append(candidate)
    return different
