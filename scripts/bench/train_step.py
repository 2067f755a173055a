"""Times one training step of protlm against performer-pytorch, ESM, itself without attention and with other layers.

A step is forward, loss, backward and an AdamW update, the same AdamW for all; the models take turns within each repeat.
protlm computes logits at the targets, as in training; the peers, as they do by themselves, at every position. Nothing
is reported unless every model first has a finite loss and gradients. A peer takes part where it is installed
(`pip install -e '.[bench]'`). Peak memory is measured in new processes; `data` needs a dataset of `protlm prep`.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Run as a file, Python looks for imports beside it, not in the folder that holds the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# As in protlm itself: waiting threads sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from protlm.ops import backends
from protlm.runtime.devices import has_half_precision_units
from scripts.bench import harness
from scripts.bench import train_step_figures as figures
from scripts.bench import train_step_measurements as measurements
from scripts.bench.models import Sizes
from scripts.bench.train_step_models import (
    CYCLE,
    ESM_PEER,
    EXACT,
    HALF,
    NO_ATTENTION,
    PERFORMER_PEER,
    PROTLM,
    PROTLM_CONVOLVED,
    check,
    why_missing,
)
from scripts.measuring import can_measure_memory, using_threads

MODELS = {
    "performer": (PROTLM, PROTLM_CONVOLVED, PERFORMER_PEER),
    "malloc": (PROTLM, PROTLM_CONVOLVED, PERFORMER_PEER),
    "esm": (PROTLM, ESM_PEER),
    "ceiling": (PROTLM, NO_ATTENTION),
    "cycle": (PROTLM, CYCLE),
    "half": (PROTLM, CYCLE, EXACT, *HALF.values()),
    "memory": (PROTLM, PERFORMER_PEER),
    "data": (PROTLM,),
}
"""The measurements, and the models that each compares."""


def obstacles(arguments: argparse.Namespace, name: str) -> Iterator[str]:
    """Yields why a measurement cannot be made here."""
    yield from map(why_missing, MODELS[name])
    if name == "memory" and not can_measure_memory():
        yield harness.NEEDS_LINUX
    if name == "half" and not has_half_precision_units("bf16"):
        yield "it needs a processor with units for bfloat16"
    if name == "data" and arguments.dataset is None:
        yield "it needs --dataset"


def measure(arguments: argparse.Namespace, wanted: Sequence[str], sizes: Sizes) -> dict[str, Any]:
    """Returns the results of the wanted measurements, by name."""
    short, long = (arguments.batch, arguments.length), (1, arguments.long_length)
    repeats = arguments.repeats
    measured: dict[str, Any] = {}
    for name, rows in (
        ("performer", (short,)),
        ("malloc", (short,)),
        ("esm", (short, long)),
        ("ceiling", (short, long)),
        ("cycle", (short, long)),
        ("half", (short, long)),
    ):
        if name in wanted:
            time_all = measurements.tuned_malloc if name == "malloc" else measurements.speed
            measured[name] = [
                {"batch": batch, "length": length, "times": time_all(MODELS[name], sizes, batch, length, repeats)}
                for batch, length in rows
            ]
    if "memory" in wanted:
        peaks = measurements.peak_bytes(MODELS["memory"], sizes, arguments.long_length)
        measured["memory"] = {"length": arguments.long_length, "peak_bytes": peaks}
    if "data" in wanted:
        tokens_per_batch = arguments.batch * arguments.length
        measured["data"] = measurements.data(arguments.dataset, sizes, tokens_per_batch, arguments.data_steps)
    return measured


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = harness.new_parser(__doc__, MODELS)
    parser.add_argument("--dataset", type=Path, metavar="DATASET", help="the dataset that `data` trains on")
    parser.add_argument("--data-steps", type=int, default=20, help="steps of `data`")
    parser.add_argument("--batch", type=int, default=4, help="proteins of a step at --length")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each protein")
    parser.add_argument("--long-length", type=int, default=8192, help="tokens of one long protein")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--model-dim", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--ffn", type=int, default=2048, help="a multiple of --model-dim")
    parser.add_argument("--features", type=int, default=256)
    arguments = harness.parse(parser, words)
    if arguments.ffn % arguments.model_dim:
        parser.error(f"--ffn: expected a multiple of --model-dim, which performer-pytorch needs, got {arguments.ffn}")
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Checks, measures and reports."""
    words = sys.argv[1:] if words is None else words
    arguments = parse(words)
    sizes = Sizes(arguments.layers, arguments.model_dim, arguments.heads, arguments.ffn, arguments.features)
    with using_threads(arguments.threads):
        wanted = harness.possible(arguments.only, lambda name: obstacles(arguments, name))
        counts = check(list(dict.fromkeys(model for name in wanted for model in MODELS[name])), sizes)
        measured = measure(arguments, wanted, sizes)
        harness.Report(
            script="train_step.py", words=words, setup=f"{sizes}, AdamW, float32 if nothing else is said",
            figures=figures.figures(measured),
            environment=harness.environment("performer-pytorch", "transformers") | {"backends": backends()},
            measured=measured, facts={"sizes": asdict(sizes), "parameters": counts},
            remarks=[
                f"{name}: {count:,} parameters ({100 * (count / counts[PROTLM] - 1):+.1f} %)"
                for name, count in counts.items()
            ],
        ).publish(arguments)  # fmt: skip


if __name__ == "__main__":
    main()
