"""The order in which records are drawn: hides how an endless run is divided into epochs, and its random generators.

Every epoch is a function of the seed and its number. The generators are Philox; their key is the seed and a number, and
their counter holds the purpose of the random numbers:

| last word of the counter | second number of the key | purpose |
|---|---|---|
| 0 | draw in the whole run | crop and masks of one protein (`masking.training_generator`) |
| 1 | epoch | order of an epoch, then the member drawn from each cluster |
| 2 | block of permutations | order of one dataset of several, whose number is the word before the last |
"""

from collections.abc import Sequence
from typing import Self

import numpy as np

from protlm.config import DataConfig
from protlm.data.storage.mixture import Mixture
from protlm.errors import ConfigError

_EPOCH, _WALK = 1, 2

# A small dataset may be permuted many times an epoch. At least so many draws are made with one generator, since making
# one costs as much as a thousand draws.
_BLOCK_DRAWS = 4096


class Draws:
    """The endless sequence of draws of a training run, arranged in epochs of equal size.

    A unit is a record, or a cluster, of which a random member is drawn. Without weights an epoch is a permutation of
    all units. With weights it has the same number of draws, divided among the datasets; each dataset goes through one
    permutation of its units after the other, regardless of where epochs end, and an epoch shuffles the draws of all.

    Attributes:
        seed: Seed of the run.
        num_draws: Number of draws of an epoch.
    """

    def __init__(
        self, num_units: Sequence[int], seed: int, *, weights: Sequence[float] = (), clusters: np.ndarray | None = None
    ) -> None:
        """Creates the draws of units that are numbered from 0, dataset after dataset.

        Args:
            num_units: Number of units of each dataset.
            seed: Seed of the run, below 2⁶⁴.
            weights: Relative number of draws from each dataset; if empty, every unit is drawn once an epoch.
            clusters: The unit of each record, int64 (records); None: the records are the units.

        Raises:
            ValueError: There is no unit.
            ConfigError: The weights do not fit the datasets.
        """
        self.seed = seed
        self.num_draws = sum(num_units)
        if not self.num_draws:
            raise ValueError("num_units: expected at least one record, got none")
        self._num_units = tuple(num_units)
        self._shares = _shares(weights, self._num_units) if weights else None
        self._clusters = None if clusters is None else _Clusters(clusters)

    @classmethod
    def of(cls, mixture: Mixture, config: DataConfig, seed: int) -> Self:
        """Returns the draws that a configuration asks for.

        Raises:
            ConfigError: data.weights does not fit the datasets.
            ShardError: data.sample is `clusters` and a dataset has none.
        """
        if config.sample == "records":
            return cls(mixture.sizes, seed, weights=config.weights)
        clusters = mixture.cluster_numbers()
        ends = np.cumsum(mixture.sizes)
        # Clusters are numbered split after split.
        num_until = [int(clusters[:end].max()) + 1 for end in ends]
        return cls(np.diff(num_until, prepend=0).tolist(), seed, weights=config.weights, clusters=clusters)

    def epoch(self, number: int) -> np.ndarray:
        """Returns the records of an epoch in the order in which they are drawn, int64 (num_draws,)."""
        generator = self._generator(_EPOCH, number)
        if self._shares is None:
            units = generator.permutation(self.num_draws)
        else:
            units = self._weighted_units(number)
            generator.shuffle(units)
        return units if self._clusters is None else self._clusters.random_members(units, generator)

    def _weighted_units(self, epoch: int) -> np.ndarray:
        assert self._shares is not None
        walks, first_unit = [], 0
        for dataset, (num_units, share) in enumerate(zip(self._num_units, self._shares, strict=True)):
            walks.append(first_unit + self._walk(dataset, num_units, epoch * share, (epoch + 1) * share))
            first_unit += num_units
        return np.concatenate(walks)

    def _walk(self, dataset: int, num_units: int, start: int, stop: int) -> np.ndarray:
        """Returns draws start to stop from the endless sequence of permutations of one dataset."""
        passes = -(-_BLOCK_DRAWS // num_units)
        block_size = passes * num_units
        first, last = start // block_size, (stop - 1) // block_size
        ordered = np.broadcast_to(np.arange(num_units), (passes, num_units))
        blocks = [
            self._generator(_WALK, block, dataset).permuted(ordered, axis=1).ravel() for block in range(first, last + 1)
        ]
        return np.concatenate(blocks)[start - first * block_size : stop - first * block_size]

    def _generator(self, purpose: int, number: int, dataset: int = 0) -> np.random.Generator:
        key = np.array([self.seed, number], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, dataset, purpose], np.uint64)))


class _Clusters:
    """The records of each cluster, for drawing members."""

    def __init__(self, clusters: np.ndarray) -> None:
        # All records, cluster after cluster, and where each cluster starts among them.
        self._records = np.argsort(clusters, kind="stable")
        self._sizes = np.bincount(clusters)
        self._starts = np.cumsum(self._sizes) - self._sizes

    def random_members(self, clusters: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Returns one record of each of these clusters, every member equally likely."""
        records: np.ndarray = self._records[self._starts[clusters] + generator.integers(self._sizes[clusters])]
        return records


def _shares(weights: Sequence[float], num_units: Sequence[int]) -> tuple[int, ...]:
    """Returns the number of draws of an epoch from each dataset: in proportion to the weights, by largest remainder.

    Raises:
        ConfigError: There are not as many weights as datasets, or a weight is too small for a single draw.
    """
    if len(weights) != len(num_units):
        raise ConfigError(f"data.weights: expected one a dataset, {len(num_units)}, got {len(weights)}")
    total = sum(num_units)
    # Divided by the largest first, so that no sum of large weights overflows.
    scaled = np.asarray(weights) / max(weights)
    exact = scaled / scaled.sum() * total
    shares = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(shares - exact, kind="stable")
    shares[by_remainder[: total - int(shares.sum())]] += 1
    if not shares.all():
        number = int(np.argmin(shares))
        raise ConfigError(
            f"data.weights: expected a draw from every dataset, got none of the {total} of an epoch from dataset "
            f"{number + 1} with weight {weights[number]:g}; raise it, or leave that dataset out"
        )
    return tuple(shares.tolist())
