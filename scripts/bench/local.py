"""Times local or near-far attention against exact attention (SDPA) and its torch backend; measures slope and memory.

The implementations take turns within each repeat; ratios of medians, with the ranges of the repeats, are printed with
the machine, the threads, the versions and the commit. Nothing is reported unless the attention first equals its float64
twin. Exact attention computes all pairs: the ratio says what is saved, not that both give the same.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Run as a file, Python looks for imports beside it, not in the folder that holds the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# As in protlm itself: waiting threads sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


from protlm.ops import backends
from scripts.attention_calls import BOTH, FORWARD
from scripts.bench import harness
from scripts.bench import local_measurements as measurements
from scripts.bench.harness import Figure, ratio
from scripts.bench.local_measurements import HEAD_DIM, HEADS, NEAR_FAR, NUM_FEATURES, SUBJECTS
from scripts.measuring import (
    MEBIBYTE,
    RETURN_FREED_MEMORY,
    Times,
    can_measure_memory,
    in_a_process,
    take_turns,
    using_threads,
)
from scripts.report.approximation import log_log_slope

MEASUREMENTS = ("speed", "slope", "memory")


def measure(arguments: argparse.Namespace, wanted: Sequence[str]) -> dict[str, Any]:
    """Returns the results of the wanted measurements, by name."""
    subject = SUBJECTS[arguments.attention]
    calls = measurements.implementations(subject, arguments.window)
    measured: dict[str, Any] = {}
    if "speed" in wanted:
        measured["speed"] = {}
        for length in arguments.lengths:
            tensors = measurements.draw(length)
            turns = {name: partial(measurements.both_passes, call, tensors) for name, call in calls.items()}
            measured["speed"][length] = take_turns(turns, arguments.repeats)
    if "slope" in wanted:
        slopes = {
            str(length): partial(measurements.both_passes, calls[subject], measurements.draw(length))
            for length in arguments.slope_lengths
        }
        measured["slope"] = take_turns(slopes, arguments.repeats)
    if "memory" in wanted:
        length = arguments.memory_length
        settings = {"subject": subject, "window": arguments.window, "length": length}
        peak = in_a_process(RETURN_FREED_MEMORY, measurements.peak_here, **settings)
        measured["memory"] = {"length": length, "peak_bytes": peak}
    return measured


def figures(measured: dict[str, Any], subject: str) -> list[Figure]:
    """Returns the figures of all that was measured of the subject."""
    rows: list[Figure] = []
    for length, times in measured.get("speed", {}).items():
        for name in times:
            if name != subject:
                rows += [
                    ratio(f"{name} / {subject}", f"L {length} {work}", times[name][work], times[subject][work])
                    for work in (FORWARD, BOTH)
                ]
    if "slope" in measured:
        rows += [slope(measured["slope"], work, subject) for work in (FORWARD, BOTH)]
    if memory := measured.get("memory"):
        size, where = memory["peak_bytes"] / MEBIBYTE, f"L {memory['length']} {BOTH}"
        rows.append(Figure("peak memory above inputs and outputs", where, size, size, size, " MiB", "in a new process"))
    return rows


def slope(times: Times, work: str, subject: str) -> Figure:
    """Returns the log-log slope of time against length."""
    lengths, by_length = [float(length) for length in times], [seconds[work] for seconds in times.values()]
    of_repeats = [log_log_slope(lengths, seconds) for seconds in zip(*by_length, strict=True)]
    value = log_log_slope(lengths, [statistics.median(seconds) for seconds in by_length])
    where = f"L {min(lengths):.0f} to {max(lengths):.0f}, {work}"
    return Figure(
        f"log-log slope of time against length, {subject}", where, value, min(of_repeats), max(of_repeats), "", ""
    )


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = harness.new_parser(__doc__, MEASUREMENTS)
    parser.add_argument("--attention", choices=SUBJECTS, default="local")
    parser.add_argument("--window", type=int, default=32, help="tokens on either side, or of a near block")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192], help="of `speed`")
    parser.add_argument("--slope-lengths", type=int, nargs="+", default=[2**power for power in range(11, 17)])
    parser.add_argument("--memory-length", type=int, default=34_350)
    return harness.parse(parser, words, repeats=7)


def main(words: Sequence[str] | None = None) -> None:
    """Checks, measures and reports."""
    words = sys.argv[1:] if words is None else words
    arguments = parse(words)
    with using_threads(arguments.threads):
        subject = SUBJECTS[arguments.attention]
        measurements.check_values(subject, arguments.window)
        wanted = harness.possible(
            arguments.only, lambda name: [harness.NEEDS_LINUX] if name == "memory" and not can_measure_memory() else []
        )
        measured = measure(arguments, wanted)
        features = f" M{NUM_FEATURES}" if subject == NEAR_FAR else ""
        harness.Report(
            script="local.py", words=words,
            setup=f"B1 H{HEADS} d{HEAD_DIM}{features} window {arguments.window} float32",
            figures=figures(measured, subject), environment=harness.environment() | {"backends": backends()},
            measured=measured,
        ).publish(arguments)  # fmt: skip


if __name__ == "__main__":
    main()
