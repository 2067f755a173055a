import numpy as np

from protlm.data.embeddings.layouts import names
from protlm.data.strings import Strings


def all_different(*given, **options):
    return names.all_different(Strings.of(given), **options).to_list()


def test_repeats_get_the_next_free_number_and_a_name_of_its_own_goes_first():
    assert all_different("a", "b", "c") == ["a", "b", "c"]
    assert all_different("a", "a", "a") == ["a", "a#2", "a#3"]
    assert all_different("a", "a", "a", "a#2") == ["a", "a#3", "a#4", "a#2"]
    assert all_different("a#2", "a", "a", "a#2", "a#2#2") == ["a#2", "a", "a#3", "a#2#3", "a#2#2"]
    assert all_different() == []


def test_what_is_the_same_may_be_more_than_equal():
    assert all_different("a", "A", "A#2", "b", folded=str.casefold) == ["a", "A#3", "A#2", "b"]


def test_names_of_many_slices_come_back_in_order():
    given = [f"é{number % 7}" for number in range(40)]
    expected = all_different(*given)
    column = Strings.of(expected)
    assert [name.decode() for name in column.encoded(3)] == list(column) == expected
    assert [column.bytes_of(index).decode() for index in range(40)] == expected
    assert names.is_repeat(Strings.of(given), num_at_once=3).tolist() == [False] * 7 + [True] * 33
    assert names.collected(iter(expected)).to_list() == expected


def test_columns_of_names_hold_no_python_strings():
    column = names.collected(str(number) for number in range(1000))
    assert column.text.dtype == np.uint8
    assert column.offsets.dtype == np.int64
    assert column.offsets.nbytes == 8 * 1001
