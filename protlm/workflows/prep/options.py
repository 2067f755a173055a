"""The request to prep: its files and options, and whether they fit together, before anything is read."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from protlm.choices import SplitMethod, SplitName, Unclustered
from protlm.data import splits
from protlm.data.labels.labels import Labels, read_clusters, read_families, read_splits
from protlm.data.parsing.sources import STDIN, expand_inputs
from protlm.data.records import Nucleotides, OnBadRecord
from protlm.data.storage.manifest import InputRole, LabelFile, PrepOptions
from protlm.data.storage.shards import DEFAULT_SHARD_RESIDUES
from protlm.errors import ProtlmError, UsageError, validation_fault
from protlm.runtime.workers import Scheduler
from protlm.workflows.prep.folder import InputFile, Start
from protlm.workflows.prep.reading import LabelFiles

DEFAULT_FRACTION = 0.01

_PART = re.compile(r"([0-9]{1,6})/([0-9]{1,6})")


@dataclass(frozen=True, kw_only=True)
class PrepRequest:
    """The dataset that is asked for, and how to make it.

    Attributes:
        inputs: The files to split, or the training set: files, folders, patterns, or `-` for the standard input.
        out: The dataset folder to make. It appears when it is complete, and not at all if anything goes wrong.
        valid_inputs: Ready-made validation set.
        test_inputs: Ready-made test set.
        ood_inputs: Ready-made out-of-distribution set.
        split: `random` draws sequences, `cluster` whole clusters; `family` puts the records of `ood_families` into ood
            and draws the others; `file` takes the splits of `split_file`.
        valid_fraction: Fraction of `inputs` drawn for validation, by default `DEFAULT_FRACTION`; beside ready-made
            splits 0, and only where no `valid_inputs` are given.
        test_fraction: Fraction drawn for the test, likewise.
        clusters: File with the clusters of records: MMseqs2 TSV, CD-HIT .clstr or UniRef XML.
        cluster_with: `mmseqs` to make the clusters with MMseqs2, or None.
        cluster_identity: Least sequence identity within its clusters, by default `mmseqs.DEFAULT_IDENTITY`.
        families: File with the families of records: TSV of id and family.
        ood_families: Families held out, or names of `splits.FAMILY_PRESETS`.
        unclustered: Where records without cluster go, in a split by cluster: `random` draws each for itself; None for
            an error.
        split_file: File with the splits of records: TSV of id and split. A record that it does not list is left out.
        seed: Seed of the draw.
        min_length: Shorter sequences are counted as rejects.
        max_length: Longer sequences are counted as rejects; None for no limit.
        dedupe: Keep only the first of equal sequences within a split; across splits that is always so.
        on_bad_record: Stop at a bad record, or count it as a reject and go on.
        nucleotides: Stop at a nucleic acid, count it as a reject, or keep it as if it were a protein.
        shard_residues: Residues after which a new shard begins.
        check_leaks: Look for sequences of one split that are contained in longer ones of another.
        workers: Processes of this machine that read and write.
        scheduler: The Dask cluster whose workers do that instead; None for none.
        resume: Continue an unfinished run; if there is none, begin.
        part: Only read the i-th of n parts of the files, (i, n) with i from 1, for a later `merge`.
        merge: Make the dataset from the parts that were read before.
        dry_run: Make nothing; estimate the outcome from samples.
        force: Replace an existing dataset or an empty folder; nothing else is ever replaced.
    """

    inputs: Sequence[str | Path]
    out: str | Path
    valid_inputs: Sequence[str | Path] = ()
    test_inputs: Sequence[str | Path] = ()
    ood_inputs: Sequence[str | Path] = ()
    split: SplitMethod = "random"
    valid_fraction: float | None = None
    test_fraction: float | None = None
    clusters: str | Path | None = None
    cluster_with: Literal["mmseqs"] | None = None
    cluster_identity: float | None = None
    families: str | Path | None = None
    ood_families: Sequence[str] = ()
    split_file: str | Path | None = None
    unclustered: Unclustered | None = None
    seed: int = 0
    min_length: int = 1
    max_length: int | None = None
    dedupe: bool = True
    on_bad_record: OnBadRecord = "error"
    nucleotides: Nucleotides = "keep"
    shard_residues: int = DEFAULT_SHARD_RESIDUES
    check_leaks: bool = True
    workers: int = 1
    scheduler: Scheduler | None = None
    resume: bool = False
    part: tuple[int, int] | None = None
    merge: bool = False
    dry_run: bool = False
    force: bool = False


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files of a dataset.

    Attributes:
        files: All of them, in the order in which they are read.
        left_out: Files of a folder that hold no proteins.
    """

    files: tuple[InputFile, ...]
    left_out: tuple[str, ...]

    def has(self, role: InputRole) -> bool:
        """Returns whether files were given in this role."""
        return any(input_file.role == role for input_file in self.files)


def find_inputs(request: PrepRequest) -> Inputs:
    """Returns the files to read; a missing one, or one that the output would harm, is an error before hours of work.

    Raises:
        ProtlmError: A file is missing, or a file and the output lie inside each other.
    """
    by_role: dict[InputRole, Sequence[str | Path]] = {
        "input": request.inputs,
        "valid": request.valid_inputs,
        "test": request.test_inputs,
        "ood": request.ood_inputs,
    }
    input_files: list[InputFile] = []
    left_out: list[str] = []
    for role, inputs in by_role.items():
        expanded = expand_inputs(inputs)
        input_files += [InputFile(role, path) for path in expanded.paths]
        left_out += expanded.left_out
    out = Path(request.out)
    target = Path(os.path.realpath(out))
    given = [str(path) for inputs in by_role.values() for path in inputs]
    for path in [input_file.path for input_file in input_files] + given:
        source = Path(os.path.realpath(path))
        if path != STDIN and (source.is_relative_to(target) or target.is_relative_to(source)):
            raise ProtlmError(f"{out}: the output and the input {path} lie inside each other; choose another --out")
    if sum(input_file.path == STDIN for input_file in input_files) > 1:
        raise UsageError("inputs: the standard input, -, can be read only once")
    return Inputs(tuple(input_files), tuple(left_out))


