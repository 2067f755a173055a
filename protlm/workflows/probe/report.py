"""The content of probe.json, and the verdict in words."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from protlm import files
from protlm.inference.metrics import FEWEST_UNITS, Estimate
from protlm.inference.probe_metrics import CLASS_METRICS, VALUE_METRICS, ProbeScores, measure_probes
from protlm.pretrained.model_files import short_name
from protlm.workflows.probe.fits import Fits, layer_name
from protlm.workflows.probe.folds import Folds
from protlm.workflows.probe.labels import LabelledProteins
from protlm.workflows.probe.request import ProbeRequest
from protlm.workflows.probe.targets import Groups, Targets

FORMAT_VERSION = 1

BASELINE_NAMES = {
    "composition": "composition",
    "dipeptides": "composition and dipeptides",
    "one_hot": "one-hot",
    "residue": "the residue alone",
    "window": "one-hot window",
    "random_weights": "random weights",
    "constant": "constant",
}
"""The baselines in words, in the order in which they are shown."""
METRIC_NAMES = {
    "accuracy": "accuracy", "macro_f1": "macro F1", "mcc": "MCC", "spearman": "Spearman", "r2": "R²",
    "mae": "mean absolute error",
}  # fmt: skip
_MOST_CLASSES = 100
_FEW_NUMBERS = 20
"""Whole numbers of so few kinds may well be classes."""


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """What a linear model reads from a model's embeddings.

    Attributes:
        model_name: Name of the model for readers.
        weights_hash: Hash of its weights.
        num_parameters: Its parameters.
        labels: Base name of the file of the labels.
        label: Name of the label.
        task: `classification`, `regression` or `per-residue`.
        num_proteins: Proteins with a label.
        num_rows: Labels: proteins or residues.
        num_tested: Labels that are predicted.
        num_fitted: Most labels that a fit took, those to choose by included.
        split: `given` by the labels, or `folds`.
        num_folds: Number of folds; 1 for a given split.
        seeds: The seeds over which every score is the mean.
        resampled: What the bootstrap draws: `clusters`, or `proteins` of different sequence.
        num_units: How many of them were tested.
        num_unclustered: Proteins without a cluster, each a group of its own; None where no clusters were given.
        metrics: The names of the metrics; the first one decides.
        scores: By the name of the probe, `{metric: {value, stderr, low, high}}`.
        gains: The first metric of the model minus that of each baseline, paired: `{value, stderr, low, high}`.
        best_baseline: The baseline with the highest first metric.
        layers: The layers that were probed.
        chosen: How many folds chose each layer, by its number.
        verdict: In one sentence, whether the model knows more than the best baseline.
        num_classes: Number of classes; 0 for values.
        classes: Name, number of labels, and the share that the model and the best baseline find, for the most frequent
            classes.
        classes_left_out: Number of proteins of each class that was too small.
        warnings: Lines that a reader should not miss.
    """

    model_name: str
    weights_hash: str
    num_parameters: int
    labels: str
    label: str
    task: str
    num_proteins: int
    num_rows: int
    num_tested: int
    num_fitted: int
    split: str
    num_folds: int
    seeds: list[int]
    resampled: str
    num_units: int
    num_unclustered: int | None
    metrics: list[str]
    scores: dict[str, dict[str, Estimate]]
    gains: dict[str, Estimate]
    best_baseline: str
    layers: list[int]
    chosen: dict[str, int]
    verdict: str
    num_classes: int
    classes: list[dict[str, Any]]
    classes_left_out: dict[str, int]
    warnings: list[str]

    @property
    def baselines(self) -> list[str]:
        """The names of the baselines, in the order in which they are shown."""
        return [name for name in BASELINE_NAMES if name in self.scores]

    def to_json(self) -> dict[str, Any]:
        """Returns the content of probe.json; numbers that are not finite are null."""
        content: dict[str, Any] = _in_json({"format_version": FORMAT_VERSION, **asdict(self)})
        return content


def probe_report(
    request: ProbeRequest,
    labelled: LabelledProteins,
    targets: Targets,
    folds: Folds,
    fits: Fits,
    groups: Groups,
) -> ProbeReport:
    """Returns the report of all fits."""
    truth = targets.values[fits.tested]
    tested, units = np.unique(groups.numbers[targets.proteins[fits.tested]], return_inverse=True)
    names = ["model", *map(layer_name, fits.layers), *(name for name in BASELINE_NAMES if name in fits.predictions)]
    scores = measure_probes(
        truth, {name: fits.predictions[name] for name in names}, units,
        [groups.keys[number] for number in tested.tolist()], request.seed, is_regression=targets.is_regression,
        folds=fits.fold_numbers,
    )  # fmt: skip
    baselines = [name for name in BASELINE_NAMES if name in fits.predictions]
    best = max(baselines, key=lambda name: _first_value(scores.metrics[name]))
    metrics = VALUE_METRICS if targets.is_regression else CLASS_METRICS
    return ProbeReport(
        model_name=short_name(request.model),
        weights_hash=fits.description.weights_hash,
        num_parameters=fits.num_parameters,
        labels=files.as_text(request.labels.name),
        label=labelled.name,
        task=targets.task,
        num_proteins=len(np.unique(targets.proteins)),
        num_rows=len(targets.values),
        num_tested=len(fits.tested),
        num_fitted=fits.num_fitted,
        split="given" if folds.is_given else "folds",
        num_folds=1 if folds.is_given else request.num_folds,
        seeds=[request.seed + number for number in range(request.num_seeds)],
        resampled="proteins" if request.clusters is None else "clusters",
        num_units=len(tested),
        num_unclustered=groups.num_unclustered,
        metrics=list(metrics),
        scores=scores.metrics,
        gains={name: scores.gains[name] for name in baselines},
        best_baseline=best,
        layers=list(fits.layers),
        chosen={str(layer): fits.chosen[layer] for layer in fits.layers if fits.chosen[layer]},
        verdict=verdict_of(labelled.name, metrics[0], scores, best, num_units=len(tested)),
        num_classes=len(targets.classes),
        classes=_classes(targets, fits, best),
        classes_left_out=dict(sorted(targets.left_out.items())),
        warnings=_warnings(request, labelled, targets, folds, fits, groups),
    )


def verdict_of(label: str, metric: str, scores: ProbeScores, best: str, *, num_units: int) -> str:
    """Returns in one sentence whether the model knows more than every baseline, beyond the uncertainty.

    It never says that the model knows less: the best of several baselines is the best by chance too.

    Args:
        label: Name of the label.
        metric: The first metric.
        scores: Those of the model and the baselines.
        best: The baseline with the highest score.
        num_units: What the bootstrap drew.
    """
    own, other, gain = scores.metrics["model"][metric], scores.metrics[best][metric], scores.gains[best]
    figures = f"{METRIC_NAMES[metric]} {_number(own.value)} against {_number(other.value)} of {BASELINE_NAMES[best]}"
    if num_units < FEWEST_UNITS or math.isnan(own.value):
        return f"Too few proteins were tested for an interval, so this decides nothing: {figures}."
    if gain.low is None or gain.high is None:
        # It is the same on every draw.
        gain = replace(gain, low=gain.value, high=gain.value)
        difference = f"difference {gain.value:+.3f} on every draw of the proteins".replace("-", "−")
    else:
        difference = f"difference {gain.value:+.3f}, 95 % interval {gain.low:+.3f} to {gain.high:+.3f}"
        difference = difference.replace("-", "−")
    assert gain.low is not None
    assert gain.high is not None
    # A weaker baseline may differ less surely.
    lows = {name: each.value if each.low is None else each.low for name, each in scores.gains.items() if name != best}
    unsure = [name for name, low in lows.items() if low <= 0]
    if gain.low > 0 and not unsure:
        return f"The model knows more about {label} than every baseline: {figures} ({difference})."
    if gain.low > 0:
        listed = ", ".join(BASELINE_NAMES[name] for name in unsure)
        return f"Whether the model adds anything to {listed} cannot be told; {figures} ({difference})."
    if gain.high <= 0:
        return f"The model adds nothing to the baselines: {figures} ({difference})."
    return f"Whether the model adds anything to the baselines cannot be told: {figures} ({difference})."


def _number(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def _first_value(scores: Mapping[str, Estimate]) -> float:
    value = next(iter(scores.values())).value
    return -math.inf if math.isnan(value) else value


def _classes(targets: Targets, fits: Fits, best: str) -> list[dict[str, Any]]:
    """Returns the share of each class that is found, for the most frequent classes."""
    truth = targets.values[fits.tested]
    counts = np.bincount(truth, minlength=len(targets.classes)) if targets.classes else np.zeros(0, dtype=np.int64)
    rows = []
    for number in np.argsort(-counts, kind="stable")[:_MOST_CLASSES].tolist():
        is_class = truth == number
        shares = {
            key: float(np.mean([(predicted[is_class] == number).mean() for predicted in fits.predictions[name]]))
            if is_class.any()
            else math.nan
            for key, name in (("model", "model"), ("best_baseline", best))
        }
        rows.append({"class": targets.classes[number], "num_tested": int(counts[number]), **shares})
    return rows


def _warnings(
    request: ProbeRequest, labelled: LabelledProteins, targets: Targets, folds: Folds, fits: Fits, groups: Groups
) -> list[str]:
    lines = []
    if labelled.num_unlabelled:
        lines.append(f"left out proteins without a label: {labelled.num_unlabelled:,}")
    if labelled.num_unused_masks:
        lines.append(f"masks of proteins without a label: {labelled.num_unused_masks:,}")
    if targets.left_out:
        lines.append(
            f"left out classes of fewer than {request.min_class_size:,} proteins: {len(targets.left_out):,}, with "
            f"{sum(targets.left_out.values()):,} proteins"
        )
    if request.min_class_size > 1 and targets.task != "classification":
        lines.append(f"--min-class-size is for classes of proteins, and has no effect here ({targets.task})")
    if targets.is_regression and request.task == "auto":
        kinds = np.unique(targets.values)
        if len(kinds) <= _FEW_NUMBERS and np.array_equal(kinds, np.round(kinds)):
            lines.append(f"whole numbers of {len(kinds)} kinds are taken as values; --task classification: as classes")
    num_left_out = int(labelled.proteins.lengths.sum()) - len(targets.values)
    if targets.task == "per-residue" and num_left_out:
        lines.append(f"left out residues by --mask or --ignore: {num_left_out:,}")
    if folds.num_shared:
        lines.append(
            f"proteins to test whose very sequence is also in train or valid: {folds.num_shared:,}; every score is "
            "better than it would be on others"
        )
    if folds.num_related:
        lines.append(
            f"further proteins to test with a member of their cluster in train or valid: {folds.num_related:,}; every "
            "score is better than it would be on others"
        )
    if folds.largest:
        lines.append(
            f"the largest cluster, or set of equal sequences, has {folds.largest:,} of "
            f"{len(np.unique(targets.proteins)):,} proteins: folds are uneven, and much of the score may come from "
            "a fit on few"
        )
    if num_contradictions := _num_contradictions(labelled, targets):
        lines.append(f"proteins whose label differs from that of an equal sequence: {num_contradictions:,}")
    if groups.num_unclustered:
        lines.append(
            f"proteins without a cluster: {groups.num_unclustered:,}; each counts as one of its own, so that relatives "
            "of theirs may be fitted"
        )
    if not folds.is_given and groups.num_unclustered is None:
        lines.append(
            "folds divide proteins at random, so that relatives of a tested one may be fitted: scores are those for "
            "new members of known families; give --clusters, or a split, for proteins without relatives"
        )
    if fits.num_unfinished:
        lines.append(f"fits that did not come to their end: {fits.num_unfinished:,}")
    return lines


def _num_contradictions(labelled: LabelledProteins, targets: Targets) -> int:
    if targets.task == "per-residue":
        labels: dict[int, str | float] = dict(enumerate(labelled.labels))
    else:
        labels = dict(zip(targets.proteins.tolist(), targets.values.tolist(), strict=True))
    first = np.asarray(labelled.proteins.first).tolist()
    return sum(labels[record] != labels.get(first[record], labels[record]) for record in labels)


def _in_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _in_json(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_in_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
