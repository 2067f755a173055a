import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protlm.inference.long_proteins import Cut, Window


@given(num_residues=st.integers(1, 5000), window=st.integers(2, 700))
def test_windows_cover_each_residue_once_and_overlap_by_half(num_residues, window):
    windows = Cut(window=window).windows(7, num_residues)
    assert [each.record for each in windows] == [7] * len(windows)
    covered = [residue for each in windows for residue in range(each.core_start, each.core_stop)]
    assert covered == list(range(num_residues))
    for each in windows:
        assert 0 <= each.start <= each.core_start < each.core_stop <= each.stop <= num_residues
        assert each.stop - each.start == min(window, num_residues)
    for before, after in itertools.pairwise(windows):
        assert before.stop - after.start >= window // 2


@given(num_residues=st.integers(1, 5000), window=st.integers(4, 700))
def test_a_residue_inside_a_protein_has_a_quarter_of_the_window_on_both_sides(num_residues, window):
    for start, stop, core_start, core_stop in (each[1:] for each in Cut(window=window).windows(0, num_residues)):
        assert core_start == 0 or core_start - start >= window // 4 - 1
        assert core_stop == num_residues or stop - core_stop >= window // 4 - 1


@given(lengths=st.lists(st.integers(1, 3000), max_size=20), window=st.integers(2, 500))
def test_sizes_are_those_of_the_windows(lengths, window):
    cut = Cut(window=window)
    expected = [each.stop - each.start for length in lengths for each in cut.windows(0, length)]
    assert sorted(cut.sizes(np.array(lengths, dtype=np.int64)).tolist()) == sorted(expected)


def test_a_truncated_protein_keeps_its_beginning():
    cut = Cut(truncate=5)
    assert cut.windows(0, 8) == [Window(0, 0, 5, 0, 5)]
    assert cut.windows(0, 3) == [Window(0, 0, 3, 0, 3)]
    assert cut.kept(np.array([8, 5, 3])).tolist() == [5, 5, 3]


@pytest.mark.parametrize("num_residues", [1, 100_000])
def test_a_protein_is_whole_unless_something_else_is_asked_for(num_residues):
    assert Cut().windows(0, num_residues) == [Window(0, 0, num_residues, 0, num_residues)]
