"""Makes the sample in `data/families` from three files of protein families; data/README.md has the source and command.

The members for validation are those with the smallest hash of seed and sequence, so that the sample does not depend on
the order of the files. Headers and lines stay as they are; `families.tsv` has the family of every protein.
"""

import argparse
import gzip
import hashlib
from pathlib import Path

OUT = Path(__file__).parents[1] / "data" / "families"


def read_records(path: Path) -> list[bytes]:
    """Returns the records of a compressed FASTA file, each without its `>`."""
    content = gzip.decompress(path.read_bytes()).removeprefix(b">")
    return [record.rstrip(b"\n") for record in content.split(b"\n>")]


def write_records(path: Path, records: list[bytes]) -> None:
    """Writes a compressed FASTA file; without a time in the header, so that the same records have the same bytes."""
    path.write_bytes(gzip.compress(b"".join(b">" + record + b"\n" for record in records), compresslevel=9, mtime=0))


def held_out(records: list[bytes], num_records: int, seed: int) -> set[bytes]:
    """Returns the records with the smallest hash of seed and sequence."""
    return set(
        sorted(
            records, key=lambda record: hashlib.sha256(f"{seed} ".encode() + b"".join(record.split(b"\n")[1:])).digest()
        )[:num_records]
    )


def main() -> None:
    """Reads train, iid and held members from a folder and writes the sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with train.fasta.gz, iid.fasta.gz and held.fasta.gz")
    parser.add_argument("--valid", type=int, default=128, help="members of train that are kept for validation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    train, iid, held = (read_records(arguments.source / f"{name}.fasta.gz") for name in ("train", "iid", "held"))
    valid = held_out(train, arguments.valid, arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    splits = {
        "train": [record for record in train if record not in valid],
        "valid": [record for record in train if record in valid],
        "test": iid,
        "ood": held,
    }
    rows = []
    for name, records in splits.items():
        path = arguments.out / f"{name}.fasta.gz"
        write_records(path, records)
        print(f"{path}: {len(records)} records, {path.stat().st_size} bytes")
        for record in records:
            record_id, family = record.split(b"\n")[0].split(b" family=")
            rows.append(record_id + b"\t" + family + b"\n")
    (arguments.out / "families.tsv").write_bytes(b"".join(rows))


if __name__ == "__main__":
    main()
