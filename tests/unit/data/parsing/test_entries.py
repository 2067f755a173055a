import gzip
import io
import itertools
import re
import xml.etree.ElementTree as ET
from collections import Counter

import pytest
from Bio import SeqIO

from protlm.data.parsing import flatfile, uniref_xml
from protlm.data.parsing.uniref_xml import check_prolog, parse_uniprot_entry, parse_uniref_entry, uniref_clusters
from protlm.data.records import Record
from protlm.errors import ProtlmError, RecordError

ENTRY = """\
ID   HBA_HUMAN               Reviewed;          14 AA.
AC   P69905; P01922; Q1HDT5;
AC   Q3MIF5;
DT   21-JUL-1986, integrated into UniProtKB/Swiss-Prot.
DE   RecName: Full=Hemoglobin subunit alpha {ECO:0000305};
DE   AltName: Full=Alpha-globin;
DE   Flags: Precursor; Fragment;
GN   Name=HBA1; and
OS   Homo sapiens (Human).
OX   NCBI_TaxID=9606 {ECO:0000312|Proteomes:UP000005640};
RX   PubMed=1; DOI=a=b;
CC   -!- FUNCTION: Carries oxygen.
DR   InterPro; IPR000971; Globin.
DR   Pfam; PF00042; Globin; 1.
DR   InterPro; IPR009050; Globin-like_sf.
DR   Pfam; PF00042; Globin; 1.
DR   PDB; 1A00; X-ray; 2.00 A; A/C=2-142.
PE   1: Evidence at protein level;
FT   anything, since it is not looked at
SQ   SEQUENCE   14 AA;  1500 MW;  15E13666573BBBAE CRC64;
     MVLSPADKTN VKAA
//
"""

UNIPROT = """\
<entry dataset="Swiss-Prot" xmlns="http://uniprot.org/uniprot">
<accession>P69905</accession>
<accession>P01922</accession>
<name>HBA_HUMAN</name>
<protein>
<recommendedName><fullName evidence="1">Hemoglobin
 subunit alpha</fullName></recommendedName>
<component><recommendedName><fullName>Hemopressin</fullName></recommendedName></component>
</protein>
<organism><name type="common">Human</name><name type="scientific">Homo sapiens</name>
<dbReference type="NCBI Taxonomy" id="9606"/></organism>
<comment type="alternative products"><isoform><sequence type="displayed"/></isoform></comment>
<reference><source><dbReference type="Pfam" id="PF99999"/></source></reference>
<dbReference type="InterPro" id="IPR000971"/>
<dbReference type="Pfam" id="PF00042"><property type="entry name" value="Globin"/></dbReference>
<sequence length="6" fragment="single">
MVLSPA
</sequence>
</entry>"""

UNIREF = """\
<entry id="UniRef90_P99999" updated="2023-09-13" xmlns="http://uniprot.org/uniref">
<name>Cluster: Cytochrome c</name>
<property type="member count" value="27"/>
<property type="common taxon" value="Catarrhini"/>
<property type="common taxon ID" value="9526"/>
<representativeMember>
<dbReference type="UniProtKB ID" id="CYC_HUMAN">
<property type="NCBI taxonomy" value="9606"/>
<property type="UniParc ID" value="UPI000013EAA0"/>
<property type="UniRef100 ID" value="UniRef100_P99999"/>
<property type="UniRef50 ID" value="UniRef50_P99999"/>
<property type="UniProtKB accession" value="P99999"/>
<property type="UniProtKB accession" value="A4D166"/>
</dbReference>
<sequence length="5" checksum="8">MGDVE</sequence>
</representativeMember>
<member>
<dbReference type="UniParc ID" id="UPI0000128BBF"><property type="UniRef100 ID" value="UniRef100_P99999"/></dbReference>
</member>
</entry>"""

PARSERS = {
    "flatfile": (flatfile.parse_entry, ENTRY),
    "uniprot": (parse_uniprot_entry, UNIPROT),
    "uniref": (parse_uniref_entry, UNIREF),
}


def parse(kind, text):
    return PARSERS[kind][0]("a.txt", text.encode() if isinstance(text, str) else text, 7)


def fault(kind, text):
    with pytest.raises(RecordError) as caught:
        parse(kind, text)
    assert "\n" not in str(caught.value)
    return caught.value


def entries_of(text, end=rb"</entry>"):
    return re.findall(rb"<entry[\s>].*?" + end, text, re.DOTALL)


def read(path):
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


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


