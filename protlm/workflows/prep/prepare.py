"""From protein files to a dataset: read, cleaned, deduplicated and split; the dataset appears whole or not at all.

Files become pieces (`reading`); the digests of all pieces decide which records stay, and the shards are put together
(`building`). Finished work lies in a folder beside the dataset (`folder`), from which a run that was killed, or the
jobs of a cluster, go on.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from protlm.data.storage import dataset
from protlm.data.storage.manifest import Manifest
from protlm.errors import UsageError
from protlm.runtime import work_folder
from protlm.runtime.progress import StartProgress, no_progress, tell_nobody
from protlm.runtime.workers import Workers, connected, open_workers
from protlm.workflows.inspect import DatasetSummary, summarise
from protlm.workflows.pages import figures
from protlm.workflows.prep import mmseqs
from protlm.workflows.prep.building import Outcome, build_dataset
from protlm.workflows.prep.estimate import PrepEstimate, estimate
from protlm.workflows.prep.folder import (
    PrepFolder,
    check_replaceable,
    complete_killed_run,
    kept_or_removed,
    open_prep_folder,
)
from protlm.workflows.prep.options import (
    PrepRequest,
    find_inputs,
    label_file,
    read_labels,
    requested_splits,
    resolve_options,
    resolve_start,
)
from protlm.workflows.prep.reading import FaultRules, LabelFiles, PrepWork, read_sources

_MOST_WORKERS = 64
_MOST_LOOKED_FOR = 1000
"""Input files that every worker of a cluster looks for before work begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepReport:
    """A dataset that `prepare` made.

    Attributes:
        out: The dataset folder.
        hash: Its hash, which identifies its content.
        manifest: Its manifest.
        num_unclustered: Records of a split by cluster that are in no cluster.
        label_notes: A note for each label file that labels only some of the records.
        left_out: Files of an input folder that hold no proteins.
    """

    out: str
    hash: str
    manifest: Manifest
    num_unclustered: int
    label_notes: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def summary(self) -> DatasetSummary:
        """The summary of the dataset."""
        return summarise(self.out, self.hash, self.manifest)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReport:
    """The files that `prepare` read as one part of several.

    Attributes:
        folder: Where their pieces lie until the parts are merged.
        files: The files of this part.
        num_records: Records in them.
    """

    folder: str
    files: tuple[str, ...]
    num_records: int


