"""Several datasets as one: hides which of them a record is in, and how cluster names become numbers."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import xxhash

from protlm.data.storage.dataset import Split
from protlm.data.strings import Strings
from protlm.errors import ShardError

_NO_LABEL = 0


class Mixture:
    """Splits of one or several datasets, in order, under one running number; pickles as their paths.

    Attributes:
        splits: The splits.
        sizes: Number of records of each split.
        num_records: Number of records of all splits.
    """

    def __init__(self, splits: Sequence[Split]) -> None:
        if not splits:
            raise ValueError("splits: expected at least one, got none")
        self.splits = tuple(splits)
        self.sizes = tuple(split.num_records for split in splits)
        self.num_records = sum(self.sizes)
        # The first running number of each split.
        self._starts = [0, *accumulate(self.sizes)][:-1]

    def __len__(self) -> int:
        return self.num_records

    def __reduce__(self) -> tuple[type["Mixture"], tuple[tuple[Split, ...]]]:
        return Mixture, (self.splits,)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Residues of each record, int64 of shape (num_records,)."""
        if len(self.splits) == 1:
            return self.splits[0].lengths
        lengths = np.concatenate([split.lengths for split in self.splits])
        lengths.flags.writeable = False
        return lengths

    @property
    def residue_counts(self) -> dict[str, int]:
        """Count of each residue in all records, by letter."""
        counts: Counter[str] = Counter()
        for split in self.splits:
            counts.update(split.summary.residue_counts)
        return dict(counts)

    def tokens(self, record: int | np.integer) -> np.ndarray:
        """Returns the residue tokens of a record, a read-only uint8 view of its shard of shape (num_residues,)."""
        split, index = self._find(record)
        return split.tokens(index)

    def id(self, record: int | np.integer) -> str:
        """Returns the id of a record; a record of another dataset may have the same."""
        split, index = self._find(record)
        return split.id(index)

    def open_shards(self) -> None:
        """Opens every shard now, so that a missing or damaged one ends a run before hours of work, not after.

        Raises:
            ShardError: A file is missing, damaged, or not the one in its manifest.
        """
        for split in self.splits:
            split.open_shards()

    def cluster_numbers(self) -> np.ndarray:
        """Returns the cluster of each record, int64 (num_records,): numbers from 0 without gaps, split after split.

        Records of one split have equal numbers if and only if their labels are equal (compared by xxh3-64). A record
        without a label is a cluster of its own, and no cluster spans two datasets.

        Raises:
            ShardError: A dataset has no clusters.
        """
        numbers_by_split, num_clusters = [], 0
        for split in self.splits:
            numbers = _cluster_numbers(split)
            numbers_by_split.append(num_clusters + numbers)
            num_clusters += int(numbers.max()) + 1
        return np.concatenate(numbers_by_split)

    def _find(self, record: int | np.integer) -> tuple[Split, int]:
        if not 0 <= record < self.num_records:
            raise IndexError(f"index: expected 0 to {self.num_records - 1}, got {record}")
        number = bisect_right(self._starts, record) - 1
        return self.splits[number], int(record) - self._starts[number]


def _cluster_numbers(split: Split) -> np.ndarray:
    shards = [split.shard(number) for number in range(len(split.summary.shards))]
    if all(shard.cluster_id is None for shard in shards):
        raise ShardError(
            f"{split.directory}: its records have no clusters, which data.sample = 'clusters' needs; prepare it with "
            "--clusters, or set data.sample = 'records'"
        )
    digests = np.concatenate(
        [
            np.full(shard.num_records, _NO_LABEL, np.uint64) if shard.cluster_id is None else _digests(shard.cluster_id)
            for shard in shards
        ]
    )
    is_labelled = digests != _NO_LABEL
    labels, numbers_of_labelled = np.unique(digests[is_labelled], return_inverse=True)
    numbers = np.empty(len(digests), dtype=np.int64)
    numbers[is_labelled] = numbers_of_labelled
    numbers[~is_labelled] = len(labels) + np.arange(len(digests) - len(numbers_of_labelled))
    return numbers


def _digests(labels: Strings) -> np.ndarray:
    """Returns the xxh3-64 of each label, uint64, and `_NO_LABEL` for an empty one."""
    text = labels.text.tobytes()
    bounds = pairwise(labels.offsets.tolist())
    return np.fromiter(
        (xxhash.xxh3_64_intdigest(text[start:end]) if end > start else _NO_LABEL for start, end in bounds),
        dtype=np.uint64,
        count=len(labels),
    )
