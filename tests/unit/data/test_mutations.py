import pytest

from protlm.data.mutations import Substitution, differences, mutant_name, mutated, parse_mutant, reverted

PROTEIN = "MKVLA"


def test_a_mutant_is_read_and_written_in_its_own_numbering():
    substitutions = parse_mutant("V5A: A7C", PROTEIN, offset=2)
    assert substitutions == (Substitution(2, "V", "A"), Substitution(4, "A", "C"))
    assert mutant_name(substitutions, offset=2) == "V5A:A7C"
    assert mutant_name(substitutions) == "V3A:A5C"
    assert parse_mutant("M-1A", PROTEIN, offset=-2) == (Substitution(0, "M", "A"),)


def test_a_variant_of_the_same_length_differs_by_substitutions():
    substitutions = parse_mutant("V3A:A5C", PROTEIN)
    variant = mutated(PROTEIN, substitutions)
    assert variant == "MKALC"
    assert differences(PROTEIN, variant) == substitutions
    assert differences(PROTEIN, PROTEIN) == ()


def test_the_wild_type_follows_from_a_variant_and_its_name():
    assert reverted("MKALC", "V3A:A5C") == PROTEIN
    assert reverted("MKALC", "V13A:A15C", offset=10) == PROTEIN
    for text, message in (("V3C", "the protein has A at position 3, not C"), ("V3", "expected a mutation such as")):
        with pytest.raises(ValueError, match=message):
            reverted("MKALC", text)
