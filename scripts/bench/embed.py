"""Times embedding: protlm against ESM of transformers and fair-esm, a very long protein, and the command as a whole.

All models have the shape of ESM-2 with 8 million parameters by default and random weights; the models take turns
within each repeat. Nothing is reported unless every model first gives finite hidden states. A peer takes part where it
is installed (`pip install -e '.[bench]'`). Peak memory is measured in new processes.

exact     protlm with exact attention against transformers, one protein at a time, its best on a CPU
extract   the same against fair-esm in the padded batches of its extract.py, on proteins that it does not cut
favor     protlm with FAVOR against transformers, on proteins of --favor-lengths
long      one long protein of --long-fasta: FAVOR against exact attention, of which one layer is measured
memory    its peak memory
pipeline  the command protlm embed against bare forward passes on the same rows
growth    peak memory of the command for few and for many proteins
"""

import argparse
import importlib.metadata
import json
import os
import random
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

from protlm.data.parsing.reader import read_records
from scripts.bench import embed_figures as figures
from scripts.bench import embed_measurements as measurements
from scripts.bench.attention import REPORT_REPEATS, full_environment
from scripts.bench.attention_implementations import using_threads
from scripts.bench.attention_measurements import SAMPLE
from scripts.bench.embed_models import ESM_PEER, EXACT, FAIR_MAX_RESIDUES, FAIR_PEER, FAVOR, why_missing
from scripts.bench.train_step_figures import markdown_rows
from scripts.bench.train_step_models import Sizes
from scripts.report.cost import can_measure_memory

MODELS = {
    "exact": (EXACT, ESM_PEER), "extract": (EXACT, FAIR_PEER), "favor": (FAVOR, ESM_PEER), "long": (), "memory": (),
    "pipeline": (), "growth": (),
}  # fmt: skip
"""The parts, and the models that each compares."""


def possible_parts(arguments: argparse.Namespace) -> list[str]:
    """Returns the parts that can be measured here; why the others cannot is told."""
    found = []
    for part in arguments.only:
        reasons = [why_missing(name) for name in MODELS[part]]
        if part in ("memory", "growth") and not can_measure_memory():
            reasons.append("it needs a system with /proc/self/clear_refs")
        if part in ("long", "memory") and arguments.long_fasta is None:
            reasons.append("it needs --long-fasta")
        if reason := next(filter(None, reasons), ""):
            print(f"{part}: cannot be measured here: {reason}", file=sys.stderr)
        else:
            found.append(part)
    return found


def measure(arguments: argparse.Namespace, wanted: Sequence[str], sizes: Sizes) -> dict[str, Any]:
    """Returns what was measured, by part."""
    budget, repeats = arguments.tokens_per_batch, arguments.repeats
    found: dict[str, Any] = {}
    for part, limits in (
        ("exact", (1, arguments.max_length)),
        ("extract", (1, min(FAIR_MAX_RESIDUES, arguments.max_length))),
        ("favor", tuple(arguments.favor_lengths)),
    ):
        if part in wanted:
            sequences = drawn(arguments, limits, arguments.num_proteins)
            times = measurements.speed(MODELS[part], sizes, sequences, budget, repeats)
            found[part] = described(sequences) | {"times": times}
    if "pipeline" in wanted:
        sequences = drawn(arguments, (1, arguments.max_length), arguments.pipeline_proteins)
        found["pipeline"] = described(sequences) | {"times": measurements.pipeline(sizes, sequences, budget, repeats)}
    if {"long", "memory"} & set(wanted):
        sequence = long_sequence(arguments)
        where = f"{arguments.long_id}, {len(sequence):,} residues"
        if "long" in wanted:
            found["long"] = {"where": where, "times": measurements.long_protein(sizes, sequence, repeats)}
        if "memory" in wanted:
            found["memory"] = {"where": where, "peak_bytes": measurements.peak_above_model(sizes, sequence)}
    if "growth" in wanted:
        sequences = drawn(arguments, (1, arguments.max_length), None)
        found["growth"] = {"peak_bytes": measurements.growth(sequences, arguments.growth, repeats)}
    return found


