"""The content of report.json: how measurements become rows with their uncertainty, and what they amount to in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from protlm.inference.metrics import METRICS, MetricSums, confidence_bins, metric_values
from protlm.inference.metrics import estimate as estimate_of

FORMAT_VERSION = 2

REPLICATED = ("accuracy", "top5_accuracy", "bits_per_residue", "calibration_error")
"""The metrics whose replicates a report keeps, so that reports can be compared in pairs; perplexity is 2 ** bits."""

ScoreRow = dict[str, float | None]
"""A metric's value under its name, and under `NAME_stderr`, `NAME_low` and `NAME_high` its standard error and 95 %
interval; these are null where there is nothing to resample."""

Replicates = Mapping[str, Sequence[float | None]]
"""The replicates of each metric; None in place of one that is no number, as in a file."""

ROW_NAMES = {
    "model": "model",
    "empirical": "empirical baseline",
    "markov": "Markov, residues before",
    "two_sided": "Markov, both sides",
    "uniform": "uniform",
    "random_weights": "random weights",
    "model_as_trained": "model, as trained",
    "copies": "copies what it sees",
}
"""The rows of the table, in its order; not every report has all of them."""


@dataclass(frozen=True, kw_only=True)
class MarkovSummary:
    """How the Markov baselines were made: their orders, the residues that were counted, and what chose the orders."""

    order: int
    two_sided_order: int | None
    num_residues: int
    chosen_on: str | None


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """The measurements on one split.

    Attributes:
        num_records: Proteins in the split.
        num_cut: Proteins longer than the model's learned positions reach, of which the rest was left out.
        num_lacked: Residues that the model lacks and read as its X or unknown token.
        num_targets: Scored residues, over all masks.
        resampled: What the bootstrap drew, and so what the intervals are over: clusters where the dataset has any.
        scores: A row for the model and each baseline, by the keys of `ROW_NAMES`.
        verdict: What the scores amount to, in one sentence.
        pseudo_perplexity: Scores with one residue hidden at a time, on a sample of `num_proteins`; None if not asked
            for.
        calibration: Per bin of the highest probability: `low`, `num_targets`, `confidence`, `accuracy`.
        breakdowns: Scores by residue, length, position and label; see docs/formats.md.
        replicates: The bootstrap replicates of the model's metrics, by name.
    """

    num_records: int
    num_cut: int
    num_lacked: int = 0
    num_targets: int
    resampled: Literal["proteins", "clusters"]
    scores: dict[str, ScoreRow]
    verdict: str
    pseudo_perplexity: dict[str, Any] | None
    calibration: list[dict[str, float]]
    breakdowns: dict[str, Any]
    replicates: dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """The content of report.json; the keys without a split's name are those of the first split.

    Attributes:
        format_version: Of this report.
        split: The first split that was scored.
        seed: Of the masks and of the bootstrap.
        objective: `masked`, or `next-token` for a causal model, which is scored at every residue.
        targets: `hidden`: every scored residue was hidden from the model; `next-token`: those of a causal model.
        mask_rate: Probability that a residue was hidden; unused by `next-token`.
        num_masks: How often each protein was scored, each time with other masks.
        num_records: Proteins in the split.
        num_cut: Proteins longer than the model's learned positions reach, of which the rest was left out.
        num_targets: Scored residues.
        model: Scores of the model.
        empirical: Scores of the empirical baseline on the same targets.
        verdict: What the scores on the first split amount to.
        splits: Everything that was measured, by split.
        differences: The model between two splits: `first`, `second`, `metric` and the difference first − second.
        attention_maps: The attention maps of some proteins, and the similarity of residues from attention; None where
            none were asked for and no split has the paper's protein, and of a model that has diverged.
        approximation: How near the attention is to exact attention, and the scores with others in its place; None if
            not asked for, and of a model that has diverged.
        markov: How the Markov baseline was made; None if the dataset has no training split.
        model_name: Name of the model's folder, for a reader.
        num_parameters: Trained numbers of the model.
        attention: The kind of attention.
        weights_hash: Of the model.
        dataset_hash: Of the dataset.
        training_dataset_hash: Of the dataset that the model was trained on, or the joint hash of several; None for a
            model that was trained elsewhere.
        projection: `fixed`, `redrawn` or `none`: how the model was trained, and so what its projections mean to it.
        precision: Number type in which the model computed.
    """

    format_version: int = FORMAT_VERSION
    split: str
    seed: int
    objective: Literal["masked", "next-token"]
    targets: Literal["hidden", "next-token"]
    mask_rate: float
    num_masks: int
    num_records: int
    num_cut: int
    num_targets: int
    model: ScoreRow
    empirical: ScoreRow
    verdict: str
    splits: dict[str, SplitReport]
    differences: list[dict[str, Any]] = field(default_factory=list)
    attention_maps: dict[str, Any] | None = None
    approximation: dict[str, Any] | None = None
    markov: MarkovSummary | None
    model_name: str
    num_parameters: int
    attention: str
    weights_hash: str
    dataset_hash: str
    training_dataset_hash: str | None
    projection: str
    precision: str = "32"

    @property
    def is_of_training_dataset(self) -> bool:
        """Whether the model was trained on this very dataset, whose splits hold it apart from what is scored."""
        return self.dataset_hash == self.training_dataset_hash

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain values; None for a number that JSON lacks, such as an infinite perplexity."""
        values: dict[str, Any] = _in_json(asdict(self))
        return values


