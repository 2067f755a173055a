"""Times one training step of protlm against performer-pytorch, ESM of transformers, and itself without attention.

A step is forward, loss, backward and an AdamW update, the same AdamW for all; the models take turns within each repeat.
protlm computes logits at the targets, as in training; the peers, as they do by themselves, at every position. Nothing
is reported unless every model first has a finite loss and gradients. A peer takes part where it is installed
(`pip install -e '.[bench]'`). Peak memory is measured in new processes; `data` needs a dataset of `protlm prep`.
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

from scripts.bench import train_step_figures as figures
from scripts.bench import train_step_measurements as measurements
from scripts.bench.attention import REPORT_REPEATS, full_environment
from scripts.bench.attention_implementations import using_threads
from scripts.bench.train_step_models import (
    ESM_PEER,
    NO_ATTENTION,
    PERFORMER_PEER,
    PROTLM,
    PROTLM_CONVOLVED,
    Sizes,
    check,
    why_missing,
)
from scripts.report.cost import can_measure_memory

MODELS = {
    "performer": (PROTLM, PROTLM_CONVOLVED, PERFORMER_PEER),
    "malloc": (PROTLM, PROTLM_CONVOLVED, PERFORMER_PEER),
    "esm": (PROTLM, ESM_PEER),
    "ceiling": (PROTLM, NO_ATTENTION),
    "memory": (PROTLM, PERFORMER_PEER),
    "data": (PROTLM,),
}
"""The parts, and the models that each compares."""


def possible_parts(arguments: argparse.Namespace) -> list[str]:
    """Returns the parts that can be measured here; why the others cannot is told."""
    found = []
    for part in arguments.only:
        reasons = [why_missing(name) for name in MODELS[part]]
        if part == "memory" and not can_measure_memory():
            reasons.append("it needs a system with /proc/self/clear_refs")
        if part == "data" and arguments.dataset is None:
            reasons.append("it needs --dataset")
        if reason := next(filter(None, reasons), ""):
            print(f"{part}: cannot be measured here: {reason}", file=sys.stderr)
        else:
            found.append(part)
    return found


def measure(arguments: argparse.Namespace, wanted: Sequence[str], sizes: Sizes) -> dict[str, Any]:
    """Returns what was measured, by part."""
    short, long = (arguments.batch, arguments.length), (1, arguments.long_length)
    repeats = arguments.repeats
    found: dict[str, Any] = {}
    for part, rows in (
        ("performer", (short,)),
        ("malloc", (short,)),
        ("esm", (short, long)),
        ("ceiling", (short, long)),
    ):
        if part in wanted:
            time_all = measurements.tuned_malloc if part == "malloc" else measurements.speed
            found[part] = [
                {"batch": batch, "length": length, "times": time_all(MODELS[part], sizes, batch, length, repeats)}
                for batch, length in rows
            ]
    if "memory" in wanted:
        peaks = measurements.peak_bytes(MODELS["memory"], sizes, arguments.long_length)
        found["memory"] = {"length": arguments.long_length, "peak_bytes": peaks}
    if "data" in wanted:
        tokens_per_batch = arguments.batch * arguments.length
        found["data"] = measurements.data(arguments.dataset, sizes, tokens_per_batch, arguments.data_steps)
    return found


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MODELS, nargs="+", default=list(MODELS), help="parts; by default all")
    parser.add_argument("--dataset", type=Path, metavar="DATASET", help="what `data` trains on")
    parser.add_argument("--data-steps", type=int, default=20, help="steps of `data`")
    parser.add_argument("--batch", type=int, default=4, help="proteins of a step at --length")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each protein")
    parser.add_argument("--long-length", type=int, default=8192, help="tokens of one long protein")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--model-dim", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--ffn", type=int, default=2048, help="a multiple of --model-dim")
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5, help=f"at least {REPORT_REPEATS} for --rows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", action="store_true", help="also print rows for RESULTS.md")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="also write JSON; without FILE print nothing else"
    )
    arguments = parser.parse_args(words)
    if arguments.repeats < 1 or (arguments.rows and arguments.repeats < REPORT_REPEATS):
        parser.error(f"--repeats: expected at least 1, and {REPORT_REPEATS} with --rows, got {arguments.repeats}")
    if arguments.rows and arguments.json == "-":
        parser.error("--rows and --json without FILE both print: give --json a file")
    if arguments.ffn % arguments.model_dim:
        parser.error(f"--ffn: expected a multiple of --model-dim, which performer-pytorch needs, got {arguments.ffn}")
    return arguments


def report(
    arguments: argparse.Namespace, sizes: Sizes, counts: dict[str, int], found: dict[str, Any], words: Sequence[str]
) -> None:
    """Prints and writes the figures."""
    told, about, setup = figures.figures(found), environment(), figures.setup(sizes)
    command = shlex.join(["python", "scripts/bench/train_step.py", *words])
    if arguments.json:
        content = {
            "environment": about, "command": command, "setup": setup, "repeats": arguments.repeats,
            "sizes": asdict(sizes), "parameters": counts, "figures": [asdict(figure) for figure in told],
            "measured": found,
        }  # fmt: skip
        text = json.dumps(content, indent=1) + "\n"
        if arguments.json == "-":
            print(text, end="")
            return
        Path(arguments.json).write_text(text, encoding="utf-8")
    print(", ".join(f"{key} {value}" for key, value in about.items() if key != "backends" and value))
    for name, count in counts.items():
        print(f"{name}: {count:,} parameters ({100 * (count / counts[PROTLM] - 1):+.1f} %)")
    print(f"{setup}, {arguments.repeats} repeats: ratio of medians (range of single repeats), medians")
    for measured in dict.fromkeys(figure.measured for figure in told):
        print(measured)
        for figure in (figure for figure in told if figure.measured == measured):
            print(f"  {figure.where:24} {figure.text:28} {figure.note}".rstrip())
    if arguments.rows:
        print(*figures.markdown_rows(told, about, command, setup, arguments.repeats), sep="\n")


def environment() -> dict[str, Any]:
    """Returns what the figures depend on."""
    try:
        transformers = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        transformers = "not installed"
    return full_environment() | {"transformers": transformers}


def main(words: Sequence[str] | None = None) -> None:
    """Checks, measures and reports."""
    words = sys.argv[1:] if words is None else words
    arguments = parse(words)
    sizes = Sizes(arguments.layers, arguments.model_dim, arguments.heads, arguments.ffn, arguments.features)
    with using_threads(arguments.threads):
        wanted = possible_parts(arguments)
        counts = check(list(dict.fromkeys(name for part in wanted for name in MODELS[part])), sizes)
        report(arguments, sizes, counts, measure(arguments, wanted, sizes), words)


if __name__ == "__main__":
    main()
