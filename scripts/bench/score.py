"""Times masked marginals of a protein against a loop over ESM of transformers, one position at a time.

Both have the same weights, and nothing is timed unless both give the same scores. Every position of the protein has its
19 mutants; each side hides the positions one by one. The sides take turns within each repeat; ratios of medians, with
the ranges of the repeats, are printed with the machine, the threads, the versions and the commit. The shape is by
default that of `tiny`; `--layers 6 --model-dim 320 --heads 20 --features 64` is that of the smallest ESM-2. `cost`
times single passes of a FAVOR model of the same shape, which tell what masked and wild-type marginals of longer
proteins take.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Run as a file, Python looks for imports beside it, not in the folder that holds the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# As in protlm itself: waiting threads sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


from scripts.bench import harness, models
from scripts.bench import score_measurements as measurements
from scripts.bench.harness import Figure, ratio_of_rates
from scripts.bench.models import Sizes
from scripts.bench.score_measurements import OURS, PEER
from scripts.measuring import SECONDS, take_turns, timed, using_threads

MEASUREMENTS = ("speed", "cost")


def measure(arguments: argparse.Namespace, sizes: Sizes, wanted: Sequence[str]) -> dict[str, Any]:
    """Returns the seconds of the wanted measurements, by name."""
    measured: dict[str, Any] = {}
    if "speed" in wanted:
        with tempfile.TemporaryDirectory() as folder:
            scorers = measurements.scorers(sizes, Path(folder), arguments.tokens_per_batch)
        protein = measurements.protein(arguments.length)
        measurements.check(scorers, protein)
        calls = {name: partial(timed, partial(scorer, protein)) for name, scorer in scorers.items()}
        times = take_turns(calls, arguments.repeats)
        measured["speed"] = {name: seconds[SECONDS] for name, seconds in times.items()}
    if "cost" in wanted:
        model = measurements.favor_model(sizes)
        calls = {
            str(length): partial(timed, partial(measurements.one_pass, model, measurements.protein(length)))
            for length in arguments.cost_lengths
        }
        times = take_turns(calls, arguments.repeats)
        measured["cost"] = {length: seconds[SECONDS] for length, seconds in times.items()}
    return measured


def figures(measured: dict[str, Any], length: int) -> list[Figure]:
    """Returns the figures of all that was measured."""
    rows: list[Figure] = []
    if speed := measured.get("speed"):
        num_variants = measurements.NUM_MUTANTS * length
        rows.append(ratio_of_rates(f"L {length}, every position", OURS, PEER, speed, num_variants, "variants/s"))
    for text, seconds in measured.get("cost", {}).items():
        hours = int(text) * statistics.median(seconds) / 3600
        note = f"so masked marginals of every position take about {hours:.3g} h by single passes"
        rows.append(harness.median("one pass, FAVOR", f"L {text}", [1e3 * each for each in seconds], " ms", note))
    return rows


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = harness.new_parser(__doc__, MEASUREMENTS)
    parser.add_argument("--length", type=int, default=300, help="residues of the protein of `speed`")
    parser.add_argument("--cost-lengths", type=int, nargs="+", default=[300, 2000, 34_350], help="of `cost`")
    parser.add_argument("--tokens-per-batch", type=int, help="budget of a row; by default that of protlm score")
    for name, default in (("layers", 3), ("model-dim", 128), ("heads", 4), ("features", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return harness.parse(parser, words)


def main(words: Sequence[str] | None = None) -> None:
    """Checks, measures and reports."""
    words = sys.argv[1:] if words is None else words
    arguments = parse(words)
    sizes = Sizes(arguments.layers, arguments.model_dim, arguments.heads, 4 * arguments.model_dim, arguments.features)
    wanted = harness.possible(
        arguments.only, lambda name: [models.why_missing("transformers") if name == "speed" else ""]
    )
    with using_threads(arguments.threads):
        measured = measure(arguments, sizes, wanted)
    harness.Report(
        script="score.py", words=words, setup=f"{sizes}, float32", figures=figures(measured, arguments.length),
        environment=harness.environment("transformers"), measured=measured,
    ).publish(arguments)  # fmt: skip


if __name__ == "__main__":
    main()
