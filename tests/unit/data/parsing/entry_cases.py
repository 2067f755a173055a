"""An entry of each format, and how it is parsed: for the tests of the flat file and of both XML formats."""

import gzip
import re

import pytest

from protlm.data.parsing import flatfile, uniprot_xml, uniref_xml
from protlm.errors import RecordError

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
    "uniprot": (uniprot_xml.parse_entry, UNIPROT),
    "uniref": (uniref_xml.parse_entry, UNIREF),
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
