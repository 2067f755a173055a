"""A dataset, a folder of shards with a manifest: hides which shard a record is in."""

from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protlm import files, vocabulary
from protlm.choices import SplitName
from protlm.data.records import UNKNOWN
from protlm.data.storage.manifest import MANIFEST_NAME, Manifest, SplitSummary, read_manifest
from protlm.data.storage.shards import ShardReader
from protlm.errors import ShardError


class Dataset:
    """A prepared dataset.

    Attributes:
        path: Its folder.
        manifest: Its description.
        hash: The xxh3-128 of the manifest's bytes; through the checksums in it, a hash of all content.
    """

    def __init__(self, path: Path, manifest: Manifest, digest: str) -> None:
        self.path = path
        self.manifest = manifest
        self.hash = digest

    def split(self, name: str) -> "Split":
        """Returns a split that has records.

        Raises:
            ShardError: The split is empty or does not exist.
        """
        filled = {split: summary for split, summary in self.manifest.splits.items() if summary.num_records}
        for split, summary in filled.items():
            if split == name:
                return Split(self.path, split, summary)
        raise ShardError(f"{self.path}: no records in split {name!r}; it has {', '.join(filled) or 'none'}")


class RecordLabels(NamedTuple):
    """The labels of a record, each kind empty where it is not known.

    Attributes:
        families: Names of its families.
        clusters: The name of its cluster.
        taxa: Its NCBI taxonomy id.
    """

    families: tuple[str, ...]
    clusters: tuple[str, ...]
    taxa: tuple[str, ...]


class Split:
    """The records of one split, by their running number over all its shards; pickles as its path.

    Shards are opened on first use, so every worker process opens its own.

    Attributes:
        directory: The folder of its dataset.
        name: train, valid, test or ood.
        num_records: Number of records.
        summary: Its entry in the manifest.
    """

    def __init__(self, directory: Path, name: SplitName, summary: SplitSummary) -> None:
        self.name = name
        self.num_records = summary.num_records
        self.summary = summary
        self.directory = directory
        # The first running number of each shard.
        self._starts = [0, *accumulate(shard.num_records for shard in summary.shards)][:-1]
        self._shards: list[ShardReader | None] = [None] * len(summary.shards)

    def __len__(self) -> int:
        return self.num_records

    def __reduce__(self) -> tuple[Any, ...]:
        return Split, (self.directory, self.name, self.summary)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Residues of each record, int64 of shape (num_records,)."""
        lengths = np.concatenate([np.diff(self.shard(index).offsets) for index in range(len(self._shards))])
        lengths.flags.writeable = False
        return lengths

    def tokens(self, index: int | np.integer) -> np.ndarray:
        """Returns the residue tokens of a record, read-only uint8 of shape (num_residues,)."""
        if not 0 <= index < self.num_records:
            raise IndexError(f"index: expected 0 to {self.num_records - 1}, got {index}")
        number = bisect_right(self._starts, index) - 1
        return self.shard(number).record_tokens(int(index) - self._starts[number])

    def checked_tokens(self, index: int | np.integer) -> np.ndarray:
        """Returns `tokens` for a use that does not check itself that all of them stand for residues.

        Raises:
            ShardError: One does not; opening a shard does not read them.
        """
        tokens = self.tokens(index)
        if not vocabulary.are_residues(tokens):
            raise ShardError(
                f"{self.directory}: record {index} of {self.name} holds tokens that stand for no residue: a shard is "
                "damaged; prepare the dataset again"
            )
        return tokens

    def id(self, index: int | np.integer) -> str:
        """Returns the id of a record."""
        if not 0 <= index < self.num_records:
            raise IndexError(f"index: expected 0 to {self.num_records - 1}, got {index}")
        number = bisect_right(self._starts, index) - 1
        return self.shard(number).ids[int(index) - self._starts[number]]

    def labels(self, index: int | np.integer) -> RecordLabels:
        """Returns the families, the cluster and the taxon of a record, as far as the dataset has them."""
        if not 0 <= index < self.num_records:
            raise IndexError(f"index: expected 0 to {self.num_records - 1}, got {index}")
        number = bisect_right(self._starts, index) - 1
        shard, place = self.shard(number), int(index) - self._starts[number]
        families = "" if shard.family is None else shard.family[place]
        cluster = "" if shard.cluster_id is None else shard.cluster_id[place]
        taxon = UNKNOWN if shard.taxon_id is None else int(shard.taxon_id[place])
        return RecordLabels(
            families=tuple(families.split(";")) if families else (),
            clusters=(cluster,) if cluster else (),
            taxa=(str(taxon),) if taxon != UNKNOWN else (),
        )

    def open_shards(self) -> None:
        """Opens every shard now, so that a missing or damaged one ends a run before hours of work, not after.

        Raises:
            ShardError: A file is missing, damaged, or not the one in the manifest.
        """
        for number in range(len(self._shards)):
            self.shard(number)

    def shard(self, number: int) -> ShardReader:
        """Returns a shard by its number within the split; opened once, and checked against the manifest.

        Raises:
            ShardError: The file is missing, damaged, not the one in the manifest, or changed since it was opened.
        """
        if (shard := self._shards[number]) is None:
            files.allow_many_open_files()
            expected = self.summary.shards[number]
            shard = ShardReader(self.directory / expected.name)
            for name, got, wanted in (
                ("split", shard.split, self.name),
                ("num_records", shard.num_records, expected.num_records),
                ("num_residues", shard.num_residues, expected.num_residues),
                ("checksum", shard.checksum, expected.checksum),
            ):
                if got != wanted:
                    raise ShardError(f"{shard.path}: {name}: expected {wanted} as in {MANIFEST_NAME}, got {got}")
            self._shards[number] = shard
        else:
            shard.check_unchanged()
        return shard


def open_dataset(path: str | Path) -> Dataset:
    """Opens a dataset that `protlm prep` made; reads only its manifest.

    Raises:
        ShardError: There is no such folder, it is no dataset, or one of another version.
    """
    directory = Path(path)
    return Dataset(directory, *read_manifest(directory))
