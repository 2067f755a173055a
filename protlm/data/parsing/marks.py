"""Marks that other programs put into a text, which are no part of it: line ends, byte order marks, DOS end marks."""

import re
from collections import Counter

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""The mark of UTF-8, with which some editors begin a file."""

_END_MARK = b"\x1a"
# Before the start of a line, or a header that lacks its line end: the text of another file was added.
_JOINED_MARK = re.compile(rb"(?<![^\n])\xef\xbb\xbf|\xef\xbb\xbf(?=>)")
# At the end of the text, or of one that another was added to.
_LAST_MARK = re.compile(rb"(?<!\x1a)\x1a++(?:(?=[ \t]*+(?:\n++(?:>|\Z)|\Z))|(?=>))")


def without_marks(text: bytes, repairs: Counter[str]) -> bytes:
    r"""Returns a text with `\n` line ends and without marks, each on the line on which it was.

    Args:
        text: Some whole records.
        repairs: The number of marks is added to it.
    """
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if BYTE_ORDER_MARK[:1] in text and BYTE_ORDER_MARK in text:
        text, number = _JOINED_MARK.subn(b"", text)
        repairs.update({"byte_order_mark": number} if number else {})
    if _END_MARK in text:
        text, number = _LAST_MARK.subn(b"", text)
        repairs.update({"end_mark": number} if number else {})
    return text
