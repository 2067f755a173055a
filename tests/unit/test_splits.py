import math
from collections import Counter

from protlm.data.duplicates import SeenSequences, sequence_digest
from protlm.data.splits import random_split

SEQUENCES = [f"M{'ACDE' * (number % 7)}K{number}".encode() for number in range(20_000)]


def draw(seed=0, valid_fraction=0.1, test_fraction=0.2):
    return [
        random_split(residues, seed=seed, valid_fraction=valid_fraction, test_fraction=test_fraction)
        for residues in SEQUENCES
    ]


def test_fractions_hold_within_five_standard_errors():
    counts = Counter(draw())
    for split, fraction in (("train", 0.7), ("valid", 0.1), ("test", 0.2)):
        error = math.sqrt(fraction * (1 - fraction) * len(SEQUENCES))
        assert abs(counts[split] - fraction * len(SEQUENCES)) < 5 * error


def test_another_seed_gives_an_independent_split():
    both = sum(first == second == "valid" for first, second in zip(draw(seed=0), draw(seed=1), strict=True))
    assert 0 < both < 2 * 0.1 * 0.1 * len(SEQUENCES)


def test_a_larger_fraction_only_adds_records_to_its_split():
    for before, after in zip(draw(), draw(valid_fraction=0.2), strict=True):
        assert after == before or (before, after) == ("train", "valid")


def test_the_ends_of_the_range_are_kept():
    assert set(draw(valid_fraction=0.0, test_fraction=0.0)) == {"train"}


def test_the_draw_of_a_sequence_never_changes():
    # Stored datasets rely on it.
    split = Counter(draw())
    assert split == {"train": 14030, "test": 3967, "valid": 2003}


def test_a_sequence_belongs_to_the_split_that_had_it_first():
    seen = SeenSequences()
    assert seen.first_split(b"MKV", "train") is None
    assert seen.first_split(b"MKW", "test") is None
    assert seen.first_split(b"MKV", "test") == "train"
    assert seen.first_split(b"MKV", "valid") == "train"
    assert seen.first_split(b"MKW", "train") == "test"


def test_the_digest_is_xxh3_128():
    assert sequence_digest(b"").hex() == "99aa06d3014798d86001c324468d497f"