def test_a_uniref_entry_gives_its_representative_under_the_name_of_the_cluster():
    record, repairs = parse("uniref", UNIREF)
    assert record == Record(
        "UniRef90_P99999",
        "Cytochrome c n=27 Tax=Catarrhini TaxID=9526 RepID=CYC_HUMAN",
        "MGDVE",
        27,
        9526,
        7,
        "UniRef50_P99999",
    )
    assert not repairs


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


def test_a_malformed_xml_entry_is_reported_at_the_line_of_the_fault():
    error = fault("uniref", UNIREF.replace('value="Catarrhini"/>', 'value="Catarrhini>'))
    assert error.line == 7 + 4
    assert "not well-formed" in error.message


@pytest.mark.parametrize("kind", PARSERS)
def test_text_that_is_not_utf8_is_a_bad_entry(kind):
    before = {"flatfile": "Hemoglobin", "uniprot": "Hemoglobin", "uniref": "Cytochrome"}[kind]
    text = PARSERS[kind][1].replace(before, "Hämoglobin")
    assert "Hämoglobin" in parse(kind, text)[0].description
    assert fault(kind, text.encode("latin-1")).reason == {"flatfile": "header_not_utf8"}.get(kind, "malformed_entry")


@pytest.mark.parametrize("kind", ["uniprot", "uniref"])
@pytest.mark.parametrize(
    "definition", ["<!DOCTYPE entry [<!ENTITY a 'b'>]>", "<!ENTITY a SYSTEM 'file:///etc/passwd'>"]
)
def test_an_entry_with_a_document_type_definition_is_refused(kind, definition):
    assert "document type definition" in fault(kind, definition + PARSERS[kind][1]).message


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


def test_a_uniref50_entry_is_its_own_cluster_and_others_without_the_property_have_none():
    without = UNIREF.replace('<property type="UniRef50 ID" value="UniRef50_P99999"/>', "")
    assert parse("uniref", without)[0].cluster_id == ""
    assert parse("uniref", without.replace("UniRef90_P99999", "UniRef50_P99999"))[0].cluster_id == "UniRef50_P99999"


def test_deeply_nested_xml_is_read_like_any_other():
    deep = "<comment>" * 200_000 + "</comment>" * 200_000
    assert parse("uniprot", UNIPROT.replace("<reference>", deep + "<reference>"))[0].sequence == "MVLSPA"


@pytest.mark.parametrize("encoding", ["UTF-8", "utf-8", "US-ASCII", "ISO-8859-1"])
def test_a_prolog_without_surprises_passes(encoding):
    check_prolog("a.xml", f'<?xml version="1.0" encoding="{encoding}" ?>\n<!-- <!DOCTYPE -->\n<UniRef>'.encode())
    check_prolog("a.xml", b"<uniprot><!DOCTYPE")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b'<?xml version="1.0" encoding="UTF-16"?><uniprot>', "in the encoding 'UTF-16'"),
        (b"<?xml version='1.0' encoding = 'x-mac'?><uniprot>", "in the encoding 'x-mac'"),
        (b"<!-- a --><!DOCTYPE uniprot [<!ENTITY a 'aaaa'>]><uniprot>", "document type definition"),
        (b"<?xml version='1.0'?>\n<!ENTITY a 'aaaa'><uniprot>", "document type definition"),
    ],
)
def test_definitions_and_other_encodings_before_the_root_are_refused(head, message):
    with pytest.raises(ProtlmError, match=message) as caught:
        check_prolog("a.xml", head)
    assert str(caught.value).startswith("a.xml: ")


def uniref(*entries, before=""):
    return f'<?xml version="1.0" encoding="ISO-8859-1"?>\n{before}<UniRef90>\n{"".join(entries)}\n</UniRef90>'.encode()


@pytest.mark.parametrize("block_bytes", [1, 7, 1 << 20])
def test_clusters_are_read_with_the_names_of_their_members(block_bytes):
    text = uniref(UNIREF, "\n", UNIREF.replace("P99999", "P11111"))
    blocks = (text[start : start + block_bytes] for start in range(0, len(text), block_bytes))
    first, second = uniref_clusters("a.xml", blocks)
    assert (first.id, first.line, first.num_members) == ("UniRef90_P99999", 3, 2)
    assert first.names == [
        "UniRef90_P99999", "CYC_HUMAN", "UPI000013EAA0", "UniRef100_P99999", "P99999", "UPI0000128BBF",
    ]  # fmt: skip
    assert first.secondary == ["A4D166"]
    assert (second.id, second.line) == ("UniRef90_P11111", 3 + UNIREF.count("\n") + 1)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (uniref(UNIREF)[:-40], 20, "not well-formed"),
        (uniref(UNIREF.replace("</name>", "")), 22, "not well-formed"),
        (uniref(UNIREF.replace("27", "&lol;")), 5, "not well-formed"),
        (uniref(UNIREF.replace('id="UniRef90_P99999"', "")), 3, "without id"),
    ],
)
def test_clusters_that_cannot_be_read_are_an_error_with_the_line(text, line, message):
    with pytest.raises(RecordError, match=message) as caught:
        list(uniref_clusters("a.xml", [text]))
    assert caught.value.line == line


