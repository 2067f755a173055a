"""Records of one side that are part of longer ones of another: hides how workers share the search for them.

Each has some of the shards of the large side. Their findings are sets, so it does not matter how shards are divided.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from protlm.data.building import kmer_search
from protlm.data.building.kmer_search import LARGE_INNER, LARGE_OUTER, Shards, distinct
from protlm.data.building.kmers import Level
from protlm.data.storage.shards import LazyShards
from protlm.data.strings import bounds_of
from protlm.runtime.workers import Workers

_Shard = TypeVar("_Shard")

_NONE = np.zeros(0, dtype=np.int64)
_TASKS_PER_WORKER = 2
"""Parts of the large side for each worker; a single worker is two threads."""
_SHARDS_PER_INDEX = 4
"""Least shards of a large outer side in a part: its index takes as long as looking through a few of them."""


@dataclass(frozen=True, slots=True)
class _Search:
    """The search for the records of some inner shards in some outer ones.

    Attributes:
        inner: Path of each inner shard, with the running number of its first record among all inner ones.
        outer: Paths of the outer shards.
        level: The k-mers.
    """

    inner: Sequence[tuple[Path, int]]
    outer: Sequence[Path]
    level: Level

    @property
    def title(self) -> str:
        """The first shard of each side."""
        return f"search for sequences of {self.inner[0][0].name} in {self.outer[0].name}"


def small_in_large(inners: Sequence[Shards], outer: Shards, workers: Workers) -> list[int]:
    """Returns for each inner side the number of its records that are part of a longer outer one.

    Records of fewer than `kmer_search.MIN_LENGTH` residues are not searched for. The count is exact.

    Memory: both sides are read shard by shard; the inner sequences that are searched for at once are bounded, and so
    are the k-mers kept of the outer side. Time is linear in the residues for proteins. Repeats, whose k-mers match in
    many places, cost at most one comparison for each outer residue and each distinct length of inner records, not for
    each pair of records; and a task searches for no record after its first match.

    Args:
        inners: The shards of each inner side.
        outer: The outer shards, which the workers divide.
        workers: The workers.
    """
    sides = [_summaries(side) for side in inners]
    inner = _numbered(list(itertools.chain.from_iterable(sides)))
    bounds = bounds_of([sum(shard.num_records for shard in side) for side in sides])
    if not inner or not outer:
        return [0] * len(inners)
    parts = _divided([shard.path for shard in _summaries(outer)], workers, at_least=_SHARDS_PER_INDEX)
    searches = [_Search(inner, part, level) for level in LARGE_OUTER for part in parts]
    contained = _NONE
    # A record may be contained in several shards.
    for found in workers.in_order(_contained_in_any, searches):
        contained = distinct(np.concatenate([contained, found]))
    counts = np.bincount(np.searchsorted(bounds, contained, side="right") - 1, minlength=len(inners))
    return [int(count) for count in counts]


def large_in_small(inner: Shards, outers: Sequence[Shards], workers: Workers) -> list[int]:
    """Returns for each outer side the number of inner records that are part of a longer one of it.

    As `small_in_large`, but the workers divide the inner shards; and only inner records that share k-mers with an outer
    side are searched for.
    """
    parts = _divided(_numbered(_summaries(inner)), workers)
    contained = [_NONE for _ in outers]
    blocks = _blocks([_summaries(side) for side in outers])
    searches = [_Search(part, [shard.path for _, shard in block], LARGE_INNER) for block in blocks for part in parts]
    sides = [[side for side, _ in block] for block in blocks for _ in parts]
    for of_search, found in zip(sides, workers.in_order(_contained_in_each, searches), strict=True):
        for side, numbers in zip(of_search, found, strict=True):
            contained[side] = distinct(np.concatenate([contained[side], numbers]))
    return [len(numbers) for numbers in contained]


@dataclass(frozen=True, slots=True)
class _Summary:
    """The path and the size of a shard, which thus needs to be opened once."""

    path: Path
    num_records: int
    num_residues: int


def _summaries(shards: Shards) -> list[_Summary]:
    return [_Summary(shard.path, shard.num_records, shard.num_residues) for shard in shards]


def _numbered(shards: Sequence[_Summary]) -> list[tuple[Path, int]]:
    """Returns the path of each shard, with the running number of its first record."""
    firsts = bounds_of([shard.num_records for shard in shards])[:-1].tolist()
    return [(shard.path, first) for shard, first in zip(shards, firsts, strict=True)]


def _divided(shards: Sequence[_Shard], workers: Workers, *, at_least: int = 1) -> list[Sequence[_Shard]]:
    """Returns the shards of a side in so many groups that all workers have some, but each at least so many shards."""
    num_groups = min(max(1, len(shards) // at_least), _TASKS_PER_WORKER * workers.number) if shards else 0
    bounds = [len(shards) * number // max(1, num_groups) for number in range(num_groups + 1)]
    return [shards[start:end] for start, end in itertools.pairwise(bounds)]


def _blocks(sides: Sequence[Sequence[_Summary]]) -> list[list[tuple[int, _Summary]]]:
    """Returns the shards of all sides, each with its side, in groups of about `BLOCK_RESIDUES`."""
    blocks: list[list[tuple[int, _Summary]]] = []
    size = kmer_search.BLOCK_RESIDUES
    for number, shards in enumerate(sides):
        for shard in shards:
            if size >= kmer_search.BLOCK_RESIDUES:
                blocks.append([])
                size = 0
            blocks[-1].append((number, shard))
            size += shard.num_residues
    return blocks


def _contained_in_any(_shared: object, search: _Search) -> np.ndarray:
    """Returns the numbers of the inner records that are part of a longer one of any outer shard."""
    outer = LazyShards(search.outer)
    contained = [
        kmer_search.search(needles, outer, search.level)
        for needles in kmer_search.needles_of(search.inner, None, search.level)
    ]
    return distinct(np.concatenate([_NONE, *contained]))


def _contained_in_each(_shared: object, search: _Search) -> list[np.ndarray]:
    """Returns for each outer shard the numbers of the inner records that are part of a longer one of it."""
    outer = LazyShards(search.outer)
    contained: list[list[np.ndarray]] = [[_NONE] for _ in outer]
    for needles in kmer_search.needles_of(search.inner, kmer_search.kmers_of(outer, search.level), search.level):
        for numbers, shard in zip(contained, outer, strict=True):
            numbers.append(kmer_search.search(needles, [shard], search.level))
    return [distinct(np.concatenate(numbers)) for numbers in contained]
