"""How protein files become a dataset, read, cleaned, deduplicated and split; it is there whole or not at all."""

import contextlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from protlm import vocabulary
from protlm.data import dataset, files, shards
from protlm.data.duplicates import SeenSequences
from protlm.data.records import OnBadRecord, Record, RecordReader, UniqueIds
from protlm.data.splits import SPLIT_NAMES, SplitName, random_split
from protlm.errors import ProtlmError

DEFAULT_FRACTION = 0.01

Part = Literal["input", "valid", "test", "ood"]


class PrepUsageError(ValueError):
    """Options of `prepare` that contradict each other or lie out of range."""


@dataclass(frozen=True, slots=True)
class SplitReport:
    """The size of one split; no median and p99 length if it is empty."""

    num_records: int
    num_residues: int
    median_length: int | None
    p99_length: int | None
    num_shards: int


@dataclass(frozen=True, slots=True)
class PrepReport:
    """What `prepare` made.

    Attributes:
        out: The dataset folder.
        hash: Its hash, which names its content.
        splits: The splits that were asked for, in order.
        duplicates_within_split: Records left out because their split had the sequence before.
        duplicates_across_splits: Records left out because an earlier split had the sequence.
        repairs: Letters repaired, by rule.
        rejects: Records left out, by reason.
    """

    out: str
    hash: str
    splits: Mapping[str, SplitReport]
    duplicates_within_split: int
    duplicates_across_splits: int
    repairs: Mapping[str, int]
    rejects: Mapping[str, int]


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    valid_inputs: Sequence[str | Path] = (),
    test_inputs: Sequence[str | Path] = (),
    ood_inputs: Sequence[str | Path] = (),
    valid_fraction: float | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    min_length: int = 1,
    max_length: int | None = None,
    dedupe: bool = True,
    on_bad_record: OnBadRecord = "error",
    shard_residues: int = shards.DEFAULT_SHARD_RESIDUES,
    force: bool = False,
    progress: Callable[[int], object] | None = None,
) -> PrepReport:
    """Turns protein files into a dataset folder.

    Without ready-made splits each sequence is drawn for train, valid or test. With any, `inputs` are the training set.
    A sequence that two splits would share stays in the earlier one of train, valid, test, ood only. Equal input,
    options and seed give equal bytes.

    Args:
        inputs: The files to split, or the training set.
        out: The dataset folder to make. It appears when it is complete, and not at all if anything goes wrong.
        valid_inputs: Ready-made validation set.
        test_inputs: Ready-made test set.
        ood_inputs: Ready-made out-of-distribution set.
        valid_fraction: Part drawn for validation, by default `DEFAULT_FRACTION`.
        test_fraction: Part drawn for the test, by default `DEFAULT_FRACTION`.
        seed: Seed of the draw.
        min_length: Shorter sequences are counted as rejects.
        max_length: Longer sequences are counted as rejects; None for no limit.
        dedupe: Keep only the first of equal sequences within a split; across splits that is always so.
        on_bad_record: Stop at a bad record, or count it as a reject and go on.
        shard_residues: Residues after which a new shard begins.
        force: Replace a dataset that is there already, or an empty folder; nothing else is ever replaced.
        progress: Called with the number of bytes of each block read from the files.

    Raises:
        PrepUsageError: The options contradict each other or lie out of range.
        ProtlmError: A bad record or file, no training record left, or an output that is in the way.
    """
    parts: dict[Part, Sequence[Path]] = {
        "input": [Path(path) for path in inputs],
        "valid": [Path(path) for path in valid_inputs],
        "test": [Path(path) for path in test_inputs],
        "ood": [Path(path) for path in ood_inputs],
    }
    options = _resolve_options(
        parts,
        seed=seed,
        valid_fraction=valid_fraction,
        test_fraction=test_fraction,
        min_length=min_length,
        max_length=max_length,
        dedupe=dedupe,
        on_bad_record=on_bad_record,
        shard_residues=shard_residues,
    )
    _check_inputs(parts, Path(out))
    with new_dataset_folder(Path(out), force=force) as folder:
        builder = _Builder(folder, options, asked_for=_splits_asked_for(parts, options))
        for part, paths in parts.items():
            builder.read(part, paths, progress)
        manifest = builder.finish()
        dataset.write_manifest(folder, manifest)
        digest = dataset.open_dataset(folder).hash
    return _report(Path(out), digest, manifest)


