import dataclasses
import json

import numpy as np
import pytest
import torch

from protlm.inference.attention_weights import attention_matrix
from protlm.inference.blosum import blosum62
from protlm.inference.residue_similarity import attention_similarity, pair_log_odds
from protlm.vocabulary import FIRST_RESIDUE, encode
from tests.unit.inference.planted_attention import model_with, random_protein
from tests.unit.model.small_models import build

OFF_DIAGONAL = ~np.eye(20, dtype=bool)


def model_of_similarity(monkeypatch, protein, similarity):
    """Returns a model in which a residue of type a attends to one of type b with the weight exp(similarity[a, b])."""
    q, k = torch.zeros(2, len(protein) + 2, 1, 32)
    types = torch.from_numpy(protein.astype(np.int64)) - FIRST_RESIDUE
    q[1:-1, 0, :20] = torch.as_tensor(similarity, dtype=torch.float32)[types]
    k[1:-1, 0, :20] = 32**0.5 * torch.eye(20)[types]
    return model_with(monkeypatch, q, k)


def test_a_constructed_attention_gives_its_similarity(monkeypatch):
    # The rows of a circulant matrix have the same sum, so that all queries divide by the same number.
    steps = np.random.default_rng(0).normal(size=20)
    steps = steps + steps[(-np.arange(20)) % 20]
    similarity = steps[(np.arange(20)[:, None] - np.arange(20)) % 20]
    protein = np.random.default_rng(1).permutation(np.repeat(np.arange(20), 8) + FIRST_RESIDUE).astype(np.uint8)
    log_odds = np.array(attention_similarity(model_of_similarity(monkeypatch, protein, similarity), [protein]).log_odds)
    difference = (log_odds - similarity)[OFF_DIAGONAL]
    np.testing.assert_allclose(difference, difference[0], atol=1e-5)
    np.testing.assert_array_equal(log_odds, log_odds.T)


def test_attention_by_blosum62_agrees_with_it(monkeypatch):
    protein = random_protein(600)
    similarity = attention_similarity(model_of_similarity(monkeypatch, protein, 0.3 * blosum62()), [protein])
    assert similarity.blosum62.num_pairs == 190
    assert similarity.blosum62.pearson > 0.95
    assert similarity.blosum62.spearman > 0.9
    assert similarity.by_head == [[similarity.blosum62]]


@pytest.mark.parametrize("causal", [False, True])
def test_log_odds_are_those_of_the_whole_maps(causal):
    model = build(causal=causal)
    proteins = [random_protein(150), random_protein(40, seed=1, num_types=25)]
    observed, expected = np.zeros((2, 20, 20))
    for protein in proteins:
        for layer, head in ((1, 1), (1, 2), (2, 1), (2, 2)):
            matrix = attention_matrix(model, protein, layer, head)[1:-1, 1:-1]
            types = protein - FIRST_RESIDUE
            for i, a in enumerate(types):
                keys = [j for j, b in enumerate(types) if b < 20 and j != i and (j < i or not causal)]
                if a >= 20 or not keys:
                    continue
                for j in keys:
                    observed[a, types[j]] += matrix[i, j] / matrix[i, keys].sum()
                    expected[a, types[j]] += 1 / len(keys)
    similarity = attention_similarity(model, proteins)
    assert similarity.num_proteins == 2
    np.testing.assert_allclose(
        np.array(similarity.log_odds, dtype=float),
        np.log((observed + observed.T) / (expected + expected.T)),
        atol=1e-9,
    )
    assert np.shape(similarity.by_head)[:2] == (2, 2)


@pytest.mark.parametrize("causal", [False, True])
def test_uniform_attention_shows_no_similarity(causal, monkeypatch):
    q = torch.zeros(402, 2, 8)
    similarity = attention_similarity(model_with(monkeypatch, q, q, causal=causal), [random_protein(400)])
    np.testing.assert_allclose(similarity.log_odds, 0, atol=1e-12)


def test_pairs_that_never_occur_are_left_out_and_fit_into_json():
    similarity = attention_similarity(build(), [encode(b"LAGVLAGVXX")])
    assert similarity.blosum62.num_pairs == 6
    assert similarity.log_odds[0][1] is not None
    assert similarity.log_odds[0][5] is None
    json.dumps(dataclasses.asdict(similarity), allow_nan=False)
    alone = attention_similarity(build(causal=True), [encode(b"L")])
    assert (alone.blosum62.num_pairs, alone.blosum62.pearson) == (0, None)


def test_no_protein_is_an_error():
    with pytest.raises(ValueError, match="proteins: expected at least one"):
        attention_similarity(build(), [])


def test_log_odds_are_symmetric_sums():
    observed, expected = np.zeros((2, 20, 20))
    observed[0, 1], observed[1, 0], expected[0, 1], expected[1, 0] = 1.0, 3.0, 1.0, 1.0
    expected[2, 3] = 1.0
    log_odds = pair_log_odds(observed, expected)
    assert log_odds[0, 1] == log_odds[1, 0] == pytest.approx(np.log(2))
    assert np.isnan(log_odds[2, 3])
    assert np.isnan(log_odds[4, 4])
