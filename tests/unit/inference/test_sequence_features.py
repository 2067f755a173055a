"""Features of sequences alone, against counts by hand."""

import numpy as np
import pytest

from protlm import vocabulary
from protlm.inference import sequence_features
from protlm.inference.sequence_features import (
    WindowFeatures,
    composition,
    dipeptides,
    variant_columns,
    variant_one_hot,
)
from protlm.vocabulary import FIRST_RESIDUE, RESIDUES


def tokens(residues: str) -> np.ndarray:
    return vocabulary.encode(residues.encode())


def test_composition_is_the_share_of_each_letter():
    shares = composition(tokens("AACX"))
    assert {letter: shares[place] for place, letter in enumerate(RESIDUES) if shares[place]} == {
        "A": 0.5, "C": 0.25, "X": 0.25,
    }  # fmt: skip


def test_dipeptides_are_the_shares_of_pairs_in_their_order():
    shares = dipeptides(tokens("ACAC"))
    a, c = (RESIDUES.index(letter) for letter in "AC")
    assert shares[a * 20 + c] == pytest.approx(2 / 3)
    assert shares[c * 20 + a] == pytest.approx(1 / 3)
    assert shares.sum() == pytest.approx(1)


def test_a_pair_with_an_unknown_residue_is_none_and_one_residue_has_no_pairs():
    assert dipeptides(tokens("AXA")).sum() == 0
    assert dipeptides(tokens("A")).sum() == 0


def test_a_window_sees_its_own_protein_and_its_ends_alone():
    proteins = [tokens("ACD"), tokens("WWWW")]
    features = WindowFeatures(np.concatenate(proteins), np.array([0, 3, 7]), radius=1)
    rows = features.rows(np.arange(7)).reshape(7, 3, 26).argmax(axis=2)
    text = "".join((*RESIDUES, "-")[state] for state in rows.ravel())
    assert [text[start : start + 3] for start in range(0, 21, 3)] == ["-AC", "ACD", "CD-", "-WW", "WWW", "WWW", "WW-"]
    assert features.rows(np.array([5])).sum() == 3
    assert features.dim == 3 * 26


def test_a_window_of_radius_0_is_the_residue():
    features = WindowFeatures(tokens("ACD"), np.array([0, 3]), radius=0)
    assert features.rows(np.array([2, 0])).argmax(axis=1).tolist() == [RESIDUES.index("D"), RESIDUES.index("A")]


def test_only_positions_that_vary_are_columns_of_variants():
    variants = [tokens("MKV"), tokens("MRV"), tokens("MKV")]
    columns = variant_columns(variants, 3)
    assert [(position, RESIDUES[token - FIRST_RESIDUE]) for position, token in columns.tolist()] == [(1, "R"), (1, "K")]
    assert variant_one_hot(variants[1], columns).tolist() == [1, 0]
    assert variant_one_hot(variants[0], columns).tolist() == [0, 1]


def test_too_many_columns_are_none(monkeypatch):
    monkeypatch.setattr(sequence_features, "MOST_VARIANT_FEATURES", 1)
    assert variant_columns([tokens("MKV"), tokens("MRV")], 3) is None
