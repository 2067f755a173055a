import io

import pytest
from Bio import SeqIO

from protlm.data.parsing import flatfile
from protlm.data.records import Record
from tests.unit.data.parsing.entry_cases import ENTRY, parse, read


def test_a_flat_file_entry_gives_a_record_with_the_families_of_its_cross_references():
    record, repairs = parse("flatfile", ENTRY)
    assert record == Record(
        "P69905",
        "HBA_HUMAN Hemoglobin subunit alpha (Fragment) OS=Homo sapiens (Human) OX=9606",
        "MVLSPADKTNVKAA",
        taxon_id=9606,
        line=7,
        families=("PF00042", "IPR000971", "IPR009050"),
    )
    assert not repairs


@pytest.mark.parametrize(
    ("name", "num_records", "num_with_pfam"), [("made_up.dat", 6, 4), ("flatfile/uniprot_sample.dat.gz", 98, 82)]
)
def test_flat_files_are_read_as_biopython_does(protein_file, name, num_records, num_with_pfam):
    text = read(protein_file(name))
    expected = list(SeqIO.parse(io.StringIO(text.decode()), "swiss"))
    records = [flatfile.parse_entry("a", entry + b"//\n", 1)[0] for entry in text.split(b"//\n")[:-1]]
    assert len(records) == num_records
    for record, other in zip(records, expected, strict=True):
        families = {key.split(":", 1)[1] for key in other.dbxrefs if key.startswith(("Pfam:", "InterPro:"))}
        assert (record.id, record.sequence, set(record.families)) == (other.id, str(other.seq), families)
        assert str(record.taxon_id) == other.annotations["ncbi_taxid"][0]
        assert record.description.startswith(other.name + " ")
    assert sum(any(family.startswith("PF") for family in record.families) for record in records) == num_with_pfam
