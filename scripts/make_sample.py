"""Cuts the sample `data/trembl_sample.fasta.gz` out of a larger FASTA file; data/README.md has the source and command.

The choice of records depends on a seed and their sequences alone; they keep their order, headers and lines.
"""

import argparse
import gzip
import hashlib
from pathlib import Path

SAMPLE_PATH = Path(__file__).parents[1] / "data" / "trembl_sample.fasta.gz"


def choose_records(records: list[bytes], num_records: int, seed: int) -> list[bytes]:
    """Returns the records with the smallest hash of seed and sequence, in their order; of equal sequences the first."""
    ranks: dict[bytes, int] = {}
    for number, record in enumerate(records):
        sequence = b"".join(record.split(b"\n")[1:])
        ranks.setdefault(hashlib.sha256(f"{seed} ".encode() + sequence).digest(), number)
    return [records[number] for number in sorted(ranks[digest] for digest in sorted(ranks)[:num_records])]


def main() -> None:
    """Reads the source named on the command line and writes the sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="mmseqs2_DB_trembl20k.fasta.gz")
    parser.add_argument("--records", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=SAMPLE_PATH)
    arguments = parser.parse_args()
    records = gzip.decompress(arguments.source.read_bytes()).removeprefix(b">").split(b"\n>")
    chosen = choose_records([record.rstrip(b"\n") for record in records], arguments.records, arguments.seed)
    content = b"".join(b">" + record + b"\n" for record in chosen)
    # Without a time in the header the same sample has the same bytes.
    arguments.out.write_bytes(gzip.compress(content, compresslevel=9, mtime=0))
    num_residues = sum(len(b"".join(record.split(b"\n")[1:])) for record in chosen)
    print(f"{arguments.out}: {len(chosen)} records, {num_residues} residues, {arguments.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
