"""Times embedding: protlm against ESM of transformers and fair-esm, a very long protein, and the command as a whole.

All models have the shape of ESM-2 with 8 million parameters by default and random weights; the models take turns
within each repeat. Nothing is reported unless every model first gives finite hidden states. A peer takes part where it
is installed (`pip install -e '.[bench]'`). Peak memory is measured in new processes.

exact     protlm with exact attention against transformers, one protein at a time, its best on a CPU
half      protlm with exact attention in bfloat16 against transformers, one protein at a time, in both number types
padded    exact attention in float32 against transformers in padded batches
extract   it against fair-esm in the padded batches of its extract.py, on proteins that it does not cut
favor     protlm with FAVOR against transformers, on proteins of --favor-lengths
earlier   exact attention and FAVOR against another checkout of protlm (--earlier), each in new processes
long      one long protein of --long-fasta: FAVOR against exact attention, of which one layer is measured
memory    its peak memory
pipeline  the command protlm embed against bare forward passes on the same rows
growth    peak memory of the command for few and for many proteins
load      a checkpoint of transformers, read by protlm and by transformers, up to a first embedding
"""

import argparse
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Run as a file, Python looks for imports beside it, not in the folder that holds the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# As in protlm itself: waiting threads sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from protlm.data.parsing.reader import read_records
from protlm.ops import backends
from protlm.runtime.devices import has_half_precision_units
from scripts.bench import embed_figures as figures
from scripts.bench import embed_measurements as measurements
from scripts.bench import harness
from scripts.bench.embed_models import (
    ESM_PEER,
    EXACT,
    EXACT_HALF,
    FAIR_MAX_RESIDUES,
    FAIR_PEER,
    FAVOR,
    HALF_PEER,
    PADDED_PEER,
    why_missing,
)
from scripts.bench.models import Sizes
from scripts.measuring import SAMPLE, can_measure_memory, using_threads

MODELS = {
    "exact": (EXACT, ESM_PEER), "half": (EXACT_HALF, ESM_PEER, HALF_PEER), "padded": (EXACT, PADDED_PEER),
    "extract": (EXACT, FAIR_PEER), "favor": (FAVOR, ESM_PEER),
    "earlier": (), "long": (), "memory": (), "pipeline": (), "growth": (), "load": (ESM_PEER,),
}  # fmt: skip
"""The measurements, and the models that each compares."""


def obstacles(arguments: argparse.Namespace, name: str) -> Iterator[str]:
    """Yields why a measurement cannot be made here."""
    yield from map(why_missing, MODELS[name])
    if name in ("memory", "growth", "load") and not can_measure_memory():
        yield harness.NEEDS_LINUX
    if name == "half" and not has_half_precision_units("bf16"):
        yield "it needs a processor with units for bfloat16"
    if name == "earlier" and (arguments.earlier is None or not (arguments.earlier / "scripts" / "bench").is_dir()):
        yield "it needs --earlier, a checkout of protlm"
    if name in ("long", "memory") and arguments.long_fasta is None:
        yield "it needs --long-fasta"


def measure(arguments: argparse.Namespace, wanted: Sequence[str], sizes: Sizes) -> dict[str, Any]:
    """Returns the results of the wanted measurements, by name."""
    budget, repeats = arguments.tokens_per_batch, arguments.repeats
    measured: dict[str, Any] = {}
    for name, limits in (
        ("exact", (1, arguments.max_length)),
        ("half", (1, arguments.max_length)),
        ("padded", (1, arguments.max_length)),
        ("extract", (1, min(FAIR_MAX_RESIDUES, arguments.max_length))),
        ("favor", tuple(arguments.favor_lengths)),
    ):
        if name in wanted:
            sequences = drawn(arguments, limits, arguments.num_proteins)
            times = measurements.speed(MODELS[name], sizes, sequences, budget, repeats)
            measured[name] = described(sequences) | {"times": times}
    if "pipeline" in wanted:
        sequences = drawn(arguments, (1, arguments.max_length), arguments.pipeline_proteins)
        times = measurements.pipeline(sizes, sequences, budget, repeats)
        measured["pipeline"] = described(sequences) | {"times": times}
    if "earlier" in wanted:
        sequences = drawn(arguments, (1, arguments.max_length), arguments.num_proteins)
        times = measurements.against_checkout(arguments.earlier.resolve(), sizes, sequences, budget, repeats)
        measured["earlier"] = described(sequences) | {"times": times}
    if {"long", "memory"} & set(wanted):
        sequence = long_sequence(arguments)
        where = f"{arguments.long_id}, {len(sequence):,} residues"
        if "long" in wanted:
            measured["long"] = {"where": where, "times": measurements.long_protein(sizes, sequence, repeats)}
        if "memory" in wanted:
            measured["memory"] = {"where": where, "peak_bytes": measurements.peak_above_model(sizes, sequence)}
    if "growth" in wanted:
        sequences = drawn(arguments, (1, arguments.max_length), None)
        measured["growth"] = {"peak_bytes": measurements.growth(sequences, arguments.growth, repeats)}
    if "load" in wanted:
        shape = Sizes(*arguments.load, 4 * arguments.load[1], arguments.features)
        where = f"{arguments.load[0]} layers of {arguments.load[1]}"
        measured["load"] = {"where": where, "figures": measurements.load(shape, repeats)}
    return measured


