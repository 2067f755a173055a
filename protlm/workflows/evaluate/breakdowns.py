"""Where a model is good and where not: the scores of a split by residue, length, position and label.

Each breakdown is a few sums a group, gathered from the stream of scores; those by residue, length and position also for
every replicate of the bootstrap. Memory is bounded: of more labels than `MOST_LABELS` the first ones are kept, and all
others counted together.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from protlm.data.storage.dataset import Split
from protlm.inference.blosum import STANDARD_RESIDUES, compare_with_blosum62
from protlm.inference.metrics import FEWEST_UNITS, NUM_REPLICATES, Resampled, estimate, replicated
from protlm.inference.residue_scores import ResidueScores
from protlm.vocabulary import FIRST_RESIDUE, NUM_RESIDUES, RESIDUES

LENGTH_STARTS = (1, 50, 100, 200, 400, 800, 1600, 3200, 6400)
"""Where the bins of length begin, in residues; the last one has no end."""
DISTANCE_STARTS = (0, 1, 2, 3, 5, 10, 20, 50, 100, 200)
"""Where the bins of distance from an end of the protein begin, in residues."""
MOST_LABELS = 10_000
LISTED_LABELS = 100
"""Labels in a report, those with the most scored residues."""
OTHER_LABELS = "(others)"

_RESIDUE_COLUMNS = slice(FIRST_RESIDUE, FIRST_RESIDUE + NUM_RESIDUES)


def _bin_names(starts: Sequence[int]) -> list[str]:
    ends = [*starts[1:], None]
    names = []
    for start, end in zip(starts, ends, strict=True):
        names.append(f"{start}+" if end is None else str(start) if end == start + 1 else f"{start}-{end - 1}")
    return names


LENGTH_BIN_NAMES = _bin_names(LENGTH_STARTS)
"""The bins of length in a report, from short to long."""


class _Groups:
    """Scored residues, negative log likelihood and correct predictions, summed by group, and so for every replicate."""

    def __init__(self, num_groups: int) -> None:
        self.sums = np.zeros((num_groups, 3))
        self._replicates = np.zeros((NUM_REPLICATES, num_groups, 3))
        self._units: list[set[bytes]] = [set() for _ in range(num_groups)]

    def add(
        self, groups: np.ndarray, nll: np.ndarray, correct: np.ndarray, places: np.ndarray, resampled: Resampled
    ) -> None:
        """Adds the targets of a row: the group of each, what it adds, and the place of its protein in `resampled`."""
        shape = (len(resampled.records), len(self.sums))
        cells = places * shape[1] + groups
        columns = [
            np.bincount(cells, weights=weights, minlength=shape[0] * shape[1]).reshape(shape)
            for weights in (np.ones(len(nll)), nll, correct)
        ]
        terms = np.stack(columns, axis=2)
        self.sums += terms.sum(axis=0)
        replicates = replicated(resampled.weights, terms.reshape(shape[0], -1))
        self._replicates += replicates.reshape(self._replicates.shape)
        for group, units in enumerate(self._units):
            if len(units) < FEWEST_UNITS:
                units.update(resampled.keys[place] for place in np.flatnonzero(columns[0][:, group]).tolist())

    def rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Returns a row for each group that has residues, with the uncertainty of its scores."""
        rows = []
        for group, name in enumerate(names):
            if not self.sums[group, 0]:
                continue
            row = _row(name, self.sums[group].tolist())
            with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
                num_targets, nll, correct = self._replicates[:, group].T
                replicates = {"accuracy": correct / num_targets, "perplexity": np.exp(nll / num_targets)}
            for metric, values in replicates.items():
                is_enough = len(self._units[group]) >= FEWEST_UNITS
                spread = estimate(row[metric], values if is_enough else np.full_like(values, np.nan))
                row |= {f"{metric}_{part}": getattr(spread, part) for part in ("stderr", "low", "high")}
            rows.append(row)
        return rows


def _row(name: str, sums: Sequence[float]) -> dict[str, Any]:
    num_targets, nll, correct = sums
    mean = nll / num_targets
    return {
        "name": name,
        "num_targets": round(num_targets),
        "accuracy": correct / num_targets,
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
    }


