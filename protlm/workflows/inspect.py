"""What a dataset tells about itself, and whether its bytes are still those that prep wrote."""

from dataclasses import dataclass
from pathlib import Path

from protlm.data.storage import dataset
from protlm.data.storage.dataset import Dataset, Split
from protlm.errors import ShardError
from protlm.runtime.progress import StartProgress, no_progress


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """A split in numbers; the lengths are None for an empty one."""

    num_records: int
    num_residues: int
    median_length: int | None
    p99_length: int | None
    num_shards: int


@dataclass(frozen=True, slots=True)
class DatasetSummary:
    """What is told of a dataset.

    Attributes:
        path: Its folder.
        hash: Its hash, which names its content.
        splits: Counts by split.
        sources: The files that it was made from.
        options: The options that shaped it.
        duplicates_within_split: Records left out because their split has the sequence already.
        duplicates_across_splits: Records left out because an earlier split has their sequence.
        repairs: Letters repaired, by rule.
        rejects: Records left out, by reason.
        leakage: What one split tells of another.
        verified: All bytes were read again and are those that the checksums name.
    """

    path: str
    hash: str
    splits: dict[str, SplitCounts]
    sources: tuple[dataset.SourceSummary, ...]
    options: dataset.PrepOptions
    duplicates_within_split: int
    duplicates_across_splits: int
    repairs: dict[str, int]
    rejects: dict[str, int]
    leakage: dataset.Leakage
    verified: bool


@dataclass(frozen=True, slots=True)
class InspectReport:
    """What `inspect_dataset` found.

    Attributes:
        path: The dataset folder.
        hash: Its hash.
        manifest: What the dataset says about itself.
        verified: All bytes were read again and are those that the checksums name.
    """

    path: str
    hash: str
    manifest: dataset.Manifest
    verified: bool

    @property
    def summary(self) -> DatasetSummary:
        """What is told of the dataset."""
        return summarise(self.path, self.hash, self.manifest, verified=self.verified)


def summarise(path: str, digest: str, manifest: dataset.Manifest, *, verified: bool = False) -> DatasetSummary:
    """Returns what is told of a dataset, from its folder, hash and manifest."""
    return DatasetSummary(
        path=path,
        hash=digest,
        splits={
            name: SplitCounts(
                split.num_records, split.num_residues, split.length_quantiles.get("median"),
                split.length_quantiles.get("p99"), len(split.shards),
            )
            for name, split in manifest.splits.items()
        },
        sources=manifest.sources,
        options=manifest.options,
        duplicates_within_split=manifest.duplicates_removed.within_split,
        duplicates_across_splits=manifest.duplicates_removed.across_splits,
        repairs=dict(manifest.repairs),
        rejects=dict(manifest.rejects),
        leakage=manifest.leakage,
        verified=verified,
    )  # fmt: skip


def inspect_dataset(path: str | Path, *, verify: bool, start_progress: StartProgress = no_progress) -> InspectReport:
    """Reads what a dataset says about itself.

    Args:
        path: The dataset folder.
        verify: Also read every byte of every shard and compare it with the manifest.
        start_progress: Starts the stage `verify` (residues), if there is one.

    Raises:
        ShardError: No dataset, or shards that are missing, damaged, or not those that the manifest lists.
    """
    found = dataset.open_dataset(path)
    if verify:
        _verify(found, start_progress)
    return InspectReport(str(path), found.hash, found.manifest, verify)


def _verify(found: Dataset, start_progress: StartProgress) -> None:
    """Checks all shards before it tells of the first that is damaged and how many others are."""
    faults: list[ShardError] = []
    advance = start_progress("verify", sum(summary.num_residues for summary in found.manifest.splits.values()))
    for name, summary in found.manifest.splits.items():
        for number, shard in enumerate(summary.shards):
            try:
                # A split of its own for each shard, so that its map is gone before the next one is opened.
                Split(found.path, name, summary).shard(number).verify()
            except ShardError as fault:
                faults.append(fault)
            advance(shard.num_residues)
    if faults:
        others = {1: "", 2: "; 1 more shard is damaged"}.get(
            len(faults), f"; {len(faults) - 1} more shards are damaged"
        )
        raise ShardError(f"{faults[0]}{others}; restore from a copy, or prepare the dataset again")
