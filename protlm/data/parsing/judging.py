"""What the lines below a FASTA header are, if no sequence: hides how English, names and lost line ends are recognised.

Nearly every letter of English is a residue too, so text is told by the shape of its words, never by its composition.
Upper-case lines without blanks are always a sequence. `judging.h` is the compiled twin.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

PLACEHOLDERS = frozenset(
    b"NA NAN NONE NULL ERROR EMPTY UNKNOWN MISSING INVALID DELETED OBSOLETE WITHDRAWN UNDEFINED UNAVAILABLE NOTFOUND "
    b"NOSEQUENCE NODATA TODO TBD PENDING FAILED NOTAVAILABLE NOTAPPLICABLE SEQUENCEUNAVAILABLE".split()
)
"""Sequences that are what a program writes in place of one it does not have."""

_MOST_PLACEHOLDER_GAPS = 2
_TELLING_WORDS = frozenset(
    b"ACCESS AVAILABLE DENIED DOWNLOAD ERROR EXCEPTION FAILED FORBIDDEN FOUND GATEWAY INTERNAL INVALID PLEASE "
    b"REQUEST RETRY SEQUENCE SERVER SERVICE TIMEOUT UNAVAILABLE UNKNOWN".split()
)
_RESIDUE_NAMES = frozenset(
    b"ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL ASX GLX SEC PYL XAA UNK".split()
)
_BLANKS = b" \t\v\f"
_LETTERS = bytes(range(65, 91)) + bytes(range(97, 123))
_NOT_LETTERS = bytes(byte for byte in range(256) if byte not in _LETTERS)
_MARKUP = re.compile(rb"<[A-Za-z!/?]|\{\"")
_WORD = re.compile(rb"[A-Za-z][a-z'-]+")
_PROPER_NAME = re.compile(rb"(?:[A-Z][a-z]{3,})+")
_MOST_NAME_LETTERS = 20
_TITLE = re.compile(rb"[A-Z]?[a-z]{2,}")
_MOST_TITLE_LETTERS = 30
_LOWER_CASE = re.compile(rb"[a-z]")
_ALL_OF_A_SEQUENCE = re.compile(rb"[A-Za-z*.\- \t\v\f]+")
_SPELLED_RESIDUES = 4
_NUMBER = re.compile(rb"[0-9]+")
_BETWEEN_WORDS = re.compile(rb"[ \t\v\f]+")


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found in place of a sequence, and the line below the header on which it is, from 1."""

    kind: Literal["text", "header"]
    line: int


def is_placeholder(residues: bytes, num_gaps: int) -> bool:
    """Returns whether the cleaned letters of a whole sequence are one of `PLACEHOLDERS`; a row of gaps is none."""
    return residues in PLACEHOLDERS and num_gaps <= _MOST_PLACEHOLDER_GAPS


def judge(body: bytes) -> Finding | None:
    r"""Returns what the lines of a record are if they are no sequence, None for a sequence.

    Args:
        body: The lines below the header, with `\n` line ends. Comment lines are blank.
    """
    lines = body.split(b"\n")
    filled = [number for number, line in enumerate(lines) if line.strip(_BLANKS)]
    if filled and (number := _title(lines, filled)) is not None:
        return Finding("text", number + 1)
    for number in filled:
        header = _header_in(lines[number])
        before = lines[number] if header is None else lines[number][: -1 - len(header)]
        if _is_text(before):
            return Finding("text", number + 1)
        if header is not None:
            return Finding("header", number + 1)
    return None


def glued_headers(body: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields each header that stands inside a sequence line: the line below the record's own header, and its id."""
    for number, line in enumerate(body.split(b"\n"), start=1):
        if (header := _header_in(line)) is not None:
            yield number, _BETWEEN_WORDS.split(header)[0]


def _header_in(line: bytes) -> bytes | None:
    before, mark, after = line.partition(b">")
    is_header = mark and after[:1].strip(_BLANKS) and before.strip(_BLANKS) and _ALL_OF_A_SEQUENCE.fullmatch(before)
    return after if is_header else None


def _title(lines: list[bytes], filled: list[int]) -> int | None:
    """Returns the number of the first line if it is a name above a sequence, or spelled residues, None if not."""
    first = lines[filled[0]].strip(_BLANKS)
    if len(filled) == 1:
        is_title = len(first) <= _MOST_NAME_LETTERS and _PROPER_NAME.fullmatch(first) is not None
    else:
        second = lines[filled[1]].strip(_BLANKS)
        # A line that was wrapped is as long as the next one.
        is_shorter = len(first) < len(second) and not _LOWER_CASE.search(second)
        is_title = is_shorter and len(first) <= _MOST_TITLE_LETTERS and _TITLE.fullmatch(first) is not None
    return filled[0] if is_title or _is_spelled(first) else None


def _is_spelled(line: bytes) -> bool:
    """Returns whether a line begins like `MetLysVal…`."""
    letters = line.translate(None, delete=_BLANKS + b"-")[: 3 * _SPELLED_RESIDUES]
    names = [letters[start : start + 3] for start in range(0, len(letters), 3)]
    return len(letters) == 3 * _SPELLED_RESIDUES and all(
        name.upper() in _RESIDUE_NAMES and name == name.capitalize() for name in names
    )


def _is_text(line: bytes) -> bool:
    """Returns whether a line is English or markup: most of its words are as in prose and do not form equal blocks."""
    line = line.strip(_BLANKS)
    if _MARKUP.match(line):
        return True
    words = _BETWEEN_WORDS.split(line)
    if len(words) < 2:
        return False
    cores = [word.strip(_NOT_LETTERS) for word in words]
    if any(core.upper() in _TELLING_WORDS for core in cores):
        return True
    # Numbers stand beside blocks of residues.
    kept = [(word, core) for word, core in zip(words, cores, strict=True) if not _NUMBER.fullmatch(word)]
    if len(kept) >= 3 and all(core.upper() in _RESIDUE_NAMES for _, core in kept):
        return True
    num_prose = sum(_WORD.fullmatch(core) is not None for _, core in kept)
    num_long = sum(len(core) != 1 for _, core in kept)
    return len(kept) >= 2 and 2 * num_prose > num_long and not _are_blocks([len(word) for word, _ in kept])


def _are_blocks(lengths: list[int]) -> bool:
    """Returns whether words are a sequence in blocks: of one length, but for the last, which may be shorter."""
    length = lengths[0]
    if any(other != length for other in lengths[1:-1]) or lengths[-1] > length:
        return False
    return length == 1 or length >= 10 or (length >= 5 and len(lengths) >= 3)
