import math
from collections import Counter

import pytest

from protlm.data.digests import digests_of
from protlm.data.splits import PFAM_20, SPLIT_NAMES, held_out_families, random_split

NUM_SEQUENCES = 20_000
DIGESTS = digests_of(f"M{'ACDE' * (number % 7)}K{number}".encode() for number in range(NUM_SEQUENCES))[:, 1]


def draw(seed=0, valid_fraction=0.1, test_fraction=0.2):
    codes = random_split(DIGESTS, seed=seed, valid_fraction=valid_fraction, test_fraction=test_fraction)
    return [SPLIT_NAMES[code] for code in codes]


def test_fractions_hold_within_five_standard_errors():
    counts = Counter(draw())
    for split, fraction in (("train", 0.7), ("valid", 0.1), ("test", 0.2)):
        error = math.sqrt(fraction * (1 - fraction) * NUM_SEQUENCES)
        assert abs(counts[split] - fraction * NUM_SEQUENCES) < 5 * error


@pytest.mark.parametrize("seed", [1, 2**63, 2**64 - 1])
def test_another_seed_gives_an_independent_split(seed):
    both = sum(first == second == "valid" for first, second in zip(draw(), draw(seed=seed), strict=True))
    error = math.sqrt(0.01 * 0.99 * NUM_SEQUENCES)
    assert abs(both - 0.01 * NUM_SEQUENCES) < 5 * error


def test_a_larger_fraction_only_adds_records_to_its_split():
    for before, after in zip(draw(), draw(valid_fraction=0.2), strict=True):
        assert after == before or (before, after) == ("train", "valid")


def test_the_ends_of_the_range_are_kept():
    assert set(draw(valid_fraction=0.0, test_fraction=0.0)) == {"train"}


def test_a_draw_depends_on_its_own_digest_alone():
    alone = [SPLIT_NAMES[random_split(DIGESTS[i : i + 1], seed=0, valid_fraction=0.1, test_fraction=0.2)[0]]
             for i in range(50)]  # fmt: skip
    assert alone == draw()[:50]


def test_the_draw_of_a_sequence_never_changes():
    # Stored datasets rely on it.
    assert Counter(draw()) == {"train": 14114, "test": 3956, "valid": 1930}


def test_families_are_held_out_without_their_version_and_presets_by_name():
    assert held_out_families(["PF00306.30", "F04.2", "IPR000276"]) == {"PF00306", "F04.2", "IPR000276"}
    assert held_out_families(["paper-pfam-20", "PF00001"]) == {*PFAM_20, "PF00001"}
    assert len(set(PFAM_20)) == 20
