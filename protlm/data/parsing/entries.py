"""The end of parsing an entry of a flat file or of XML: cleaning its residues, and the error of a bad entry."""

from collections import Counter
from pathlib import Path

from protlm import vocabulary
from protlm.data.records import shown
from protlm.errors import RecordError


def clean_entry(path: str | Path, line: int, record_id: str, text: str) -> tuple[str, Counter[str]]:
    """Returns the residues of an entry and the repairs made to them.

    Args:
        path: The file, for messages.
        line: Line of the entry.
        record_id: Its id.
        text: Its sequence without layout.

    Raises:
        RecordError: An illegal character; no residue at all.
    """
    try:
        residues, repairs = vocabulary.clean(text.encode())
    except vocabulary.IllegalLetterError as error:
        message = f"entry {shown(record_id)}: illegal character {error.letter!r} as residue {error.offset + 1}"
        raise RecordError(path, line, message, reason="illegal_character", record_id=record_id) from error
    if not residues:
        raise without_sequence(path, line, record_id)
    return residues.decode(), repairs


def without_sequence(path: str | Path, line: int, record_id: str) -> RecordError:
    """Returns the error of an entry without residues."""
    message = f"entry {shown(record_id)} has no sequence"
    return RecordError(path, line, message, reason="empty_sequence", record_id=record_id)


def malformed(path: str | Path, line: int, message: str, record_id: str = "") -> RecordError:
    """Returns the error of an entry that cannot be parsed; the id is empty if it is not known."""
    return RecordError(path, line, message, reason="malformed_entry", record_id=record_id)
