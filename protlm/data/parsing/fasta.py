"""Records of FASTA and A3M files, parsed one at a time in plain Python: the reference for the compiled parser."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from protlm import vocabulary
from protlm.data.parsing import judging
from protlm.data.records import MAX_RECORD_BYTES, Record, shown
from protlm.errors import RecordError

ANNOTATION_IDS = frozenset(("ss_pred", "ss_conf", "ss_dssp", "sa_pred", "sa_dssp", "aa_pred", "aa_dssp"))
"""Ids of A3M rows that hold no protein but secondary structure and the like, as HH-suite writes them."""

_A3M_MARK = b"#A3M#"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
# Nine digits always fit the int32 columns; a longer number is neither a cluster size nor a taxon.
_CLUSTER_SIZE = re.compile(rb"(?:^|\s)n=(\d{1,9})(?!\S)")
_TAXON_ID = re.compile(rb"(?:^|\s)(?:TaxID|OX)=(\d{1,9})(?!\S)")
# ColabFold's first line: the lengths and the numbers of the chains.
_SEVERAL_CHAINS = re.compile(rb"#[0-9]+(?:,[0-9]+)+\t[0-9]")
# The codes of the kinds of sequences in PIR files, before the id.
_PIR_ID = re.compile(rb"(?:[PF]1|D[LC]|R[LC]|N[13]|XX);")
# Old FASTA has such lines between header and sequence.
_COMMENT_LINE = re.compile(rb"^;.*", re.MULTILINE)
_SHOWN_LETTERS = 60
_BINARY_BYTES = 1024


def is_a3m(head: bytes) -> bool:
    """Returns whether a FASTA file is an A3M file with rows that are no proteins, judged by its first lines."""
    if head.startswith(_A3M_MARK):
        return True
    start = head.find(b">")
    words = head[start + 1 : start + 1 + 64].split(None, 1) if start >= 0 else []
    return bool(words) and words[0].decode("ascii", "replace") in ANNOTATION_IDS


def refused_kind(head: bytes) -> str | None:
    """Returns which relative of FASTA, which would be misread, a file is by its first lines; None for FASTA."""
    if _SEVERAL_CHAINS.match(head):
        return "an A3M file of several chains (ColabFold), each row of which joins several proteins; cut them apart"
    headers = list(itertools.islice((line.split() for line in head.splitlines() if line.strip()), 2))
    names = [words[0] for words in headers if words[0].startswith(b">") and len(words[0]) > 1]
    if len(names) == 2 and names[0] == names[1]:
        return (
            "MMseqs2's FASTA of clusters (`_all_seqs.fasta`), where a header without a sequence opens each cluster; "
            "give the proteins that were clustered, and the file `_cluster.tsv` as --clusters"
        )
    return None


def split_head(text: bytes) -> tuple[bytes, bytes]:
    r"""Returns the text above the first header, and the text from its `>` on; `\n` line ends only."""
    if text.startswith(b">"):
        return b"", text
    start = text.find(b"\n>") + 1
    return (text[:start], text[start:]) if start else (text, b"")


def parse_fasta(path: str | Path, text: bytes, repairs: Counter[str]) -> Iterator[Record | RecordError]:
    r"""Yields the records of a text in order; in place of a record that cannot be used, its error.

    Args:
        path: The file, for messages.
        text: Whole records, from a `>` on; `\n` line ends only.
        repairs: The repaired letters are added to it.
    """
    line = 1
    # A text is ">record\n>record…".
    for record in text[1:].split(b"\n>"):
        try:
            yield _parse(path, record, line, repairs)
        except RecordError as error:
            yield error
            if error.reason == "missing_line_end":
                yield from _lost_with(path, record, line)
        line += 1 + record.count(b"\n")


def _parse(path: str | Path, text: bytes, line: int, repairs: Counter[str]) -> Record:
    header, _, body = text.partition(b"\n")
    words = header.split(None, 1)
    if not words:
        raise RecordError(path, line, "expected an id after `>`, got none", reason="empty_id")
    name = words[0].decode("utf-8", "replace")
    try:
        record_id = words[0].decode()
        description = words[1].rstrip().decode() if len(words) > 1 else ""
    except UnicodeDecodeError as error:
        message = f"the header of {shown(name)} is not UTF-8 text; convert the file"
        raise RecordError(path, line, message, reason="header_not_utf8", record_id=name) from error
    if len(text) > MAX_RECORD_BYTES:
        raise too_long(path, line, name)
    if _PIR_ID.match(words[0]):
        message = f"record {shown(name)} is of the PIR format (NBRF), with a title as its first line; convert the file"
        raise RecordError(path, line, message, reason="pir_record", record_id=name)
    residues, made = clean_body(path, name, body, line)
    repairs.update(made)
    cluster_size = taxon_id = None
    if len(words) > 1 and b"=" in words[1]:
        cluster_size = _number(_CLUSTER_SIZE, words[1])
        taxon_id = _number(_TAXON_ID, words[1])
    return Record(record_id, description, residues.decode(), cluster_size, taxon_id, line)


def clean_body(path: str | Path, record_id: str, body: bytes, line: int) -> tuple[bytes, Counter[str]]:
    r"""Returns the cleaned residues of the lines below a header, and the repairs made to them.

    Args:
        path: The file, for messages.
        record_id: Id of the record, for messages.
        body: The lines, with `\n` line ends.
        line: Line of the header.

    Raises:
        RecordError: Text, a header or an illegal character in it, with its line; no residue at all.
    """
    num_comments = 0
    if b";" in body:
        body, num_comments = _COMMENT_LINE.subn(b"", body)
    try:
        residues, repairs = vocabulary.clean(body.replace(b"\n", b""))
    except vocabulary.IllegalLetterError as error:
        _refuse_other(path, record_id, body, line)
        at, column = _place(body, error.offset)
        message = f"record {shown(record_id)}: illegal character {error.letter!r} in column {column}"
        raise RecordError(path, line + at, message, reason="illegal_character", record_id=record_id) from error
    if repairs["lower_case"] or repairs["white_space"]:
        _refuse_other(path, record_id, body, line)
    if not residues:
        got = "only a stop, and no sequence" if repairs["trailing_stop"] else "no sequence"
        message = f"record {shown(record_id)} has {got}"
        raise RecordError(path, line, message, reason="empty_sequence", record_id=record_id)
    if not repairs["trailing_stop"] and judging.is_placeholder(residues, repairs["gap"]):
        at = next(number for number, text in enumerate(body.split(b"\n"), start=1) if text.strip())
        raise _text_in_sequence(path, record_id, body, line, at)
    repairs["comment_line"] = num_comments
    return residues, +repairs


def _refuse_other(path: str | Path, record_id: str, body: bytes, line: int) -> None:
    """Raises the error of lines that are text, or that a header stands in."""
    finding = judging.judge(body)
    if finding is None:
        return
    if finding.kind == "text":
        raise _text_in_sequence(path, record_id, body, line, finding.line)
    _, glued_id = next(judging.glued_headers(body))
    glued = shown(glued_id.decode("utf-8", "replace"))
    message = (
        f"record {shown(record_id)}: the header of {glued} stands inside its line: "
        "a line end is missing before `>`, as where files were joined; put it in"
    )
    raise RecordError(path, line + finding.line, message, reason="missing_line_end", record_id=record_id)


def _text_in_sequence(path: str | Path, record_id: str, body: bytes, line: int, at: int) -> RecordError:
    lines = body.split(b"\n")
    got = repr(lines[at - 1].strip()[:_SHOWN_LETTERS].decode("utf-8", "replace"))
    if any(text.strip() for text in lines[: at - 1]) and not any(text.strip() for text in lines[at:]):
        message = f"record {shown(record_id)} ends in the text {got}: the file is cut short; download it again"
    else:
        message = f"record {shown(record_id)}: expected residues, got the text {got}"
    return RecordError(path, line + at, message, reason="text_in_sequence", record_id=record_id)


def _lost_with(path: str | Path, text: bytes, line: int) -> Iterator[RecordError]:
    """Yields the errors of the records whose headers stand inside the lines of another."""
    _, _, body = text.partition(b"\n")
    for at, name in judging.glued_headers(_COMMENT_LINE.sub(b"", body)):
        record_id = name.decode("utf-8", "replace")
        message = f"record {shown(record_id)} begins inside a line; a line end is missing before `>`"
        yield RecordError(path, line + at, message, reason="missing_line_end", record_id=record_id)


def too_long(path: str | Path, line: int, record_id: str) -> RecordError:
    """Returns the error of a record that takes more than `MAX_RECORD_BYTES`; the id may be empty."""
    name = f"record {shown(record_id)}" if record_id else "a record"
    message = f"{name} is longer than {MAX_RECORD_BYTES:,} bytes, which no protein is; is this a protein file?"
    return RecordError(path, line, message, reason="oversized", record_id=record_id)


def fault_above(path: str | Path, above: bytes, repairs: Counter[str]) -> RecordError | None:
    """Returns the error of the text above the first header; None if its lines are blank or begin with `#` or `;`.

    Args:
        path: The file, for messages.
        above: The text.
        repairs: Its comment lines of old FASTA are added to it.
    """
    if comments := _COMMENT_LINE.findall(above):
        repairs["comment_line"] += len(comments)
    lines = above.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith((b"#", b";")):
            continue
        reason = "text_above_first_header"
        if line.startswith(_UTF16_MARKS):
            message = "UTF-16 text: save the file as plain text"
        elif b"\0" in above[:_BINARY_BYTES]:
            message = "a binary file; expected FASTA, a line that starts with `>`"
        else:
            beginning = line[:_SHOWN_LETTERS].decode("ascii", "replace")
            message = f"expected FASTA, a line that starts with `>`, got {beginning!r}"
        return RecordError(path, number, message, reason=reason)
    return None


def _place(body: bytes, offset: int) -> tuple[int, int]:
    """Returns the line below the header and the column of a letter, both from 1; `offset` does not count line ends."""
    lines = body.split(b"\n")
    for number, text in enumerate(lines, start=1):
        if offset < len(text):
            return number, offset + 1
        offset -= len(text)
    raise AssertionError("an offset lies inside its sequence")


def _number(pattern: re.Pattern[bytes], description: bytes) -> int | None:
    match = pattern.search(description)
    return int(match[1]) if match else None
