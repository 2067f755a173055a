import numpy as np
import pytest

from protlm.data import strings
from protlm.data.embeddings.layouts import names
from protlm.data.embeddings.layouts.esm import file_names
from protlm.data.embeddings.layouts.npz import key_of
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


def test_names_of_many_slices_come_back_in_order(monkeypatch):
    given = [f"é{number % 7}" for number in range(40)]
    expected = all_different(*given)
    monkeypatch.setattr(names, "_SLICE", 3)
    monkeypatch.setattr(strings, "_SLICE_STRINGS", 3)
    assert all_different(*given) == expected
    column = Strings.of(expected)
    assert list(column) == expected
    assert [column.bytes_of(index).decode() for index in range(40)] == expected
    assert names.is_repeat(Strings.of(given)).tolist() == [False] * 7 + [True] * 33
    assert names.collected(iter(expected)).to_list() == expected


@pytest.mark.parametrize(
    "record_id", ["sp|P69905|HBA_HUMAN", "a#2", "日本", "a.b", "a..b", "x-y", "console", "é" * 100, "a b"]
)
def test_an_id_that_any_file_system_can_hold_is_the_name_of_its_file(record_id):
    assert file_names(Strings.of([record_id])).to_list() == [record_id]


@pytest.mark.parametrize(
    ("record_id", "beginning"),
    [
        ("../../x", "_._.._x-"),
        ("/x", "_x-"),
        ("a\\b", "a_b-"),
        ("a\0b\x1f\x7f", "a_b__-"),
        (".hidden", "_hidden-"),
        ("-rf", "_rf-"),
        ("..", "__-"),
        ("", "_-"),
        ("end.", "end_-"),
        ("nul", "_nul-"),
        ("COM1.x", "_COM1.x-"),
        ("é" * 101, "é" * 100 + "-"),
    ],
)
def test_an_id_that_no_file_should_have_becomes_a_safe_name_with_its_hash(record_id, beginning):
    (name,) = file_names(Strings.of([record_id])).to_list()
    assert name.startswith(beginning)
    assert len(name) == len(beginning) + 16
    assert len(f"{name}.pt".encode()) <= 255


def test_files_differ_where_case_and_accents_do_not_count():
    found = file_names(Strings.of(["é", "E\u0301", "e\u0301", "É", "Straße", "STRASSE"])).to_list()
    assert [name.partition("-")[0] for name in found] == ["é", "E\u0301", "e\u0301", "É", "Straße", "STRASSE"]
    assert ["-" in name for name in found] == [False, True, True, True, False, True]


@pytest.mark.parametrize("record_id", ["a", "a/b", "a..b", "..a", "a.npz", "sp|P|X", "x" * 10_000])
def test_a_key_of_npz_is_the_id_where_that_harms_nobody(record_id):
    assert key_of(record_id) == record_id


@pytest.mark.parametrize(
    ("record_id", "key"),
    [
        ("../a", ".._a"),
        ("a/../b", "a_.._b"),
        ("a/..", "a_.."),
        ("a/./b", "a_._b"),
        ("a//b", "a__b"),
        ("/a", "_a"),
        ("C:a", "C_a"),
        ("a\\..\\b", "a_.._b"),
        ("a\0", "a_"),
        ("a.npy", "a_npy"),
        ("", "_"),
    ],
)
def test_a_key_of_npz_never_leads_out_of_a_folder(record_id, key):
    assert key_of(record_id) == key


def test_columns_of_names_hold_no_python_strings():
    column = names.collected(str(number) for number in range(1000))
    assert column.text.dtype == np.uint8
    assert column.offsets.dtype == np.int64
    assert column.offsets.nbytes == 8 * 1001
