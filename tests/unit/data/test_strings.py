import numpy as np
import pytest

from protlm.data.strings import Strings, bounds_of
from protlm.errors import ShardError

TEXTS = ["MKV", "", "é日本", "a\0b", "", "x" * 100, ""]


@pytest.mark.parametrize("num_at_once", [1, 3, 1 << 16])
def test_a_column_gives_back_its_strings_in_every_way_of_reading(num_at_once):
    column = Strings.of(TEXTS)
    assert len(column) == len(TEXTS)
    assert list(column) == column.to_list() == TEXTS
    assert [column[index] for index in range(len(TEXTS))] == TEXTS
    assert list(column.encoded(num_at_once)) == [column.bytes_of(index) for index in range(len(TEXTS))]
    assert (column.text.dtype, column.offsets.dtype) == (np.uint8, np.int64)


def test_an_index_counts_from_either_end_and_stays_within_the_column():
    column = Strings.of(TEXTS)
    assert column[-2] == "x" * 100
    for index in (len(TEXTS), -len(TEXTS) - 1):
        with pytest.raises(IndexError):
            column[index]


def test_a_column_of_no_strings_is_empty():
    column = Strings.of([])
    assert (len(column), list(column), column.to_list(), column.offsets.tolist()) == (0, [], [], [0])


def test_text_of_a_file_that_is_not_utf8_is_an_error_that_names_the_column():
    column = Strings(np.frombuffer(b"a\xff", dtype=np.uint8), np.array([0, 1, 2]), "a.h5: ids")
    assert column[0] == "a"
    for read in (lambda: column[1], lambda: list(column), column.to_list):
        with pytest.raises(ShardError, match=r"^a\.h5: ids: expected UTF-8 text"):
            read()


def test_bounds_start_at_zero_and_add_up():
    assert bounds_of([3, 0, 2]).tolist() == [0, 3, 3, 5]
    assert bounds_of(np.zeros(0, dtype=np.int32)).tolist() == [0]
