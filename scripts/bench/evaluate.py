"""Times protlm eval against bare forward passes on the same rows: the cost of scores, baselines, bootstrap and page.

The model has the tiny configuration and random weights. Its evaluation, all that the command does but the start of
Python, takes turns with forward passes on the rows that it scores. Nothing is reported unless both give the same loss.
With --memory, the peak of a new process that evaluates is measured too, for a tenth of the proteins and for all.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Run as a file, Python looks for imports beside it, not in the folder that holds the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# As in protlm itself: waiting threads sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from scripts.bench import evaluate_measurements as measurements
from scripts.bench import harness
from scripts.bench.evaluate_measurements import EVAL, FORWARD
from scripts.bench.harness import Figure, median, ratio
from scripts.measuring import MEBIBYTE, SAMPLE, SECONDS, can_measure_memory, using_threads


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Returns the times of both sides, and the peaks by number of proteins."""
    dataset = measurements.prepared(arguments.fasta, folder / "dataset", arguments.test_fraction)
    measured: dict[str, Any] = {
        "proteins": dataset.split("test").num_records,
        "training_residues": dataset.manifest.splits["train"].num_residues,
        "times": measurements.speed(folder / "model", dataset, arguments.repeats),
    }
    if arguments.memory:
        few = measurements.prepared(arguments.fasta, folder / "few", arguments.test_fraction / 10)
        measured["peak_bytes"] = {
            of.split("test").num_records: measurements.peak(folder / f"model of {of.path.name}", of)
            for of in (few, dataset)
        }
    return measured


def figures(measured: Mapping[str, Any]) -> Iterator[Figure]:
    """Yields the ratio of the times, and the peaks."""
    seconds = {name: times[SECONDS] for name, times in measured["times"].items()}
    where = f"{measured['proteins']:,} proteins, {measured['training_residues'] / 1e6:.1f} M residues counted"
    yield ratio(f"time of {EVAL} / {FORWARD}", where, seconds[EVAL], seconds[FORWARD])
    for count, peak_bytes in measured.get("peak_bytes", {}).items():
        yield median(f"peak memory of {EVAL}", f"{count:,} proteins", [peak_bytes / MEBIBYTE], " MiB")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = harness.new_parser(__doc__)
    parser.add_argument("--fasta", type=Path, default=SAMPLE, metavar="FASTA", help="proteins, split at random")
    parser.add_argument("--test-fraction", type=float, default=0.2, help="share of them that is scored")
    parser.add_argument("--memory", action="store_true", help="measure peaks of memory too")
    arguments = harness.parse(parser, words)
    if arguments.memory and not can_measure_memory():
        parser.error(f"--memory: {harness.NEEDS_LINUX}")
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    words = sys.argv[1:] if words is None else words
    arguments = parse(words)
    with tempfile.TemporaryDirectory() as folder, using_threads(arguments.threads):
        measured = measure(arguments, Path(folder))
        report = harness.Report(
            script="evaluate.py",
            words=words,
            setup="tiny, random weights, rows of 8,192 tokens",
            environment=harness.environment(),
            figures=list(figures(measured)),
            measured=measured,
        )
    report.publish(arguments)


if __name__ == "__main__":
    main()
