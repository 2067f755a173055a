"""From finished pieces to a dataset: the second half of prep. What stays, the shards, leaks, rejects, the manifest."""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from protlm import files, vocabulary
from protlm.choices import SplitName
from protlm.data.building import assembly, leakage, selection
from protlm.data.building.assembly import ShardPlan
from protlm.data.building.pieces import Piece, PieceFile
from protlm.data.building.selection import Rules, Selection
from protlm.data.storage import dataset
from protlm.data.storage.shards import FinishedShard, ShardReader
from protlm.errors import ProtlmError
from protlm.runtime.progress import StartProgress
from protlm.runtime.workers import Workers
from protlm.workflows.prep.folder import FinishedSource, PrepFolder
from protlm.workflows.prep.reading import raise_first_fault
from protlm.workflows.prep.report_page import render_report

# Per split: they are read one after the other.
_OPEN_SHARDS = 2
_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


@dataclass(frozen=True, slots=True)
class _ShardTask:
    plan: ShardPlan
    folder: Path
    pieces: Sequence[PieceFile]
    selection: Selection


class _Shards(Sequence[ShardReader]):
    """Shards that are opened when they are asked for: a dataset may have more of them than files may be open."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._open = functools.lru_cache(maxsize=_OPEN_SHARDS)(ShardReader)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        return self._open(self._paths[index])


def build_dataset(
    folder: PrepFolder,
    options: dataset.PrepOptions,
    asked_for: Sequence[SplitName],
    workers: Workers,
    *,
    check_leaks: bool,
    start_progress: StartProgress,
) -> tuple[dataset.Manifest, int]:
    """Makes the dataset in its folder from all pieces.

    Args:
        folder: Where the pieces lie, of all files.
        options: The options that shape the content.
        asked_for: The splits that it should have.
        workers: Who writes the shards.
        check_leaks: Look for sequences of one split inside those of another.
        start_progress: Starts the stage `write` (residues).

    Returns:
        The manifest, and how many records no cluster names where the split is by cluster.

    Raises:
        ProtlmError: Files that were not read yet, a bad record, or no record left.
    """
    sources = _finished_sources(folder)
    by_source = [folder.pieces(number) for number in range(len(sources))]
    pieces = [piece for found in by_source for piece in found]
    chosen = selection.select(pieces, _rules(options), folder.codes_path)
    if options.split == "cluster" and chosen.num_unclustered == chosen.starts[-1]:
        raise ProtlmError("split by cluster: no record is in a cluster; give --clusters, or --cluster-with mmseqs")
    plans = assembly.plan_shards(pieces, chosen, options.shard_residues)
    # Shards that were made before are those to be made only if all that shapes them is the same.
    texts = xxhash.xxh3_128_hexdigest("".join(f"{piece.part} {piece.text_hash}\n" for piece in pieces).encode())
    folder.begin_dataset({"options": options.model_dump(mode="json"), "texts": texts})
    rejects = _write_rejects(folder, sources, by_source, chosen, options)
    if not plans:
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(rejects.items()))
        raise ProtlmError(f"no record is left; rejected: {told}")
    finished = _make_shards(folder, plans, pieces, chosen, workers, start_progress)
    repairs: Counter[str] = Counter()
    for piece in pieces:
        repairs.update(piece.repairs)
    across = chosen.counts[selection.DUPLICATE_ACROSS]
    readers = {
        split: _Shards([folder.dataset_path / shard.info.name for shard in found]) for split, found in finished.items()
    }
    manifest = dataset.Manifest(
        format=dataset.FORMAT,
        format_version=dataset.FORMAT_VERSION,
        vocabulary=vocabulary.TOKENS,
        sources=tuple(
            dataset.SourceSummary(
                part=given.part, name=source.name, format=source.format, num_records=source.num_records,
                sha256=source.sha256,
            )
            for given, source in zip(folder.inputs, sources, strict=True)
        ),
        options=options,
        splits={split: dataset.summarise_split(finished.get(split, [])) for split in asked_for},
        duplicates_removed=dataset.DuplicatesRemoved(
            within_split=chosen.counts[selection.DUPLICATE_WITHIN], across_splits=across
        ),
        leakage=leakage.look_for_leaks(readers, across, substrings=check_leaks),
        rejects=dict(sorted(rejects.items())),
        repairs=dict(sorted(repairs.items())),
    )  # fmt: skip
    with files.written_whole(folder.dataset_path / dataset.REPORT_NAME) as path:
        path.write_text(render_report(manifest), encoding="utf-8")
    dataset.write_manifest(folder.dataset_path, manifest)
    return manifest, chosen.num_unclustered


def _finished_sources(folder: PrepFolder) -> list[FinishedSource]:
    found = [folder.finished_source(number) for number in range(len(folder.inputs))]
    missing = [given.path for given, source in zip(folder.inputs, found, strict=True) if source is None]
    if missing:
        raise ProtlmError(
            f"{missing[0]}: not read yet, or changed since; {len(missing)} of {len(found)} files are missing: "
            "run their parts again, or all with --resume"
        )
    return [source for source in found if source is not None]


def _rules(options: dataset.PrepOptions) -> Rules:
    return Rules(
        method=options.split,
        seed=options.seed or 0,
        valid_fraction=options.valid_fraction or 0.0,
        test_fraction=options.test_fraction or 0.0,
        min_length=options.min_length,
        max_length=options.max_length,
        dedupe=options.dedupe,
        ood_families=frozenset(options.ood_families),
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
    """Returns what a worker needs to make a shard, and no more: it goes through a pipe."""
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
    options: dataset.PrepOptions,
) -> Counter[str]:
    """Lists what was left out, but for duplicates, in the order of the input: source, line, id and reason.

    Raises:
        RecordError: A bad record, unless bad records are skipped.
    """
    rejects: Counter[str] = Counter()
    number = 0
    path = folder.dataset_path / dataset.REJECTS_NAME
    with files.written_whole(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write("source\tline\tid\treason\n")
        for source, pieces in zip(sources, by_source, strict=True):
            num_lines = 0
            for piece in pieces:
                for line, record_id, reason in _rejects_of(piece, number, num_lines, chosen, options):
                    row = (source.name, str(line), record_id, reason)
                    file.write("\t".join(field.translate(_ESCAPES) for field in row) + "\n")
                    rejects[reason] += 1
                num_lines += piece.num_lines
                number += 1
    if not rejects:
        path.unlink()
    return rejects


def _rejects_of(
    piece: PieceFile, number: int, num_lines: int, chosen: Selection, options: dataset.PrepOptions
) -> list[tuple[int, str, str]]:
    raise_first_fault(piece, num_lines, options.on_bad_record)
    has_others = piece.num_records and any(chosen.counts[code] for code in selection.REASONS)
    if not (piece.num_faults or has_others):
        return []
    columns = Piece(piece.path)
    found = [(line + num_lines, record_id, reason) for line, record_id, reason in columns.faults()]
    if has_others:
        codes = chosen.codes_of(number)
        ids = columns.strings("ids")
        for code, reason in selection.REASONS.items():
            for index in (codes == code).nonzero()[0].tolist():
                name = ids.text[ids.offsets[index] : ids.offsets[index + 1]].tobytes().decode()
                found.append((int(columns["lines"][index]) + num_lines, name, reason))
    return sorted(found)
