"""k-mers by compiled code and by NumPy, each against its definition."""

import numpy as np
import pytest

from protlm.data.building import kmers
from protlm.data.building.kmers import KmerSet, Level

pytestmark = pytest.mark.usefixtures("with_and_without_the_library")

LEVELS = [Level(8, 32, 39), Level(5, 8, 12, 38), Level(8, 4, 12), Level(7, 3, 12)]


def residues(num_tokens, seed=0):
    return np.random.default_rng(seed).integers(4, 29, num_tokens).astype(np.uint8)


def kmer(tokens, place, width):
    """The k-mer at a place, with zeros after the end."""
    return bytes(tokens[place : place + width]).ljust(width, b"\0")


def multiples(tokens, level):
    return range(0, len(tokens), level.stride)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 8, 9, 31, 32, 33, 100, 1000])
def test_all_added_kmers_are_found_at_their_places_and_few_others(level, num_tokens, monkeypatch):
    monkeypatch.setattr(kmers, "_CHUNK_KMERS", 7)
    added = KmerSet(0, level)
    added.add_all(residues(num_tokens))
    # What follows the k-mers that were added begins a k-mer of its own.
    other = residues(500, seed=1)
    tokens = np.concatenate([residues(num_tokens - num_tokens % level.stride), other])
    known = {kmer(residues(num_tokens), place, level.width) for place in multiples(residues(num_tokens), level)}
    places, hashes = added.find(tokens)
    assert places.dtype == np.int64
    assert hashes.dtype == np.uint64
    expected = [place for place in multiples(tokens, level) if kmer(tokens, place, level.width) in known]
    assert expected == sorted(set(places.tolist()) & set(expected))
    assert len(places) <= len(expected) + 2
    assert places.tolist() == sorted(places.tolist())
    # Equal k-mers have equal hashes, and others have others.
    by_hash = {}
    for place, value in zip(places.tolist(), hashes.tolist(), strict=True):
        by_hash.setdefault(value, set()).add(kmer(tokens, place, level.width))
        assert value < 1 << kmers.HASH_BITS
    assert all(len(same) == 1 for same in by_hash.values())


@pytest.mark.parametrize("level", LEVELS)
def test_hashes_are_those_of_first_kmers(level):
    tokens = residues(300)
    everything = KmerSet(0, level)
    everything._bytes[:] = 255
    places, hashes = everything.find(tokens)
    assert places.tolist() == list(multiples(tokens, level))
    starts = np.array([0, 5, 100])
    firsts = kmers.first_kmers(tokens, starts, level)
    assert firsts.shape == (3, level.stride)
    for row, start in zip(firsts, starts.tolist(), strict=True):
        for step, value in enumerate(row.tolist()):
            if (start + step) % level.stride == 0:
                assert value == hashes[(start + step) // level.stride]


@pytest.mark.parametrize("level", LEVELS)
def test_parts_of_the_tokens_are_known_and_others_are_not(level):
    outer, other = residues(2000), residues(2000, seed=1)
    added = KmerSet(0, level)
    added.add_all(outer)
    tokens = np.concatenate([outer, other])
    starts = np.arange(0, 1900)
    lengths = np.random.default_rng(2).integers(level.span, 101, len(starts))
    assert added.are_known(tokens, starts, lengths).all()
    assert not added.are_known(tokens, starts[:-100] + 2000, lengths[:-100]).any()


def test_one_stretch_without_a_kmer_makes_a_sequence_unknown():
    level = Level(8, 4, 12)
    outer = residues(400)
    added = KmerSet(0, level)
    added.add_all(outer)
    changed = outer.copy()
    changed[:11] = residues(11, seed=5)
    starts, lengths = np.array([0, 0]), np.array([400, 400])
    tokens = np.concatenate([changed, outer])
    assert added.are_known(tokens, np.array([0, 400]), lengths).tolist() == [False, True]
    assert added.are_known(tokens, starts[:0], lengths[:0]).tolist() == []
