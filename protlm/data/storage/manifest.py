"""The manifest of a dataset: its content, and how it is read and written."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from protlm import files, vocabulary
from protlm.choices import SplitMethod, SplitName, Unclustered
from protlm.data.records import Format, Nucleotides, OnBadRecord
from protlm.data.storage.shards import FinishedShard
from protlm.errors import ShardError, validation_fault

FORMAT: Final = "protlm-dataset"
FORMAT_VERSION: Final = 2
MANIFEST_NAME = "manifest.json"
REPORT_NAME = "report.html"
MULTIQC_NAME = "protlm_prep_mqc.json"
REJECTS_NAME = "rejects.tsv"
SHARD_NAME_PATTERN = r"^[a-z]+-[0-9]{5,}\.h5$"
"""Shard names come from a file that anyone may have written: only plain base names of this form are opened."""

LENGTH_QUANTILES: dict[str, float] = {
    "min": 0.0, "p1": 0.01, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99, "max": 1.0,
}  # fmt: skip

LENGTH_BIN_STARTS = tuple(sorted({round(2 ** (step / 4)) for step in range(4 * 17)}))
"""Lower bounds of the bins of the length histograms, four to a doubling; the last bin is open."""

_MOST_MANIFEST_BYTES = 64 << 20
"""That of a dataset of more than 200,000 sources and shards."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
InputRole = Literal["input", "valid", "test", "ood"]
"""The role of an input file: records to split or train on, or a ready-made split."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class SourceSummary(_Strict):
    """The entry of an input file in the manifest; `num_records` counts its good records, before any are left out."""

    model_config = ConfigDict(populate_by_name=True)

    # Two aliases, since type checkers take `alias` for the name of the argument.
    role: InputRole = Field(validation_alias="part", serialization_alias="part")
    name: str
    format: Format
    num_records: Count
    sha256: Digest


class LabelFile(_Strict):
    """A file of clusters, families or splits: its base name and sha256."""

    name: str
    sha256: Digest


class PrepOptions(_Strict):
    """The options of prep that shape the content; an option that did not apply is None."""

    split: Literal[SplitMethod, "ready-made"]
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None
    valid_fraction: Fraction | None
    test_fraction: Fraction | None
    min_length: Annotated[int, Field(ge=1, lt=2**63)]
    max_length: Annotated[int, Field(ge=1, lt=2**63)] | None
    dedupe: bool
    on_bad_record: OnBadRecord
    shard_residues: Annotated[int, Field(ge=1, lt=2**63)]
    ood_families: tuple[str, ...] = ()
    clusters: LabelFile | None = None
    families: LabelFile | None = None
    split_file: LabelFile | None = None
    unclustered: Unclustered | None = None
    nucleotides: Nucleotides = "keep"

    @model_validator(mode="after")
    def _validate_together(self) -> "PrepOptions":
        if (self.valid_fraction or 0.0) + (self.test_fraction or 0.0) >= 1.0:
            raise ValueError("valid_fraction and test_fraction: their sum should be less than 1")
        if self.max_length is not None and self.max_length < self.min_length:
            raise ValueError(f"max_length: {self.max_length} should not be less than min_length, {self.min_length}")
        return self


class ShardSummary(_Strict):
    """The entry of a shard in the manifest."""

    name: Annotated[str, Field(pattern=SHARD_NAME_PATTERN)]
    num_records: Annotated[int, Field(gt=0, lt=2**63)]
    num_residues: Annotated[int, Field(gt=0, lt=2**63)]
    checksum: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class SplitSummary(_Strict):
    """The entry of a split in the manifest."""

    num_records: Count
    num_residues: Count
    residue_counts: dict[str, Count]
    length_quantiles: dict[str, Count]
    length_histogram: tuple[Count, ...]
    shards: tuple[ShardSummary, ...]

    @model_validator(mode="after")
    def _validate_sums(self) -> "SplitSummary":
        if tuple(self.residue_counts) != tuple(vocabulary.RESIDUES):
            raise ValueError(f"residue_counts: expected the letters {vocabulary.RESIDUES} in this order")
        if list(self.length_quantiles) != (list(LENGTH_QUANTILES) if self.num_records else []):
            raise ValueError(f"length_quantiles: expected {', '.join(LENGTH_QUANTILES)}, or none for no records")
        if len(self.length_histogram) != len(LENGTH_BIN_STARTS):
            raise ValueError(f"length_histogram: expected {len(LENGTH_BIN_STARTS)} counts")
        sums = {
            "num_records of the shards": (sum(shard.num_records for shard in self.shards), self.num_records),
            "num_residues of the shards": (sum(shard.num_residues for shard in self.shards), self.num_residues),
            "residue_counts": (sum(self.residue_counts.values()), self.num_residues),
            "length_histogram": (sum(self.length_histogram), self.num_records),
        }
        for name, (total, expected) in sums.items():
            if total != expected:
                raise ValueError(f"{name}: expected a sum of {expected}, got {total}")
        return self


class DuplicatesRemoved(_Strict):
    """Counts of records left out because an earlier record has their sequence, in the same split or in another."""

    within_split: Count
    across_splits: Count


class Contained(_Strict):
    """Count of records of one split whose whole sequence occurs in a longer record of another."""

    inner: SplitName
    outer: SplitName
    num_records: Count


class Shared(_Strict):
    """Count of clusters or families that have records in both of two splits."""

    first: SplitName
    second: SplitName
    num_labels: Count


class Leakage(_Strict):
    """The sequences and labels that splits have in common.

    Attributes:
        exact_duplicates_removed: Records left out because an earlier split has their sequence; none is left.
        substrings: For each pair of splits; None if they were not searched for.
        clusters: For each pair of splits, where clusters are known.
        families: For each pair of splits, where families are known.
    """

    exact_duplicates_removed: Count
    substrings: tuple[Contained, ...] | None
    clusters: tuple[Shared, ...] | None
    families: tuple[Shared, ...] | None


class Manifest(_Strict):
    """The description of a dataset; same input, options, seed and library versions give the same bytes."""

    format: Literal["protlm-dataset"]
    format_version: Literal[2]
    vocabulary: tuple[str, ...]
    sources: tuple[SourceSummary, ...]
    options: PrepOptions
    splits: dict[SplitName, SplitSummary]
    duplicates_removed: DuplicatesRemoved
    leakage: Leakage
    rejects: dict[str, Count]
    repairs: dict[str, Count]
    nucleic_acids: Count = 0

    @model_validator(mode="after")
    def _validate_vocabulary(self) -> "Manifest":
        if self.vocabulary != vocabulary.TOKENS:
            raise ValueError("vocabulary: not the one of this protlm; prepare the dataset again")
        return self


def summarise_split(finished: Sequence[FinishedShard]) -> SplitSummary:
    """Returns the manifest's entry of a split, from its shards in order."""
    residue_counts = sum(
        (shard.residue_counts for shard in finished), start=np.zeros(vocabulary.NUM_RESIDUES, np.int64)
    )
    lengths, counts = _merged_lengths(finished)
    return SplitSummary(
        num_records=int(counts.sum()),
        num_residues=int(residue_counts.sum()),
        residue_counts=dict(zip(vocabulary.RESIDUES, residue_counts.tolist(), strict=True)),
        length_quantiles=_length_quantiles(lengths, counts),
        length_histogram=_length_histogram(lengths, counts),
        shards=tuple(ShardSummary(**dataclasses.asdict(shard.info)) for shard in finished),
    )


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes the manifest into a folder of shards, which makes it a dataset."""
    (directory / MANIFEST_NAME).write_bytes(manifest.model_dump_json(indent=2, by_alias=True).encode() + b"\n")


def is_dataset(directory: Path) -> bool:
    """Returns whether a folder has the manifest of a protlm dataset, of any version."""
    try:
        content = json.loads(_read_manifest(directory))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def read_manifest(directory: Path) -> tuple[Manifest, str]:
    """Returns the manifest of a dataset, and the xxh3-128 of its bytes.

    Raises:
        ShardError: There is no such folder, it is no dataset, or one of another version.
    """
    if not directory.is_dir():
        raise ShardError(f"{directory}: expected a dataset folder, got {'a file' if directory.exists() else 'nothing'}")
    try:
        content = _read_manifest(directory)
    except FileNotFoundError as error:
        raise ShardError(f"{directory}: not a protlm dataset: it has no {MANIFEST_NAME}") from error
    return _parse_manifest(directory / MANIFEST_NAME, content), xxhash.xxh3_128_hexdigest(content)


def _read_manifest(directory: Path) -> bytes:
    return files.read_regular(directory / MANIFEST_NAME, max_bytes=_MOST_MANIFEST_BYTES)


def _parse_manifest(path: Path, content: bytes) -> Manifest:
    try:
        header = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path}: not JSON: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ShardError(f"{path}: not the manifest of a protlm dataset")
    if header.get("format_version") != FORMAT_VERSION:
        raise ShardError(
            f"{path}: format_version: expected {FORMAT_VERSION}, got {str(header.get('format_version'))[:40]}; "
            "prepare the dataset again, or read it with the protlm that wrote it"
        )
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise ShardError(f"{path}: {validation_fault(error)}") from error


def _merged_lengths(finished: Sequence[FinishedShard]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct lengths of the records of some shards, ascending, and the number of records of each."""
    none = np.zeros(0, dtype=np.int64)
    lengths, places = np.unique(np.concatenate([none, *(shard.lengths for shard in finished)]), return_inverse=True)
    counts = np.zeros(len(lengths), dtype=np.int64)
    np.add.at(counts, places, np.concatenate([none, *(shard.length_counts for shard in finished)]))
    return lengths, counts


def _length_quantiles(lengths: np.ndarray, counts: np.ndarray) -> dict[str, int]:
    """Returns for each quantile the smallest length that at least this fraction of the records does not exceed."""
    if not len(lengths):
        return {}
    upto = np.cumsum(counts)
    ranks = [max(1, math.ceil(quantile * int(upto[-1]))) for quantile in LENGTH_QUANTILES.values()]
    return dict(zip(LENGTH_QUANTILES, lengths[np.searchsorted(upto, ranks)].tolist(), strict=True))


def _length_histogram(lengths: np.ndarray, counts: np.ndarray) -> tuple[int, ...]:
    histogram = np.zeros(len(LENGTH_BIN_STARTS), dtype=np.int64)
    np.add.at(histogram, np.searchsorted(LENGTH_BIN_STARTS, lengths, side="right") - 1, counts)
    return tuple(histogram.tolist())
