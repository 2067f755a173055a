import numpy as np
import pytest

from protlm import vocabulary
from protlm.data.residue_counts import count_residues


@pytest.mark.usefixtures("with_and_without_the_library")
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 7, 1000, (1 << 20) - 1, (1 << 20) + 1, (2 << 20) + 3])
def test_residues_are_counted_and_nothing_else(length):
    tokens = np.random.default_rng(length).integers(0, 256, size=length, dtype=np.uint8)
    counts = count_residues(tokens)
    first = vocabulary.FIRST_RESIDUE
    assert counts.dtype == np.int64
    assert counts.tolist() == [int((tokens == first + i).sum()) for i in range(vocabulary.NUM_RESIDUES)]
    # Every other byte, as a slice of a column may be.
    assert count_residues(np.repeat(tokens, 2)[::2]).tolist() == counts.tolist()


@pytest.mark.usefixtures("with_and_without_the_library")
@pytest.mark.parametrize("tokens", [np.zeros(3, dtype=np.int64), np.zeros((2, 3), dtype=np.uint8)])
def test_tokens_of_another_type_or_rank_break_the_contract(tokens):
    with pytest.raises(ValueError, match="tokens: expected uint8 of one axis"):
        count_residues(tokens)
