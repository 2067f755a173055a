"""From finished pieces to a dataset, the second half of prep: selection, shards, leaks, rejects, the manifest."""

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
import xxhash

from protlm import files, vocabulary
from protlm.choices import SplitName
from protlm.data.building import assembly, leakage, selection
from protlm.data.building.assembly import ShardPlan
from protlm.data.building.pieces import Piece, PieceFile
from protlm.data.building.selection import Rules, Selection
from protlm.data.storage.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MULTIQC_NAME,
    REJECTS_NAME,
    REPORT_NAME,
    DuplicatesRemoved,
    Manifest,
    PrepOptions,
    SourceSummary,
    summarise_split,
    write_manifest,
)
from protlm.data.storage.shards import FinishedShard, LazyShards
from protlm.errors import ProtlmError
from protlm.runtime.progress import StartProgress
from protlm.runtime.workers import Workers
from protlm.workflows.prep.folder import FinishedSource, PrepFolder
from protlm.workflows.prep.label_checks import check_labels
from protlm.workflows.prep.multiqc_row import render_multiqc
from protlm.workflows.prep.reading import FaultRules, LabelFiles, raise_first_fault
from protlm.workflows.prep.report_page import render_report

_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the user is told beside the dataset.

    Attributes:
        num_unclustered: The number of records that are in no cluster, where the split is by cluster.
        notes: A note for each label file that labels only some of the records.
    """

    num_unclustered: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _ShardTask:
    plan: ShardPlan
    folder: Path
    pieces: Sequence[PieceFile]
    selection: Selection

    @property
    def title(self) -> str:
        """The name of the shard."""
        return self.plan.name


def build_dataset(
    folder: PrepFolder,
    options: PrepOptions,
    requested: Sequence[SplitName],
    workers: Workers,
    *,
    labels: LabelFiles,
    ood_names: Sequence[str],
    check_leaks: bool,
    start_progress: StartProgress,
) -> Outcome:
    """Makes the dataset in its folder from the pieces of all files.

    Args:
        folder: The folder of the run, with all pieces.
        options: The options that shape the content.
        requested: The splits that the dataset should have.
        workers: The workers that share the passes over the records, the shards and the search for leaks.
        labels: The label files, which the pieces were made with.
        ood_names: The families to hold out, as the user named them.
        check_leaks: Look for sequences of one split inside those of another.
        start_progress: Starts the stage `write` (residues).

    Raises:
        ProtlmError: A file was not read yet, a bad record, labels that do not fit the records, or no record left.
    """
    sources = _finished_sources(folder)
    by_source = [folder.pieces(number) for number in range(len(sources))]
    pieces = [piece for source_pieces in by_source for piece in source_pieces]
    chosen = selection.select(pieces, _rules(options), folder.codes_path, workers)
    notes = check_labels(by_source, chosen, options, labels, ood_names)
    plans = assembly.plan_shards(pieces, chosen, options.shard_residues)
    # Finished shards of an earlier run are used again only if everything that shapes them is the same.
    texts = xxhash.xxh3_128_hexdigest("".join(f"{piece.role} {piece.text_hash}\n" for piece in pieces).encode())
    folder.begin_dataset({"options": options.model_dump(mode="json"), "texts": texts})
    rejects = _write_rejects(folder, sources, by_source, chosen, options)
    if not plans:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(rejects.items()))
        raise ProtlmError(f"no record is left; rejected: {counts}")
    finished = _make_shards(folder, plans, pieces, chosen, workers, start_progress)
    repairs: Counter[str] = Counter()
    for piece in pieces:
        repairs.update(piece.repairs)
    tables = [table for table in (labels.clusters, labels.families, labels.splits) if table is not None]
    if num_marks := sum(table.num_marks for table in tables):
        repairs["byte_order_mark"] += num_marks
    across = chosen.counts[selection.DUPLICATE_ACROSS]
    readers = {
        split: LazyShards([folder.dataset_path / shard.info.name for shard in shards])
        for split, shards in finished.items()
    }
    manifest = Manifest(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        vocabulary=vocabulary.TOKENS,
        sources=_source_summaries(folder, sources),
        options=options,
        splits={split: summarise_split(finished.get(split, [])) for split in requested},
        duplicates_removed=DuplicatesRemoved(
            within_split=chosen.counts[selection.DUPLICATE_WITHIN], across_splits=across
        ),
        leakage=leakage.look_for_leaks(readers, across, workers, substrings=check_leaks),
        rejects=dict(sorted(rejects.items())),
        repairs=dict(sorted(repairs.items())),
        nucleic_acids=chosen.num_nucleotides,
    )
    for name, render in ((REPORT_NAME, render_report), (MULTIQC_NAME, render_multiqc)):
        with files.written_whole(folder.dataset_path / name) as path:
            path.write_text(render(manifest), encoding="utf-8")
    write_manifest(folder.dataset_path, manifest)
    return Outcome(chosen.num_unclustered, notes)


def _finished_sources(folder: PrepFolder) -> list[FinishedSource]:
    sources = [folder.finished_source(number) for number in range(len(folder.inputs))]
    missing = [input_file.path for input_file, source in zip(folder.inputs, sources, strict=True) if source is None]
    if missing:
        raise ProtlmError(
            f"{missing[0]}: not read yet, or changed since; {len(missing)} of {len(sources)} files are missing: "
            "run their parts again, or all with --resume"
        )
    return [source for source in sources if source is not None]


def _source_summaries(folder: PrepFolder, sources: Sequence[FinishedSource]) -> tuple[SourceSummary, ...]:
    return tuple(
        SourceSummary(
            role=input_file.role,
            name=source.name,
            format=source.format,
            num_records=source.num_records,
            sha256=source.sha256,
        )
        for input_file, source in zip(folder.inputs, sources, strict=True)
    )


def _rules(options: PrepOptions) -> Rules:
    return Rules(
        method=options.split,
        seed=options.seed or 0,
        valid_fraction=options.valid_fraction or 0.0,
        test_fraction=options.test_fraction or 0.0,
        min_length=options.min_length,
        max_length=options.max_length,
        dedupe=options.dedupe,
        ood_families=frozenset(options.ood_families),
        unclustered=options.unclustered,
        keep_nucleotides=options.nucleotides == "keep",
    )


def _make_shards(
    folder: PrepFolder,
    plans: Sequence[ShardPlan],
    pieces: Sequence[PieceFile],
    chosen: Selection,
    workers: Workers,
    start_progress: StartProgress,
) -> dict[SplitName, list[FinishedShard]]:
    finished: dict[SplitName, list[FinishedShard]] = {}
    advance = start_progress("write", sum(plan.num_residues for plan in plans))
    tasks = (_shard_task(plan, folder.dataset_path, pieces, chosen) for plan in plans)
    for shard in workers.in_order(_make_shard, tasks):
        finished.setdefault(shard.split, []).append(shard)
        advance(shard.info.num_residues)
    return finished


def _shard_task(plan: ShardPlan, path: Path, pieces: Sequence[PieceFile], chosen: Selection) -> _ShardTask:
    """Returns the task of making a shard, without the rest of the selection: it is sent through a pipe."""
    first = int(np.searchsorted(chosen.starts, plan.start, side="right")) - 1
    last = int(np.searchsorted(chosen.starts, plan.end))
    return _ShardTask(plan, path, pieces[first:last], chosen.between(first, last))


def _make_shard(_shared: object, task: _ShardTask) -> FinishedShard:
    return assembly.make_shard(task.plan, task.folder, task.pieces, task.selection)


def _write_rejects(
    folder: PrepFolder,
    sources: Sequence[FinishedSource],
    by_source: Sequence[Sequence[PieceFile]],
    chosen: Selection,
    options: PrepOptions,
) -> Counter[str]:
    """Writes source, line, id and reason of all rejected records, duplicates apart, in the order of the input.

    Raises:
        RecordError: A bad record, unless bad records are skipped.
    """
    rejects = Counter({reason: count for code, reason in selection.REASONS.items() if (count := chosen.counts[code])})
    is_any_left_out = bool(rejects)
    number = 0
    path = folder.dataset_path / REJECTS_NAME
    with files.written_whole(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write("source\tline\tid\treason\n")
        for source, pieces in zip(sources, by_source, strict=True):
            num_lines, name = 0, source.name.translate(_ESCAPES)
            for piece in pieces:
                raise_first_fault(piece, num_lines, FaultRules(options.on_bad_record, options.nucleotides))
                rows = _rejects_of(piece, chosen.codes_of(number) if is_any_left_out else None)
                file.writelines(
                    f"{name}\t{line + num_lines}\t{record_id}\t{reason}\n" for line, record_id, reason in rows
                )
                rejects.update(piece.fault_counts)
                num_lines += piece.num_lines
                number += 1
    if not rejects:
        path.unlink()
    return rejects


def _rejects_of(piece: PieceFile, codes: np.ndarray | None) -> Iterable[tuple[int, str, str]]:
    """Returns line in the piece, escaped id and reason of its rejected records, by line.

    Args:
        piece: The piece.
        codes: The decisions on its good records; None if none of any piece is left out by a rule.
    """
    if not piece.fault_counts and (codes is None or not piece.num_records):
        return ()
    columns = Piece(piece.path)
    faults: Iterable[tuple[int, str, str]] = columns.faults()
    # All records of a file may be bad: what most ids do not need costs them nothing.
    if any(letter in columns["faults/ids/bytes"].tobytes() for letter in b"\\\t\n\r"):
        faults = ((line, record_id.translate(_ESCAPES), reason) for line, record_id, reason in faults)
    if codes is None or not piece.num_records:
        return faults
    ids, lines = columns.strings("ids"), columns["lines"]
    left_out = [
        (int(lines[index]), ids.bytes_of(index).decode().translate(_ESCAPES), reason)
        for code, reason in selection.REASONS.items()
        for index in (codes == code).nonzero()[0].tolist()
    ]
    return heapq.merge(faults, sorted(left_out), key=itemgetter(0))
