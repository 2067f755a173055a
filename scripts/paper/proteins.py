"""The proteins of the table: Swiss-Prot, divided by clusters and families, and the samples that are scored."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from protlm import read_records
from protlm.data.records import Record
from protlm.errors import ProtlmError
from protlm.workflows.prep.options import PrepRequest
from protlm.workflows.prep.prepare import prepare

NUM_VALID = 150
"""Proteins of the valid split, which is measured often."""
NUM_SCORED = 600
"""Proteins of each of the sets that are scored."""


@dataclass(frozen=True)
class Sets:
    """The datasets.

    Attributes:
        trained: Splits train, valid, test (whole clusters that were held out of training) and ood (families held out).
        iid: Its split test has random proteins, whose relatives are in train.
    """

    trained: Path
    iid: Path


def prepare_sets(data: Path, folder: Path, *, num_scored: int = NUM_SCORED) -> Sets:
    """Returns the datasets in a folder; those that are there are taken as they are.

    Args:
        data: The folder `swissprot`, with train_100k, valid_cluster_5k, test_random_5k and ood_pfam24.
        folder: Where the samples and the datasets go.
        num_scored: Proteins of each set that is scored.

    Raises:
        ProtlmError: A file that is not there or cannot be read.
    """
    sets = Sets(folder / "trained", folder / "iid")
    train = data / "train_100k.fasta.gz"
    if not train.exists():
        raise ProtlmError(f"{train}: no such file; name the folder of the proteins with --data")
    folder.mkdir(parents=True, exist_ok=True)
    clusters = shuffled(list(read_records(data / "valid_cluster_5k.fasta.gz")))
    valid, test = clusters[:NUM_VALID], clusters[NUM_VALID : NUM_VALID + num_scored]
    families = of_each_family(list(read_records(data / "ood_pfam24.fasta.gz")), num_scored)
    iid = shuffled(list(read_records(data / "test_random_5k.fasta.gz")))[:num_scored]
    for out, splits in ((sets.trained, {"valid": valid, "test": test, "ood": families}), (sets.iid, {"test": iid})):
        if out.exists():
            continue
        paths = {
            name: [write_proteins(folder / f"{out.name}-{name}.fasta", records)] for name, records in splits.items()
        }
        prepare(
            PrepRequest(
                inputs=[train], out=out, valid_inputs=paths.get("valid", []), test_inputs=paths["test"],
                ood_inputs=paths.get("ood", []), check_leaks=False,
            )
        )  # fmt: skip
    return sets


def of_each_family(records: Sequence[Record], num_scored: int) -> list[Record]:
    """Returns a sample in which every family has as many proteins as any other, or all that it has."""
    taken: Counter[str] = Counter()
    kept = []
    families = {record.id: record.description.partition("|")[0] for record in records}
    most = max(1, num_scored // len(set(families.values())))
    for record in shuffled(records):
        family = families[record.id]
        if taken[family] < most:
            taken[family] += 1
            kept.append(record)
    return kept


def shuffled(records: Sequence[Record]) -> list[Record]:
    """Returns records in an order that depends on their sequences alone."""
    return sorted(records, key=lambda record: hashlib.sha256(record.sequence.encode()).digest())


def write_proteins(path: Path, records: Sequence[Record]) -> Path:
    """Writes records as FASTA, and returns the path."""
    lines = (f">{record.id} {record.description}\n{record.sequence}\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
    return path
