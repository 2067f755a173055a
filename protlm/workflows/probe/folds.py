"""The division of labelled proteins into those to fit, to choose by and to test; a group is never divided."""

import warnings

import numpy as np

from protlm.data.records import shown
from protlm.errors import ProtlmError
from protlm.inference.linear_probe import Fold
from protlm.workflows.probe.labels import LabelledProteins
from protlm.workflows.probe.request import ProbeRequest
from protlm.workflows.probe.targets import Targets

_VALID_SHARE = 5
"""One in so many groups of a given training set selects, where it names no `valid` proteins."""


class Folds:
    """The folds of a run.

    Attributes:
        is_given: Whether the labels name the split.
        num_shared: Number of proteins to test whose sequence is also fitted, in a given split.
    """

    def __init__(self, request: ProbeRequest, labelled: LabelledProteins, targets: Targets, groups: np.ndarray) -> None:
        """Prepares; `groups` has the number of each protein's group, int64."""
        self._request, self._targets, self._groups = request, targets, groups
        self._splits = np.array(labelled.splits)
        self.is_given = bool(any(labelled.splits))
        is_test = self._splits == "test"
        first = np.asarray(labelled.proteins.first)
        self.num_shared = int(np.isin(first[is_test], first[~is_test]).sum()) if self.is_given else 0

    def of_seed(self, seed: int) -> list[Fold]:
        """Returns the folds of rows that a seed draws.

        Raises:
            ProtlmError: Too few groups, or a class that only rows to test have.
        """
        divided = self._given(seed) if self.is_given else self._drawn(seed)
        folds = []
        for number, (train, valid, test) in enumerate(divided):
            generator = np.random.Generator(np.random.PCG64([seed, number]))
            of_train, of_valid, of_test = map(self._targets.rows_of, (train, valid, test))
            self._check_classes(of_train, of_valid, of_test)
            fitted, chosen_by = self._sample(of_train, generator, 4), self._sample(of_valid, generator, 1)
            folds.append(Fold(fitted, chosen_by, of_test))
        return folds

    def _sample(self, rows: np.ndarray, generator: np.random.Generator, share: int) -> np.ndarray:
        """Returns a sample of rows so large that `share` fifths of the most rows to fit are not exceeded."""
        most = self._request.most_rows * share // 5
        return rows if len(rows) <= most else np.sort(generator.choice(rows, most, replace=False))

    def _given(self, seed: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        labelled = np.unique(self._targets.proteins)
        train, valid, test = (labelled[self._splits[labelled] == name] for name in ("train", "valid", "test"))
        if not len(train) or not len(test):
            raise ProtlmError(f"{self._request.labels}: no label is left in train or in test; see --min-class-size")
        if not len(valid):
            parts = self._divided(train, _VALID_SHARE, seed)
            valid, train = parts[0], np.sort(np.concatenate(parts[1:]))
        return [(train, valid, test)]

    def _drawn(self, seed: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        count = self._request.num_folds
        parts = self._divided(np.unique(self._targets.proteins), count, seed)
        return [
            (
                np.sort(np.concatenate([parts[(number + step) % count] for step in range(2, count)])),
                parts[(number + 1) % count],
                parts[number],
            )
            for number in range(count)
        ]

    def _divided(self, proteins: np.ndarray, count: int, seed: int) -> list[np.ndarray]:
        """Returns a division of proteins into parts, by groups; classes of proteins are spread evenly."""
        from sklearn.model_selection import StratifiedGroupKFold

        groups = self._groups[proteins]
        num_groups = len(np.unique(groups))
        if num_groups < count:
            raise ProtlmError(
                f"{self._request.labels}: expected at least {count} different proteins or clusters to divide, got "
                f"{num_groups}; lower --folds, or name a split for each protein"
            )
        strata = np.zeros(len(proteins), dtype=np.int64)
        if self._targets.task == "classification":
            strata = self._targets.values[np.searchsorted(self._targets.proteins, proteins)]
        with warnings.catch_warnings():
            # Of a class with few proteins; what cannot be learned is an error of ours.
            warnings.filterwarnings("ignore", "The least populated class")
            divider = StratifiedGroupKFold(count, shuffle=True, random_state=seed % 2**32)
            return [proteins[test] for _, test in divider.split(proteins, strata, groups)]

    def _check_classes(self, train: np.ndarray, valid: np.ndarray, test: np.ndarray) -> None:
        values, names = self._targets.values, self._targets.classes
        if self._targets.is_regression:
            if not np.ptp(values[train]):
                raise ProtlmError(f"{self._request.labels}: every label to fit is {values[train][0]:g}")
            return
        to_fit = np.unique(values[np.concatenate([train, valid])])
        unknown = np.setdiff1d(values[test], to_fit)
        if len(unknown):
            count = int((values[test] == unknown[0]).sum())
            rows = "residues" if self._targets.task == "per-residue" else "proteins"
            others = f", and {len(unknown) - 1:,} more classes" if len(unknown) > 1 else ""
            where = "in the test split only" if self.is_given else "in one fold only"
            step = "remove it" if self._targets.task == "per-residue" else "remove it, or raise --min-class-size"
            raise ProtlmError(
                f"{self._request.labels}: class {shown(names[int(unknown[0])])} ({count:,} {rows}{others}) is {where}, "
                f"so that nothing can learn it; {step}"
            )
        if len(np.unique(values[train])) < 2:
            raise ProtlmError(
                f"{self._request.labels}: every label to fit is {shown(names[int(values[train][0])])}, so that there "
                "is nothing to learn"
            )