class _Builder:
    """Carries records from the files into the shards of their splits, and counts what does not get there."""

    def __init__(self, folder: Path, options: dataset.PrepOptions, *, asked_for: Sequence[SplitName]) -> None:
        self._options = options
        self._writers = {
            split: shards.ShardWriter(folder, split, shard_residues=options.shard_residues) for split in asked_for
        }
        self._seen = SeenSequences()
        self._unique_ids = UniqueIds()
        self._sources: list[dataset.SourceSummary] = []
        self._repairs: Counter[str] = Counter()
        self._rejects: Counter[str] = Counter()
        self._within_split = self._across_splits = 0

    def read(self, part: Part, paths: Sequence[Path], progress: Callable[[int], object] | None) -> None:
        """Adds the records of the files of one part."""
        reader = RecordReader(paths, on_bad_record=self._options.on_bad_record, progress=progress)
        for record in reader:
            self._add(record, part)
        self._sources += [dataset.SourceSummary(part=part, name=s.name, sha256=s.sha256) for s in reader.sources]
        self._repairs += reader.repairs
        self._rejects += reader.rejects

    def _add(self, record: Record, part: Part) -> None:
        options = self._options
        length = len(record.sequence)
        if length < options.min_length:
            self._rejects["too_short"] += 1
            return
        if options.max_length is not None and length > options.max_length:
            self._rejects["too_long"] += 1
            return
        residues = record.sequence.encode()
        split = self._split_of(residues, part)
        first = self._seen.first_split(residues, split)
        if first is not None and first != split:
            self._across_splits += 1
        elif first is not None and options.dedupe:
            self._within_split += 1
        else:
            self._writers[split].add(record, self._unique_ids(record.id))

    def _split_of(self, residues: bytes, part: Part) -> SplitName:
        options = self._options
        if part != "input":
            return part
        if options.valid_fraction is None or options.test_fraction is None or options.seed is None:
            return "train"
        return random_split(
            residues,
            seed=options.seed,
            valid_fraction=options.valid_fraction,
            test_fraction=options.test_fraction,
        )

    def finish(self) -> dataset.Manifest:
        """Closes the shards and returns the manifest."""
        for writer in self._writers.values():
            writer.close()
        if not self._writers["train"].lengths:
            rejects = ", ".join(f"{count} {reason}" for reason, count in sorted(self._rejects.items()))
            raise ProtlmError(f"no record is left for training; rejected: {rejects or 'none'}")
        return dataset.Manifest(
            format=dataset.FORMAT,
            format_version=dataset.FORMAT_VERSION,
            vocabulary=vocabulary.TOKENS,
            sources=tuple(self._sources),
            options=self._options,
            splits={split: dataset.summarise_split(writer) for split, writer in self._writers.items()},
            duplicates_removed=dataset.DuplicatesRemoved(
                within_split=self._within_split, across_splits=self._across_splits
            ),
            rejects=dict(sorted(self._rejects.items())),
            repairs=dict(sorted(self._repairs.items())),
        )


@contextlib.contextmanager
def new_dataset_folder(out: Path, *, force: bool) -> Iterator[Path]:
    """Gives a temporary folder beside `out` that takes its place on success, and is gone otherwise, Ctrl-C included.

    Raises:
        ProtlmError: Something is in the way that may not be replaced.
    """
    # Through a link the folder it leads to is replaced, not the link.
    out = out.resolve()
    _check_replaceable(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = files.partial_path(out)
    temporary.mkdir()
    try:
        yield temporary
        if out.exists():
            _check_replaceable(out, force)
            old = files.partial_path(out)
            out.rename(old)
            try:
                temporary.rename(out)
            except BaseException:
                old.rename(out)
                raise
            shutil.rmtree(old)
        else:
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ProtlmError(f"{out}: expected a folder to make or replace, got a file; choose another --out")
    if not force:
        raise ProtlmError(f"{out}: exists already; choose another --out, or replace it with --force")
    entries = sorted(os.listdir(out))
    if entries and not dataset.is_dataset(out):
        raise ProtlmError(f"{out}: not a protlm dataset, so --force does not replace it; choose another --out")
    for entry in entries:
        if entry != dataset.MANIFEST_NAME and not re.search(dataset.SHARD_NAME_PATTERN, entry):
            raise ProtlmError(f"{out}: holds {entry!r}, which is no part of a dataset, so --force does not replace it")


def _resolve_options(
    parts: Mapping[Part, Sequence[Path]],
    *,
    seed: int,
    valid_fraction: float | None,
    test_fraction: float | None,
    **other_options: Any,
) -> dataset.PrepOptions:
    """Fills in what depends on whether the splits are drawn or ready-made, and checks all options."""
    if not parts["input"]:
        raise PrepUsageError("inputs: expected at least one file, got none")
    is_random = not (parts["valid"] or parts["test"] or parts["ood"])
    if not is_random and (valid_fraction is not None or test_fraction is not None):
        raise PrepUsageError("valid_fraction and test_fraction: only without ready-made splits")
    try:
        return dataset.PrepOptions(
            split="random" if is_random else "ready-made",
            seed=seed if is_random else None,
            valid_fraction=(DEFAULT_FRACTION if valid_fraction is None else valid_fraction) if is_random else None,
            test_fraction=(DEFAULT_FRACTION if test_fraction is None else test_fraction) if is_random else None,
            **other_options,
        )
    except ValidationError as error:
        raise PrepUsageError(dataset.first_fault(error)) from error


def _check_inputs(parts: Mapping[Part, Sequence[Path]], out: Path) -> None:
    """Finds a missing file, or an output that would harm an input, before hours of work rather than after."""
    target = out.resolve()
    for paths in parts.values():
        for path in paths:
            if not path.exists():
                raise ProtlmError(f"{path}: no such file")
            if path.is_dir():
                raise ProtlmError(f"{path}: expected a file, got a folder")
            source = path.resolve()
            if source.is_relative_to(target) or target.is_relative_to(source):
                raise ProtlmError(f"{out}: the output and the input {path} lie inside each other; choose another --out")


def _splits_asked_for(parts: Mapping[Part, Sequence[Path]], options: dataset.PrepOptions) -> list[SplitName]:
    asked_for = {
        "train": True,
        "valid": bool(parts["valid"] or options.valid_fraction),
        "test": bool(parts["test"] or options.test_fraction),
        "ood": bool(parts["ood"]),
    }
    return [split for split in SPLIT_NAMES if asked_for[split]]


def _report(out: Path, digest: str, manifest: dataset.Manifest) -> PrepReport:
    return PrepReport(
        out=str(out),
        hash=digest,
        splits={
            name: SplitReport(
                num_records=split.num_records,
                num_residues=split.num_residues,
                median_length=split.length_quantiles.get("median"),
                p99_length=split.length_quantiles.get("p99"),
                num_shards=len(split.shards),
            )
            for name, split in manifest.splits.items()
        },
        duplicates_within_split=manifest.duplicates_removed.within_split,
        duplicates_across_splits=manifest.duplicates_removed.across_splits,
        repairs=manifest.repairs,
        rejects=manifest.rejects,
    )
