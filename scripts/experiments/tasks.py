"""The tasks that models are trained on: hides which proteins are in which split, and how a far field is made to matter.

Every task has the splits train and valid, `test` (proteins like those of train, called iid) and `ood` (called held). It
is a function of the files it reads and of `SEED`, not of the seed of a run: all runs of a task see the same proteins.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from protlm import read_records
from protlm.choices import SplitName
from protlm.data.records import Record
from protlm.workflows.prep.options import PrepRequest
from protlm.workflows.prep.prepare import prepare

SEED = 0
"""Of all draws of the tasks."""
STANDARD = "ACDEFGHIKLMNPQRSTVWY"
LONG_FAMILIES = ("F01", "F02", "F03")
"""Families of long proteins that are trained on: three of eleven, which a processor learns in minutes."""
SUBSTITUTED = 0.3
"""Share of the residues of a diverged copy that differ from the protein before it."""
COPIED_RESIDUES = 200
"""Residues of a window of a protein that is copied, and so the distance of each residue from its copy."""
VARIED_RESIDUES = (150, 300)
"""The same, where it is another one for each protein."""
UNSEEN_FAMILIES = 4
"""Families of which no member is trained on, where homologues stand side by side."""
KEPT_MEMBERS = 40
"""Members of each other family that are iid there, kept out of training."""
VALID_MEMBERS = 12
"""And members that are valid."""
ORDERS = 8
"""How often the members of a family stand in train there, each time in another order."""

Protein = tuple[str, str]
"""Id and sequence."""
Splits = Mapping[SplitName, list[Protein]]
_Thing = TypeVar("_Thing")


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        title: In tables and figures.
        make: Makes its proteins by split from the folder of all data.
        steps: Updates of a run.
        overrides: Settings of its runs beside those of the kind of attention.
    """

    title: str
    make: Callable[[Path], Splits]
    steps: int
    overrides: tuple[str, ...] = ()


def prepare_task(task: Task, data: Path, folder: Path, *, most: int | None = None) -> Path:
    """Returns the dataset of a task in a folder, which is made unless it is there.

    Args:
        task: The task.
        data: The folder of all data.
        folder: Where its FASTA files and the dataset go.
        most: Most proteins of a split; None: all.

    Raises:
        ProtlmError: A file of the task that is not there or cannot be read.
    """
    dataset = folder / "dataset"
    if dataset.exists():
        return dataset
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.fasta" for name in ("train", "valid", "test", "ood")}
    for name, proteins in task.make(data).items():
        lines = (f">{record_id}\n{sequence}\n" for record_id, sequence in proteins[:most])
        paths[name].write_text("".join(lines), encoding="ascii")
    prepare(
        PrepRequest(
            inputs=[paths["train"]], valid_inputs=[paths["valid"]], test_inputs=[paths["test"]],
            ood_inputs=[paths["ood"]], out=dataset, check_leaks=False,
        )
    )  # fmt: skip
    return dataset


def families(folder: str, num_valid: int, only: Collection[str] = ()) -> Callable[[Path], Splits]:
    """Returns the maker of the task of a folder of families, whose valid split is some members of train.

    Args:
        folder: Of the files train, iid and held.
        num_valid: Members of train that become valid.
        only: Names of the families; empty: all.
    """

    def make(data: Path) -> Splits:
        splits = {name: _read(data / folder / f"{name}.fasta.gz", only) for name in ("train", "iid", "held")}
        train = _shuffled(splits["train"], "valid")
        return {"train": train[num_valid:], "valid": train[:num_valid], "test": splits["iid"], "ood": splits["held"]}

    return make


def copies(shortest: int, longest: int) -> Callable[[Path], Splits]:
    """Returns the maker of the task of copies: windows of Swiss-Prot's proteins, each followed by its diverged copy.

    Both are one record. Held ones are of families of which train has no member.

    Args:
        shortest: Fewest residues of a window.
        longest: Most residues, equally likely as any number between them.
    """
    files: Mapping[SplitName, tuple[str, int]] = {
        "train": ("train_100k", 6000), "valid": ("valid_cluster_5k", 48), "test": ("test_random_5k", 120),
        "ood": ("ood_pfam24", 120),
    }  # fmt: skip

    def make(data: Path) -> Splits:
        splits: dict[SplitName, list[Protein]] = {}
        for name, (file, count) in files.items():
            proteins = [
                protein
                for protein in _read(data / "swissprot" / f"{file}.fasta.gz")
                if len(protein[1]) >= longest and set(protein[1]) <= set(STANDARD)
            ]
            generator = _generator(f"copies {name}")
            splits[name] = []
            for record_id, sequence in _shuffled(proteins, f"copied {name}")[:count]:
                size = int(generator.integers(shortest, longest + 1))
                start = int(generator.integers(len(sequence) - size + 1))
                window = sequence[start : start + size]
                splits[name].append((record_id, window + diverged(window, generator)))
        return splits

    return make


