"""The dry run of prep: the size and duration of a dataset, estimated from samples that are read and thrown away."""

import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from protlm.data.building.pieces import open_piece_file, write_piece
from protlm.data.parsing import reader
from protlm.data.parsing.sources import SourceBlocks
from protlm.data.parsing.text_pieces import cut_into_pieces
from protlm.data.records import NUCLEOTIDES
from protlm.errors import UsageError
from protlm.files import free_bytes
from protlm.workflows.prep.options import Inputs
from protlm.workflows.prep.reading import FaultRules, raise_first_fault

_SAMPLE_BYTES = 8 << 20
_SAMPLED_FILES = 8
# Building takes about as long as reading.
_WORK_AFTER_READING = 1.0
_WORKER_EFFICIENCY = 0.85


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepEstimate:
    """The expected numbers for all inputs, from samples, before duplicates and length bounds.

    Attributes:
        files: Number of files.
        input_bytes: Their size on disk.
        sampled_bytes: Size on disk of the samples.
        num_records: Records.
        num_residues: Residues.
        dataset_bytes: Size of the dataset.
        peak_bytes: Disk space needed while it is made, the dataset included.
        free_bytes: Free disk space at its place.
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


def estimate(inputs: Inputs, target: Path, *, rules: FaultRules, workers: int) -> PrepEstimate:
    """Returns an estimate for all files, from reading the beginning of some of them.

    Args:
        inputs: The files.
        target: The dataset folder that would be made.
        rules: Which records of a sample are an error.
        workers: Processes that would read and write.

    Raises:
        UsageError: An input is a pipe, which has no size.
        ProtlmError: A bad file.
    """
    if any(input_file.state is None for input_file in inputs.files):
        raise UsageError("dry run: a pipe has no size to tell from; write it to a file")
    sizes = [input_file.num_bytes for input_file in inputs.files]
    step = max(1, len(inputs.files) // _SAMPLED_FILES)
    sample, rejects = _Sample(), Counter[str]()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for input_file in inputs.files[::step][:_SAMPLED_FILES]:
            _add_sample(sample, input_file.path, Path(folder) / "piece.h5", rules, rejects)
    seconds = time.perf_counter() - begun
    scale = sum(sizes) / max(1.0, sample.disk_bytes)
    speed_up = workers * _WORKER_EFFICIENCY if workers > 1 else 1.0
    dataset_bytes = round(sample.piece_bytes * scale)
    return PrepEstimate(
        files=len(sizes),
        input_bytes=sum(sizes),
        sampled_bytes=round(sample.disk_bytes),
        num_records=round(sample.num_records * scale),
        num_residues=round(sample.num_residues * scale),
        dataset_bytes=dataset_bytes,
        peak_bytes=2 * dataset_bytes,
        free_bytes=free_bytes(target),
        seconds=seconds * scale * (1 + _WORK_AFTER_READING) / speed_up,
        rejects=dict(sorted(rejects.items())),
        left_out=inputs.left_out,
    )


def _add_sample(sample: _Sample, path: str, piece_path: Path, rules: FaultRules, rejects: Counter[str]) -> None:
    """Adds the first piece of a file to the sample."""
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
    rejects.update(parsed.faults.counts)
    if not len(parsed.table) and not parsed.faults:
        raise reader.no_records(path, parsed.num_lines)
    write_piece(piece_path, parsed, text_hash="")
    written = open_piece_file(piece_path, path, "input")
    assert written is not None
    raise_first_fault(written, 0, rules)
    if rules.nucleotides == "skip" and written.num_nucleotides:
        rejects[NUCLEOTIDES] += written.num_nucleotides
    # The source has read a few blocks past the piece.
    sample.disk_bytes += on_disk * len(piece.text) / max(1, text_bytes)
    sample.num_records += len(parsed.table)
    sample.num_residues += len(parsed.table.tokens)
    sample.piece_bytes += piece_path.stat().st_size
