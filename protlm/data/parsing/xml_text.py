"""The XML of UniProtKB and UniRef alike: prolog, root element, an entry as a tree. Document types are never read."""

import re
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from protlm.data.parsing.entries import clean_entry, malformed, without_sequence
from protlm.data.records import shown
from protlm.errors import ProtlmError

_PROLOG_NODE = re.compile(rb"\s+|<\?.*?\?>|<!--.*?-->", re.DOTALL)
_ROOT = re.compile(rb"<(?:(?i:!DOCTYPE)\s+)?([A-Za-z_:][^\s/>\[]*)")
_ENCODING = re.compile(rb"""<\?xml\s[^>]*?\bencoding\s*+=\s*+["']([^"']*)["']""")
# The files of a UniRef release declare ISO-8859-1 and hold ASCII; a letter beyond that makes a bad entry.
_ENCODINGS = ("utf-8", "utf8", "us-ascii", "ascii", "iso-8859-1")
_DEFINITIONS = (b"<!DOCTYPE", b"<!ENTITY")
_NUMBER = re.compile(r"[0-9]{1,9}")


def root_name(head: bytes) -> str:
    """Returns the name of the root element of an XML text, or that in its document type; empty if there is none."""
    match = _ROOT.match(head, _prolog_end(head))
    return match[1].decode("utf-8", "replace") if match else ""


def check_prolog(path: str | Path, head: bytes) -> None:
    """Refuses an XML text for its prolog, the text before its root element; a web page is left to `sniff_format`.

    Args:
        path: The file, for messages.
        head: The first 64 KiB of the text.

    Raises:
        ProtlmError: A document type definition, or an encoding that is neither UTF-8 nor ASCII.
    """
    end = _prolog_end(head)
    if head.startswith(_DEFINITIONS, end) and root_name(head).lower() != "html":
        raise definition_fault(path)
    declared = _ENCODING.match(head.lstrip())
    if declared and declared[1].decode("ascii", "replace").lower() not in _ENCODINGS:
        encoding = declared[1].decode("ascii", "replace")
        raise ProtlmError(f"{path}: XML in the encoding {shown(encoding)}; convert the file to UTF-8")


def parse_tree(path: str | Path, text: bytes, line: int) -> ET.Element:
    """Returns an entry as an element tree.

    Args:
        path: The file, for messages.
        text: The entry, from `<entry` to `</entry>`.
        line: Its line in the file.

    Raises:
        RecordError: XML that is not well-formed, with its line; a document type definition.
    """
    if any(mark in text for mark in _DEFINITIONS):
        raise malformed(path, line, "an entry with a document type definition, which protlm does not read")
    try:
        return ET.fromstring(text)
    except ET.ParseError as error:
        at, column = error.position
        reason = str(error).split(":")[0]
        message = f"the entry is not well-formed XML ({reason}, in column {column + 1})"
        raise malformed(path, line + at - 1, message) from error


def residues_of(path: str | Path, line: int, record_id: str, sequence: ET.Element | None) -> tuple[str, Counter[str]]:
    """Returns the cleaned residues of an entry's `<sequence>`, and the repairs made to them.

    Args:
        path: The file, for messages.
        line: Line of the entry.
        record_id: Its id.
        sequence: The element, None if the entry has none.

    Raises:
        RecordError: No residues, another number of them than the element declares, or an illegal character.
    """
    # White space is layout here, and no repair.
    text = "" if sequence is None or sequence.text is None else "".join(sequence.text.split())
    if sequence is None or not text:
        raise without_sequence(path, line, record_id)
    declared = number_of(sequence.get("length"))
    if declared is not None and declared != len(text):
        message = f"entry {shown(record_id)}: its sequence has {len(text)} residues, and should have {declared}"
        raise malformed(path, line, message, record_id)
    return clean_entry(path, line, record_id, text)


def text_of(element: ET.Element, path: str) -> str:
    """Returns the text of a descendant on one line; empty if there is no such descendant."""
    text = element.findtext(path)
    return " ".join(text.split()) if text else ""


def number_of(text: str | None) -> int | None:
    """Returns the number that a text stands for, None if it is none."""
    # Nine digits always fit the int32 columns; a longer number is neither a count nor a taxon.
    return int(text) if text and _NUMBER.fullmatch(text) else None


def definition_fault(path: str | Path) -> ProtlmError:
    """Returns the error of a file with a document type definition, which can make a small file expand without bound."""
    return ProtlmError(f"{path}: XML with a document type definition, which protlm does not read: remove it")


def _prolog_end(head: bytes) -> int:
    end = 0
    while match := _PROLOG_NODE.match(head, end):
        end = match.end()
    return end
