import io

import pytest
from Bio import SeqIO

from protlm.data.parsing import uniprot_xml
from protlm.data.records import Record
from tests.unit.data.parsing.entry_cases import UNIPROT, entries_of, parse, read


def test_a_uniprot_xml_entry_gives_a_record_of_its_own_elements_only():
    record, repairs = parse("uniprot", UNIPROT)
    assert record == Record(
        "P69905",
        "HBA_HUMAN Hemoglobin subunit alpha (Fragment) OS=Homo sapiens OX=9606",
        "MVLSPA",
        taxon_id=9606,
        line=7,
        families=("PF00042", "IPR000971"),
    )
    assert not repairs


def test_deeply_nested_xml_is_read_like_any_other():
    deep = "<comment>" * 200_000 + "</comment>" * 200_000
    assert parse("uniprot", UNIPROT.replace("<reference>", deep + "<reference>"))[0].sequence == "MVLSPA"


@pytest.mark.parametrize(
    "name", ["made_up_uniprot.xml", "flatfile/P84001.xml", "flatfile/Q13639.xml", "flatfile/multi_ex.xml"]
)
def test_uniprot_xml_is_read_as_biopython_does(protein_file, name):
    text = read(protein_file(name))
    expected = list(SeqIO.parse(io.BytesIO(text), "uniprot-xml"))
    for entry, other in zip(entries_of(text), expected, strict=True):
        record, _ = uniprot_xml.parse_entry("a", entry, 1)
        families = {key.split(":", 1)[1] for key in other.dbxrefs if key.startswith(("Pfam:", "InterPro:"))}
        assert (record.id, record.sequence, set(record.families)) == (other.id, str(other.seq), families)
        assert f"NCBI Taxonomy:{record.taxon_id}" in other.dbxrefs
        assert record.description.startswith(f"{other.name} {other.description}")
