"""Which split a record belongs to: decided by its sequence and a seed alone, never by its place, file or company."""

from typing import Literal, get_args

import xxhash

SplitName = Literal["train", "valid", "test", "ood"]
SPLIT_NAMES: tuple[SplitName, ...] = get_args(SplitName)
"""All splits, in the order in which they claim sequences: the first to have one keeps it."""

_HASH_VALUES = 2.0**64


def random_split(residues: bytes, *, seed: int, valid_fraction: float, test_fraction: float) -> SplitName:
    """Returns `train`, `valid` or `test`, a function of the seed and the cleaned sequence alone.

    A hash in [0, 1) is drawn for the sequence; valid takes the lower end and test the upper one, so that a larger
    fraction only ever adds records to its split.

    Args:
        residues: The cleaned sequence.
        seed: Another seed gives an independent split.
        valid_fraction: Expected part of all distinct sequences in `valid`.
        test_fraction: Expected part of all distinct sequences in `test`.
    """
    draw = xxhash.xxh3_64_intdigest(residues, seed) / _HASH_VALUES
    if draw < valid_fraction:
        return "valid"
    return "test" if draw >= 1.0 - test_fraction else "train"
