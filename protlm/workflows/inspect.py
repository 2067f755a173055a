"""`protlm inspect`: the summary of a dataset, and the check that its bytes are still those that prep wrote."""

from dataclasses import dataclass
from pathlib import Path

from protlm.data.storage import dataset
from protlm.data.storage.dataset import Dataset, Split
from protlm.data.storage.manifest import Leakage, Manifest, PrepOptions, SourceSummary
from protlm.errors import ShardError
from protlm.runtime.progress import StartProgress, no_progress


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitCounts:
    """The counts of a split; the lengths are None for an empty one."""

    num_records: int
    num_residues: int
    median_length: int | None
    p99_length: int | None
    num_shards: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSummary:
    """The summary of a dataset that `prep --json` and `inspect --json` print.

    Attributes:
        path: Its folder.
        hash: Its hash, which identifies its content.
        splits: Counts by split.
        sources: The files that it was made from.
        options: The options that shaped it.
        duplicates_within_split: Records left out because their split has the sequence already.
        duplicates_across_splits: Records left out because an earlier split has their sequence.
        repairs: Letters repaired, by rule.
        rejects: Records left out, by reason.
        nucleic_acids: Records that are nucleic acids, and were kept.
        leakage: Overlaps between splits.
        verified: Whether all bytes were read again and agree with their checksums.
    """

    path: str
    hash: str
    splits: dict[str, SplitCounts]
    sources: tuple[SourceSummary, ...]
    options: PrepOptions
    duplicates_within_split: int
    duplicates_across_splits: int
    repairs: dict[str, int]
    rejects: dict[str, int]
    nucleic_acids: int
    leakage: Leakage
    verified: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectReport:
    """The outcome of `inspect_dataset`.

    Attributes:
        path: The dataset folder.
        hash: Its hash.
        manifest: Its manifest.
        verified: Whether all bytes were read again and agree with their checksums.
    """

    path: str
    hash: str
    manifest: Manifest
    verified: bool

    @property
    def summary(self) -> DatasetSummary:
        """The summary of the dataset."""
        return summarise(self.path, self.hash, self.manifest, verified=self.verified)


def summarise(path: str, digest: str, manifest: Manifest, *, verified: bool = False) -> DatasetSummary:
    """Returns the summary of a dataset from its folder, hash and manifest."""
    return DatasetSummary(
        path=path,
        hash=digest,
        splits={
            name: SplitCounts(
                num_records=split.num_records,
                num_residues=split.num_residues,
                median_length=split.length_quantiles.get("median"),
                p99_length=split.length_quantiles.get("p99"),
                num_shards=len(split.shards),
            )
            for name, split in manifest.splits.items()
        },
        sources=manifest.sources,
        options=manifest.options,
        duplicates_within_split=manifest.duplicates_removed.within_split,
        duplicates_across_splits=manifest.duplicates_removed.across_splits,
        repairs=dict(manifest.repairs),
        rejects=dict(manifest.rejects),
        nucleic_acids=manifest.nucleic_acids,
        leakage=manifest.leakage,
        verified=verified,
    )


def inspect_dataset(path: str | Path, *, verify: bool, start_progress: StartProgress = no_progress) -> InspectReport:
    """Opens a dataset and, with `verify`, reads all of it.

    Args:
        path: The dataset folder.
        verify: Read every byte of every shard and compare the checksums with the manifest.
        start_progress: Starts the stage `verify` (residues), if there is one.

    Raises:
        ShardError: There is no dataset, or a shard is missing, damaged, or not the one in the manifest.
    """
    opened = dataset.open_dataset(path)
    if verify:
        _verify(opened, start_progress)
    return InspectReport(path=str(path), hash=opened.hash, manifest=opened.manifest, verified=verify)


def _verify(opened: Dataset, start_progress: StartProgress) -> None:
    """Reads all shards; the error names the first damaged one and the number of others."""
    faults: list[ShardError] = []
    advance = start_progress("verify", sum(summary.num_residues for summary in opened.manifest.splits.values()))
    for name, summary in opened.manifest.splits.items():
        for number, shard in enumerate(summary.shards):
            try:
                # A new Split for each shard, so that only one memory map is open at a time.
                Split(opened.path, name, summary).shard(number).verify()
            except ShardError as fault:
                faults.append(fault)
            advance(shard.num_residues)
    if faults:
        others = {1: "", 2: "; 1 more shard is damaged"}.get(
            len(faults), f"; {len(faults) - 1} more shards are damaged"
        )
        raise ShardError(f"{faults[0]}{others}; restore from a copy, or prepare the dataset again")
