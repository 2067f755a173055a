"""Leakage between splits: sequences that are part of longer ones of another split, and labels that both have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, pairwise, permutations
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from protlm.choices import SplitName
from protlm.data.building import containment
from protlm.data.building.kmer_search import distinct, num_residues
from protlm.data.splits import SPLIT_NAMES
from protlm.data.storage.manifest import Contained, Leakage, Shared
from protlm.data.storage.shards import ShardReader
from protlm.runtime.workers import Workers

LabelColumn = Literal["cluster_id", "family"]
Shards = Sequence[ShardReader]


@dataclass(frozen=True, slots=True)
class _LabelTask:
    """The labels of a shard in a column."""

    path: Path
    column: LabelColumn

    @property
    def title(self) -> str:
        """The shard and the column."""
        return f"{self.path.name}, {self.column}"


def look_for_leaks(
    splits: Mapping[SplitName, Shards], exact_duplicates_removed: int, workers: Workers, *, substrings: bool
) -> Leakage:
    """Returns the leakage between all pairs of splits that have records.

    Args:
        splits: The shards of each split.
        exact_duplicates_removed: Records left out because an earlier split has their sequence.
        workers: The workers that share the search.
        substrings: Also search for sequences that are part of longer ones; this reads all tokens.
    """
    filled = {name: splits[name] for name in SPLIT_NAMES if any(shard.num_records for shard in splits.get(name, ()))}
    shared: dict[LabelColumn, tuple[Shared, ...] | None] = {"cluster_id": None, "family": None}
    for column in shared:
        if any(getattr(shard, column) is not None for shard in chain.from_iterable(filled.values())):
            labels = {name: _label_digests(shards, column, workers) for name, shards in filled.items()}
            shared[column] = tuple(
                Shared(first=first, second=second, num_labels=_num_common(labels[first], labels[second]))
                for first, second in combinations(filled, 2)
            )
    return Leakage(
        exact_duplicates_removed=exact_duplicates_removed,
        substrings=_contained_pairs(filled, workers) if substrings else None,
        clusters=shared["cluster_id"],
        families=shared["family"],
    )


def _contained_pairs(splits: Mapping[SplitName, Shards], workers: Workers) -> tuple[Contained, ...]:
    """Returns the containment in both directions of all pairs; compares each split with all smaller ones at once."""
    counts: dict[tuple[SplitName, SplitName], int] = {}
    waiting = sorted(splits, key=lambda name: num_residues(splits[name]))
    while len(waiting) > 1:
        large = waiting.pop()
        smaller = [splits[name] for name in waiting]
        inside = containment.small_in_large(smaller, splits[large], workers)
        around = containment.large_in_small(splits[large], smaller, workers)
        for name, num_inside, num_around in zip(waiting, inside, around, strict=True):
            counts[name, large], counts[large, name] = num_inside, num_around
    return tuple(
        Contained(inner=inner, outer=outer, num_records=counts[inner, outer])
        for inner, outer in permutations(splits, 2)
    )


def _num_common(first: np.ndarray, second: np.ndarray) -> int:
    return len(np.intersect1d(first, second, assume_unique=True))


def _label_digests(shards: Shards, column: LabelColumn, workers: Workers) -> np.ndarray:
    """Returns the xxh3-64 of each distinct label, ascending; 8 bytes of memory a label."""
    tasks = [_LabelTask(shard.path, column) for shard in shards]
    return distinct(np.concatenate([np.zeros(0, np.uint64), *workers.in_order(_labels_of_shard, tasks)]))


def _labels_of_shard(_shared: object, task: _LabelTask) -> np.ndarray:
    """Returns the xxh3-64 of each distinct label of a shard, in no order."""
    strings = getattr(ShardReader(task.path), task.column)
    if strings is None:
        return np.zeros(0, dtype=np.uint64)
    text, bounds = strings.text.tobytes(), strings.offsets.tolist()
    labels = {text[start:end] for start, end in pairwise(bounds)}
    if task.column == "family":
        labels = {label for joined in labels for label in joined.split(b";")}
    labels.discard(b"")
    return np.fromiter(map(xxhash.xxh3_64_intdigest, labels), dtype=np.uint64, count=len(labels))
