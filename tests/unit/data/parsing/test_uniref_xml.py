import itertools
import xml.etree.ElementTree as ET

import pytest

from protlm.data.parsing import uniref_xml
from protlm.data.parsing.uniref_xml import clusters_of
from protlm.data.records import Record
from protlm.errors import ProtlmError, RecordError
from tests.unit.data.parsing.entry_cases import UNIREF, entries_of, fault, parse, read


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


def test_a_malformed_xml_entry_is_reported_at_the_line_of_the_fault():
    error = fault("uniref", UNIREF.replace('value="Catarrhini"/>', 'value="Catarrhini>'))
    assert error.line == 7 + 4
    assert "not well-formed" in error.message


def test_a_uniref50_entry_is_its_own_cluster_and_others_without_the_property_have_none():
    without = UNIREF.replace('<property type="UniRef50 ID" value="UniRef50_P99999"/>', "")
    assert parse("uniref", without)[0].cluster_id == ""
    assert parse("uniref", without.replace("UniRef90_P99999", "UniRef50_P99999"))[0].cluster_id == "UniRef50_P99999"


def uniref(*entries, before=""):
    return f'<?xml version="1.0" encoding="ISO-8859-1"?>\n{before}<UniRef90>\n{"".join(entries)}\n</UniRef90>'.encode()


@pytest.mark.parametrize("block_bytes", [1, 7, 1 << 20])
def test_clusters_are_read_with_the_names_of_their_members(block_bytes):
    text = uniref(UNIREF, "\n", UNIREF.replace("P99999", "P11111"))
    blocks = (text[start : start + block_bytes] for start in range(0, len(text), block_bytes))
    first, second = clusters_of("a.xml", blocks)
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
        list(clusters_of("a.xml", [text]))
    assert caught.value.line == line


def test_definitions_are_refused_while_clusters_are_read_however_late_they_come():
    entities = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))
    text = uniref(UNIREF, before=f'<!-- {"x" * 70_000} --><!DOCTYPE UniRef90 [<!ENTITY a0 "lol">{entities}]>')
    with pytest.raises(ProtlmError, match="document type definition"):
        list(clusters_of("a.xml", [text]))


def test_a_text_without_tags_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(uniref_xml, "MAX_RECORD_BYTES", 1 << 20)
    blocks = itertools.chain([b"<UniRef><entry id='a"], itertools.repeat(b"a" * (1 << 18)))
    read_bytes = []
    with pytest.raises(RecordError, match="no tag in"):
        list(clusters_of("a.xml", (read_bytes.append(len(block)) or block for block in blocks)))
    assert sum(read_bytes) < 2 << 20


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("made_up_uniref50.xml", [4, 2]),
        ("uniref/UniRef90_P99999.xml", [27]),
        ("uniref/50_Q9EPS7_Q95604.xml.gz", [64, 5423]),
    ],
)
def test_uniref_files_are_read_as_an_xml_library_does(protein_file, name, sizes):
    text = read(protein_file(name))
    space = "{http://uniprot.org/uniref}"
    expected = ET.fromstring(text).findall(f"{space}entry")
    records = [uniref_xml.parse_entry("a", entry, 1)[0] for entry in entries_of(text)]
    clusters = list(clusters_of("a", [text]))
    assert [record.cluster_size for record in records] == [cluster.num_members for cluster in clusters] == sizes
    for record, cluster, entry in zip(records, clusters, expected, strict=True):
        assert record.id == cluster.id == entry.get("id")
        assert record.sequence == "".join(entry.find(f".//{space}sequence").text.split())
        accessions = {p.get("value") for p in entry.iter(f"{space}property") if p.get("type") == "UniProtKB accession"}
        names = {reference.get("id") for reference in entry.iter(f"{space}dbReference")}
        assert accessions | names <= {*cluster.names, *cluster.secondary}
        assert {name for name in cluster.names if name.startswith("UniRef50")} <= {cluster.id}
