"""Times `protlm prep` against the pipeline that one would write with Biopython, and the training reader against h5py.

Everything is a command of its own, start included; the commands take turns within each repeat. Nothing is reported
unless prep keeps exactly the sequences that the Biopython pipeline keeps.
"""

import argparse
import gzip
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

# Run as a file, Python looks for imports beside it, not in the folder that holds the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import h5py
import numpy as np

from protlm import read_records, vocabulary
from protlm.data.storage.dataset import Split, open_dataset
from scripts.bench import harness
from scripts.bench.harness import Figure, median, ratio
from scripts.measuring import SAMPLE, SECONDS, Times, take_turns

LINE = 60
MUTATED = 0.05
REPEATED = 0.05
NUM_READS = 200_000
MEGABYTES = "peak_megabytes"
READER, SLICES = "training reader", "h5py slices"
RATE = "records_per_second"
RATIOS = (
    ("Biopython / prep", "Biopython", "prep"),
    ("Biopython / prep, no leak check", "Biopython", "prep, no leak check"),
    ("Biopython / prep, .gz", "Biopython, .gz", "prep, .gz"),
    ("1 worker / 2 workers", "prep, no leak check", "prep, 2 workers"),
)
"""Names of ratios, and the slower and the faster command of each."""

BIOPYTHON = """
import gzip, sys, h5py, numpy as np, xxhash
from Bio.SeqIO.FastaIO import SimpleFastaParser
from protlm import vocabulary
path, out = sys.argv[1:]
table = bytes(vocabulary.TOKEN_IDS.get(chr(byte), 255) for byte in range(256))
seen, tokens, offsets, headers = set(), bytearray(), [0], []
with (gzip.open if path.endswith(".gz") else open)(path, "rt") as file:
    for header, sequence in SimpleFastaParser(file):
        residues = sequence.encode()
        digest = xxhash.xxh3_128_digest(residues)
        if digest in seen:
            continue
        seen.add(digest)
        tokens += residues.translate(table)
        offsets.append(len(tokens))
        headers.append(header)
with h5py.File(out, "w") as file:
    file["tokens"] = np.frombuffer(tokens, dtype=np.uint8)
    file["offsets"] = np.array(offsets)
    file.create_dataset("headers", data=headers, dtype=h5py.string_dtype())
"""


def write_fasta(path: Path, num_bytes: int, *, seed: int = 0) -> int:
    """Writes proteins with the lengths of the sample, most of them with some residues changed; returns how many."""
    sequences = [np.frombuffer(record.sequence.encode(), dtype=np.uint8) for record in read_records(SAMPLE)]
    letters = np.frombuffer(vocabulary.RESIDUES[:20].encode(), dtype=np.uint8)
    generator = np.random.default_rng(seed)
    written = number = 0
    with path.open("wb") as file:
        while written < num_bytes:
            changed = sequences[number % len(sequences)].copy()
            if generator.random() > REPEATED:
                places = generator.integers(0, len(changed), int(len(changed) * MUTATED) + 1)
                changed[places] = generator.choice(letters, len(places))
            residues = changed.tobytes()
            name = f"A{seed}A{number:09d}"
            header = (
                f">tr|{name}|{name}_9BACT Uncharacterized protein OS=Bacterium {number % 997} OX={number % 99991} PE=4"
            )
            lines = (residues[start : start + LINE] for start in range(0, len(residues), LINE))
            text = header.encode() + b"\n" + b"\n".join(lines) + b"\n"
            file.write(text)
            written += len(text)
            number += 1
    return number


def run(command: Sequence[str | Path]) -> dict[str, float]:
    """Runs a command; returns its seconds, and the peak memory in MB of its largest process."""
    # Modules that are installed have their byte code beside them.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    with subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, env=environment) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"failed: {' '.join(map(str, command))[:200]}")
    return {SECONDS: seconds, MEGABYTES: usage.ru_maxrss / 1000}


def prep(path: Path, out: Path, *options: str) -> list[str | Path]:
    """Returns the command that prepares a file."""
    return [sys.executable, "-m", "protlm.cli.app", "prep", path, "--out", out, "--force", *options]


def check_same(dataset: Path, biopython: Path) -> None:
    """Ends the program unless both kept the same sequences."""
    with h5py.File(biopython) as file:
        expected = (len(file["offsets"]) - 1, file["tokens"].shape[0])
    splits = open_dataset(dataset).manifest.splits.values()
    kept = (sum(split.num_records for split in splits), sum(split.num_residues for split in splits))
    if kept != expected:
        sys.exit(f"not the same records and residues: {kept} of prep, {expected} of Biopython; nothing is reported")


