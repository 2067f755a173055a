"""The split of a record: a function of the seed and its own digest or label, never of its file or of other records."""

from collections.abc import Iterable
from typing import get_args

import numpy as np

from protlm.choices import SplitName

SPLIT_NAMES: tuple[SplitName, ...] = get_args(SplitName)
"""All splits, in the order in which they claim sequences; the code of a split is its index here."""
TRAIN, VALID, TEST, OOD = range(4)

PFAM_20 = (
    "PF18369", "PF04680", "PF17988", "PF12325", "PF03272", "PF03938", "PF17724", "PF10696", "PF11968", "PF04153",
    "PF06173", "PF12378", "PF04420", "PF10841", "PF06917", "PF03492", "PF06905", "PF15340", "PF17055", "PF05318",
)  # fmt: skip
"""The Pfam families that Choromanski et al. held out of TrEMBL (arXiv 2006.03555)."""
FAMILY_PRESETS: dict[str, tuple[str, ...]] = {"paper-pfam-20": PFAM_20}

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_UNIT = 2.0**-53


def random_split(digests: np.ndarray, *, seed: int, valid_fraction: float, test_fraction: float) -> np.ndarray:
    """Returns the code of train, valid or test for each digest, a function of the seed and that digest alone.

    A number in [0, 1) is drawn for each digest; valid takes the lowest numbers and test the highest, so that a larger
    fraction only adds records to its split.

    Args:
        digests: Low half of an xxh3-128, uint64 (records): of the sequence, or of the cluster's name, which keeps a
            cluster whole.
        seed: Another seed gives an independent split.
        valid_fraction: Expected fraction of all distinct digests in valid.
        test_fraction: Expected fraction of all distinct digests in test.

    Returns:
        Codes, uint8 (records).
    """
    draws = _mixed(digests + np.uint64(seed * _GOLDEN_GAMMA % 2**64))
    codes = np.full(len(digests), TRAIN, dtype=np.uint8)
    codes[draws >= 1.0 - test_fraction] = TEST
    codes[draws < valid_fraction] = VALID
    return codes


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Returns numbers hashed into [0, 1) by the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    numbers ^= numbers >> np.uint64(31)
    return (numbers >> np.uint64(11)).astype(np.float64) * _UNIT


def held_out_families(names: Iterable[str]) -> frozenset[str]:
    """Returns the names of families without version (`PF00306.30` is `PF00306`); a preset stands for its families."""
    families: set[str] = set()
    for name in names:
        families.update(FAMILY_PRESETS.get(name, (plain_family(name),)))
    return frozenset(families)


def plain_family(name: str) -> str:
    """Returns the name of a family without the version that Pfam adds to it."""
    stem, dot, version = name.partition(".")
    return stem if dot and stem.startswith("PF") and version.isdigit() else name
