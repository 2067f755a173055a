"""Nucleic acids are told from proteins record by record."""

import numpy as np
import pytest

from protlm import vocabulary
from protlm.data.nucleotides import MIN_LENGTH, is_nucleic_acid, nucleic_acids
from protlm.data.parsing.reader import RecordReader
from protlm.data.strings import Strings, bounds_of

CASES = [
    # Nucleic acids.
    ("ACGT" * 8, "", True),
    ("GGCGCUUGCGUC" * 3, "", True),
    ("ACGTNNNNNN" * 20, "a read", True),
    ("ACGTACGTAR" * 10, "with an ambiguous base in ten", True),
    ("N" * 200 + "ACG", "", True),
    ("CGCGAATTCG", "mol:na length:10  DNA (5'-D(*CP*GP*CP*GP*AP*AP*TP*TP*CP*G)-3')", True),
    ("GC", "mol:na", True),
    # Proteins.
    ("ACGT" * 7, "of fewer letters than any such protein", False),
    ("GA" * 200, "the repeats of silk", False),
    ("A" * 100, "", False),
    ("N" * 100, "", False),
    ("ACGT" * 8 + "L", "", False),
    ("ARAVRRRRARSRSRSRKSRSRSRSAKRSASRRRSRSAGRRRRRRTASRRRRRSASRRRSV", "a protamine", False),
    ("ACGT" * 50, "mol:protein length:200", False),
    ("MKVLAAGIV", "binds mol:nack", False),
    ("DTASDAAAAAALTAANAKAAAELTAANAAAAAAATAR", "antifreeze protein of the winter flounder", False),
]


@pytest.mark.parametrize(("residues", "description", "expected"), CASES)
def test_only_a_header_or_nothing_but_bases_over_a_length_make_a_nucleic_acid(residues, description, expected):
    assert is_nucleic_acid(residues.encode(), description) == expected


def test_columns_of_records_give_what_single_records_give():
    for cases in (CASES, CASES[::-1], CASES[7:], CASES[9:12], []):
        tokens = vocabulary.encode("".join(residues for residues, _, _ in cases).encode())
        offsets = bounds_of([len(residues) for residues, _, _ in cases])
        found = nucleic_acids(tokens, offsets, Strings.of(description for _, description, _ in cases))
        np.testing.assert_array_equal(found, [place for place, case in enumerate(cases) if case[2]])


def test_the_length_is_a_bound():
    letters = ("ACGT" * MIN_LENGTH)[:MIN_LENGTH].encode()
    assert is_nucleic_acid(letters, "")
    assert not is_nucleic_acid(letters[1:], "")


@pytest.mark.parametrize(
    "name",
    ["swissprot/test_random_5k.fasta.gz", "uniref/uniref100_sample14k.fasta.gz", "long/proteins_gt8000aa.fasta.gz"],
)
def test_no_protein_of_the_data_sets_is_a_nucleic_acid(protein_file, name):
    records = list(RecordReader([protein_file(name)], on_bad_record="skip"))
    assert records
    assert not [record.id for record in records if is_nucleic_acid(record.sequence.encode(), record.description)]