def diverged(sequence: str, generator: np.random.Generator, share: float = SUBSTITUTED) -> str:
    """Returns a sequence with each residue replaced by another standard one with this probability.

    Args:
        sequence: Standard residues.
        generator: Of the draws.
        share: Probability of a replacement, 0 to 1.
    """
    numbers = np.array([STANDARD.index(residue) for residue in sequence])
    shifts = generator.integers(1, len(STANDARD), len(sequence))
    changed = np.where(generator.random(len(sequence)) < share, (numbers + shifts) % len(STANDARD), numbers)
    return "".join(STANDARD[number] for number in changed)


def packed(tokens: int) -> tuple[str, ...]:
    """Returns the settings of rows of whole proteins, of so many tokens."""
    return (f"data.tokens_per_batch={tokens}",)


def concatenated(tokens: int) -> tuple[str, ...]:
    """Returns the settings of rows that are one window of so many tokens."""
    return ("data.mode=concatenated", f"data.window_tokens={tokens}", f"data.tokens_per_batch={tokens}")


def side_by_side(tokens: int) -> Callable[[Path], Splits]:
    """Returns the maker of the task of homologues in one window: records are members of a family, joined.

    A record is about half as long as a window, so that windows of concatenated proteins, which begin anywhere, hold
    members of two or three families. The families of held records are in no other split, and iid ones are of other
    members than those of train.

    Args:
        tokens: Tokens of a window.
    """

    def make(data: Path) -> Splits:
        members = _members(data / "families" / f"{name}.fasta.gz" for name in ("train", "iid", "held"))
        names = _shuffled(sorted(members), "unseen families")
        splits: dict[SplitName, list[Protein]] = {"train": [], "valid": [], "test": [], "ood": []}
        for family in names[:UNSEEN_FAMILIES]:
            splits["ood"] += _joined(members[family], family, tokens // 2, 1)
        for family in names[UNSEEN_FAMILIES:]:
            kept = _shuffled(members[family], f"kept {family}")
            bounds: Mapping[SplitName, tuple[int, int]] = {
                "test": (0, KEPT_MEMBERS), "valid": (KEPT_MEMBERS, KEPT_MEMBERS + VALID_MEMBERS),
                "train": (KEPT_MEMBERS + VALID_MEMBERS, len(kept)),
            }  # fmt: skip
            for name, (start, stop) in bounds.items():
                splits[name] += _joined(kept[start:stop], family, tokens // 2, ORDERS if name == "train" else 1)
        return splits

    return make


TASKS: Mapping[str, Task] = {
    "families-long": Task(
        "proteins of 400–1,022 residues", families("families_long", 24, LONG_FAMILIES), 600, packed(2048)
    ),
    "families": Task("proteins of 80–192 residues", families("families", 64), 400, packed(2048)),
    "copies": Task("a protein and its diverged copy", copies(COPIED_RESIDUES, COPIED_RESIDUES), 300, packed(2048)),
    "copies-varied": Task("the same at varied distances", copies(*VARIED_RESIDUES), 300, packed(2048)),
    "concat-4096": Task("homologues in windows of 4,096", side_by_side(4096), 120, concatenated(4096)),
    "concat-8192": Task("homologues in windows of 8,192", side_by_side(8192), 60, concatenated(8192)),
}
"""The tasks by name."""


def _joined(sequences: Sequence[str], family: str, num_residues: int, orders: int) -> list[Protein]:
    """Returns records of at least this many residues, but for the last one of each order of the members."""
    records: list[Protein] = []
    for order in range(orders):
        joined = ""
        for sequence in _shuffled(sequences, f"order {order} of {family}"):
            joined += sequence
            if len(joined) >= num_residues:
                records.append((f"{family}-{order}-{len(records)}", joined))
                joined = ""
        if joined:
            records.append((f"{family}-{order}-{len(records)}", joined))
    return records


def _members(paths: Iterable[Path]) -> dict[str, list[str]]:
    """Returns the sequences of each family."""
    members: dict[str, list[str]] = {}
    for path in paths:
        for record in read_records(path):
            members.setdefault(_family(record), []).append(record.sequence)
    return members


def _family(record: Record) -> str:
    """Returns the family of a record, which its header has as `family=`."""
    return record.description.removeprefix("family=")


def _read(path: Path, families: Collection[str] = ()) -> list[Protein]:
    """Returns the proteins of a file: all, or those of some families."""
    return [
        (record.id, record.sequence) for record in read_records(path) if not families or _family(record) in families
    ]


def _shuffled(things: Sequence[_Thing], purpose: str) -> list[_Thing]:
    """Returns things in an order that depends on the purpose alone."""
    return [things[place] for place in _generator(purpose).permutation(len(things))]


def _generator(purpose: str) -> np.random.Generator:
    """Returns a generator of draws for one purpose, apart from all others."""
    digest = hashlib.sha256(f"{SEED} {purpose}".encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:8], "little")))
