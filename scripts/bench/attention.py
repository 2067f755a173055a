"""Times FAVOR attention against exact attention, the plain formula and performer-pytorch; measures memory.

The implementations take turns within each repeat; ratios of medians, with the ranges of the repeats, are printed with
the machine, the threads, the versions and the commit. Nothing is reported unless FAVOR first equals its float64 twin.
performer-pytorch takes part where it is installed (`pip install -e '.[bench]'`), torch.compile where a C++ compiler is.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Run as a file, Python looks for imports beside it, not in the folder that holds the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# As in protlm itself: waiting threads sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from protlm.ops import backends
from protlm.runtime.devices import has_half_precision_units
from scripts.attention_calls import Attention, exact
from scripts.bench import attention_figures as figures
from scripts.bench import attention_measurements as measurements
from scripts.bench import harness
from scripts.bench.attention_implementations import (
    PEER_MODULE,
    RELU_PEER,
    SOFTMAX_PEER,
    check_values,
    compiled_formula,
    implementations,
)
from scripts.bench.models import why_missing
from scripts.measuring import can_measure_memory, using_threads

MEASUREMENTS = ("speed", "half", "malloc", "threads", "memory", "slope", "packed")


def obstacles(arguments: argparse.Namespace, name: str) -> Iterator[str]:
    """Yields why a measurement cannot be made here."""
    if name == "malloc" and why_missing(PEER_MODULE):
        yield "it needs performer-pytorch"
    if name == "threads" and arguments.threads < 2:
        yield "it needs --threads of at least 2"
    if name == "half" and not has_half_precision_units("bf16"):
        yield "it needs a processor with units for bfloat16"
    if name == "memory" and not can_measure_memory():
        yield harness.NEEDS_LINUX


def measure(arguments: argparse.Namespace, wanted: Sequence[str], functions: dict[str, Attention]) -> dict[str, Any]:
    """Returns the results of the wanted measurements, by name."""
    repeats, favor = arguments.repeats, functions["favor"]
    measured: dict[str, Any] = {}
    if "speed" in wanted:
        measured["speed"] = measurements.speed(functions, arguments.lengths, repeats)
    if "half" in wanted:
        lengths = [length for length in arguments.lengths if length <= measurements.PEER_MAX_LENGTH]
        measured["half"] = {length: measurements.half(favor, exact, length, repeats) for length in lengths}
    if "malloc" in wanted:
        names, length = ("favor", "favor relu", SOFTMAX_PEER, RELU_PEER), arguments.malloc_length
        measured["malloc"] = {"length": length, "times": measurements.tuned_malloc(names, length, repeats)}
    if "threads" in wanted:
        length = arguments.thread_length
        times = measurements.threads(favor, length, (1, arguments.threads), repeats)
        measured["threads"] = {"length": length, "times": times}
    if "memory" in wanted:
        names = [name for name in ("favor", "chunked torch", SOFTMAX_PEER) if name in functions]
        peaks = measurements.peak_bytes(names, arguments.memory_length)
        measured["memory"] = {"length": arguments.memory_length, "peak_bytes": peaks}
    if "slope" in wanted:
        measured["slope"] = measurements.slope(favor, arguments.slope_lengths, repeats)
    if "packed" in wanted:
        times = measurements.packed(favor, arguments.packed_tokens, repeats)
        measured["packed"] = {"row_tokens": arguments.packed_tokens, "times": times}
    return measured


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = harness.new_parser(__doc__, MEASUREMENTS)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[512, 1024, 4096, 8192, 32_768],
        help=f"of `speed`; above {measurements.PEER_MAX_LENGTH} the peers take no part",
    )  # fmt: skip
    parser.add_argument("--malloc-length", type=int, default=8192)
    parser.add_argument("--thread-length", type=int, default=32_768)
    parser.add_argument("--memory-length", type=int, default=16_384)
    parser.add_argument("--slope-lengths", type=int, nargs="+", default=[2**power for power in range(11, 17)])
    parser.add_argument("--packed-tokens", type=int, default=8192, help="of a row of packed proteins")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw `speed`: time against length")
    arguments = harness.parse(parser, words, repeats=7)
    if arguments.plot and "speed" not in arguments.only:
        parser.error("--plot draws `speed`, which --only leaves out")
    if len(set(arguments.slope_lengths)) < 2:
        parser.error("--slope-lengths: expected at least 2 lengths")
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Checks, measures and reports."""
    words = sys.argv[1:] if words is None else words
    arguments = parse(words)
    with using_threads(arguments.threads):
        functions = implementations()
        # First without the compiled formula, which takes long to compile.
        check_values(functions)
        if "speed" in arguments.only:
            compiled = compiled_formula()
            check_values(compiled)
            functions |= compiled
        wanted = harness.possible(arguments.only, lambda name: obstacles(arguments, name))
        measured = measure(arguments, wanted, functions)
        if arguments.plot:
            figures.draw(arguments.plot, measured["speed"])
        harness.Report(
            script="attention.py", words=words, setup=figures.SETUP, figures=figures.figures(measured),
            environment=harness.environment("performer-pytorch") | {"backends": backends()}, measured=measured,
        ).publish(arguments)  # fmt: skip


if __name__ == "__main__":
    main()