def time_reads(split: Split, repeats: int) -> Times:
    """Returns records a second, read in random order: by the training reader, and by slices of h5py."""
    order = np.random.default_rng(0).integers(0, len(split), NUM_READS).tolist()
    shard = split.shard(0)
    order_of_shard = [index % shard.num_records for index in order[: NUM_READS // 10]]
    bounds = shard.offsets.tolist()

    def rate(read: Any, indices: Sequence[int]) -> dict[str, float]:
        started = time.perf_counter()
        for index in indices:
            read(index)
        return {RATE: len(indices) / (time.perf_counter() - started)}

    with h5py.File(shard.path) as file:
        tokens = file["tokens"]
        calls = {
            READER: partial(rate, split.tokens, order),
            SLICES: partial(rate, lambda index: tokens[bounds[index] : bounds[index + 1]], order_of_shard),
        }
        return take_turns(calls, repeats)


def measure(folder: Path, num_bytes: int, repeats: int) -> dict[str, Any]:
    """Returns the sizes of the file, the figures of every command, and those of the readers."""
    plain, packed = folder / "proteins.fasta", folder / "proteins.fasta.gz"
    num_records = write_fasta(plain, num_bytes)
    with plain.open("rb") as text, gzip.open(packed, "wb", compresslevel=6) as file:
        shutil.copyfileobj(text, file, 1 << 20)
    script = folder / "biopython.py"
    script.write_text(BIOPYTHON)
    python = sys.executable
    commands: dict[str, list[str | Path]] = {
        "prep": prep(plain, folder / "one"),
        "prep, no leak check": prep(plain, folder / "unchecked", "--no-check-leaks"),
        "prep, 2 workers": prep(plain, folder / "two", "--workers", "2", "--no-check-leaks"),
        "Biopython": [python, script, plain, folder / "biopython.h5"],
        "prep, .gz": prep(packed, folder / "gz", "--no-check-leaks"),
        "Biopython, .gz": [python, script, packed, folder / "biopython_gz.h5"],
    }
    times = take_turns({name: partial(run, command) for name, command in commands.items()}, repeats)
    check_same(folder / "one", folder / "biopython.h5")
    reads = time_reads(open_dataset(folder / "unchecked").split("train"), repeats)
    return {"records": num_records, "bytes": plain.stat().st_size, "commands": times, "reads": reads}


def figures(measured: Mapping[str, Any]) -> Iterable[Figure]:
    """Yields the time and the peak of every command, the rates of the readers, and the ratios."""
    seconds = {name: times[SECONDS] for name, times in measured["commands"].items()}
    for name, times in measured["commands"].items():
        time_taken = median("time", name, seconds[name], " s")
        rate = measured["bytes"] / 1e6 / time_taken.value
        yield replace(time_taken, note=f"{rate:,.0f} MB/s, peak memory {max(times[MEGABYTES]):,.0f} MB")
    rates = {name: times[RATE] for name, times in measured["reads"].items()}
    for name, values in rates.items():
        yield median("random reads", name, values, " records/s")
    for name, slow, fast in RATIOS:
        yield ratio(name, "whole commands", seconds[slow], seconds[fast])
    note = " and ".join(f"{statistics.median(rates[name]):,.0f}" for name in (READER, SLICES)) + " records/s"
    yield ratio(f"{READER} / {SLICES}", "random reads", rates[READER], rates[SLICES], note=note)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = harness.new_parser(__doc__)
    parser.add_argument("--megabytes", type=int, default=300, help="size of the FASTA file")
    parser.add_argument("--folder", type=Path, help="folder of the files; by default the system's place")
    return harness.parse(parser, words, has_threads=False)


def main(words: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    words = sys.argv[1:] if words is None else words
    arguments = parse(words)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measured = measure(Path(folder), arguments.megabytes * 1_000_000, arguments.repeats)
    harness.Report(
        script="prep.py", words=words, setup=f"{measured['records']:,} records, {measured['bytes'] / 1e6:,.0f} MB",
        figures=list(figures(measured)), measured=measured,
        environment=harness.environment("biopython", "h5py", "xxhash"),
    ).publish(arguments)  # fmt: skip


if __name__ == "__main__":
    main()
