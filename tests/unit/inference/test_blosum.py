import numpy as np
import pytest
from scipy import stats

from protlm.inference.blosum import STANDARD_RESIDUES, blosum62, compare_with_blosum62


def test_blosum62_is_in_the_order_of_the_vocabulary():
    scores = {
        (a, b): blosum62()[i, j] for i, a in enumerate(STANDARD_RESIDUES) for j, b in enumerate(STANDARD_RESIDUES)
    }
    assert [scores[pair] for pair in (("W", "W"), ("D", "E"), ("F", "Y"), ("L", "I"), ("C", "W"))] == [11, 2, 3, 2, -2]
    np.testing.assert_array_equal(blosum62(), blosum62().T)


def test_correlations_equal_those_of_scipy_with_ties_and_missing_pairs():
    generator = np.random.default_rng(0)
    similarity = np.round(generator.normal(size=(20, 20)), 1)
    similarity = similarity + similarity.T
    similarity[3, 7] = similarity[7, 3] = np.nan
    agreement = compare_with_blosum62(similarity)
    pairs = np.triu_indices(20, k=1)
    present = np.isfinite(similarity[pairs])
    values, scores = similarity[pairs][present], blosum62()[pairs][present]
    assert agreement.num_pairs == 189
    assert agreement.pearson == pytest.approx(stats.pearsonr(values, scores).statistic)
    assert agreement.spearman == pytest.approx(stats.spearmanr(values, scores).statistic)
    assert compare_with_blosum62(blosum62()).pearson == pytest.approx(1)
    assert compare_with_blosum62(np.ones((20, 20))).pearson is None
