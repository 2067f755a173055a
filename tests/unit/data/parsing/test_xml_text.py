import pytest

from protlm.data.parsing.xml_text import check_prolog
from protlm.errors import ProtlmError
from tests.unit.data.parsing.entry_cases import PARSERS, fault


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


@pytest.mark.parametrize("kind", ["uniprot", "uniref"])
@pytest.mark.parametrize(
    "definition", ["<!DOCTYPE entry [<!ENTITY a 'b'>]>", "<!ENTITY a SYSTEM 'file:///etc/passwd'>"]
)
def test_an_entry_with_a_document_type_definition_is_refused(kind, definition):
    assert "document type definition" in fault(kind, definition + PARSERS[kind][1]).message
