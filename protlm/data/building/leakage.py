"""Leakage between splits: sequences that are part of longer ones of another split, and labels that both have."""

from collections.abc import Mapping, Sequence
from itertools import chain, combinations, pairwise, permutations
from typing import Literal

import numpy as np
import xxhash

from protlm.choices import SplitName
from protlm.data.building import containment
from protlm.data.splits import SPLIT_NAMES
from protlm.data.storage.manifest import Contained, Leakage, Shared
from protlm.data.storage.shards import ShardReader

LabelColumn = Literal["cluster_id", "family"]
Shards = Sequence[ShardReader]


def look_for_leaks(splits: Mapping[SplitName, Shards], exact_duplicates_removed: int, *, substrings: bool) -> Leakage:
    """Returns the leakage between all pairs of splits that have records.

    Args:
        splits: The shards of each split.
        exact_duplicates_removed: Records left out because an earlier split has their sequence.
        substrings: Also search for sequences that are part of longer ones; this reads all tokens.
    """
    filled = {name: splits[name] for name in SPLIT_NAMES if any(shard.num_records for shard in splits.get(name, ()))}
    shared: dict[LabelColumn, tuple[Shared, ...] | None] = {"cluster_id": None, "family": None}
    for column in shared:
        if any(getattr(shard, column) is not None for shard in chain.from_iterable(filled.values())):
            labels = {name: _label_digests(shards, column) for name, shards in filled.items()}
            shared[column] = tuple(
                Shared(first=first, second=second, num_labels=_num_common(labels[first], labels[second]))
                for first, second in combinations(filled, 2)
            )
    return Leakage(
        exact_duplicates_removed=exact_duplicates_removed,
        substrings=_contained_pairs(filled) if substrings else None,
        clusters=shared["cluster_id"],
        families=shared["family"],
    )


def _contained_pairs(splits: Mapping[SplitName, Shards]) -> tuple[Contained, ...]:
    """Returns the containment in both directions of all pairs; compares each split with all smaller ones at once."""
    counts: dict[tuple[SplitName, SplitName], int] = {}
    waiting = sorted(splits, key=lambda name: containment.num_residues(splits[name]))
    while len(waiting) > 1:
        large = waiting.pop()
        smaller = [splits[name] for name in waiting]
        inside = containment.small_in_large(smaller, splits[large])
        around = containment.large_in_small(splits[large], smaller)
        for name, num_inside, num_around in zip(waiting, inside, around, strict=True):
            counts[name, large], counts[large, name] = num_inside, num_around
    return tuple(
        Contained(inner=inner, outer=outer, num_records=counts[inner, outer])
        for inner, outer in permutations(splits, 2)
    )


def shared_labels(first: Shards, second: Shards, column: LabelColumn) -> int:
    """Returns the number of distinct labels on both sides, compared by xxh3-64; takes 8 bytes of memory a label."""
    return _num_common(_label_digests(first, column), _label_digests(second, column))


def _num_common(first: np.ndarray, second: np.ndarray) -> int:
    return len(np.intersect1d(first, second, assume_unique=True))


def _label_digests(shards: Shards, column: LabelColumn) -> np.ndarray:
    """Returns the xxh3-64 of each distinct label, ascending."""
    digests_by_shard = [np.zeros(0, dtype=np.uint64)]
    for shard in shards:
        strings = getattr(shard, column)
        if strings is None:
            continue
        text, bounds = strings.text.tobytes(), strings.offsets.tolist()
        labels = {text[start:end] for start, end in pairwise(bounds)}
        if column == "family":
            labels = {label for joined in labels for label in joined.split(b";")}
        labels.discard(b"")
        digests = np.fromiter(map(xxhash.xxh3_64_intdigest, labels), dtype=np.uint64, count=len(labels))
        digests_by_shard.append(digests)
    return containment.distinct(np.concatenate(digests_by_shard))


def contained(inner: Shards, outer: Shards) -> int:
    """Returns the number of records of `inner` that are part of a longer record of `outer`.

    Records of fewer than `containment.MIN_LENGTH` residues are not searched for. The count is exact.

    Memory: both sides are read shard by shard; the inner sequences that are searched for at once are bounded, and so
    are the k-mers kept of the outer side. Time is linear in the residues for proteins. Repeats, whose k-mers match in
    many places, cost at most one comparison for each outer residue and each distinct length of inner records, not for
    each pair of records; and no record is searched for after its first match.
    """
    if containment.num_residues(inner) > containment.num_residues(outer):
        return containment.large_in_small(inner, [outer])[0]
    return containment.small_in_large([inner], outer)[0]
