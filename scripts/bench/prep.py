"""Times `protlm prep` against the pipeline that one would write with Biopython, and the training reader against h5py.

Everything is a command of its own, start included; the commands take turns within each repeat, and medians and ranges
of all repeats are printed with the machine, the versions and the commit. Nothing is reported unless prep first kept
exactly the sequences that the Biopython pipeline keeps.
"""

import argparse
import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Run as a file, Python looks for imports beside it, not in the folder that holds the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import h5py
import numpy as np

from protlm import read_records, vocabulary
from protlm.data.storage.dataset import Split, open_dataset

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "trembl_sample.fasta.gz"
LINE = 60
MUTATED = 0.05
REPEATED = 0.05
NUM_READS = 200_000

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


def write_fasta(path: Path, num_bytes: int) -> int:
    """Writes proteins with the lengths of the sample, most of them with some residues changed; returns how many."""
    sequences = [np.frombuffer(record.sequence.encode(), dtype=np.uint8) for record in read_records(SAMPLE)]
    letters = np.frombuffer(vocabulary.RESIDUES[:20].encode(), dtype=np.uint8)
    generator = np.random.default_rng(0)
    written = number = 0
    with path.open("wb") as file:
        while written < num_bytes:
            changed = sequences[number % len(sequences)].copy()
            if generator.random() > REPEATED:
                places = generator.integers(0, len(changed), int(len(changed) * MUTATED) + 1)
                changed[places] = generator.choice(letters, len(places))
            residues = changed.tobytes()
            name = f"A0A{number:09d}"
            header = (
                f">tr|{name}|{name}_9BACT Uncharacterized protein OS=Bacterium {number % 997} OX={number % 99991} PE=4"
            )
            lines = (residues[start : start + LINE] for start in range(0, len(residues), LINE))
            text = header.encode() + b"\n" + b"\n".join(lines) + b"\n"
            file.write(text)
            written += len(text)
            number += 1
    return number


def run(command: Sequence[str | Path]) -> tuple[float, float]:
    """Runs a command; returns seconds, and the peak memory in MB of its largest process."""
    begun = time.perf_counter()
    with subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begun
    if process.returncode:
        sys.exit(f"failed: {' '.join(map(str, command))[:200]}")
    return seconds, usage.ru_maxrss / 1000


def prep(path: Path, out: Path, *options: str) -> list[str | Path]:
    """Returns the command that prepares a file."""
    return [sys.executable, "-m", "protlm.cli.app", "prep", path, "--out", out, "--force", *options]


def check_same(dataset: Path, biopython: Path) -> None:
    """Ends the program unless both kept the same sequences."""
    with h5py.File(biopython) as file:
        expected = (len(file["offsets"]) - 1, file["tokens"].shape[0])
    splits = open_dataset(dataset).manifest.splits.values()
    found = (sum(split.num_records for split in splits), sum(split.num_residues for split in splits))
    if found != expected:
        sys.exit(f"not the same records and residues: {found} of prep, {expected} of Biopython; nothing is reported")


def time_reads(split: Split, repeats: int) -> dict[str, list[float]]:
    """Returns records a second, read in random order: by the training reader, and by slices of h5py; in turns."""
    order = np.random.default_rng(0).integers(0, len(split), NUM_READS).tolist()
    shard = split.shard(0)
    order_of_shard = [index % shard.num_records for index in order[: NUM_READS // 10]]
    bounds = shard.offsets.tolist()
    found: dict[str, list[float]] = {"training reader": [], "h5py slices": []}
    with h5py.File(shard.path) as file:
        tokens = file["tokens"]
        for _ in range(repeats):
            begun = time.perf_counter()
            for index in order:
                split.tokens(index)
            found["training reader"].append(len(order) / (time.perf_counter() - begun))
            begun = time.perf_counter()
            for index in order_of_shard:
                tokens[bounds[index] : bounds[index + 1]]
            found["h5py slices"].append(len(order_of_shard) / (time.perf_counter() - begun))
    return found


def measure(folder: Path, num_bytes: int, repeats: int) -> dict[str, Any]:
    """Returns all figures."""
    plain, packed = folder / "proteins.fasta", folder / "proteins.fasta.gz"
    num_records = write_fasta(plain, num_bytes)
    with plain.open("rb") as text, gzip.open(packed, "wb", compresslevel=6) as file:
        shutil.copyfileobj(text, file, 1 << 20)
    script = folder / "biopython.py"
    script.write_text(BIOPYTHON)
    python = sys.executable
    commands: dict[str, list[str | Path]] = {
        "prep": prep(plain, folder / "one"),
        "prep, no leak check": prep(plain, folder / "one", "--no-check-leaks"),
        "prep, 2 workers": prep(plain, folder / "two", "--workers", "2", "--no-check-leaks"),
        "Biopython": [python, script, plain, folder / "biopython.h5"],
        "prep, .gz": prep(packed, folder / "gz", "--no-check-leaks"),
        "Biopython, .gz": [python, script, packed, folder / "biopython_gz.h5"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    megabytes: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for name, command in commands.items():
            taken, peak = run(command)
            # The first round only warms up.
            if repeat:
                seconds[name].append(taken)
                megabytes[name] = max(megabytes.get(name, 0.0), peak)
        if not repeat:
            check_same(folder / "one", folder / "biopython.h5")
    reads = time_reads(open_dataset(folder / "one").split("train"), repeats)
    return {
        "records": num_records,
        "bytes": plain.stat().st_size,
        "seconds": seconds,
        "peak_megabytes": megabytes,
        "records_per_second": reads,
    }


def print_figures(found: dict[str, Any]) -> None:
    """Prints what was measured, and the ratios."""
    for name, value in found["environment"].items():
        print(f"{name}: {value}")
    print(f"\n{found['records']:,} records, {found['bytes'] / 1e6:,.0f} MB of text")
    medians = {name: statistics.median(times) for name, times in found["seconds"].items()}
    for name, times in found["seconds"].items():
        rate = found["bytes"] / 1e6 / medians[name]
        spread = f"{min(times):.2f}-{max(times):.2f}"
        print(
            f"{name:20s} {medians[name]:6.2f} s ({spread})  {rate:5.0f} MB/s  {found['peak_megabytes'][name]:5.0f} MB"
        )
    reads = {name: statistics.median(rates) for name, rates in found["records_per_second"].items()}
    for name, rate in reads.items():
        print(f"{name:20s} {rate:12,.0f} records/s")
    print()
    for title, slow, fast in (
        ("Biopython / prep", "Biopython", "prep"),
        ("the same, no leak check", "Biopython", "prep, no leak check"),
        ("Biopython / prep, .gz", "Biopython, .gz", "prep, .gz"),
        ("1 worker / 2 workers", "prep, no leak check", "prep, 2 workers"),
    ):
        print(f"{title:24s} {medians[slow] / medians[fast]:.2f}x")
    print(f"{'training reader / h5py':24s} {reads['training reader'] / reads['h5py slices']:.1f}x")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300, help="size of the FASTA file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the files are made; by default the system's place")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(Path(folder), arguments.megabytes * 1_000_000, arguments.repeats)
    # Only now: it loads torch, and a child begins with the peak memory of its parent.
    from scripts.environment import environment

    found["environment"] = environment()
    print_figures(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
