from protlm.data.numbered_ids import NumberedIds, numbered_id


def test_the_next_number_of_a_repeat_passes_over_those_that_are_taken():
    numbered = NumberedIds()
    for text in ("a#2", "a#4", "b#3", "a#2#2", "a#02", "a#1"):
        if (taken := numbered_id(text)) is not None:
            numbered.add(*taken)
    assert [numbered.next_free(name) for name in ("a", "a", "b", "a", "a#2", "b", "c")] == [3, 5, 2, 6, 3, 4, 2]
    assert ("a" in numbered, "c" in numbered) == (True, False)


def test_only_what_a_repeat_could_be_called_is_a_numbered_id():
    assert numbered_id("sp|P1|A#12") == ("sp|P1|A", 12)
    assert numbered_id("a\n#2#3") == ("a\n#2", 3)
    assert numbered_id("#2") == ("", 2)
    for text in ("a", "a#", "#", "a#02", "a#0", "a#2 ", "a#²", "a#" + "9" * 19):
        assert numbered_id(text) is None