def drawn(arguments: argparse.Namespace, limits: tuple[int, ...], count: int | None) -> list[str]:
    """Returns proteins of these lengths in random order, the same at every call; all of them without a count."""
    shortest, longest = limits
    all_sequences = (record.sequence for path in arguments.proteins for record in read_records(path))
    sequences = [sequence for sequence in all_sequences if shortest <= len(sequence) <= longest]
    if not sequences:
        sys.exit(f"error: --proteins: expected some of {shortest} to {longest} residues, got none; nothing is timed")
    random.Random(0).shuffle(sequences)
    return sequences[:count]


def described(sequences: Sequence[str]) -> dict[str, Any]:
    """Returns the number and the lengths of some proteins as text, and their residues."""
    lengths = sorted(map(len, sequences))
    where = f"{len(lengths)} proteins of {lengths[0]}–{lengths[-1]} residues, median {lengths[len(lengths) // 2]}"
    return {"where": where, "residues": sum(lengths)}


def long_sequence(arguments: argparse.Namespace) -> str:
    """Returns the long protein."""
    for record in read_records(arguments.long_fasta):
        if record.id == arguments.long_id:
            return record.sequence
    sys.exit(f"error: --long-id: {arguments.long_fasta} has no {arguments.long_id}; nothing is timed")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = harness.new_parser(__doc__, MODELS)
    parser.add_argument(
        "--proteins", type=Path, nargs="+", default=[SAMPLE], metavar="FASTA", help="the proteins to embed"
    )
    parser.add_argument(
        "--earlier", type=Path, metavar="CHECKOUT",
        help="of `earlier`: another checkout of protlm, whose compiled libraries were built in place",
    )  # fmt: skip
    parser.add_argument(
        "--num-proteins", type=int, default=60, help="of exact, extract, favor and earlier, drawn from them"
    )
    parser.add_argument("--pipeline-proteins", type=int, default=200, help="of pipeline")
    parser.add_argument("--max-length", type=int, default=10_000, help="residues of the longest protein that is drawn")
    parser.add_argument("--favor-lengths", type=int, nargs=2, default=[300, 2000], metavar="N", help="of favor")
    parser.add_argument("--long-fasta", type=Path, metavar="FASTA", help="the file of the protein of long and memory")
    parser.add_argument("--long-id", default="Q8WZ42", help="its id; human titin")
    parser.add_argument("--growth", type=int, nargs=2, default=[10_000, 40_000], metavar="N", help="proteins of growth")
    parser.add_argument(
        "--load", type=int, nargs=3, default=[33, 1280, 20], metavar="N", help="layers, width and heads of load"
    )
    parser.add_argument("--tokens-per-batch", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--model-dim", type=int, default=320)
    parser.add_argument("--heads", type=int, default=20)
    parser.add_argument("--features", type=int, default=64)
    arguments = harness.parse(parser, words)
    if not 0 < arguments.growth[0] < arguments.growth[1]:
        parser.error(f"--growth: expected few and then many proteins, got {arguments.growth}")
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    words = sys.argv[1:] if words is None else words
    arguments = parse(words)
    sizes = Sizes(arguments.layers, arguments.model_dim, arguments.heads, 4 * arguments.model_dim, arguments.features)
    with using_threads(arguments.threads):
        wanted = harness.possible(arguments.only, lambda name: obstacles(arguments, name))
        measured = measure(arguments, wanted, sizes)
        harness.Report(
            script="embed.py", words=words, setup=f"{sizes}, float32, random weights",
            figures=figures.figures(measured, sizes), measured=measured, facts={"sizes": asdict(sizes)},
            environment=harness.environment("transformers", "fair-esm") | {"backends": backends()},
        ).publish(arguments)  # fmt: skip


if __name__ == "__main__":
    main()
