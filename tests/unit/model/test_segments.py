"""The segments of a packed row."""

from tests.unit.model.small_models import segments_of


def test_segments_know_positions_lengths_and_neighbours():
    segments = segments_of(2, 0, 3)
    assert segments.cpu_bounds.tolist() == [0, 2, 2, 5]
    assert segments.positions.tolist() == [0, 1, 0, 1, 2]
    assert segments.lengths.tolist() == [2, 2, 3, 3, 3]
    assert segments.numbers.tolist() == [0, 0, 2, 2, 2]
    assert segments.lacks_neighbour(1).tolist() == [False, True, False, False, True]
    assert segments.lacks_neighbour(-2).tolist() == [True, True, True, True, False]