def prepare(
    request: PrepRequest,
    *,
    start_progress: StartProgress = no_progress,
    tell: Callable[[str], object] = tell_nobody,
) -> PrepReport | PartReport | PrepEstimate:
    """Turns protein files into a dataset folder.

    Without ready-made splits each sequence is drawn for train, valid or test. With any, `inputs` are the training set,
    from which the fractions that are asked for are drawn.
    A sequence that two splits would share stays only in the earlier one of train, valid, test, ood; where families are
    held out, in ood. Equal input, options and seed give equal bytes; `workers`, `scheduler`, `resume`, `part` and
    `merge` change none.

    Args:
        request: The dataset that is asked for.
        start_progress: Starts the stages `read` (bytes on disk) and `write` (residues), and before them, where MMseqs2
            clusters, those of `make_clusters`.
        tell: Called with a line on the cluster of a scheduler, such as where its dashboard is.

    Returns:
        The dataset that was made; with `part` the files that were read; with `dry_run` the estimate.

    Raises:
        UsageError: The options contradict each other or lie out of range.
        ProtlmError: A bad record or file, no record left, an output that is in the way, or a scheduler or workers that
            cannot be used.
    """
    most = max(_MOST_WORKERS, 4 * (os.cpu_count() or 1))
    if not 1 <= request.workers <= most:
        raise UsageError(f"workers: expected 1 to {most} on this machine, got {request.workers}")
    inputs = find_inputs(request)
    start = resolve_start(inputs, request)
    # Through a link the folder it leads to is made or replaced, not the link.
    target = Path(os.path.realpath(request.out))
    finished = None if request.dry_run else complete_killed_run(target)
    if start == "resume" and finished is not None:
        return _report(request, finished, Outcome(0, ()), inputs.left_out)
    check_replaceable(target, force=request.force or start == "part")
    mmseqs.check_request(request.cluster_with, request.cluster_identity, request.clusters is not None, inputs.files)
    labels = read_labels(request)
    options = resolve_options(inputs, labels, request)
    rules = FaultRules(options.on_bad_record, options.nucleotides)
    if request.dry_run:
        return estimate(inputs, target, rules=rules, workers=request.workers)
    with connected(request.scheduler) as cluster:
        if cluster is not None:
            tell(cluster.description)
        if request.cluster_with is not None:
            clusters = mmseqs.make_clusters(
                request.cluster_with, request.cluster_identity, inputs.files, options, start_progress=start_progress
            )
            labels = dataclasses.replace(labels, clusters=clusters)
            options = options.model_copy(update={"clusters": label_file(clusters)})
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = open_prep_folder(target, inputs.files, _hashes(labels), start, force=request.force)
        work = PrepWork(folder if cluster is None else folder.elsewhere(), labels, rules)
        # Of many files, the first ones show whether their folders are there.
        seen = [file.path for file in work.folder.inputs if file.state is not None][:_MOST_LOOKED_FOR]
        with (
            folder.locked(start),
            kept_or_removed(folder, start),
            open_workers(request.workers, cluster, work, folder.path, seen) as workers,
        ):
            if request.part is not None:
                return _read_part(folder, work, workers, request.part, start_progress)
            if workers.are_here:
                figures.load_early()
            if not request.merge:
                _read(folder, work, workers, range(len(inputs.files)), start_progress)
            outcome = build_dataset(
                folder, options, requested_splits(inputs, options), workers,
                labels=labels, ood_names=request.ood_families, check_leaks=request.check_leaks,
                start_progress=start_progress,
            )  # fmt: skip
            finished = dataset.open_dataset(folder.dataset_path)
            folder.put_in_place(target, force=request.force)
            work_folder.remove_finished(folder.path)
    return _report(request, finished, outcome, inputs.left_out)


def _report(request: PrepRequest, finished: dataset.Dataset, outcome: Outcome, left_out: tuple[str, ...]) -> PrepReport:
    return PrepReport(
        out=str(request.out),
        hash=finished.hash,
        manifest=finished.manifest,
        num_unclustered=outcome.num_unclustered,
        label_notes=outcome.notes,
        left_out=left_out,
    )


def _hashes(labels: LabelFiles) -> dict[str, str | None]:
    by_kind = (("clusters", labels.clusters), ("families", labels.families), ("splits", labels.splits))
    return {kind: None if table is None else table.sha256 for kind, table in by_kind}


def _read(
    folder: PrepFolder, work: PrepWork, workers: Workers, numbers: Sequence[int], start_progress: StartProgress
) -> None:
    """Reads those of the numbered files that were not read before."""
    waiting = [number for number in numbers if folder.finished_source(number) is None]
    advance = start_progress("read", sum(folder.inputs[number].num_bytes for number in waiting))
    read_sources(work, folder.inputs, waiting, workers, advance)


def _read_part(
    folder: PrepFolder, work: PrepWork, workers: Workers, part: tuple[int, int], start_progress: StartProgress
) -> PartReport:
    numbers = _files_of_part([input_file.num_bytes for input_file in folder.inputs], part)
    _read(folder, work, workers, numbers, start_progress)
    sources = [folder.finished_source(number) for number in numbers]
    return PartReport(
        folder=str(folder.path),
        files=tuple(folder.inputs[number].path for number in numbers),
        num_records=sum(source.num_records for source in sources if source is not None),
    )


def _files_of_part(sizes: Sequence[int], part: tuple[int, int]) -> list[int]:
    """Returns the numbers of a part's files: from the largest on, each file goes to the part with the fewest bytes."""
    loads = [0] * part[1]
    numbers = []
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        least = loads.index(min(loads))
        loads[least] += sizes[number]
        if least == part[0] - 1:
            numbers.append(number)
    return sorted(numbers)