class _Labels:
    """The same sums by label, with the proteins that bear it; a protein with several labels counts for each."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}

    def add(self, label: str, *terms: float) -> None:
        """Adds scored residues, negative log likelihood, correct predictions and proteins."""
        if label not in self._sums and len(self._sums) >= MOST_LABELS:
            label = OTHER_LABELS
        sums = self._sums.setdefault(label, np.zeros(4))
        sums += terms

    def rows(self) -> list[dict[str, Any]]:
        """Returns the labels with the most scored residues, in that order."""
        ordered = sorted(self._sums.items(), key=lambda item: (-item[1][0], item[0]))
        return [
            {**_row(label, sums[:3].tolist()), "num_proteins": round(float(sums[3]))}
            for label, sums in ordered[:LISTED_LABELS]
        ]

    def __len__(self) -> int:
        return len(self._sums)


class Breakdowns:
    """All breakdowns of one model on one split."""

    def __init__(self, split: Split) -> None:
        """Starts with nothing.

        Args:
            split: The split that is scored, for the lengths and labels of its records.
        """
        self._split = split
        self._residues = _Groups(NUM_RESIDUES)
        self._lengths = _Groups(len(LENGTH_STARTS))
        self._from_start, self._from_end = _Groups(len(DISTANCE_STARTS)), _Groups(len(DISTANCE_STARTS))
        self._labels = {kind: _Labels() for kind in ("family", "cluster", "taxon")}
        # Of each true residue: the sum of the predicted probabilities of all residues, and the predicted residues.
        self._probabilities = np.zeros((NUM_RESIDUES, NUM_RESIDUES))
        self._predictions = np.zeros((NUM_RESIDUES, NUM_RESIDUES), dtype=np.int64)
        # A protein comes again with other masks, or in the next row of windows.
        self._is_scored = np.zeros(split.num_records, dtype=bool)

    def add(self, scores: ResidueScores, resampled: Resampled) -> None:
        """Adds the targets of a row, at least one, and the proteins that they are in."""
        places = np.searchsorted(resampled.records, scores.records)
        nll, correct = -scores.true_log_probabilities(), scores.ranks() == 0
        lengths = self._split.lengths[scores.records]
        residues = scores.residues
        for breakdown, groups in (
            (self._residues, residues),
            (self._lengths, _bins(lengths, LENGTH_STARTS)),
            (self._from_start, _bins(scores.positions, DISTANCE_STARTS)),
            (self._from_end, _bins(lengths - 1 - scores.positions, DISTANCE_STARTS)),
        ):
            breakdown.add(groups, nll, correct, places, resampled)
        predicted = scores.log_probabilities[:, _RESIDUE_COLUMNS]
        cells = residues[:, None] * NUM_RESIDUES + np.arange(NUM_RESIDUES)
        probabilities = np.exp(predicted, dtype=np.float64).ravel()
        self._probabilities += np.bincount(cells.ravel(), probabilities, NUM_RESIDUES**2).reshape(-1, NUM_RESIDUES)
        pairs = residues * NUM_RESIDUES + predicted.argmax(axis=1)
        self._predictions += np.bincount(pairs, minlength=NUM_RESIDUES**2).reshape(-1, NUM_RESIDUES)
        self._add_labels(resampled.records, places, nll, correct)

    def _add_labels(self, members: np.ndarray, places: np.ndarray, nll: np.ndarray, correct: np.ndarray) -> None:
        is_new = ~self._is_scored[members]
        self._is_scored[members] = True
        sums = [np.bincount(places, weights=weights) for weights in (np.ones(len(nll)), nll, correct)] + [is_new]
        for record, *terms in zip(members.tolist(), *(column.tolist() for column in sums), strict=True):
            labels = self._split.labels(record)
            for kind, names in (("family", labels.families), ("cluster", labels.clusters), ("taxon", labels.taxa)):
                for name in names:
                    self._labels[kind].add(name, *terms)

    def report(self) -> dict[str, Any]:
        """Returns every breakdown that has something to show, for report.json."""
        return {
            "residues": self._residues.rows(RESIDUES),
            "lengths": self._lengths.rows(LENGTH_BIN_NAMES),
            "from_n_terminus": self._from_start.rows(_bin_names(DISTANCE_STARTS)),
            "from_c_terminus": self._from_end.rows(_bin_names(DISTANCE_STARTS)),
            **{
                kind: {"num_labels": len(labels), "rows": labels.rows()}
                for kind, labels in self._labels.items()
                if len(labels)
            },
            "confusion": {
                "residues": RESIDUES,
                "mean_probabilities": _rounded(self._probabilities / np.maximum(self._targets(), 1)[:, None]),
                "predictions": self._predictions.tolist(),
            },
            "substitutions": self._substitutions(),
        }

    def _substitutions(self) -> dict[str, Any] | None:
        """Returns which residues are taken for each other, and how far that is what BLOSUM62 says."""
        standard = slice(0, len(STANDARD_RESIDUES))
        log_odds = substitution_log_odds(self._probabilities[standard, standard], self._targets()[standard])
        if log_odds is None:
            return None
        agreement = asdict(compare_with_blosum62(log_odds))
        return {"residues": STANDARD_RESIDUES, "log_odds": _rounded(log_odds), "blosum62": agreement}

    def _targets(self) -> np.ndarray:
        return self._residues.sums[:, 0]


def substitution_log_odds(probabilities: np.ndarray, num_targets: np.ndarray) -> np.ndarray | None:
    """Returns log₂ of how much more often a residue is predicted where another one stands than anywhere, symmetrised.

    None if a residue was not scored, or a pair has no probability.

    Args:
        probabilities: Sums of the predicted probabilities, true residues by predicted ones.
        num_targets: Scored residues of each kind.
    """
    if not (probabilities > 0).all() or not (num_targets > 0).all():
        return None
    anywhere = probabilities.sum(axis=0) / num_targets.sum()
    odds = np.log2(probabilities / num_targets[:, None] / anywhere)
    symmetric: np.ndarray = (odds + odds.T) / 2
    return symmetric


def _rounded(matrix: np.ndarray) -> list[list[float]]:
    # A report for people and plots; seven digits are those of the predictions.
    return [[float(f"{value:.7g}") for value in row] for row in matrix.tolist()]


def _bins(values: np.ndarray, starts: Sequence[int]) -> np.ndarray:
    return np.searchsorted(np.asarray(starts), values, side="right") - 1
