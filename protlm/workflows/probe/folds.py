"""The division of labelled proteins into those to fit, to choose by and to test; a group is never divided."""

import numpy as np

from protlm.data.records import shown
from protlm.errors import ProtlmError
from protlm.inference.linear_probe import Fold
from protlm.workflows.probe.labels import LabelledProteins
from protlm.workflows.probe.request import ProbeRequest
from protlm.workflows.probe.targets import Groups, Targets

_VALID_SHARE = 5
"""One in so many proteins of a given training set selects, where it names no `valid` proteins; and one in so many of
the rows that a fit may take."""
_UNEVEN = 1.5
"""So many times as many proteins as a fold should have make it uneven."""
_LEAST_SAMPLED = 2
"""Rows of each class, where there are as many, that a sample to fit has at least."""


class Folds:
    """The folds of a run.

    Attributes:
        is_given: Whether the labels name the split.
        num_shared: Of a given split, proteins to test whose sequence is also fitted.
        num_related: Of a given split, further ones of whose cluster a protein is fitted.
        largest: Proteins of the largest group, where drawn folds cannot be even for it; else 0.
    """

    def __init__(self, request: ProbeRequest, labelled: LabelledProteins, targets: Targets, groups: Groups) -> None:
        """Takes the proteins and their groups."""
        self._request, self._targets, self._groups = request, targets, groups.numbers
        self._splits = np.array(labelled.splits)
        self.is_given = bool(any(labelled.splits))
        self.num_shared = self.num_related = self.largest = 0
        if not self.is_given:
            proteins = np.unique(targets.proteins)
            largest = int(np.bincount(groups.numbers[proteins]).max())
            self.largest = largest if largest > _UNEVEN * len(proteins) / request.num_folds else 0
        if self.is_given:
            proteins = np.unique(targets.proteins)
            is_test = self._splits[proteins] == "test"
            first = np.asarray(labelled.proteins.first)[proteins]
            is_shared = np.isin(first[is_test], first[~is_test])
            numbers = groups.numbers[proteins]
            self.num_shared = int(is_shared.sum())
            self.num_related = int((np.isin(numbers[is_test], numbers[~is_test]) & ~is_shared).sum())

    def of_seed(self, seed: int) -> list[Fold]:
        """Returns the folds of rows that a seed draws.

        Raises:
            ProtlmError: Too few groups, or labels to fit or to test from which nothing can be learned.
        """
        folds = []
        for number, proteins in enumerate(self._given(seed) if self.is_given else self._drawn(seed)):
            generator = np.random.Generator(np.random.PCG64([seed, number]))
            train, valid, test = map(self._targets.rows_of, proteins)
            most = self._request.most_rows
            fold = Fold(
                self._sample(train, generator, most - most // _VALID_SHARE),
                self._sample(valid, generator, most // _VALID_SHARE),
                test,
            )
            self._check(fold)
            folds.append(fold)
        return folds

    def _sample(self, rows: np.ndarray, generator: np.random.Generator, most: int) -> np.ndarray:
        """Returns a sample of so many rows, or of more if those are needed for some of each class."""
        if len(rows) <= most:
            return rows
        shuffled = generator.permutation(rows)
        if self._targets.is_regression:
            return np.sort(shuffled[:most])
        # The number of each row among those of its class, in the order of the shuffle: the first ones come first.
        order = np.argsort(self._targets.values[shuffled], kind="stable")
        _, starts, counts = np.unique(self._targets.values[shuffled][order], return_index=True, return_counts=True)
        place = np.empty(len(rows), dtype=np.int64)
        place[order] = np.arange(len(rows)) - np.repeat(starts, counts)
        is_needed = place < _LEAST_SAMPLED
        num_others = max(0, most - int(is_needed.sum()))
        return np.sort(np.concatenate([shuffled[is_needed], shuffled[~is_needed][:num_others]]))

    def _given(self, seed: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        labelled = np.unique(self._targets.proteins)
        train, valid, test = (labelled[self._splits[labelled] == name] for name in ("train", "valid", "test"))
        if not len(train) or not len(test):
            raise ProtlmError(f"{self._request.labels}: no label is left in train or in test; see --min-class-size")
        if not len(valid):
            if len(np.unique(self._groups[train])) < _VALID_SHARE:
                raise ProtlmError(
                    f"{self._request.labels}: expected at least {_VALID_SHARE} different proteins or clusters in "
                    "train, of which some select, got fewer; add some, or name some as valid"
                )
            parts = self._divided(train, _VALID_SHARE, seed)
            valid, train = parts[0], np.sort(np.concatenate(parts[1:]))
        return [(train, valid, test)]

    def _drawn(self, seed: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        count, proteins = self._request.num_folds, np.unique(self._targets.proteins)
        if (num_groups := len(np.unique(self._groups[proteins]))) < count:
            raise ProtlmError(
                f"{self._request.labels}: expected at least {count} different proteins or clusters to divide, got "
                f"{num_groups}; lower --folds, or name a split for each protein"
            )
        parts = self._divided(proteins, count, seed)
        return [
            (
                np.sort(np.concatenate([parts[(number + step) % count] for step in range(2, count)])),
                parts[(number + 1) % count],
                parts[number],
            )
            for number in range(count)
        ]

    def _divided(self, proteins: np.ndarray, count: int, seed: int) -> list[np.ndarray]:
        """Returns a division of proteins into parts, by groups; classes of proteins are spread evenly.

        The largest groups first, each goes to the part where the shares of its classes become most even, rare classes
        as much as frequent ones, and of equal parts to the one with fewest proteins.
        """
        strata = np.zeros(len(proteins), dtype=np.int64)
        if self._targets.task == "classification":
            strata = self._targets.values[np.searchsorted(self._targets.proteins, proteins)]
        _, groups = np.unique(self._groups[proteins], return_inverse=True)
        members = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
        generator = np.random.Generator(np.random.PCG64([seed, 0]))
        order = generator.permutation(len(members))
        order = order[np.argsort([-len(members[group]) for group in order.tolist()], kind="stable")]
        totals = np.bincount(strata).astype(np.float64)
        of_class, sizes = np.zeros((len(totals), count)), np.zeros(count)
        part_of = np.empty(len(proteins), dtype=np.int64)
        for group in order.tolist():
            classes, counts = np.unique(strata[members[group]], return_counts=True)
            # By how much the sum of the squares of the shares grows, up to what is the same for all parts.
            growth = (of_class[classes] * counts[:, None] / totals[classes, None] ** 2).sum(axis=0)
            part = int(np.lexsort((generator.random(count), sizes, np.round(growth, 12)))[0])
            of_class[classes, part] += counts
            sizes[part] += counts.sum()
            part_of[members[group]] = part
        return [proteins[part_of == part] for part in range(count)]

    def _check(self, fold: Fold) -> None:
        """Raises ProtlmError if nothing can be learned from the rows to fit, or nothing measured on those to test."""
        values, names = self._targets.values, self._targets.classes
        for rows, use in ((fold.train, "fit"), (fold.test, "test")):
            # Of several folds one may well have proteins to test of a single class.
            if len(rows) and (len(np.unique(values[rows])) > 1 or (use == "test" and not self.is_given)):
                continue
            first = values[rows][0] if len(rows) else 0
            value = f"{first:g}" if self._targets.is_regression else shown(names[int(first)])
            raise ProtlmError(
                f"{self._request.labels}: expected different labels to {use}, got "
                f"{f'{value} alone' if len(rows) else 'none'}; choose another split, or other folds with --folds or "
                "--seed"
            )
        if self._targets.is_regression:
            return
        unknown = np.setdiff1d(values[fold.test], np.concatenate([values[fold.train], values[fold.valid]]))
        if len(unknown):
            of_class = values == unknown[0]
            count = int((of_class[fold.test]).sum())
            num_groups = len(np.unique(self._groups[self._targets.proteins[of_class]]))
            others = f" and {len(unknown) - 1:,} more classes" if len(unknown) > 1 else ""
            where = "in the test split" if self.is_given else "in one fold"
            name = names[int(unknown[0])]
            step = "remove it, or leave out rare classes with --min-class-size"
            if self._targets.task == "per-residue":
                step = f"leave it out with --ignore {name!r}"
            elif num_groups == 1 and count > 1:
                step = "all are of one cluster, or have the same sequence: remove it"
            elif num_groups > 1 and not self.is_given:
                step += ", or draw others with --seed"
            raise ProtlmError(
                f"{self._request.labels}: class {shown(name)}{others} occurs only {where} ({count:,} times), so that "
                f"nothing can learn it; {step}"
            )
