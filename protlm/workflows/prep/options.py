"""What prep is asked to do: which files, which options, and whether they fit together; before anything is read."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from protlm.choices import SplitMethod, SplitName
from protlm.data import splits
from protlm.data.labels.labels import Labels, read_clusters, read_families, read_splits
from protlm.data.parsing.sources import STDIN, expand_inputs
from protlm.data.storage import dataset
from protlm.data.storage.dataset import Part
from protlm.errors import ProtlmError, validation_fault
from protlm.workflows.prep.folder import InputFile, Start
from protlm.workflows.prep.reading import LabelFiles

DEFAULT_FRACTION = 0.01

_PART = re.compile(r"([0-9]{1,6})/([0-9]{1,6})")


class PrepUsageError(ValueError):
    """Options of `prepare` that contradict each other or lie out of range."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files of a dataset.

    Attributes:
        files: All of them, in the order in which they are read.
        left_out: Files of a folder that hold no proteins.
    """

    files: tuple[InputFile, ...]
    left_out: tuple[str, ...]

    def has(self, part: Part) -> bool:
        """Says whether files were given as this part."""
        return any(given.part == part for given in self.files)


def find_inputs(parts: Mapping[Part, Sequence[str | Path]], out: Path) -> Inputs:
    """Returns the files to read; finds a missing one, or an output that would harm one, before hours of work.

    Raises:
        ProtlmError: A file that is not there, or that lies in the output, or the other way round.
    """
    found: list[InputFile] = []
    left_out: list[str] = []
    for part, inputs in parts.items():
        expanded = expand_inputs(inputs)
        found += [InputFile(part, path) for path in expanded.paths]
        left_out += expanded.left_out
    target = Path(os.path.realpath(out))
    for path in [given.path for given in found] + [str(given) for inputs in parts.values() for given in inputs]:
        source = Path(os.path.realpath(path))
        if path != STDIN and (source.is_relative_to(target) or target.is_relative_to(source)):
            raise ProtlmError(f"{out}: the output and the input {path} lie inside each other; choose another --out")
    if sum(given.path == STDIN for given in found) > 1:
        raise PrepUsageError("inputs: the standard input, -, can be read only once")
    return Inputs(tuple(found), tuple(left_out))


def start_of(inputs: Inputs, *, resume: bool, part: tuple[int, int] | None, merge: bool) -> Start:
    """Returns how the work begins.

    Raises:
        PrepUsageError: More than one of resume, part and merge; a part out of range; the standard input with any.
    """
    if resume + (part is not None) + merge > 1:
        raise PrepUsageError("resume, part and merge: only one of them")
    if part is not None and not 1 <= part[0] <= part[1]:
        raise PrepUsageError(f"part: expected i/n with i from 1 to n, got {part[0]}/{part[1]}")
    if (part is not None or merge) and any(given.state is None for given in inputs.files):
        raise PrepUsageError("inputs: a pipe cannot be shared among parts; write it to a file")
    return "part" if part is not None else "merge" if merge else "resume" if resume else "new"


def parse_part(text: str) -> tuple[int, int]:
    """Returns (i, n) of `i/n`.

    Raises:
        PrepUsageError: Another form.
    """
    found = _PART.fullmatch(text)
    if found is None:
        raise PrepUsageError(f"part: expected i/n, such as 3/10, got {text!r}")
    return int(found[1]), int(found[2])


def read_labels(clusters: str | Path | None, families: str | Path | None, split_file: str | Path | None) -> LabelFiles:
    """Reads the files that tell clusters, families and splits.

    Raises:
        ProtlmError: A file or a row that cannot be used.
    """
    return LabelFiles(
        None if clusters is None else read_clusters(clusters),
        None if families is None else read_families(families),
        None if split_file is None else read_splits(split_file),
    )


def resolve_options(
    inputs: Inputs,
    labels: LabelFiles,
    *,
    split: SplitMethod,
    seed: int,
    valid_fraction: float | None,
    test_fraction: float | None,
    ood_families: Sequence[str],
    **other_options: Any,
) -> dataset.PrepOptions:
    """Fills in what depends on how the splits come about, and checks all options.

    Raises:
        PrepUsageError: Options that contradict each other or lie out of range.
    """
    if not inputs.has("input"):
        raise PrepUsageError("inputs: expected at least one file, got none")
    is_ready_made = any(given.part != "input" for given in inputs.files)
    is_drawn = not is_ready_made and split != "file"
    if is_ready_made and split != "random":
        raise PrepUsageError(f"split: {split!r} only without ready-made splits")
    if not is_drawn and (valid_fraction is not None or test_fraction is not None):
        raise PrepUsageError("valid_fraction and test_fraction: only without ready-made splits and a split file")
    if (labels.splits is not None) != (split == "file"):
        raise PrepUsageError("split_file: wanted with split 'file', and only with it")
    if bool(ood_families) != (split == "family"):
        raise PrepUsageError("ood_families: wanted with split 'family', and only with it")
    try:
        return dataset.PrepOptions(
            split="ready-made" if is_ready_made else split,
            seed=seed if is_drawn else None,
            valid_fraction=(DEFAULT_FRACTION if valid_fraction is None else valid_fraction) if is_drawn else None,
            test_fraction=(DEFAULT_FRACTION if test_fraction is None else test_fraction) if is_drawn else None,
            ood_families=tuple(sorted(splits.held_out_families(ood_families))),
            clusters=_label_file(labels.clusters),
            families=_label_file(labels.families),
            split_file=_label_file(labels.splits),
            **other_options,
        )
    except ValidationError as error:
        raise PrepUsageError(validation_fault(error)) from error


def _label_file(labels: Labels | None) -> dataset.LabelFile | None:
    return None if labels is None else dataset.LabelFile(name=labels.file_name, sha256=labels.sha256)


def splits_asked_for(inputs: Inputs, options: dataset.PrepOptions) -> list[SplitName]:
    """Returns the splits that the dataset should have; one that stays empty is told."""
    is_drawn = options.valid_fraction is not None
    asked_for = {
        "train": True,
        "valid": bool(inputs.has("valid") or options.valid_fraction),
        "test": bool(inputs.has("test") or options.test_fraction),
        "ood": inputs.has("ood") or options.split == "family",
    }
    if options.split == "file" and not is_drawn:
        return list(splits.SPLIT_NAMES)
    return [split for split in splits.SPLIT_NAMES if asked_for[split]]
