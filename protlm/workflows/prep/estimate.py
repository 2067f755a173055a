"""What prep would make of some files, told from the beginning of each: nothing is left behind."""

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from protlm.data.building.pieces import write_piece
from protlm.data.parsing import reader
from protlm.data.parsing.sources import SourceBlocks
from protlm.data.parsing.text_pieces import cut_into_pieces
from protlm.data.records import OnBadRecord
from protlm.workflows.prep.options import Inputs, PrepUsageError

_SAMPLE_BYTES = 8 << 20
_SAMPLED_FILES = 8
# The second half of the work takes about as long as the first.
_WORK_AFTER_READING = 1.0
_WORKER_EFFICIENCY = 0.85


@dataclass(frozen=True, slots=True)
class Estimate:
    """What to expect, before duplicates and length bounds; numbers of whole inputs, from samples of them.

    Attributes:
        files: How many files there are.
        input_bytes: Their size on disk.
        sampled_bytes: What was read of them, on disk.
        num_records: Records.
        num_residues: Residues.
        dataset_bytes: Size of the dataset.
        peak_bytes: Disk that is needed while it is made, the dataset included.
        free_bytes: Free disk where it would go.
        seconds: Time on this machine.
        rejects: Bad records of the samples, by reason.
        left_out: Files of a folder that hold no proteins.
    """

    files: int
    input_bytes: int
    sampled_bytes: int
    num_records: int
    num_residues: int
    dataset_bytes: int
    peak_bytes: int
    free_bytes: int
    seconds: float
    rejects: dict[str, int]
    left_out: tuple[str, ...]


@dataclass
class _Sample:
    disk_bytes: float = 0.0
    num_records: int = 0
    num_residues: int = 0
    piece_bytes: int = 0


def estimate(inputs: Inputs, target: Path, *, on_bad_record: OnBadRecord, workers: int) -> Estimate:
    """Reads the beginning of some of the files and tells what would become of them all.

    Args:
        inputs: The files.
        target: Where the dataset would go.
        on_bad_record: Whether a bad record in a sample is an error.
        workers: Processes that would read and write.

    Raises:
        PrepUsageError: A pipe, which has no size.
        ProtlmError: A bad file.
    """
    if any(given.state is None for given in inputs.files):
        raise PrepUsageError("dry run: a pipe has no size to tell from; write it to a file")
    sizes = [given.num_bytes for given in inputs.files]
    step = max(1, len(inputs.files) // _SAMPLED_FILES)
    sample, rejects = _Sample(), Counter[str]()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for given in inputs.files[::step][:_SAMPLED_FILES]:
            _add_sample(sample, given.path, Path(folder) / "piece.h5", on_bad_record, rejects)
    seconds = time.perf_counter() - begun
    scale = sum(sizes) / max(1.0, sample.disk_bytes)
    share = workers * _WORKER_EFFICIENCY if workers > 1 else 1.0
    dataset_bytes = round(sample.piece_bytes * scale)
    return Estimate(
        files=len(sizes),
        input_bytes=sum(sizes),
        sampled_bytes=round(sample.disk_bytes),
        num_records=round(sample.num_records * scale),
        num_residues=round(sample.num_residues * scale),
        dataset_bytes=dataset_bytes,
        peak_bytes=2 * dataset_bytes,
        free_bytes=shutil.disk_usage(_existing(target)).free,
        seconds=seconds * scale * (1 + _WORK_AFTER_READING) / share,
        rejects=dict(sorted(rejects.items())),
        left_out=inputs.left_out,
    )


def _add_sample(
    sample: _Sample, path: str, piece_path: Path, on_bad_record: OnBadRecord, rejects: Counter[str]
) -> None:
    """Reads the first piece of a file."""
    on_disk = text_bytes = 0

    def count(num_bytes: int) -> None:
        nonlocal on_disk
        on_disk += num_bytes

    def counted(blocks: SourceBlocks) -> Iterator[bytes]:
        nonlocal text_bytes
        for block in blocks:
            text_bytes += len(block)
            yield block

    pieces = cut_into_pieces(path, counted(SourceBlocks(path, advance=count)), piece_bytes=_SAMPLE_BYTES)
    piece = next(pieces)
    parsed = reader.parse_piece(path, piece)
    if on_bad_record == "error" and parsed.faults.first is not None:
        raise parsed.faults.first
    rejects.update(parsed.faults.reasons)
    if not len(parsed.table) and not parsed.faults:
        raise reader.no_records(path, parsed.num_lines)
    write_piece(piece_path, parsed, text_hash="")
    # The reader is ahead of the piece by a few blocks.
    sample.disk_bytes += on_disk * len(piece.text) / max(1, text_bytes)
    sample.num_records += len(parsed.table)
    sample.num_residues += len(parsed.table.tokens)
    sample.piece_bytes += piece_path.stat().st_size


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