def test_definitions_are_refused_while_clusters_are_read_however_late_they_come():
    entities = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))
    text = uniref(UNIREF, before=f'<!-- {"x" * 70_000} --><!DOCTYPE UniRef90 [<!ENTITY a0 "lol">{entities}]>')
    with pytest.raises(ProtlmError, match="document type definition"):
        list(uniref_clusters("a.xml", [text]))


def test_a_text_without_tags_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(uniref_xml, "MAX_RECORD_BYTES", 1 << 20)
    blocks = itertools.chain([b"<UniRef><entry id='a"], itertools.repeat(b"a" * (1 << 18)))
    read_bytes = []
    with pytest.raises(RecordError, match="no tag in"):
        list(uniref_clusters("a.xml", (read_bytes.append(len(block)) or block for block in blocks)))
    assert sum(read_bytes) < 2 << 20


def test_real_flat_files_are_read_as_biopython_does(shared_data):
    text = read(shared_data / "flatfile/uniprot_sample.dat.gz")
    expected = list(SeqIO.parse(io.StringIO(text.decode()), "swiss"))
    found = [flatfile.parse_entry("a", entry + b"//\n", 1)[0] for entry in text.split(b"//\n")[:-1]]
    assert len(found) == 98
    for record, other in zip(found, expected, strict=True):
        families = {key.split(":", 1)[1] for key in other.dbxrefs if key.startswith(("Pfam:", "InterPro:"))}
        assert (record.id, record.sequence, set(record.families)) == (other.id, str(other.seq), families)
        assert str(record.taxon_id) == other.annotations["ncbi_taxid"][0]
        assert record.description.startswith(other.name + " ")
    assert sum(any(family.startswith("PF") for family in record.families) for record in found) == 82


@pytest.mark.parametrize("name", ["P84001.xml", "Q13639.xml", "multi_ex.xml"])
def test_real_uniprot_xml_is_read_as_biopython_does(shared_data, name):
    text = read(shared_data / "flatfile" / name)
    expected = list(SeqIO.parse(io.BytesIO(text), "uniprot-xml"))
    for entry, other in zip(entries_of(text), expected, strict=True):
        record, _ = parse_uniprot_entry("a", entry, 1)
        families = {key.split(":", 1)[1] for key in other.dbxrefs if key.startswith(("Pfam:", "InterPro:"))}
        assert (record.id, record.sequence, set(record.families)) == (other.id, str(other.seq), families)
        assert f"NCBI Taxonomy:{record.taxon_id}" in other.dbxrefs
        assert record.description.startswith(f"{other.name} {other.description}")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("UniRef90_P99999.xml", [27]), ("50_Q9EPS7_Q95604.xml.gz", [64, 5423])],
)
def test_real_uniref_files_are_read_as_an_xml_library_does(shared_data, name, sizes):
    text = read(shared_data / "uniref" / name)
    space = "{http://uniprot.org/uniref}"
    expected = ET.fromstring(text).findall(f"{space}entry")
    found = [parse_uniref_entry("a", entry, 1)[0] for entry in entries_of(text)]
    clusters = list(uniref_clusters("a", [text]))
    assert [record.cluster_size for record in found] == [cluster.num_members for cluster in clusters] == sizes
    for record, cluster, entry in zip(found, clusters, expected, strict=True):
        assert record.id == cluster.id == entry.get("id")
        assert record.sequence == "".join(entry.find(f".//{space}sequence").text.split())
        accessions = {p.get("value") for p in entry.iter(f"{space}property") if p.get("type") == "UniProtKB accession"}
        names = {reference.get("id") for reference in entry.iter(f"{space}dbReference")}
        assert accessions | names <= {*cluster.names, *cluster.secondary}
        assert {name for name in cluster.names if name.startswith("UniRef50")} <= {cluster.id}
