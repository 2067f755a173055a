"""How protein files become a dataset, read, cleaned, deduplicated and split; it is there whole or not at all.

Files become pieces (`prep_reading`); the digests of all pieces decide what stays, and the shards are put together
(`prep_building`). What is finished lies in a folder beside the dataset (`prep_folder`), so that a run that was killed,
or the jobs of a cluster, go on from there.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from protlm.choices import SplitMethod
from protlm.data.records import OnBadRecord
from protlm.data.storage import dataset
from protlm.data.storage.shards import DEFAULT_SHARD_RESIDUES
from protlm.runtime.progress import StartProgress, no_progress
from protlm.runtime.workers import Workers
from protlm.workflows.inspect import DatasetSummary, summarise
from protlm.workflows.prep import options as prep_options
from protlm.workflows.prep.building import build_dataset
from protlm.workflows.prep.estimate import Estimate, estimate
from protlm.workflows.prep.folder import (
    PrepFolder,
    check_replaceable,
    finished_before,
    kept_or_removed,
    open_prep_folder,
    put_in_place,
)
from protlm.workflows.prep.options import PrepUsageError
from protlm.workflows.prep.reading import LabelFiles, read_source

_MOST_WORKERS = 64


@dataclass(frozen=True, slots=True)
class PrepReport:
    """What `prepare` made.

    Attributes:
        out: The dataset folder.
        hash: Its hash, which names its content.
        manifest: What the dataset says about itself.
        num_unclustered: Records that no cluster names, where the split is by cluster; each was drawn for itself.
        left_out: Files of an input folder that hold no proteins.
    """

    out: str
    hash: str
    manifest: dataset.Manifest
    num_unclustered: int
    left_out: tuple[str, ...]

    @property
    def summary(self) -> DatasetSummary:
        """What is told of the dataset."""
        return summarise(self.out, self.hash, self.manifest)


@dataclass(frozen=True, slots=True)
class PartReport:
    """What `prepare` read as one part of several.

    Attributes:
        folder: Where it lies until the parts are merged.
        files: The files of this part.
        num_records: Records in them.
    """

    folder: str
    files: tuple[str, ...]
    num_records: int


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    valid_inputs: Sequence[str | Path] = (),
    test_inputs: Sequence[str | Path] = (),
    ood_inputs: Sequence[str | Path] = (),
    split: SplitMethod = "random",
    valid_fraction: float | None = None,
    test_fraction: float | None = None,
    clusters: str | Path | None = None,
    families: str | Path | None = None,
    ood_families: Sequence[str] = (),
    split_file: str | Path | None = None,
    seed: int = 0,
    min_length: int = 1,
    max_length: int | None = None,
    dedupe: bool = True,
    on_bad_record: OnBadRecord = "error",
    shard_residues: int = DEFAULT_SHARD_RESIDUES,
    check_leaks: bool = True,
    workers: int = 1,
    resume: bool = False,
    part: tuple[int, int] | None = None,
    merge: bool = False,
    dry_run: bool = False,
    force: bool = False,
    start_progress: StartProgress = no_progress,
) -> PrepReport | PartReport | Estimate:
    """Turns protein files into a dataset folder.

    Without ready-made splits each sequence is drawn for train, valid or test. With any, `inputs` are the training set.
    A sequence that two splits would share stays in the earlier one of train, valid, test, ood only; where families are
    held out, in ood. Equal input, options and seed give equal bytes, whatever `workers`, `resume`, `part` and `merge`
    are.

    Args:
        inputs: The files to split, or the training set: files, folders, patterns, or `-` for the standard input.
        out: The dataset folder to make. It appears when it is complete, and not at all if anything goes wrong.
        valid_inputs: Ready-made validation set.
        test_inputs: Ready-made test set.
        ood_inputs: Ready-made out-of-distribution set.
        split: `random` draws sequences, `cluster` whole clusters; `family` puts the records of `ood_families` into ood
            and draws the others; `file` does as `split_file` says.
        valid_fraction: Part drawn for validation, by default `prep_options.DEFAULT_FRACTION`.
        test_fraction: Part drawn for the test, by default the same.
        clusters: Tells the clusters of records: MMseqs2 TSV, CD-HIT .clstr or UniRef XML.
        families: Tells the families of records: TSV of id and family.
        ood_families: Families held out, or names of `splits.FAMILY_PRESETS`.
        split_file: Tells the splits of records: TSV of id and split. A record that it does not list is left out.
        seed: Seed of the draw.
        min_length: Shorter sequences are counted as rejects.
        max_length: Longer sequences are counted as rejects; None for no limit.
        dedupe: Keep only the first of equal sequences within a split; across splits that is always so.
        on_bad_record: Stop at a bad record, or count it as a reject and go on.
        shard_residues: Residues after which a new shard begins.
        check_leaks: Look for sequences of one split that are part of longer ones of another.
        workers: Processes that read and write.
        resume: Go on with what an unfinished run left; without any, begin.
        part: Only read the i-th of n parts of the files, (i, n) with i from 1, for a later `merge`.
        merge: Make the dataset from the parts that were read before.
        dry_run: Make nothing; tell from samples what would be made.
        force: Replace a dataset that is there already, or an empty folder; nothing else is ever replaced.
        start_progress: Starts the stages `read` (bytes on disk) and `write` (residues).

    Returns:
        What was made; of a part what was read; of a dry run what is to be expected.

    Raises:
        PrepUsageError: The options contradict each other or lie out of range.
        ProtlmError: A bad record or file, no record left, or an output that is in the way.
    """
    most = max(_MOST_WORKERS, 4 * (os.cpu_count() or 1))
    if not 1 <= workers <= most:
        raise PrepUsageError(f"workers: expected 1 to {most} on this machine, got {workers}")
    found = prep_options.find_inputs(
        {"input": inputs, "valid": valid_inputs, "test": test_inputs, "ood": ood_inputs}, Path(out)
    )
    start = prep_options.start_of(found, resume=resume, part=part, merge=merge)
    # Through a link the folder it leads to is made or replaced, not the link.
    target = Path(os.path.realpath(out))
    if start == "resume" and (done := finished_before(target)) is not None:
        return PrepReport(str(out), done.hash, done.manifest, 0, found.left_out)
    check_replaceable(target, force=force or part is not None)
    labels = prep_options.read_labels(clusters, families, split_file)
    options = prep_options.resolve_options(
        found, labels, split=split, seed=seed, valid_fraction=valid_fraction, test_fraction=test_fraction,
        ood_families=ood_families, min_length=min_length, max_length=max_length, dedupe=dedupe,
        on_bad_record=on_bad_record, shard_residues=shard_residues,
    )  # fmt: skip
    if dry_run:
        return estimate(found, target, on_bad_record=on_bad_record, workers=workers)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = open_prep_folder(target, found.files, _hashes(labels), start, force=force)
    with folder.locked(start), kept_or_removed(folder, start), Workers(workers, labels) as pool:
        if part is not None:
            return _read_part(folder, pool, part, on_bad_record, start_progress)
        if not merge:
            _read(folder, pool, range(len(found.files)), on_bad_record, start_progress)
        manifest, num_unclustered = build_dataset(
            folder, options, prep_options.splits_asked_for(found, options), pool,
            check_leaks=check_leaks, start_progress=start_progress,
        )  # fmt: skip
        digest = dataset.open_dataset(folder.dataset_path).hash
        folder.note_finished(digest)
        put_in_place(folder.dataset_path, target, force=force)
    folder.remove()
    return PrepReport(str(out), digest, manifest, num_unclustered, found.left_out)


def _hashes(labels: LabelFiles) -> dict[str, str | None]:
    named = (("clusters", labels.clusters), ("families", labels.families), ("splits", labels.splits))
    return {name: None if found is None else found.sha256 for name, found in named}


def _read(
    folder: PrepFolder, pool: Workers, numbers: Sequence[int], on_bad_record: OnBadRecord, start_progress: StartProgress
) -> None:
    """Reads the files that were not read before."""
    waiting = [number for number in numbers if folder.finished_source(number) is None]
    advance = start_progress("read", sum(folder.inputs[number].num_bytes for number in waiting))
    for number in waiting:
        read_source(folder, number, pool, on_bad_record, advance)


def _read_part(
    folder: PrepFolder, pool: Workers, part: tuple[int, int], on_bad_record: OnBadRecord, start_progress: StartProgress
) -> PartReport:
    numbers = _files_of_part([given.num_bytes for given in folder.inputs], part)
    _read(folder, pool, numbers, on_bad_record, start_progress)
    finished = [folder.finished_source(number) for number in numbers]
    return PartReport(
        str(folder.path),
        tuple(folder.inputs[number].path for number in numbers),
        sum(source.num_records for source in finished if source is not None),
    )


def _files_of_part(sizes: Sequence[int], part: tuple[int, int]) -> list[int]:
    """Returns the files of one part: dealt out from the largest on, each to the part that has least so far."""
    loads = [0] * part[1]
    found = []
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        least = loads.index(min(loads))
        loads[least] += sizes[number]
        if least == part[0] - 1:
            found.append(number)
    return sorted(found)