def drawn(arguments: argparse.Namespace, limits: tuple[int, ...], count: int | None) -> list[str]:
    """Returns proteins of these lengths in random order, the same at every call; all of them without a count."""
    shortest, longest = limits
    everything = (record.sequence for path in arguments.proteins for record in read_records(path))
    sequences = [sequence for sequence in everything if shortest <= len(sequence) <= longest]
    if not sequences:
        sys.exit(f"error: --proteins: expected some of {shortest} to {longest} residues, got none; nothing is timed")
    random.Random(0).shuffle(sequences)
    return sequences[:count]


def described(sequences: Sequence[str]) -> dict[str, Any]:
    """Returns what is told of the proteins of a part."""
    lengths = sorted(map(len, sequences))
    where = f"{len(lengths)} proteins of {lengths[0]}–{lengths[-1]} residues, median {lengths[len(lengths) // 2]}"
    return {"where": where, "residues": sum(lengths)}


def long_sequence(arguments: argparse.Namespace) -> str:
    """Returns the long protein."""
    for record in read_records(arguments.long_fasta):
        if record.id == arguments.long_id:
            return record.sequence
    sys.exit(f"error: --long-id: {arguments.long_fasta} has no {arguments.long_id}; nothing is timed")


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MODELS, nargs="+", default=list(MODELS), help="parts; by default all")
    parser.add_argument("--proteins", type=Path, nargs="+", default=[SAMPLE], metavar="FASTA", help="what is embedded")
    parser.add_argument("--num-proteins", type=int, default=60, help="of exact, extract and favor, drawn from them")
    parser.add_argument("--pipeline-proteins", type=int, default=200, help="of pipeline")
    parser.add_argument("--max-length", type=int, default=10_000, help="residues of the longest protein that is drawn")
    parser.add_argument("--favor-lengths", type=int, nargs=2, default=[300, 2000], metavar="N", help="of favor")
    parser.add_argument("--long-fasta", type=Path, metavar="FASTA", help="where the protein of long and memory is")
    parser.add_argument("--long-id", default="Q8WZ42", help="its id; human titin")
    parser.add_argument("--growth", type=int, nargs=2, default=[10_000, 40_000], metavar="N", help="proteins of growth")
    parser.add_argument("--tokens-per-batch", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--model-dim", type=int, default=320)
    parser.add_argument("--heads", type=int, default=20)
    parser.add_argument("--features", type=int, default=64)
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
    if not 0 < arguments.growth[0] < arguments.growth[1]:
        parser.error(f"--growth: expected few and then many proteins, got {arguments.growth}")
    return arguments


def report(arguments: argparse.Namespace, sizes: Sizes, found: dict[str, Any], words: Sequence[str]) -> None:
    """Prints and writes the figures."""
    told, about, setup = figures.figures(found, sizes), environment(), figures.setup(sizes)
    command = shlex.join(["python", "scripts/bench/embed.py", *words])
    if arguments.json:
        content = {
            "environment": about, "command": command, "setup": setup, "repeats": arguments.repeats,
            "sizes": asdict(sizes), "figures": [asdict(figure) for figure in told], "measured": found,
        }  # fmt: skip
        text = json.dumps(content, indent=1) + "\n"
        if arguments.json == "-":
            print(text, end="")
            return
        Path(arguments.json).write_text(text, encoding="utf-8")
    print(", ".join(f"{key} {value}" for key, value in about.items() if key != "backends" and value))
    print(f"{setup}, {arguments.repeats} repeats: figure of medians (range of single repeats), medians")
    for figure in told:
        print(f"{figure.measured}\n  {figure.where:56} {figure.text:28} {figure.note}".rstrip())
    if arguments.rows:
        print(*markdown_rows(told, about, command, setup, arguments.repeats), sep="\n")


def environment() -> dict[str, Any]:
    """Returns what the figures depend on."""
    peers = {}
    for package in ("transformers", "fair-esm"):
        try:
            peers[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            peers[package] = "not installed"
    return full_environment() | peers


def main(words: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    words = sys.argv[1:] if words is None else words
    arguments = parse(words)
    sizes = Sizes(arguments.layers, arguments.model_dim, arguments.heads, 4 * arguments.model_dim, arguments.features)
    with using_threads(arguments.threads):
        report(arguments, sizes, measure(arguments, possible_parts(arguments), sizes), words)


if __name__ == "__main__":
    main()
