"""Clusters from MMseqs2, if the program is installed: its command line, and the life of its files."""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from protlm.data.parsing.sources import STDIN, expand_inputs
from protlm.errors import ProtlmError, UsageError

DEFAULT_IDENTITY = 0.3
_COVERAGE = "0.8"


@contextlib.contextmanager
def clusters_of(
    inputs: Sequence[str | Path], program: str | None, identity: float | None, clusters: Path | None
) -> Iterator[Path | None]:
    """Yields the file of clusters: the given one, or a temporary one that MMseqs2 makes from the inputs.

    `easy-linclust` takes time linear in the number of sequences; members cover 80 % of their representative.

    Args:
        inputs: FASTA files, plain, .gz or .bz2, which MMseqs2 reads.
        program: `mmseqs`, or None to use `clusters`.
        identity: Least sequence identity of a member to its representative, by default `DEFAULT_IDENTITY`.
        clusters: A file of clusters, or None.

    Raises:
        UsageError: Both a program and a file; an identity without a program; the standard input.
        ProtlmError: The program is not installed, or fails.
    """
    if program is None:
        if identity is not None:
            raise UsageError("cluster_identity: only with cluster_with")
        yield clusters
        return
    if clusters is not None:
        raise UsageError("clusters and cluster_with: only one of them")
    paths = expand_inputs(inputs).paths
    if STDIN in paths:
        raise UsageError("cluster_with: the standard input, -, can be read only once; write it to a file")
    command = shutil.which(program)
    if command is None:
        raise ProtlmError(f"{program}: not installed; install MMseqs2, or give its clusters with --clusters")
    least = DEFAULT_IDENTITY if identity is None else identity
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "clusters"
        # Absolute paths: no file name can be mistaken for an option.
        arguments = [*(str(Path(path).resolve()) for path in paths), str(result), str(Path(folder) / "tmp")]
        done = subprocess.run(
            [command, "easy-linclust", *arguments, "--min-seq-id", str(least), "-c", _COVERAGE, "--cov-mode", "1"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise ProtlmError(f"{program}: ended with status {done.returncode}: {lines[-1] if lines else 'no message'}")
        yield Path(f"{result}_cluster.tsv")