def resolve_start(inputs: Inputs, request: PrepRequest) -> Start:
    """Returns how the work begins.

    Raises:
        UsageError: More than one of resume, part and merge; a part out of range; a part or merge of a pipe.
    """
    resume, part, merge = request.resume, request.part, request.merge
    if resume + (part is not None) + merge > 1:
        raise UsageError("resume, part and merge: only one of them")
    if request.scheduler is not None and part is not None:
        raise UsageError("part and scheduler: only one of them; the workers of a scheduler share the files already")
    if request.scheduler is not None and request.workers > 1:
        raise UsageError("workers and scheduler: only one of them; the scheduler has workers of its own")
    if part is not None and not 1 <= part[0] <= part[1]:
        raise UsageError(f"part: expected i/n with i from 1 to n, got {part[0]}/{part[1]}")
    if (part is not None or merge) and any(input_file.state is None for input_file in inputs.files):
        raise UsageError("inputs: a pipe cannot be shared among parts; write it to a file")
    return "part" if part is not None else "merge" if merge else "resume" if resume else "new"


def parse_part(text: str) -> tuple[int, int]:
    """Returns (i, n) of `i/n`.

    Raises:
        UsageError: Another form.
    """
    match = _PART.fullmatch(text)
    if match is None:
        raise UsageError(f"part: expected i/n, such as 3/10, got {text!r}")
    return int(match[1]), int(match[2])


def read_labels(request: PrepRequest) -> LabelFiles:
    """Reads the files of clusters, families and splits.

    Raises:
        ProtlmError: A file or a row that cannot be used.
    """
    return LabelFiles(
        clusters=None if request.clusters is None else read_clusters(request.clusters),
        families=None if request.families is None else read_families(request.families),
        splits=None if request.split_file is None else read_splits(request.split_file),
    )


def resolve_options(inputs: Inputs, labels: LabelFiles, request: PrepRequest) -> PrepOptions:
    """Returns the options that shape the content, checked; those that do not apply to the kind of split are None.

    Raises:
        UsageError: Options that contradict each other or lie out of range.
    """
    if not inputs.has("input"):
        raise UsageError("inputs: expected at least one file, got none")
    split, valid_fraction, test_fraction = request.split, request.valid_fraction, request.test_fraction
    is_ready_made = any(input_file.role != "input" for input_file in inputs.files)
    if is_ready_made and split != "random":
        raise UsageError(f"split: {split!r} only without ready-made splits")
    has_fraction = valid_fraction is not None or test_fraction is not None
    if split == "file" and has_fraction:
        raise UsageError("valid_fraction and test_fraction: only without a split file")
    for role, fraction in (("valid", valid_fraction), ("test", test_fraction)):
        if fraction is not None and any(input_file.role == role for input_file in inputs.files):
            raise UsageError(f"{role}_fraction: only without {role}_inputs, which are that split already")
    if request.unclustered is not None and split != "cluster":
        raise UsageError("unclustered: only with split 'cluster'")
    is_drawn = has_fraction if is_ready_made else split != "file"
    default = DEFAULT_FRACTION if is_drawn and not is_ready_made else None
    if (labels.splits is not None) != (split == "file"):
        raise UsageError("split_file: wanted with split 'file', and only with it")
    if bool(request.ood_families) != (split == "family"):
        raise UsageError("ood_families: wanted with split 'family', and only with it")
    try:
        return PrepOptions(
            split="ready-made" if is_ready_made else split,
            seed=request.seed if is_drawn else None,
            valid_fraction=default if valid_fraction is None else valid_fraction,
            test_fraction=default if test_fraction is None else test_fraction,
            min_length=request.min_length,
            max_length=request.max_length,
            dedupe=request.dedupe,
            on_bad_record=request.on_bad_record,
            shard_residues=request.shard_residues,
            ood_families=tuple(sorted(splits.held_out_families(request.ood_families))),
            clusters=label_file(labels.clusters),
            families=label_file(labels.families),
            split_file=label_file(labels.splits),
            unclustered=request.unclustered,
            nucleotides=request.nucleotides,
        )
    except ValidationError as error:
        raise UsageError(validation_fault(error)) from error


def label_file(labels: Labels | None) -> LabelFile | None:
    """Returns the manifest's entry of a label file."""
    return None if labels is None else LabelFile(name=labels.file_name, sha256=labels.sha256)


def requested_splits(inputs: Inputs, options: PrepOptions) -> list[SplitName]:
    """Returns the splits that the dataset should have; if one stays empty, the user is warned."""
    is_drawn = options.valid_fraction is not None
    is_requested = {
        "train": True,
        "valid": bool(inputs.has("valid") or options.valid_fraction),
        "test": bool(inputs.has("test") or options.test_fraction),
        "ood": inputs.has("ood") or options.split == "family",
    }
    if options.split == "file" and not is_drawn:
        return list(splits.SPLIT_NAMES)
    return [split for split in splits.SPLIT_NAMES if is_requested[split]]
