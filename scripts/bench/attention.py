"""Times FAVOR attention against exact attention, the plain formula and performer-pytorch; measures memory.

The implementations take turns within each repeat; ratios of medians, with the ranges of the repeats, are printed with
the machine, the threads, the versions and the commit. Nothing is reported unless FAVOR first equals its float64 twin.
performer-pytorch takes part where it is installed (`pip install -e '.[bench]'`), torch.compile where a C++ compiler is.
"""

import argparse
import importlib.metadata
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Run as a file, Python looks for imports beside it, not in the folder that holds the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# As in protlm itself: waiting threads sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from protlm.ops import backends
from scripts.bench import attention_figures as figures
from scripts.bench import attention_measurements as measurements
from scripts.bench.attention_implementations import (
    RELU_PEER,
    SOFTMAX_PEER,
    Attention,
    check_values,
    compiled_formula,
    implementations,
    using_threads,
)
from scripts.environment import environment
from scripts.report.cost import can_measure_memory

PARTS = ("speed", "malloc", "threads", "memory", "slope", "packed")
REPORT_REPEATS = 5
MEASURED_VARIABLES = ("OMP_", "KMP_", "MKL_", "MALLOC_", "LD_PRELOAD")
"""Beginnings of the environment variables that change figures."""
NEEDS = {
    "malloc": "it needs performer-pytorch",
    "threads": "it needs --threads of at least 2",
    "memory": "it needs a system with /proc/self/clear_refs",
}
"""What a part cannot do without."""


def measure(arguments: argparse.Namespace, functions: dict[str, Attention]) -> dict[str, Any]:
    """Returns what was measured, by part; what a part cannot do here is told."""
    repeats, favor = arguments.repeats, functions["favor"]
    found: dict[str, Any] = {}
    if "speed" in arguments.only:
        found["speed"] = measurements.speed(functions, arguments.lengths, repeats)
    if "malloc" in arguments.only and SOFTMAX_PEER in functions:
        names, length = ("favor", "favor relu", SOFTMAX_PEER, RELU_PEER), arguments.malloc_length
        found["malloc"] = {"length": length, "times": measurements.tuned_malloc(names, length, repeats)}
    if "threads" in arguments.only and arguments.threads > 1:
        length = arguments.thread_length
        times = measurements.threads(favor, length, (1, arguments.threads), repeats)
        found["threads"] = {"length": length, "times": times}
    if "memory" in arguments.only and can_measure_memory():
        names = [name for name in ("favor", "chunked torch", SOFTMAX_PEER) if name in functions]
        peaks = measurements.peak_bytes(names, arguments.memory_length)
        found["memory"] = {"length": arguments.memory_length, "peak_bytes": peaks}
    if "slope" in arguments.only:
        found["slope"] = measurements.slope(favor, arguments.slope_lengths, repeats)
    if "packed" in arguments.only:
        times = measurements.packed(favor, arguments.packed_tokens, repeats)
        found["packed"] = {"row_tokens": arguments.packed_tokens, "times": times}
    for part in arguments.only:
        if part not in found:
            print(f"{part}: cannot be measured here: {NEEDS[part]}", file=sys.stderr)
    return found


def full_environment() -> dict[str, Any]:
    """Returns what the figures depend on: also the variables that are set, the backends and the peer."""
    names = sorted(name for name in os.environ if name.startswith(MEASURED_VARIABLES))
    try:
        peer = importlib.metadata.version("performer-pytorch")
    except importlib.metadata.PackageNotFoundError:
        peer = "not installed"
    return environment() | {
        "variables": " ".join(f"{name}={os.environ[name]}" for name in names),
        "performer-pytorch": peer,
        "backends": backends(),
    }


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="parts; by default all")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[512, 1024, 4096, 8192, 32_768],
        help=f"of `speed`; above {measurements.PEER_MAX_LENGTH} the peers take no part",
    )  # fmt: skip
    parser.add_argument("--malloc-length", type=int, default=8192)
    parser.add_argument("--thread-length", type=int, default=32_768)
    parser.add_argument("--memory-length", type=int, default=16_384)
    parser.add_argument("--slope-lengths", type=int, nargs="+", default=[2**power for power in range(11, 17)])
    parser.add_argument("--packed-tokens", type=int, default=8192, help="of a row of packed proteins")
    parser.add_argument("--repeats", type=int, default=7, help=f"at least {REPORT_REPEATS} for --rows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", action="store_true", help="also print rows for RESULTS.md")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="also write JSON; without FILE print nothing else"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw `speed`: time against length")
    arguments = parser.parse_args(words)
    if arguments.repeats < 1 or (arguments.rows and arguments.repeats < REPORT_REPEATS):
        parser.error(f"--repeats: expected at least 1, and {REPORT_REPEATS} with --rows, got {arguments.repeats}")
    if arguments.rows and arguments.json == "-":
        parser.error("--rows and --json without FILE both print: give --json a file")
    if arguments.plot and "speed" not in arguments.only:
        parser.error("--plot draws `speed`, which --only leaves out")
    if len(set(arguments.slope_lengths)) < 2:
        parser.error("--slope-lengths: expected at least 2 lengths")
    return arguments


def report(arguments: argparse.Namespace, found: dict[str, Any], words: Sequence[str]) -> None:
    """Prints and writes the figures."""
    told, about = figures.figures(found), full_environment()
    command = shlex.join(["python", "scripts/bench/attention.py", *words])
    if arguments.json:
        content = {
            "environment": about, "command": command, "setup": figures.SETUP, "repeats": arguments.repeats,
            "figures": [asdict(figure) for figure in told], "measured": found,
        }  # fmt: skip
        text = json.dumps(content, indent=1) + "\n"
        if arguments.json == "-":
            print(text, end="")
        else:
            Path(arguments.json).write_text(text, encoding="utf-8")
    if arguments.plot:
        figures.draw(arguments.plot, found["speed"])
    if arguments.json == "-":
        return
    print(", ".join(f"{key} {value}" for key, value in about.items() if key != "backends" and value))
    for name, line in about["backends"].items():
        print(f"backend {name}: {line}")
    print(f"{figures.SETUP}, {arguments.repeats} repeats: ratio of medians (range of single repeats), medians")
    for measured in dict.fromkeys(figure.measured for figure in told):
        print(f"{measured}")
        for figure in (figure for figure in told if figure.measured == measured):
            print(f"  {figure.where:36} {figure.text:28} {figure.note}".rstrip())
    if arguments.rows:
        print(*figures.markdown_rows(told, about, command, arguments.repeats), sep="\n")


def main(words: Sequence[str] | None = None) -> None:
    """Checks, measures and reports."""
    words = sys.argv[1:] if words is None else words
    arguments = parse(words)
    with using_threads(arguments.threads):
        functions = implementations()
        # First without what takes long to compile.
        check_values(functions)
        if "speed" in arguments.only:
            compiled = compiled_formula()
            check_values(compiled)
            functions |= compiled
        report(arguments, measure(arguments, functions), words)


if __name__ == "__main__":
    main()
