import itertools
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protlm.data import compiled
from protlm.data.building import containment, kmer_search, kmers
from protlm.runtime.local_workers import LocalWorkers
from tests.unit.data.building.leak_cases import PROTEIN, shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


def oracle(inner_groups, outer_groups):
    """How many of the inner sequences some longer outer one holds, by Python's own search."""
    outer = list(itertools.chain(*outer_groups))
    return sum(
        len(text) >= kmer_search.MIN_LENGTH and any(text in other and text != other for other in outer)
        for text in itertools.chain(*inner_groups)
    )


def count_each_way(folder, inner_groups, outer_groups):
    """The counts of both ways of searching, which of them is used depends on sizes only."""
    inner, outer = shards(folder, *inner_groups), shards(folder, *outer_groups)
    with LocalWorkers(1, None) as workers:
        return {
            *containment.small_in_large([inner], outer, workers),
            *containment.large_in_small(inner, [outer], workers),
        }


def random_sides(letters, seed):
    """Groups of outer sequences of some letters, and of inner ones: parts of outer ones, half with a change."""
    draw = random.Random(seed)

    def sequence():
        return "".join(draw.choices(letters, k=draw.randint(1, 120)))

    outer = [[sequence() for _ in range(draw.randint(1, 4))] for _ in range(draw.randint(1, 3))]

    def part():
        text = draw.choice(draw.choice(outer))
        start = draw.randrange(len(text))
        residues = list(text[start : start + draw.randint(1, 120)])
        if draw.random() < 0.5:
            residues[draw.randrange(len(residues))] = draw.choice(letters)
        return "".join(residues)

    inner = [[part() for _ in range(draw.randint(1, 5))] for _ in range(draw.randint(1, 3))]
    return inner, outer


# Few letters make many parts that nearly fit.
sides = st.builds(
    random_sides, st.sampled_from(["A", "AC", "WXBUZO", "ACDEFGHIKLMNPQRSTVWY"]), st.integers(0, 2**32 - 1)
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sides=sides)
def test_what_is_found_is_what_comparing_all_pairs_finds(folder, sides):
    inner, outer = sides
    assert count_each_way(folder, inner, outer) == {oracle(inner, outer)}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(kmers, "_CHUNK_KMERS", 8)
    monkeypatch.setattr(kmer_search, "BLOCK_RESIDUES", 60)
    monkeypatch.setattr(kmer_search, "_BATCH", 3)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sides=sides)
def test_chunks_blocks_and_batches_change_nothing(folder, small_blocks, sides):
    inner, outer = sides
    assert count_each_way(folder, inner, outer) == {oracle(inner, outer)}


@pytest.fixture
def colliding_hashes(monkeypatch):
    monkeypatch.setattr(kmers, "_FACTOR", np.uint64(0))
    monkeypatch.setattr(kmer_search.xxhash, "xxh3_64_intdigest", lambda text: 7)


@pytest.fixture
def without_compiled_code(monkeypatch):
    monkeypatch.setattr(compiled, "load", lambda: "hidden by this test")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sides=sides)
def test_numpy_finds_the_same(folder, without_compiled_code, sides):
    inner, outer = sides
    assert count_each_way(folder, inner, outer) == {oracle(inner, outer)}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sides=sides)
def test_hashes_that_all_collide_change_nothing(folder, colliding_hashes, sides):
    inner, outer = sides
    assert count_each_way(folder, inner, outer) == {oracle(inner, outer)}


@pytest.mark.parametrize("length", range(1, len(PROTEIN)))
def test_a_part_of_every_length_is_found_at_every_place_from_12_residues_on(folder, length):
    places = range(len(PROTEIN) - length + 1)
    inner = [PROTEIN[place : place + length] for place in places]
    expected = len(inner) if length >= 12 else 0
    assert count_each_way(folder, [inner], [["MAAAW" * 3, PROTEIN]]) == {expected}


def test_a_sequence_is_no_part_of_an_equal_one(folder):
    assert count_each_way(folder, [[PROTEIN]], [[PROTEIN, "MK"]]) == {0}


def test_what_spans_two_records_is_no_part_of_either(folder):
    # The shift moves the bounds to all places within the k-mers that are read.
    outer = [
        text
        for shift in range(33)
        for text in ("A" * shift, "A" * 33 + PROTEIN[:45], PROTEIN[45:] + PROTEIN[:44])
        if text
    ]
    inner = [PROTEIN[start : start + 46] for start in range(45)]
    assert count_each_way(folder, [inner], [outer]) == {0}


def test_one_other_residue_anywhere_is_no_match(folder):
    changed = [PROTEIN[:place] + "W" + PROTEIN[place + 1 :] for place in range(len(PROTEIN)) if PROTEIN[place] != "W"]
    assert count_each_way(folder, [changed], [["A" + PROTEIN + "A"]]) == {0}


def test_equal_inner_records_each_count_and_several_outer_ones_count_once(folder):
    part = PROTEIN[5:60]
    assert count_each_way(folder, [[part, part], [part]], [[PROTEIN, PROTEIN + "A"], ["A" + PROTEIN]]) == {3}


@pytest.mark.parametrize("unit", ["W", "AC", "GGX", "PROTEIN", "ACDEFGHIKLMNPQRSTVWYACDEFGHIKL"])
def test_near_equal_repeats_cost_no_comparison_of_all_pairs(folder, unit, monkeypatch):

    def changed(length, letter):
        repeat = unit * (length // len(unit))
        return [repeat[:place] + letter + repeat[place + 1 :] for place in range(60, 260)]

    compared = []
    digests = kmer_search._digests
    monkeypatch.setattr(
        kmer_search,
        "_digests",
        lambda tokens, starts, lengths: compared.append(len(starts)) or digests(tokens, starts, lengths),
    )
    inner, outer = changed(300, "B"), changed(600, "Z")
    assert count_each_way(folder, [inner], [outer]) == {0}
    # 3 searches; a comparison for each outer residue at most, and the inner records themselves.
    assert sum(compared) <= 3 * (sum(map(len, outer)) + 2 * len(inner))


def test_splits_without_shards_or_records_hold_nothing(folder):
    some, none = shards(folder, [PROTEIN]), shards(folder, [])
    with LocalWorkers(1, None) as workers:
        for inner, outer in (([], some), (some, []), (none, some), (some, none)):
            assert containment.small_in_large([inner], outer, workers) == [0]
            assert containment.large_in_small(inner, [outer], workers) == [0]
