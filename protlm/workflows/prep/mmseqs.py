"""Clusters from MMseqs2, if the program is installed: its command line, the life of its files, and what it is given.

It gets the cleaned sequences under numbers, each once. So it need not understand the files or their compression, and no
id of theirs is shortened, lost or shared; its clusters come back by sequence.
"""

import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from protlm import vocabulary
from protlm.data.labels.labels import Labels, clusters_of_sequences
from protlm.data.nucleotides import nucleic_acids, refusal
from protlm.data.parsing.reader import parse_piece
from protlm.data.parsing.record_table import RecordTable
from protlm.data.parsing.sources import SourceBlocks
from protlm.data.parsing.text_pieces import PIECE_BYTES, cut_into_pieces
from protlm.data.records import NUCLEOTIDES
from protlm.data.storage.manifest import PrepOptions
from protlm.errors import ProtlmError, RecordError, UsageError
from protlm.runtime.progress import Advance, StartProgress, no_progress
from protlm.workflows.prep.folder import InputFile

DEFAULT_IDENTITY = 0.3
_COVERAGE = "0.8"
_SECONDS_BETWEEN_LOOKS = 1.0


def check_request(program: str | None, identity: float | None, has_clusters: bool, files: Sequence[InputFile]) -> None:
    """Checks before any work whether clusters can be made.

    Args:
        program: `mmseqs`, or None for none.
        identity: Least sequence identity of a member to its representative, or None for the default.
        has_clusters: Whether a file of clusters is given too.
        files: The files to cluster.

    Raises:
        UsageError: Both a program and a file; an identity without a program; a pipe.
        ProtlmError: The program is not installed.
    """
    if program is None:
        if identity is not None:
            raise UsageError("cluster_identity: only with cluster_with")
        return
    if has_clusters:
        raise UsageError("clusters and cluster_with: only one of them")
    if any(input_file.state is None for input_file in files):
        raise UsageError("cluster_with: the standard input and other pipes can be read only once; write it to a file")
    if shutil.which(program) is None:
        raise ProtlmError(f"{program}: not installed; install MMseqs2, or give its clusters with --clusters")


def make_clusters(
    program: str,
    identity: float | None,
    files: Sequence[InputFile],
    options: PrepOptions,
    *,
    start_progress: StartProgress = no_progress,
) -> Labels:
    """Returns the clusters that MMseqs2 makes of the records of files, by their sequences.

    `easy-linclust` takes time linear in the number of sequences; members cover 80 % of their representative. Memory:
    the ids, and some 300 bytes for each sequence, beside what MMseqs2 takes.

    Args:
        program: `mmseqs`, which is installed.
        identity: Least sequence identity of a member to its representative, by default `DEFAULT_IDENTITY`.
        files: The files.
        options: The options by which records are kept.
        start_progress: Starts the stages `read for clusters` (sequences) and `cluster`, whose size is unknown.

    Raises:
        RecordError: A record that ends the command.
        ProtlmError: A damaged file, no record left, or a program that fails.
    """
    ids: list[str] = []
    digests: list[np.ndarray] = []
    seen: set[bytes] = set()
    advance = start_progress("read for clusters", 0)
    with tempfile.TemporaryDirectory() as folder:
        fasta = Path(folder) / "sequences.fasta"
        with fasta.open("wb") as file:
            for table in (table for input_file in files for table in _tables(input_file.path, options)):
                residues, bounds = vocabulary.decode(table.tokens).encode(), table.offsets.tolist()
                num_before = len(ids)
                for place in _kept(table, options):
                    if (key := table.digests[place].tobytes()) not in seen:
                        seen.add(key)
                        file.write(b">%d\n%s\n" % (len(ids), residues[bounds[place] : bounds[place + 1]]))
                        ids.append(table.ids[place])
                        digests.append(table.digests[place])
                advance(len(ids) - num_before)
        if not ids:
            raise ProtlmError(f"{program}: no record is left to cluster")
        advance = start_progress("cluster", 0)
        pairs = _run(program, DEFAULT_IDENTITY if identity is None else identity, fasta, len(ids), advance)
    representatives = np.full(len(ids), -1, dtype=np.int64)
    representatives[pairs[:, 1]] = pairs[:, 0]
    return clusters_of_sequences(program, np.stack(digests), representatives, ids)


def _tables(path: str, options: PrepOptions) -> Iterator[RecordTable]:
    num_lines = 0
    for piece in cut_into_pieces(path, SourceBlocks(path), piece_bytes=PIECE_BYTES):
        parsed = parse_piece(path, piece)
        if options.on_bad_record == "error" and parsed.faults.first is not None:
            raise parsed.faults.first.moved(num_lines)
        table = parsed.table
        if options.nucleotides == "error" and len(
            found := nucleic_acids(table.tokens, table.offsets, table.descriptions)
        ):
            line, record_id = int(table.lines[found[0]]) + num_lines, table.ids[int(found[0])]
            raise RecordError(path, line, refusal(record_id), reason=NUCLEOTIDES, record_id=record_id)
        num_lines += parsed.num_lines
        yield table


def _kept(table: RecordTable, options: PrepOptions) -> list[int]:
    """Returns the places of the records that are not left out by their length or as nucleic acids."""
    lengths = np.diff(table.offsets)
    is_kept = lengths >= options.min_length
    if options.max_length is not None:
        is_kept &= lengths <= options.max_length
    if options.nucleotides == "skip":
        is_kept[nucleic_acids(table.tokens, table.offsets, table.descriptions)] = False
    places: list[int] = np.flatnonzero(is_kept).tolist()
    return places


def _run(program: str, identity: float, fasta: Path, num_sequences: int, advance: Advance) -> np.ndarray:
    """Returns the numbers of representative and member of each row that MMseqs2 writes, int64 (rows, 2)."""
    command = shutil.which(program)
    assert command is not None
    result = fasta.parent / "clusters"
    # Absolute paths: no file name can be mistaken for an option.
    words = [command, "easy-linclust", str(fasta), str(result), str(fasta.parent / "tmp"),
             "--min-seq-id", str(identity), "-c", _COVERAGE, "--cov-mode", "1"]  # fmt: skip
    status, told, errors = _watched(words, advance)
    if status:
        lines = (errors.strip() or told.strip()).splitlines()
        raise ProtlmError(f"{program}: ended with status {status}: {lines[-1] if lines else 'no message'}")
    try:
        with warnings.catch_warnings():
            # NumPy warns where it meets anything else than a number.
            warnings.simplefilter("error")
            numbers = np.fromfile(f"{result}_cluster.tsv", dtype=np.int64, sep=" ")
        pairs = numbers.reshape(-1, 2)
        if not len(pairs) or pairs.min() < 0 or pairs.max() >= num_sequences:
            raise ValueError
    except (OSError, ValueError, DeprecationWarning) as error:
        raise ProtlmError(f"{program}: wrote no clusters of the sequences it was given; is it MMseqs2?") from error
    return pairs


def _watched(words: Sequence[str], advance: Advance) -> tuple[int, str, str]:
    """Returns status, stdout and stderr of a program, and meanwhile reports that it is at work."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            while True:
                try:
                    told, errors = process.communicate(timeout=_SECONDS_BETWEEN_LOOKS)
                except subprocess.TimeoutExpired:
                    advance(0)
                else:
                    return process.returncode, told, errors
        except BaseException:
            process.kill()
            raise