def score_row(sums: MetricSums) -> ScoreRow:
    """Returns a row of the table: every metric, with its standard error and interval beside it."""
    row: ScoreRow = {}
    for name, estimate in sums.estimates().items():
        row |= {name: estimate.value, f"{name}_stderr": estimate.stderr}
        row |= {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return row


def exact_row(values: Mapping[str, float]) -> ScoreRow:
    """Returns the row of a baseline whose metrics are known without a measurement."""
    unknown = dict.fromkeys(f"{name}_{suffix}" for name in METRICS for suffix in ("stderr", "low", "high"))
    return {**unknown, **values}


def replicates_of(sums: MetricSums) -> dict[str, list[float]]:
    """Returns the replicates that a report keeps, to seven digits."""
    values = metric_values(sums.resampled())
    return {name: [float(f"{value:.7g}") for value in values[name].tolist()] for name in REPLICATED}


def calibration_of(sums: MetricSums) -> list[dict[str, float]]:
    """Returns the calibration curve: for each bin of confidence with residues, confidence and accuracy."""
    return confidence_bins(sums.total)


def difference(first: Replicates, second: Replicates, metric: str, value: float) -> dict[str, Any]:
    """Returns the difference of two models or splits in a metric, with its interval from their replicates.

    Args:
        first: Replicates of the first, by metric.
        second: Replicates of the second; paired where both are of the same proteins.
        metric: One of `REPLICATED`.
        value: The difference itself.
    """
    replicates = [np.array(of[metric], dtype=np.float64) for of in (first, second)]
    estimate = estimate_of(value, replicates[0] - replicates[1])
    return {
        "metric": metric,
        "difference": value,
        "stderr": estimate.stderr,
        "low": estimate.low,
        "high": estimate.high,
    }


def differences_between_splits(splits: Mapping[str, SplitReport]) -> list[dict[str, Any]]:
    """Returns the difference of the model between the first split and each other one, in every replicated metric."""
    (first_name, first), *others = splits.items()
    rows = []
    for name, other in others:
        for metric in REPLICATED:
            value = _number(first.scores["model"][metric]) - _number(other.scores["model"][metric])
            rows.append(
                {"first": first_name, "second": name, **difference(first.replicates, other.replicates, metric, value)}
            )
    return rows


BASELINE_NAMES = {
    "empirical": "the empirical baseline",
    "markov": "the Markov baseline on the residues before",
    "two_sided": "the Markov baseline on both sides",
}
"""The baselines that a model has to beat, in words."""


def verdict_of(split: str, sums: Mapping[str, MetricSums]) -> str:
    """Returns one plain sentence: whether the model knows more than the best of the baselines, beyond the uncertainty.

    On the training split only the empirical baseline counts: a table has counted the very residues that it predicts.

    Args:
        split: The name of the split.
        sums: Of the model and of the baselines.
    """
    own = sums["model"].values()
    if not math.isfinite(own["bits_per_residue"]):
        return f"On {split} the model makes no usable predictions: its perplexity is no number, so it has diverged."
    names = [name for name in BASELINE_NAMES if name in sums and (split != "train" or name == "empirical")]
    best = min(names, key=lambda name: sums[name].values()["bits_per_residue"])
    other = sums[best].values()
    lead = other["bits_per_residue"] - own["bits_per_residue"]
    spread = estimate_of(lead, _bits(sums[best]) - _bits(sums["model"]))
    figures = f"perplexity {own['perplexity']:.2f} against {other['perplexity']:.2f}"
    if spread.low is None or spread.high is None:
        return (
            f"On {split} too few proteins were scored for an interval, so this decides nothing: {figures} of "
            f"{BASELINE_NAMES[best]}."
        )
    if spread.low > 0:
        of_all = ", the best of the baselines" if len(names) > 1 else ""
        return f"On {split} the model beats {BASELINE_NAMES[best]}{of_all}: {figures}."
    if spread.high >= 0:
        return f"On {split} the model cannot be told from {BASELINE_NAMES[best]}: {figures}."
    if best != "empirical" and own["bits_per_residue"] < sums["empirical"].values()["bits_per_residue"]:
        knows = "It knows more than the residue frequencies, and less than a table of counts."
    else:
        knows = "It knows nothing of use about these proteins."
    return f"On {split} the model does not beat {BASELINE_NAMES[best]}: {figures}. {knows}"


def _bits(sums: MetricSums) -> np.ndarray:
    return metric_values(sums.resampled())["bits_per_residue"]


def _in_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _in_json(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_in_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else value
