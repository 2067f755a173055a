import itertools
import re
from collections import Counter

import pytest

from protlm.errors import RecordError
from tests.unit.data.parsing.entry_cases import ENTRY, PARSERS, UNIPROT, UNIREF, fault, parse


@pytest.mark.parametrize("kind", PARSERS)
def test_repairs_of_a_sequence_are_made_and_counted(kind):
    changes = {
        "flatfile": ("MVLSPADKTN VKAA", "mJLSPADKTN VKA*"),
        "uniprot": ("MVLSPA", "mJLSP*"),
        "uniref": ("MGDVE", "mJDV*"),
    }
    record, repairs = parse(kind, PARSERS[kind][1].replace(*changes[kind]))
    assert record.sequence.startswith("MX")
    assert not record.sequence.endswith("A*")
    assert repairs == Counter(lower_case=1, j_to_x=1, trailing_stop=1)


@pytest.mark.parametrize(
    ("kind", "before", "after", "reason"),
    [
        ("flatfile", "ID   HBA_HUMAN ", "XX   HBA_HUMAN ", "malformed_entry"),
        ("flatfile", "14 AA.", "many AA.", "malformed_entry"),
        ("flatfile", "14 AA.\n", "15 AA.\n", "malformed_entry"),
        ("flatfile", "SEQUENCE   14", "SEQUENCE   13", "malformed_entry"),
        ("flatfile", "SQ   SEQUENCE   14 AA;", "SQ   SEQUENCE", "malformed_entry"),
        ("flatfile", "SQ   SEQUENCE   14 AA;  1500 MW;  15E13666573BBBAE CRC64;\n", "", "malformed_entry"),
        ("flatfile", "NCBI_TaxID=9606", "TaxID=9606", "malformed_entry"),
        ("flatfile", "OX   NCBI", "OX   a=b=NCBI", "malformed_entry"),
        ("flatfile", "OS   Homo", "ZZ   Homo", "malformed_entry"),
        ("flatfile", "//\n", "", "malformed_entry"),
        ("flatfile", "//\n", "//\nID   B_B   Reviewed; 1 AA.\n//\n", "malformed_entry"),
        ("flatfile", "AC   P69905; P01922; Q1HDT5;\nAC   Q3MIF5;\n", "", "malformed_entry"),
        ("flatfile", "     MVLSPADKTN VKAA\n", "", "empty_sequence"),
        ("flatfile", "     MVLSPADKTN VKAA\n", "     MVLSPADKT1 VKAA\n", "illegal_character"),
        ("uniprot", "</organism>", "", "malformed_entry"),
        ("uniprot", "<accession>P69905</accession>\n<accession>P01922</accession>", "", "malformed_entry"),
        ("uniprot", 'length="6"', 'length="60"', "malformed_entry"),
        ("uniprot", "MVLSPA", "", "empty_sequence"),
        ("uniprot", "MVLSPA", "MVL5PA", "illegal_character"),
        ("uniprot", "MVLSPA", "MVL&xxe;", "malformed_entry"),
        ("uniref", 'id="UniRef90_P99999" ', "", "malformed_entry"),
        ("uniref", "representativeMember", "member", "malformed_entry"),
        ("uniref", 'length="5"', 'length="4"', "malformed_entry"),
        ("uniref", '<sequence length="5" checksum="8">MGDVE</sequence>', "", "empty_sequence"),
        ("uniref", "MGDVE", "*GDVE", "illegal_character"),
    ],
)
def test_an_entry_that_cannot_be_used_is_an_error_with_its_line_and_reason(kind, before, after, reason):
    text = PARSERS[kind][1]
    assert before in text
    error = fault(kind, text.replace(before, after))
    assert error.reason == reason
    assert str(error).startswith("a.txt:")
    assert error.line >= 7


@pytest.mark.parametrize("kind", PARSERS)
def test_an_entry_cut_at_any_place_is_an_error(kind):
    text = PARSERS[kind][1].rstrip("\n")
    for end in range(1, len(text)):
        # A flat file whose last line is `/` says so much that it does not end.
        fault(kind, text[:end])


@pytest.mark.parametrize("kind", PARSERS)
def test_no_damage_to_an_entry_raises_anything_but_a_record_error(kind):
    text = PARSERS[kind][1].encode()
    for place, byte in itertools.product(range(len(text)), (b"\0", b"\xff", b" ", b"\n", b"=", b"<", b"")):
        try:
            record, _ = parse(kind, text[:place] + byte + text[place + 1 :])
        except RecordError as error:
            assert error.line >= 7  # noqa: PT017 (much damage goes unnoticed, and may)
        else:
            assert record.sequence.isalpha()


@pytest.mark.parametrize("kind", PARSERS)
def test_text_that_is_not_utf8_is_a_bad_entry(kind):
    before = {"flatfile": "Hemoglobin", "uniprot": "Hemoglobin", "uniref": "Cytochrome"}[kind]
    text = PARSERS[kind][1].replace(before, "Hämoglobin")
    assert "Hämoglobin" in parse(kind, text)[0].description
    assert fault(kind, text.encode("latin-1")).reason == {"flatfile": "header_not_utf8"}.get(kind, "malformed_entry")


@pytest.mark.parametrize("number", ["99999999999", "x", "-1", "", "٣"])
def test_numbers_that_are_none_count_as_not_told(number):
    assert parse("uniprot", UNIPROT.replace('"9606"', f'"{number}"'))[0].taxon_id is None
    assert parse("flatfile", ENTRY.replace("=9606", f"={number}"))[0].taxon_id is None
    record, _ = parse("uniref", UNIREF.replace('"9526"', f'"{number}"').replace('"27"', f'"{number}"'))
    assert (record.taxon_id, record.cluster_size) == (None, 2)


def test_names_of_old_and_of_submitted_entries_are_found():
    old = re.sub(r"DE .*\n(DE .*\n)*", "DE   Hemoglobin alpha chain.\n", ENTRY)
    assert parse("flatfile", old)[0].description.startswith("HBA_HUMAN Hemoglobin alpha chain OS=")
    submitted = ENTRY.replace("RecName", "SubName").replace("Flags: Precursor; Fragment", "Flags: Fragments")
    assert " Hemoglobin subunit alpha (Fragments) OS=" in parse("flatfile", submitted)[0].description
    submitted = UNIPROT.replace("recommendedName", "submittedName", 2)
    assert " Hemoglobin subunit alpha (Fragment) OS=" in parse("uniprot", submitted)[0].description
